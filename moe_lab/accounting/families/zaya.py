"""ZAYA: compressed convolutional attention, a router on a state that runs through the layers, and a
class that skips the experts.
"""

from moe_lab.accounting import layer_types
from moe_lab.accounting.architecture import Architecture
from moe_lab.accounting.block_factories import (
    heads_of,
    norms,
    top,
    used,
    width,
)
from moe_lab.accounting.block_factories import window as sliding
from moe_lab.cost import attention_cost, layer_cost
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
        Piece(
            A,
            "conv_grouped",
            channels * dim * span + channels,
            channels * dim * span,
            state=channels * (span - 1),
        ),
        vector(A, "temperature", kv),
        linear(A, "o_proj", heads * dim, d, bias),
        attention_cost.scores(Attend(heads, dim, dim, window=sliding(f), cached=2 * kv * dim)),
    )


def zaya_moe(f: Fields) -> Pieces:
    """Top-1 of the experts and one class that skips them; the router is an MLP on a narrow state
    that runs through the layers.
    """
    d, rank, (experts, run) = width(f), f.size("router_hidden_size"), used(f)
    f.note(
        "skip",
        "no token takes the skip class (its share is learned; the published active parameters "
        "assume none)",
    )
    state = (
        (vector(Part.ROUTER, "state_scale", rank),) if not f.mark(layer_types.first_only) else ()
    )
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
            layer_cost.gated_ffn(Part.ROUTED, d, size), experts, ExpertsRun(0, run.mean, run.most)
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
        "layer_types": layer_types.all_of("full_attention"),
    },
    top=top(
        head_bias="lm_head_bias",
        extra=(lambda f: (vector(Part.OTHER, "input_scale", 2 * width(f)),),),
    ),
)

ROWS = {"zaya": zaya}
