"""Decoders with grouped-query attention in every layer and routed experts without shared ones."""

from moe_lab.accounting import layer_types
from moe_lab.accounting.architecture import Architecture
from moe_lab.accounting.block_factories import (
    choose,
    dense,
    gate,
    gqa,
    heads_of,
    layer_type,
    moe,
    norms,
    shared,
    sinks,
    top,
    width,
)
from moe_lab.accounting.block_factories import window as sliding
from moe_lab.cost import attention_cost
from moe_lab.cost.parts import Attend, Part, Pieces, norm, vector
from moe_lab.hf.fields import Fields

KV_IS_HEADS = {"num_key_value_heads": layer_types.kv_is_heads}
UNTIED = {"tie_word_embeddings": False}
BIASED = {**UNTIED, "attention_bias": False}

mixtral = Architecture(
    blocks=(gqa(), moe("intermediate_size"), norms(2)), defaults={**UNTIED, **KV_IS_HEADS}
)
granitemoe = Architecture(
    blocks=(gqa(bias="attention_bias"), moe("intermediate_size"), norms(2)),
    defaults={**BIASED, **KV_IS_HEADS},
)
granite_shared = shared("shared_intermediate_size", counted=False)

gpt_oss = Architecture(
    blocks=(
        gqa(bias="attention_bias", extra=(sinks,)),
        moe("intermediate_size", bias=True, router_bias=True),
        norms(2),
    ),
    defaults={
        **UNTIED,
        **KV_IS_HEADS,
        "attention_bias": True,
        "head_dim": 64,
        "layer_types": layer_types.every_nth_full(2, "sliding_attention"),
    },
)
privacy_filter = gpt_oss.variant(
    blocks=(
        gqa(bias="attention_bias", extra=(sinks,), window=lambda f: f.size("sliding_window") + 1),
        *gpt_oss.blocks[1:],
    ),
    top=top(head=False),
)
phimoe = granitemoe.variant(
    blocks=(gqa(bias="attention_bias"), moe("intermediate_size"), norms(2, bias=True)),
    defaults={"lm_head_bias": False},
    top=top(head_bias="lm_head_bias", norm_bias=True),
)
mellum = Architecture(
    blocks=(
        gqa(bias="attention_bias", norms="head"),
        choose(moe(), dense()),
        norms(2),
    ),
    defaults={**BIASED, "head_dim": 128, "layer_types": layer_types.all_of("full_attention")},
)


def olmoe_norms(f: Fields) -> Pieces:
    """OLMoE norms queries and keys over the whole width, whatever ``head_dim`` says."""
    heads, kv, _ = heads_of(f)
    return (norm("q_norm", width(f)), norm("k_norm", width(f) // heads * kv))


def granite_types(f: Fields) -> list[str]:
    types = [
        "sliding_attention" if layer % 4 else "full_attention" for layer in range(f.num_layers)
    ]
    return layer_types.usual_types(
        f, types, "full_attention in the first of every four layers, else sliding_attention"
    )


def beam_bias(f: Fields) -> Pieces:
    return (vector(Part.ATTENTION, "gate_bias", f.size("num_attention_heads")),)


def mimo_attention(f: Fields) -> Pieces:
    """MiMo-V2: sliding layers have twice the key-value heads and sinks; values are narrower than
    keys.
    """
    heads, kv, dim = heads_of(f)
    v, inside = f.size("v_head_dim"), layer_type(f) == "sliding_attention"
    if inside:
        kv = f.size_or("swa_num_key_value_heads", 2 * kv, 1)
    kernel = Attend(heads, dim, v, window=sliding(f))
    pieces = attention_cost.gqa(
        width(f), heads, kv, dim, kernel, v_dim=v, bias=f.flag("attention_bias"), out_bias=False
    )
    return (*pieces, *(sinks(f) if inside else ()))


def mimo_types(f: Fields) -> list[str]:
    """``hybrid_layer_pattern`` has 0 for full and 1 for sliding attention."""
    if f.find("hybrid_layer_pattern") is not None:
        return [
            "sliding_attention" if mark else "full_attention"
            for mark in f.per_layer("hybrid_layer_pattern")
        ]
    types = [
        "full_attention" if not layer or (layer + 1) % 6 == 0 else "sliding_attention"
        for layer in range(f.num_layers)
    ]
    return layer_types.usual_types(
        f, types, "full_attention in the first and every sixth layer, else sliding_attention"
    )


ROWS = {
    "mixtral": mixtral,
    "granitemoe": granitemoe,
    "granitemoeshared": granitemoe.variant(
        blocks=(
            gqa(bias="attention_bias"),
            moe("intermediate_size", extra=(granite_shared,)),
            norms(2),
        ),
        defaults={"shared_expert_intermediate_size": 0},
    ),
    "granitemoe_swa": granitemoe.variant(
        blocks=(
            gqa(bias="attention_bias", extra=(sinks,)),
            moe("intermediate_size", extra=(granite_shared,)),
            norms(2),
        ),
        defaults={
            "shared_expert_intermediate_size": 0,
            "layer_types": granite_types,
        },
    ),
    "granite_docling_text": granitemoe.variant(
        blocks=(gqa(bias="attention_bias"), dense(bias="mlp_bias"), norms(2)),
        defaults={"tie_word_embeddings": True, "mlp_bias": False},
    ),
    "gpt_oss": gpt_oss,
    "openai_privacy_filter": privacy_filter,
    "flex_olmo": granitemoe.variant(
        blocks=(gqa(bias="attention_bias", norms="width"), *granitemoe.blocks[1:])
    ),
    "olmoe": granitemoe.variant(
        blocks=(gqa(bias="attention_bias", extra=(olmoe_norms,)), *granitemoe.blocks[1:])
    ),
    "minimax_m2": Architecture(
        blocks=(gqa(norms="width"), moe("intermediate_size"), norms(2)),
        defaults={**UNTIED, "head_dim": 128},
    ),
    "phimoe": phimoe,
    "mellum": mellum,
    "beam": mellum.variant(
        blocks=(
            gqa(bias="attention_bias", norms="head", extra=(gate("width"), beam_bias)),
            choose(moe(), dense()),
            norms(4),
        ),
        defaults={"layer_types": layer_types.every_nth_full(6, "sliding_attention")},
    ),
    "dbrx": Architecture(blocks=(gqa(), moe("ffn_hidden_size"), norms(2)), defaults=UNTIED),
    "mimo_v2_flash": Architecture(
        blocks=(
            mimo_attention,
            choose(moe(), dense()),
            norms(2),
        ),
        defaults={**BIASED, "layer_types": mimo_types},
    ),
}
