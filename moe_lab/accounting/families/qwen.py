"""Qwen: MoE with and without a gated shared expert, hybrids with Gated DeltaNet, and the n-gram
memory of Qwen4.
"""

import math

from moe_lab.accounting import layer_types
from moe_lab.accounting.architecture import Architecture
from moe_lab.accounting.block_factories import (
    Block,
    by_type,
    choose,
    delta_net,
    dense,
    gqa,
    moe,
    norms,
    shared,
    shared_gate,
    top,
    width,
)
from moe_lab.cost import attention_cost
from moe_lab.cost.parts import Index, Part, Piece, Pieces, conv, linear, norm
from moe_lab.errors import require
from moe_lab.hf.fields import Fields

UNTIED = {"tie_word_embeddings": False}

gated_shared = (shared("shared_expert_intermediate_size", counted=False), shared_gate)

qwen3_moe = Architecture(
    blocks=(
        gqa(bias="attention_bias", norms="head"),
        choose(moe(), dense()),
        norms(2),
    ),
    defaults={**UNTIED, "attention_bias": False},
)
qwen2_moe = Architecture(
    blocks=(
        gqa(bias="qkv_bias", out_bias=False),
        choose(moe(extra=gated_shared), dense()),
        norms(2),
    ),
    defaults={**UNTIED, "qkv_bias": True},
)


def hybrid(f: Fields) -> Pieces:
    """Gated DeltaNet, with gated attention in every ``full_attention_interval``-th layer."""
    attention = gqa(bias="attention_bias", norms="head", query_width=2)
    return by_type({"linear_attention": delta_net, "full_attention": attention})(f)


HYBRID = {
    "attention_bias": False,
    "full_attention_interval": 4,
    "layer_types": layer_types.every_nth_full("full_attention_interval", "linear_attention"),
    "head_dim": 256,
}

qwen3_next = Architecture(
    blocks=(hybrid, choose(moe(extra=gated_shared), dense()), norms(2)),
    defaults={**UNTIED, **HYBRID},
)
lara_mini = Architecture(
    blocks=(
        by_type(
            {
                "linear_attention": delta_net,
                **dict.fromkeys(
                    ("sliding_attention", "full_attention"),
                    gqa(bias="attention_bias", norms="head"),
                ),
            }
        ),
        moe(extra=(shared("shared_expert_intermediate_size", counted=False),)),
        norms(2),
    ),
    defaults={
        "tie_word_embeddings": True,
        "attention_bias": False,
        "head_dim": 128,
        "layer_types": layer_types.lara_types,
    },
)
qwen3_5_moe = qwen3_next.variant(blocks=(hybrid, moe(extra=gated_shared), norms(2)))


# --------------------------------------------------------------------------------------------------
# Qwen4 (exp)


def block_indexer(f: Fields) -> Pieces:
    """Scores blocks of ``indexer_compress_ratio`` positions; attention reads ``indexer_budget``
    positions of the best ones.
    """
    heads, keys, dim = (
        f.size("indexer_n_heads"),
        f.size("indexer_kv_heads"),
        f.size("indexer_head_dim"),
    )
    return (
        linear(Part.ATTENTION, "indexer.qk_proj", width(f), (heads + keys) * dim),
        norm("indexer.q_norm", dim),
        norm("indexer.k_norm", dim),
        Piece(
            Part.ATTENTION,
            "indexer.scores",
            kernel=Index(heads, dim, f.size("indexer_compress_ratio"), cached=keys * dim),
        ),
    )


def indexed_gated(f: Fields) -> Pieces:
    pieces = gqa(bias="attention_bias", norms="head", query_width=2, extra=(block_indexer,))(f)
    return tuple(attention_cost.sparse(piece, f.size("indexer_budget")) for piece in pieces)


