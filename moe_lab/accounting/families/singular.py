"""Architectures with blocks of their own: ZAYA, JetMoe, Doge, Gemma 4, Muse Spark."""

import math
from collections.abc import Mapping
from typing import Any

from moe_lab.accounting import patterns
from moe_lab.accounting.architecture import Architecture
from moe_lab.accounting.blocks import (
    choose,
    dense,
    gate,
    gqa,
    heads_of,
    layer_type,
    moe,
    norms,
    top,
    used,
    width,
)
from moe_lab.accounting.blocks import window as sliding
from moe_lab.accounting.families.grouped import BIASED, KV_IS_HEADS
from moe_lab.cost import formulas
from moe_lab.cost.parts import (
    Attend,
    ExpertsRun,
    Part,
    Piece,
    Pieces,
    conv,
    linear,
    norm,
    times,
    vector,
)
from moe_lab.hf.fields import Fields

A = Part.ATTENTION


# -----------------------------------------------------------------------------------------------------------------
# ZAYA


def zaya_attention(f: Fields) -> Pieces:
    """Compressed convolutional attention: a depthwise and a grouped convolution over queries and
    keys, half of each value delayed.
    """
    d, (heads, kv, dim) = width(f), heads_of(f)
    channels, bias, span = (heads + kv) * dim, f.flag("attention_bias"), f.size("cca_time1")
    return (
        linear(A, "q_proj", d, heads * dim, bias),
        linear(A, "k_proj", d, kv * dim, bias),
        linear(A, "v_proj_current", d, kv * dim // 2, bias),
        linear(A, "v_proj_delayed", d, kv * dim // 2, bias),
        conv(A, "conv_depthwise", channels, f.size("cca_time0"), True),
        Piece(A, "conv_grouped", channels * dim * span + channels, channels * dim * span),
        vector(A, "temperature", kv),
        linear(A, "o_proj", heads * dim, d, bias),
        formulas.scores(Attend(heads, dim, dim, window=sliding(f))),
    )


def zaya_moe(f: Fields) -> Pieces:
    """Top-1 of the experts and one class that skips them; the router is an MLP on a narrow state
    that runs through the layers.
    """
    d, rank, (experts, run) = width(f), f.size("router_hidden_size"), used(f)
    f.note(
        "skip",
        "no token takes the skip class (its share is learned; the published active parameters assume none)",
    )
    state = (vector(Part.ROUTER, "state_scale", rank),) if not f.mark(patterns.first_only) else ()
    router = (
        linear(Part.ROUTER, "down_proj", d, rank, True),
        *state,
        norm("router.norm", rank),
        linear(Part.ROUTER, "fc1", rank, rank, True),
        linear(Part.ROUTER, "fc2", rank, rank, True),
        linear(Part.ROUTER, "out_proj", rank, experts + 1),
    )
    size = f.size("moe_intermediate_size")
    return (
        *router,
        *times(
            formulas.gated_ffn(Part.ROUTED, d, size), experts, ExpertsRun(0, run.mean, run.most)
        ),
    )


def zaya_scales(f: Fields) -> Pieces:
    """Scale and shift of both branches of both residual additions."""
    return (vector(Part.OTHER, "residual_scales", 8 * width(f)),)


zaya = Architecture(
    blocks=(zaya_attention, zaya_moe, norms(2), zaya_scales),
    defaults={
        "tie_word_embeddings": True,
        "attention_bias": False,
        "lm_head_bias": False,
        "head_dim": 128,
        "router_hidden_size": 256,
        "cca_time0": 2,
        "cca_time1": 2,
        "layer_types": patterns.all_of("full_attention"),
    },
    top=top(
        head_bias="lm_head_bias",
        extra=(lambda f: (vector(Part.OTHER, "input_scale", 2 * width(f)),),),
    ),
)


# ----------------------------------------------------------------------------------------------------------
# JetMoe, Doge


def jet_attention(f: Fields) -> Pieces:
    """Query and output projections are experts with a router; keys and values are shared by all of
    them.
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
        formulas.scores(Attend(heads, dim, dim)),
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
    """A dense feed-forward plus tiny experts of one hidden channel each, found by two product keys."""
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
        choose(lambda f: [f.flag("is_moe")] * f.num_layers, doge_moe, dense(bias="mlp_bias")),
        norms(2),
        doge_residuals,
    ),
    defaults={**BIASED, **KV_IS_HEADS, "mlp_bias": False, "is_moe": False},
)


# ---------------------------------------------------------------------------------------------------------------
# Gemma 4


def gemma_types(f: Fields) -> list[str]:
    last = f.num_layers - 1
    types = [
        "full_attention" if layer % 6 == 5 or layer == last else "sliding_attention"
        for layer in range(f.num_layers)
    ]
    return patterns.usual_types(
        f, types, "full_attention in every sixth layer and the last, else sliding_attention"
    )


def gemma_wide(f: Fields) -> Mapping[int, Mapping[str, Any]]:
    """Full-attention layers have their own head size and, where keys serve as values, their own
    number of key-value heads.
    """
    wide: dict[str, Any] = {"head_dim": f.size("global_head_dim")}
    if f.find("num_global_key_value_heads") is not None and f.flag("attention_k_eq_v"):
        wide["num_key_value_heads"] = f.size("num_global_key_value_heads")
    return {
        layer: wide
        for layer, kind in enumerate(f.per_layer("layer_types"))
        if kind == "full_attention"
    }


def borrows_cache(f: Fields) -> list[bool]:
    """The last ``num_kv_shared_layers`` layers read keys and values of an earlier one."""
    shared = f.size_or("num_kv_shared_layers", 0)
    return [layer >= f.num_layers - shared for layer in range(f.num_layers)]


def gemma_attention(f: Fields, may_borrow: bool = True) -> Pieces:
    heads, kv, dim = (
        f.size("num_attention_heads"),
        f.size("num_key_value_heads"),
        f.size("head_dim"),
    )
    inside, bias = layer_type(f) == "sliding_attention", f.flag("attention_bias")
    values = inside or not f.flag("attention_k_eq_v")
    kernel = Attend(heads, dim, dim, window=sliding(f))
    pieces = formulas.gqa(width(f), heads, kv, dim, kernel, bias=bias, out_bias=bias, values=values)
    query, key = formulas.qk_norms("head", heads, kv, dim)
    if may_borrow and f.mark(borrows_cache):
        return (*(piece for piece in pieces if piece.name not in ("k_proj", "v_proj")), query)
    return (*pieces, query, key)


def gemma_ffn(f: Fields) -> Pieces:
    double = 2 if f.truth("use_double_wide_mlp") and f.mark(borrows_cache) else 1
    return (
        *formulas.gated_ffn(Part.DENSE, width(f), double * f.size("intermediate_size")),
        *norms(2)(f),
    )


def gemma_moe(f: Fields) -> Pieces:
    """Experts beside the dense feed-forward, with a scaled router and three norms of their own."""
    d, (experts, _) = width(f), used(f)
    scales = (
        vector(Part.ROUTER, "router.scale", d),
        vector(Part.ROUTER, "router.expert_scale", experts),
    )
    return (*gemma_ffn(f), *moe()(f), *scales, *norms(3)(f))


def layer_embedding(f: Fields) -> Pieces:
    """Per-layer embeddings (Gemma 3n): each layer gates a narrow vector of its token into the
    stream.
    """
    d, narrow = width(f), f.size_or("hidden_size_per_layer_input", 0)
    if not narrow:
        return ()
    return (
        linear(Part.OTHER, "per_layer.gate", d, narrow),
        linear(Part.OTHER, "per_layer.projection", narrow, d),
        norm("per_layer", d),
    )


def layer_tables(f: Fields) -> Pieces:
    narrow = f.size_or("hidden_size_per_layer_input", 0)
    if not narrow:
        return ()
    wide = f.num_layers * narrow
    return (
        Piece(
            Part.NGRAM_TABLE, "embed_tokens_per_layer", f.size("vocab_size_per_layer_input") * wide
        ),
        linear(Part.NGRAM_PROJECTION, "per_layer_model_projection", width(f), wide),
        norm("per_layer_projection_norm", narrow),
    )


gemma4 = Architecture(
    blocks=(
        gemma_attention,
        choose(lambda f: [f.truth("enable_moe_block")] * f.num_layers, gemma_moe, gemma_ffn),
        norms(2),
        layer_embedding,
    ),
    defaults={
        "tie_word_embeddings": True,
        "attention_bias": False,
        "head_dim": 256,
        "global_head_dim": 512,
        "attention_k_eq_v": lambda f: False,
        "layer_types": gemma_types,
    },
    top=top(extra=(layer_tables,)),
    overrides=gemma_wide,
)


def self_conditioning(f: Fields) -> Pieces:
    """Diffusion: the previous step's prediction enters through a norm and a gated feed-forward."""
    d = width(f)
    return (
        norm("self_conditioning.norm", d),
        *formulas.gated_ffn(Part.OTHER, d, f.size("intermediate_size")),
    )


# ------------------------------------------------------------------------------------------------------------
# Muse Spark


def muse_width(f: Fields) -> int:
    return f.size("moe_hidden_size")


def muse_latent(f: Fields) -> Pieces:
    """Experts that work in a narrower stream: down, a norm on either side of the experts, and up
    again.
    """
    d, size = width(f), muse_width(f)
    inside = (norm("latent.norm_before", size), norm("latent.norm_after", size))
    return (
        linear(Part.OTHER, "latent.down", d, size),
        *inside,
        linear(Part.OTHER, "latent.up", size, d),
    )


def muse_gates(f: Fields) -> Pieces:
    return (vector(Part.OTHER, "residual_gates", 2 * width(f)),)


def muse_types(f: Fields) -> list[str]:
    last = f.num_layers - 1
    f.note(
        "layer_types",
        "full_attention in every fourth layer, counted from the last (no layer_types)",
    )
    return [
        "sliding_attention" if (last - layer) % 4 else "full_attention"
        for layer in range(f.num_layers)
    ]


muse_spark = Architecture(
    blocks=(
        gqa(bias="attention_bias", extra=(gate("width"),)),
        choose(
            patterns.by_mlp_type(patterns.every),
            moe(d_in=muse_width, extra=(muse_latent,)),
            dense(),
        ),
        norms(3),
        muse_gates,
    ),
    defaults={"attention_bias": False, "layer_types": muse_types},
    top=top(may_tie=False),
)

ROWS = {
    "zaya": zaya,
    "jetmoe": Architecture(
        blocks=(jet_attention, moe("intermediate_size"), jet_bias, norms(2)),
        defaults={"tie_word_embeddings": True, "head_dim": 128},
    ),
    "doge": doge,
    "gemma4_text": gemma4,
    "gemma4_unified_text": gemma4,
    "diffusion_gemma_text": gemma4.variant(
        blocks=(lambda f: gemma_attention(f, may_borrow=False), gemma_moe, norms(2)),
        defaults={"attention_k_eq_v": lambda f: True},
        top=top(extra=(self_conditioning,)),
    ),
    "muse_spark_text": muse_spark,
}
