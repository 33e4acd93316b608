"""JetMoe, whose attention has experts too, and Doge, whose experts are found by product keys."""

import math

from moe_lab.accounting.architecture import Architecture
from moe_lab.accounting.block_factories import (
    choose,
    dense,
    gqa,
    heads_of,
    moe,
    norms,
    used,
    width,
)
from moe_lab.accounting.families.grouped import BIASED, KV_IS_HEADS
from moe_lab.cost import attention_cost
from moe_lab.cost.parts import (
    Attend,
    Part,
    Pieces,
    linear,
    times,
    vector,
)
from moe_lab.hf.fields import Fields

A = Part.ATTENTION


def jet_attention(f: Fields) -> Pieces:
    """Attention whose query and output projections are experts with a router; all of them share
    keys and values.
    """
    d, kv, dim = width(f), f.size("num_key_value_heads"), f.size("head_dim")
    experts, run = used(f)
    expert = (linear(A, "q_proj", d, kv * dim), linear(A, "o_proj", kv * dim, d))
    heads = kv * int(run.most)
    return (
        linear(Part.ROUTER, "attention_router", d, experts),
        *times(expert, experts, run),
        vector(A, "attention_bias", d),
        linear(A, "kv_proj", d, 2 * kv * dim),
        attention_cost.scores(Attend(heads, dim, dim, cached=2 * kv * dim)),
    )


def jet_bias(f: Fields) -> Pieces:
    return (vector(Part.OTHER, "feed_forward_bias", width(f)),)


def doge_attention(f: Fields) -> Pieces:
    """A learned mask from the values: one decay and one projection per key-value head."""
    _, kv, dim = heads_of(f)
    bias = f.flag("attention_bias")
    return (
        *gqa(bias="attention_bias", norms="head")(f),
        vector(A, "A", kv),
        linear(A, "dt_proj", kv * dim, kv, bias),
    )


def doge_moe(f: Fields) -> Pieces:
    """A dense feed-forward plus experts of one hidden channel each, chosen by two product keys."""
    d, (experts, run) = width(f), used(f)
    expert = (linear(Part.ROUTED, "down", d, 1), linear(Part.ROUTED, "up", 1, d))
    return (
        *dense(bias="mlp_bias")(f),
        linear(Part.ROUTER, "router", d, 2 * math.isqrt(experts)),
        *times(expert, experts, run),
    )


def doge_residuals(f: Fields) -> Pieces:
    return (vector(Part.OTHER, "residual_scales", 2 * width(f)),)


doge = Architecture(
    blocks=(
        doge_attention,
        choose(doge_moe, dense(bias="mlp_bias")),
        norms(2),
        doge_residuals,
    ),
    defaults={**BIASED, **KV_IS_HEADS, "mlp_bias": False},
)

ROWS = {
    "doge": doge,
    "jetmoe": Architecture(
        blocks=(jet_attention, moe("intermediate_size"), jet_bias, norms(2)),
        defaults={"tie_word_embeddings": True, "head_dim": 128},
    ),
}
