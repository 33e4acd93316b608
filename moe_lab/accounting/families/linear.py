"""Hybrids of linear and full attention: Kimi Linear, Kimi K3, Ling 2.5 and MiniMax-01."""

from moe_lab.accounting import layer_types
from moe_lab.accounting.architecture import Architecture
from moe_lab.accounting.block_factories import (
    by_type,
    choose,
    dense,
    gate,
    gqa,
    heads_of,
    mla,
    moe,
    norms,
    shared,
    top,
    width,
)
from moe_lab.cost import recurrence_cost
from moe_lab.cost.parts import Part, Pieces, linear, norm
from moe_lab.hf.fields import Fields


def kimi_delta(f: Fields) -> Pieces:
    """Decay through a bottleneck of one head's width; the output gate too, unless
    ``use_full_rank_gate``.
    """
    return recurrence_cost.kda(
        width(f),
        f.size("linear_num_heads"),
        f.size("linear_head_dim"),
        f.size("linear_conv_kernel_dim"),
        low_rank_gate=not f.truth("use_full_rank_gate"),
    )


def ling_delta(f: Fields) -> Pieces:
    sizes = (
        f.size("linear_num_heads"),
        f.size("linear_head_dim"),
        f.size("linear_conv_kernel_dim"),
    )
    return recurrence_cost.kda(width(f), *sizes, low_rank_decay=False, low_rank_gate=False)


def output_gate(f: Fields) -> Pieces:
    """Kimi K3's latent attention has an output gate of its full width; nothing says so but
    ``mla_use_output_gate``.
    """
    if not f.truth("mla_use_output_gate"):
        return ()
    f.note("mla_use_output_gate", "the output gate of latent attention has one value per channel")
    return (
        linear(
            Part.ATTENTION,
            "gate_proj",
            width(f),
            f.size("num_attention_heads") * f.size("v_head_dim"),
        ),
    )


def expert_width(f: Fields) -> int:
    """The stream that the routed experts work in: Kimi K3 narrows it
    (``routed_expert_hidden_size``).
    """
    return f.size_or("routed_expert_hidden_size", width(f), 1)


def latent(f: Fields) -> Pieces:
    """Projections to the narrower stream and back, with a norm before the way back."""
    size, d = expert_width(f), width(f)
    if size == d:
        return ()
    ending = (norm("latent.norm", size),) if f.truth("latent_moe_use_norm") else ()
    return (
        linear(Part.OTHER, "latent.down", d, size),
        *ending,
        linear(Part.OTHER, "latent.up", size, d),
    )


def lightning(f: Fields) -> Pieces:
    heads, _, dim = heads_of(f)
    return recurrence_cost.lightning(width(f), heads, dim)


def minimax_types(f: Fields) -> list[str]:
    """``attn_type_list`` has 0 for lightning and 1 for softmax attention."""
    if f.find("attn_type_list") is not None:
        return [
            "full_attention" if mark else "linear_attention"
            for mark in f.per_layer("attn_type_list")
        ]
    types = ["linear_attention" if layer % 2 else "full_attention" for layer in range(f.num_layers)]
    return layer_types.usual_types(f, types, "full_attention and linear_attention in turn")


kimi_linear = Architecture(
    blocks=(
        by_type({"full_attention": mla(extra=(output_gate,)), "linear_attention": kimi_delta}),
        choose(
            moe(d_in=expert_width, extra=(shared(), latent)),
            dense(),
        ),
        norms(2),
    ),
    defaults={
        "attention_bias": False,
        "q_lora_rank": None,
        "layer_types": layer_types.kda_types,
    },
    top=top(may_tie=False),
)
minimax = Architecture(
    blocks=(
        by_type({"full_attention": gqa(), "linear_attention": lightning}),
        moe("intermediate_size"),
        norms(2),
    ),
    defaults={
        "tie_word_embeddings": False,
        "num_key_value_heads": layer_types.kv_is_heads,
        "layer_types": minimax_types,
    },
)

ROWS = {
    "kimi_linear": kimi_linear,
    "bailing_hybrid": kimi_linear.variant(
        blocks=(
            by_type({"full_attention": mla(extra=(gate("head"),)), "linear_attention": ling_delta}),
            choose(moe(extra=(shared(),)), dense()),
            norms(2),
        ),
        defaults={
            "layer_group_size": 6,
            "head_dim": 128,
            "short_conv_kernel_size": 4,
            "linear_head_dim": lambda f: f.size("head_dim"),
            "linear_num_heads": lambda f: f.size("num_attention_heads"),
            "linear_conv_kernel_dim": lambda f: f.size("short_conv_kernel_size"),
            "layer_types": layer_types.every_nth_full("layer_group_size", "linear_attention"),
        },
    ),
    "minimax": minimax,
}
