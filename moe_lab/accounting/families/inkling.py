"""Inkling: relative position logits, short convolutions everywhere, shared experts that enter the
router's normaliser.
"""

from moe_lab.accounting import layer_types
from moe_lab.accounting.architecture import Architecture
from moe_lab.accounting.block_factories import (
    Block,
    choose,
    dense,
    join,
    layer_type,
    moe,
    norms,
    top,
    used,
    width,
)
from moe_lab.cost import attention_cost, layer_cost
from moe_lab.cost.parts import Attend, Part, Piece, Pieces, conv, linear, norm, times, vector
from moe_lab.hf import architectures
from moe_lab.hf.fields import Fields

A = Part.ATTENTION


def sizes(f: Fields) -> tuple[int, int, int, int | None, int]:
    """(heads, key-value heads, head size, window, positions with a relative logit); sliding layers
    have fields of their own.
    """
    if layer_type(f) == "sliding_attention":
        span = f.size("sliding_window")
        return (
            f.size("swa_num_attention_heads"),
            f.size("swa_num_key_value_heads"),
            f.size("swa_head_dim"),
            span,
            span,
        )
    return (
        f.size("num_attention_heads"),
        f.size("num_key_value_heads"),
        f.size("head_dim"),
        None,
        f.size("rel_extent"),
    )


def relative_attention(f: Fields) -> Pieces:
    """Grouped-query attention with a learned logit for each distance, from ``d_rel`` channels per
    head; transformers computes it for every distance that has one.
    """
    heads, kv, dim, span, extent = sizes(f)
    d, relative = width(f), f.size("d_rel")
    return (
        *attention_cost.gqa(d, heads, kv, dim, Attend(heads, dim, dim, window=span)),
        linear(A, "relative_proj", d, heads * relative),
        Piece(A, "relative_logits", relative * extent, heads * relative * extent),
    )


def attention1(f: Fields) -> Pieces:
    heads, kv, dim, _, _ = sizes(f)
    kernel = f.size("conv_kernel_size")
    return (
        *relative_attention(f),
        conv(A, "k_conv", kv * dim, kernel),
        conv(A, "v_conv", kv * dim, kernel),
        *attention_cost.qk_norms("head", heads, kv, dim),
    )


def sink_moe(f: Fields) -> Pieces:
    """The router scores shared experts too: they run always, and take part in the normalisation."""
    d, size, (experts, run), copies = (
        width(f),
        f.size("moe_intermediate_size"),
        used(f),
        f.size("n_shared_experts", 0),
    )
    return (
        linear(Part.ROUTER, "router", d, experts + copies),
        vector(Part.ROUTER, "global_scale", 1),
        *times(layer_cost.gated_ffn(Part.ROUTED, d, size), experts, run),
        *layer_cost.gated_ffn(Part.SHARED, d, copies * size),
    )


def scaled_dense(f: Fields) -> Pieces:
    return (*dense()(f), vector(Part.OTHER, "feed_forward_scale", 1))


def stream_convs(f: Fields) -> Pieces:
    kernel = f.size("conv_kernel_size")
    return (
        conv(Part.OTHER, "attention_conv", width(f), kernel),
        conv(Part.OTHER, "feed_forward_conv", width(f), kernel),
    )


def embed_norm(f: Fields) -> Pieces:
    return (norm("embed_norm", width(f)),)


def attention2(f: Fields) -> Pieces:
    """Inkling 2: output gate, data-dependent sinks and clipped queries; full layers convolve with
    weights read from the input.
    """
    heads, kv, dim, _, _ = sizes(f)
    d, kernel, full = width(f), f.size("conv_kernel_size"), layer_type(f) == "full_attention"

    def time_conv(name: str) -> Pieces:
        dynamic = (linear(A, f"{name}.weights", d, kv * kernel),) if full else ()
        return (conv(A, name, kv * dim, kernel), *dynamic)

    return (
        *relative_attention(f),
        *time_conv("k_conv"),
        *time_conv("v_conv"),
        linear(A, "gate_proj", d, heads * dim),
        linear(A, "sink_proj", d, heads),
        vector(A, "q_clip_scale", heads * dim),
        vector(A, "relative_clip_scale", heads * f.size("d_rel")),
    )