def gated_residual(name: str, *, inject: bool = True) -> Block:
    """Low-rank mixing of ``hc_count`` residual streams."""

    def block(f: Fields) -> Pieces:
        streams, rank = f.size("hc_count"), f.size("hc_lowrank")
        wide = streams * width(f)
        return (
            norm(f"{name}.norm", wide),
            linear(Part.OTHER, f"{name}.mix_down", wide, rank),
            linear(Part.OTHER, f"{name}.mix_up", rank, wide),
            *((linear(Part.OTHER, f"{name}.inject", wide, streams),) if inject else ()),
        )

    return block


def memories(f: Fields) -> list[int | None]:
    """The n-gram memory of each layer: ``ple_layer_ids`` counts layers from 1."""
    listed: list[int] = sorted(set(f.numbers("ple_layer_ids")))
    return [
        listed.index(layer) if layer in listed else None for layer in range(1, f.num_layers + 1)
    ]


def memory(f: Fields) -> Pieces:
    """The n-gram memory of the layers that have one."""
    index = f.mark(memories)
    if index is None:
        return ()
    d, streams = width(f), f.size("hc_count")
    wide, channels = d * streams, f.size("ple_embed_dim")
    return (
        Piece(
            Part.NGRAM_TABLE, "ple.ngram_table", ngram_rows(f, index) * _channels_each(f, channels)
        ),
        linear(Part.NGRAM_PROJECTION, "ple.key_proj", channels, wide),
        linear(Part.NGRAM_PROJECTION, "ple.value_proj", channels, d),
        *(norm(f"ple.norm_{name}", wide) for name in ("key", "query", "conv")),
        conv(Part.NGRAM_PROJECTION, "ple.conv1d", wide, f.size("ple_conv_kernel_size")),
    )


def _heads(f: Fields) -> int:
    return (f.size("ngram_size", 2, 16) - 1) * f.size("heads_per_ngram", most=64)


def _channels_each(f: Fields, channels: int) -> int:
    heads = _heads(f)
    require(channels >= heads, f"ple_embed_dim of at least the {heads} n-gram heads", channels)
    return channels // heads


def ngram_rows(f: Fields, memory_index: int) -> int:
    """Each hash head has a prime number of rows: the primes from ``ngram_vocab_size_base`` on, all
    memories in one sequence.
    """
    heads, base, multiple = (
        _heads(f),
        f.size("ngram_vocab_size_base", most=10**10),
        f.size("make_ngram_vocab_size_divisible_by"),
    )
    primes, candidate = [], base
    while len(primes) < (memory_index + 1) * heads:
        if is_prime(candidate):
            primes.append(candidate)
        candidate += 1
    return math.ceil(sum(primes[memory_index * heads :]) / multiple) * multiple


def is_prime(number: int) -> bool:
    return number == 2 or (
        number > 1
        and number % 2 == 1
        and all(number % divisor for divisor in range(3, math.isqrt(number) + 1, 2))
    )


qwen4_exp = Architecture(
    blocks=(
        by_type(
            {
                "linear_attention": delta_net,
                "full_attention": indexed_gated,
                "indexed_attention": indexed_gated,
            }
        ),
        moe(extra=gated_shared),
        memory,
        gated_residual("attn_hc"),
        gated_residual("mlp_hc"),
    ),
    defaults={
        **HYBRID,
        "tie_word_embeddings": False,
        "layer_types": layer_types.every_nth_full(
            "full_attention_interval", "linear_attention", "indexed_attention"
        ),
        "ple_embed_dim": width,
    },
    top=top(final_norm=False, extra=(gated_residual("final_hc", inject=False),)),
)

ROWS = {
    "qwen2_moe": qwen2_moe,
    "qwen3_moe": qwen3_moe,
    "qwen3_next": qwen3_next,
    "qwen3_5_moe_text": qwen3_5_moe,
    "lara_mini": lara_mini,
    "qwen3_vl_moe_text": qwen3_moe.variant(
        defaults={"num_key_value_heads": layer_types.kv_is_heads}
    ),
    "qwen3_omni_moe_text": qwen3_moe,
    "qwen4_exp_text": qwen4_exp,
}
