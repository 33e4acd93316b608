"""Hybrids of attention and state spaces or short convolutions: Jamba, Bamba, Granite 4, Nemotron-H,
LFM2.
"""

import math

from moe_lab.accounting import layer_types
from moe_lab.accounting.architecture import Architecture, mtp_module
from moe_lab.accounting.block_factories import (
    by_type,
    choose,
    dense,
    flag,
    gqa,
    join,
    moe,
    norms,
    shared,
    top,
    width,
)
from moe_lab.accounting.families.grouped import BIASED, KV_IS_HEADS, UNTIED
from moe_lab.cost import layer_cost, recurrence_cost
from moe_lab.cost.parts import Part, Pieces, linear
from moe_lab.hf.fields import Fields
from moe_lab.hf.sparse_layers import nemotron_marks


def mamba(f: Fields) -> Pieces:
    """Jamba's Mamba-1 layer; the rank of dt is ``hidden_size / 16`` rounded up unless the
    configuration says otherwise.
    """
    rank = f.get("mamba_dt_rank")
    rank = math.ceil(width(f) / 16) if rank == "auto" else f.check_size("mamba_dt_rank", rank)
    return recurrence_cost.mamba1(
        width(f),
        f.size("mamba_expand"),
        f.size("mamba_d_state"),
        rank,
        f.size("mamba_d_conv"),
        f.flag("mamba_conv_bias"),
        f.flag("mamba_proj_bias"),
    )


def mamba2(f: Fields) -> Pieces:
    """Bamba and Granite 4."""
    return recurrence_cost.mamba2(
        width(f),
        int(f.number("mamba_expand") * width(f)),
        f.size("mamba_n_heads"),
        f.size("mamba_n_groups"),
        f.size("mamba_d_state"),
        f.size("mamba_d_conv"),
        f.flag("mamba_conv_bias"),
        f.flag("mamba_proj_bias"),
    )


def nemotron_mamba(f: Fields) -> Pieces:
    heads = f.size("mamba_num_heads")
    inner = heads * f.size("mamba_head_dim")
    sizes = (heads, f.size("n_groups"), f.size("ssm_state_size"), f.size("conv_kernel"))
    return recurrence_cost.mamba2(
        width(f), inner, *sizes, f.flag("use_conv_bias"), f.flag("use_bias")
    )


def nemotron_latent(f: Fields) -> int:
    return f.size_or("routed_expert_hidden_size", width(f), 1)


def latent_projections(f: Fields) -> Pieces:
    """Super and Ultra route in a narrower stream (``moe_latent_size``)."""
    d, size = width(f), nemotron_latent(f)
    if f.find("routed_expert_hidden_size") is None:
        return ()
    bias = f.flag("mlp_bias")
    return (
        linear(Part.OTHER, "latent.down", d, size, bias),
        linear(Part.OTHER, "latent.up", size, d, bias),
    )


def nemotron_mlp(f: Fields) -> Pieces:
    return layer_cost.plain_ffn(
        Part.DENSE, width(f), f.size("intermediate_size"), flag(f, "mlp_bias")
    )


def short_conv(f: Fields) -> Pieces:
    return recurrence_cost.short_conv(width(f), f.size("conv_L_cache"), f.flag("conv_bias"))


def nemotron_module(architecture: Architecture, f: Fields, index: int) -> Pieces:
    """An MTP module has a block for each entry of ``mtp_layers_block_type`` (attention and experts
    unless it says otherwise).
    """
    kinds = ["full_attention", "moe"]
    if f.find("mtp_hybrid_override_pattern") is not None:
        kinds = nemotron_marks(f.text("mtp_hybrid_override_pattern"))
    kinds = [str(kind) for kind in f.optional("mtp_layers_block_type", kinds)]
    f.note(
        "mtp",
        f"an MTP module is {' and '.join(kinds)}, three norms and a projection (the form of "
        f"DeepSeek-V3)",
    )
    own = {
        **f.values,
        "layer_types": list(kinds),
        "num_hidden_layers": len(kinds),
        "num_nextn_predict_layers": 0,
    }
    inner = Fields(
        {key: value for key, value in own.items() if key != "layers_block_type"},
        f.family,
        f.defaults,
    )
    return mtp_module(
        f,
        tuple(
            piece
            for layer in range(len(kinds))
            for piece in join(inner.at(layer), architecture.blocks)
        ),
    )


nemotron_moe = moe(
    gated=False,
    d_in=nemotron_latent,
    extra=(
        shared("shared_expert_intermediate_size", counted=False, gated=False, bias="mlp_bias"),
        latent_projections,
    ),
)
granite_shared = shared("shared_expert_intermediate_size", counted=False)
MAMBA2 = {"mamba_proj_bias": False, "mamba_conv_bias": True}

ROWS = {
    "jamba": Architecture(
        blocks=(
            by_type({"full_attention": gqa(), "linear_attention": mamba}),
            choose(moe("intermediate_size"), dense()),
            norms(2),
        ),
        defaults={
            **UNTIED,
            **KV_IS_HEADS,
            "mamba_dt_rank": "auto",
            "mamba_conv_bias": True,
            "mamba_proj_bias": False,
            "layer_types": layer_types.jamba_types,
        },
    ),
    "bamba": Architecture(
        blocks=(
            by_type({"full_attention": gqa(bias="attention_bias"), "linear_attention": mamba2}),
            dense(bias="mlp_bias"),
            norms(2),
        ),
        defaults={
            **BIASED,
            **KV_IS_HEADS,
            **MAMBA2,
            "mlp_bias": False,
            "layer_types": layer_types.bamba_types,
        },
    ),
    "granitemoehybrid": Architecture(
        blocks=(
            by_type({"full_attention": gqa(bias="attention_bias"), "linear_attention": mamba2}),
            choose(moe("intermediate_size"), lambda f: ()),
            granite_shared,
            norms(2),
        ),
        defaults={
            **BIASED,
            **KV_IS_HEADS,
            **MAMBA2,
            "layer_types": layer_types.all_of("linear_attention"),
        },
    ),
    "nemotron_h": Architecture(
        blocks=(
            by_type(
                {
                    "full_attention": gqa(),
                    "linear_attention": nemotron_mamba,
                    "moe": nemotron_moe,
                    "mlp": nemotron_mlp,
                }
            ),
            norms(1),
        ),
        defaults={
            **KV_IS_HEADS,
            "head_dim": 128,
            "use_conv_bias": True,
            "use_bias": False,
            "mlp_bias": False,
        },
        top=top(may_tie=False),
        mtp=nemotron_module,
    ),
    "lfm2_moe": Architecture(
        blocks=(
            by_type({"full_attention": gqa(norms="head"), "conv": short_conv}),
            choose(moe(), dense()),
            norms(2),
        ),
        defaults={"tie_word_embeddings": True, "conv_bias": False},
    ),
}