def mix(f: Fields, name: str, queries: int, states: int) -> Pieces:
    """Learned queries that attend to ``states`` states of the residual stream, each both key and
    value.
    """
    d = width(f)
    return (Piece(Part.OTHER, name, queries * d, 2 * queries * states * d),) if queries else ()


def states_before(f: Fields) -> list[tuple[int, int]]:
    """For each layer, how many states its attention and its feed-forward can attend to: the output
    of each block of ``n_layers_per_attn_res_block`` layers, and the stream itself.
    """
    size = f.size("n_layers_per_attn_res_block")
    return [(-(-layer // size) + 1, layer // size + 2) for layer in range(f.num_layers)]


def block_residuals(f: Fields) -> Pieces:
    """Attention over the outputs of earlier blocks of layers: a query vector per input, three in
    full layers (queries, keys, values).
    """
    inputs = (
        (3 if layer_type(f) == "full_attention" else 1) if not f.mark(layer_types.first_only) else 0
    )
    for_attention, for_feed_forward = f.mark(states_before)
    return (
        *mix(f, "attention_input", inputs, for_attention),
        *mix(f, "mlp_input", 1, for_feed_forward),
    )


def norms2(f: Fields) -> Pieces:
    return norms(4 if layer_type(f) == "full_attention" else 2)(f)


def local_types(f: Fields) -> list[str]:
    if f.find("local_layer_ids") is None:
        f.note(
            "layer_types",
            "full_attention in every sixth layer, else sliding_attention (no layer_types)",
        )
    local = set(
        f.numbers("local_layer_ids", [layer for layer in range(f.num_layers) if (layer + 1) % 6])
    )
    return [
        "sliding_attention" if layer in local else "full_attention" for layer in range(f.num_layers)
    ]


inkling = Architecture(
    blocks=(
        attention1,
        choose(sink_moe, scaled_dense),
        norms(2),
        stream_convs,
    ),
    defaults={"layer_types": local_types},
    top=top(may_tie=False, extra=(embed_norm,)),
)


def final_query(f: Fields) -> Pieces:
    blocks = -(-f.num_layers // f.size("n_layers_per_attn_res_block"))
    return (*embed_norm(f), *mix(f, "final_input", 1, blocks + 1))


def loop_width(f: Fields) -> int:
    """Number of layers in the loop."""
    return f.size("loop_layer_index_end") - f.size("loop_layer_index_start")


def looped(*blocks: Block) -> Block:
    """The blocks of a layer as often as it runs. From its second pass on, four messages of the pass
    before (to queries, keys, values and feed-forward) go through a gate each.
    """

    def block(f: Fields) -> Pieces:
        passes, d, rank = f.mark(architectures.passes), width(f), f.size("loop_gate_rank")
        own = tuple(piece._replace(passes=passes) for piece in join(f, blocks))
        if not f.mark(in_loop):
            return own
        blocks_before = loop_width(f) // f.size("n_layers_per_attn_res_block")
        gates = (
            linear(Part.OTHER, f"{place}_message_gate.{name}", *size)
            for place in ("q", "k", "v", "mlp")
            for name, size in (
                ("down_proj", (2 * d, rank)),
                ("forget_gate_proj", (rank, d)),
                ("message_gate_proj", (rank, d)),
            )
        )
        messages = (*gates, *mix(f, "message_input", 4, blocks_before))
        return (*own, *(piece._replace(passes=passes - 1) for piece in messages))

    return block


def in_loop(f: Fields) -> list[bool]:
    """The layers of the loop, also where it runs once."""
    loop = range(f.size("loop_layer_index_start"), f.size("loop_layer_index_end"))
    return [layer in loop for layer in range(f.num_layers)]


def all_rows(f: Fields) -> int:
    rows = f.size("vocab_size")
    f.assume("unpadded_vocab_size", rows, "as many as vocab_size")
    return rows


inkling2 = Architecture(
    blocks=(attention2, moe(), norms2, stream_convs, block_residuals),
    defaults={
        "layer_types": local_types,
        "unpadded_vocab_size": all_rows,
        "n_layers_per_attn_res_block": 6,
    },
    top=top(may_tie=False, head_rows="unpadded_vocab_size", extra=(final_query,)),
)

ROWS = {
    "inkling_text": inkling,
    "inkling2_text": inkling2,
    "inkling2_loop_text": inkling2.variant(blocks=(looped(*inkling2.blocks),)),
}
