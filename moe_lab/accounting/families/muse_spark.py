"""Muse Spark: experts in a narrower stream than the model's."""

from moe_lab.accounting.architecture import Architecture
from moe_lab.accounting.block_factories import (
    choose,
    dense,
    gate,
    gqa,
    moe,
    norms,
    top,
    width,
)
from moe_lab.cost.parts import (
    Part,
    Pieces,
    linear,
    norm,
    vector,
)
from moe_lab.hf.fields import Fields


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
            moe(d_in=muse_width, extra=(muse_latent,)),
            dense(),
        ),
        norms(3),
        muse_gates,
    ),
    defaults={"attention_bias": False, "layer_types": muse_types},
    top=top(may_tie=False),
)

ROWS = {"muse_spark_text": muse_spark}
