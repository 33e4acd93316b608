"""Gemma 4 and Diffusion Gemma: experts beside a dense feed-forward, keys shared by layers."""

from collections.abc import Mapping
from typing import Any

from moe_lab.accounting import layer_types
from moe_lab.accounting.architecture import Architecture
from moe_lab.accounting.block_factories import (
    choose,
    layer_type,
    moe,
    norms,
    top,
    used,
    width,
)
from moe_lab.accounting.block_factories import window as sliding
from moe_lab.cost import attention_cost, layer_cost
from moe_lab.cost.parts import (
    Attend,
    Part,
    Piece,
    Pieces,
    linear,
    norm,
    vector,
)
from moe_lab.hf.fields import Fields


def gemma_types(f: Fields) -> list[str]:
    last = f.num_layers - 1
    types = [
        "full_attention" if layer % 6 == 5 or layer == last else "sliding_attention"
        for layer in range(f.num_layers)
    ]
    return layer_types.usual_types(
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
    pieces = attention_cost.gqa(
        width(f), heads, kv, dim, kernel, bias=bias, out_bias=bias, values=values
    )
    query, key = attention_cost.qk_norms("head", heads, kv, dim)
    if may_borrow and f.mark(borrows_cache):
        return (*attention_cost.borrowed(pieces), query)
    return (*pieces, query, key)


def gemma_ffn(f: Fields) -> Pieces:
    double = 2 if f.truth("use_double_wide_mlp") and f.mark(borrows_cache) else 1
    return (
        *layer_cost.gated_ffn(Part.DENSE, width(f), double * f.size("intermediate_size")),
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
        choose(gemma_moe, gemma_ffn),
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
        *layer_cost.gated_ffn(Part.OTHER, d, f.size("intermediate_size")),
    )


ROWS = {
    "gemma4_text": gemma4,
    "gemma4_unified_text": gemma4,
    "diffusion_gemma_text": gemma4.variant(
        blocks=(lambda f: gemma_attention(f, may_borrow=False), gemma_moe, norms(2)),
        defaults={"attention_k_eq_v": lambda f: True},
        top=top(extra=(self_conditioning,)),
    ),
}
