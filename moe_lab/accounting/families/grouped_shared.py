"""Decoders with grouped-query attention whose MoE layers also have shared experts."""

from collections.abc import Mapping
from typing import Any

from moe_lab.accounting import layer_types
from moe_lab.accounting.architecture import Architecture, mtp_module
from moe_lab.accounting.block_factories import (
    Block,
    choose,
    dense,
    gate,
    gqa,
    head_dim,
    heads_of,
    join,
    layer_type,
    moe,
    norms,
    shared,
    sinks,
    top,
    used,
    width,
    window,
)
from moe_lab.accounting.families.grouped import BIASED, KV_IS_HEADS, UNTIED
from moe_lab.cost import attention_cost, layer_cost
from moe_lab.cost.parts import (
    Attend,
    ExpertsRun,
    Index,
    Part,
    Piece,
    Pieces,
    linear,
    norm,
    times,
    vector,
)
from moe_lab.errors import require
from moe_lab.hf.fields import Fields

glm4_moe = Architecture(
    blocks=(
        gqa(bias="attention_bias", out_bias=False, norms="use_qk_norm"),
        choose(moe(extra=(shared(),)), dense()),
        norms(2),
    ),
    defaults={**BIASED, "use_qk_norm": False},
)
afmoe = Architecture(
    blocks=(
        gqa(bias="attention_bias", norms="head", extra=(gate("width"),)),
        choose(
            moe(score_bias=True, extra=(shared(),)),
            dense(),
        ),
        norms(4),
    ),
    defaults={
        **BIASED,
        **KV_IS_HEADS,
        "head_dim": 128,
        "global_attn_every_n_layers": 4,
        "layer_types": layer_types.every_nth_full(
            "global_attn_every_n_layers", "sliding_attention"
        ),
    },
)


def ernie_module(architecture: Architecture, f: Fields, index: int) -> Pieces:
    """ERNIE's MTP module has a dense feed-forward."""
    f.note("mtp", "an MTP module is attention, a dense feed-forward, three norms and a projection")
    return mtp_module(f, join(f.at(0), (gqa(bias="use_bias"), dense(bias="use_bias"), norms(2))))


ernie = Architecture(
    blocks=(
        gqa(bias="use_bias"),
        choose(
            moe(score_bias=True, extra=(shared(bias="use_bias"),)),
            dense(bias="use_bias"),
        ),
        norms(2),
    ),
    defaults={
        "tie_word_embeddings": True,
        "use_bias": False,
    },
    top=top(head_bias="use_bias"),
    mtp=ernie_module,
)


def ernie_vl_moe(f: Fields) -> Pieces:
    """Text and vision have experts of their own size and a router each; a text token runs only the
    text experts.
    """
    sizes = f.numbers("moe_intermediate_size")
    require(
        len(sizes) == 2 and min(sizes) >= 1,
        "moe_intermediate_size as two widths, of text and of vision experts",
        list(sizes),
    )
    text, vision = sizes
    d, (experts, run) = width(f), used(f)
    pieces: Pieces = ()
    others = f.size_or("moe_num_vision_experts", experts)
    for kind, copies, size, runs in (
        ("text", experts, text, run),
        ("vision", others, vision, ExpertsRun(0, 0, 0)),
    ):
        router = (
            linear(Part.ROUTER, f"{kind}_router", d, copies),
            vector(Part.ROUTER, f"{kind}_score_bias", copies),
        )
        pieces += (*router, *times(layer_cost.gated_ffn(Part.ROUTED, d, size), copies, runs))
    channels = text * f.size("n_shared_experts", 0)
    return (
        *pieces,
        *(layer_cost.gated_ffn(Part.SHARED, d, channels, f.flag("use_bias")) if channels else ()),
    )


def cohere_dense(f: Fields) -> Pieces:
    return layer_cost.gated_ffn(
        Part.DENSE,
        width(f),
        f.size_or("prefix_dense_intermediate_size", f.size("intermediate_size"), 1),
    )


def chunked(f: Fields) -> Pieces:
    """Llama 4: attention within chunks in all layers but every fourth."""
    heads, kv, dim = heads_of(f)
    chunk = f.size("attention_chunk_size") if layer_type(f) == "chunked_attention" else None
    bias = f.flag("attention_bias")
    return attention_cost.gqa(
        width(f), heads, kv, dim, Attend(heads, dim, dim, chunk=chunk), bias=bias, out_bias=bias
    )


def owns_keys(f: Fields) -> list[bool]:
    share = f.size("cla_share_factor") if f.flag("use_cla") else 1
    return [layer % share == 0 for layer in range(f.num_layers)]


def cross_layer_attention(f: Fields) -> Pieces:
    """Hunyuan-Large: keys and values of every ``cla_share_factor``-th layer serve the layers up to
    the next.
    """
    heads, kv, dim = heads_of(f)
    pieces = attention_cost.gqa(width(f), heads, kv, dim, Attend(heads, dim, dim))
    return pieces if f.mark(owns_keys) else attention_cost.borrowed(pieces)


def gated_per_layer(f: Fields) -> Pieces:
    """Laguna, Step-3.7: an output gate, and a number of heads that may differ between layers."""
    varying = f.find("num_attention_heads_per_layer") is not None
    heads = f.size("num_attention_heads_per_layer" if varying else "num_attention_heads")
    kv, dim, d, bias = (
        f.size("num_key_value_heads"),
        head_dim(f, heads),
        width(f),
        f.flag("attention_bias"),
    )
    gates = heads if f.get("gating") in (True, "per-head") else heads * dim
    return (
        *attention_cost.gqa(
            d, heads, kv, dim, Attend(heads, dim, dim, window=window(f)), bias=bias, out_bias=bias
        ),
        *attention_cost.qk_norms("head", heads, kv, dim),
        linear(Part.ATTENTION, "gate_proj", d, gates),
    )


def flint_types(f: Fields) -> list[str]:
    last = f.num_layers - 1
    types = [
        "full_attention" if n < 2 or n % 4 == 1 or n == last else "sliding_attention"
        for n in range(f.num_layers)
    ]
    return layer_types.usual_types(
        f,
        types,
        "full_attention in the first two, every fourth and the last layer, else sliding_attention",
    )


def step3_sliding(f: Fields) -> Mapping[int, Mapping[str, Any]]:
    """Sliding layers have their own number of heads."""
    other = f.table("attention_other_setting").get("num_attention_heads")
    heads = f.optional("num_sliding_attention_heads", other)
    sliding = [
        layer
        for layer, kind in enumerate(f.per_layer("layer_types"))
        if kind == "sliding_attention"
    ]
    return {} if heads is None else {layer: {"num_attention_heads": heads} for layer in sliding}


def m3_attention(f: Fields) -> Pieces:
    """MiniMax-M3: in sparse layers a few index heads choose blocks of keys."""
    pieces = gqa(norms="head")(f)
    if layer_type(f) != "minimax_m3_sparse":
        return pieces
    heads, dim = f.size("index_n_heads"), f.size("index_head_dim")
    top_k = f.size("index_topk_blocks") * f.size("index_block_size")
    attend = tuple(attention_cost.sparse(piece, top_k) for piece in pieces)
    a = Part.ATTENTION
    return (
        *attend,
        linear(a, "indexer.q_proj", width(f), heads * dim),
        linear(a, "indexer.k_proj", width(f), dim),
        norm("indexer.q_norm", dim),
        norm("indexer.k_norm", dim),
        Piece(a, "indexer.scores", kernel=Index(heads, dim, cached=dim)),
    )


def ling_bias(f: Fields) -> Pieces:
    """Ling 2.0 stores the selection bias with the weights."""
    return (
        (vector(Part.ROUTER, "score_bias", f.size("num_experts")),)
        if f.truth("moe_router_enable_expert_bias")
        else ()
    )


def one_shared(size: str) -> Block:
    """A single shared expert of the width of the routed ones, which no field announces."""
    return lambda f: layer_cost.gated_ffn(Part.SHARED, width(f), f.size(size))


ROWS = {
    "glm4_moe": glm4_moe,
    "sarvam_moe": glm4_moe.variant(defaults={"use_qk_norm": True}),
    "glm4v_moe_text": glm4_moe.variant(
        blocks=(gqa(bias="attention_bias", out_bias=False), *glm4_moe.blocks[1:]),
        defaults={"attention_bias": True},
    ),
    "solar_open": glm4_moe.variant(
        blocks=(gqa(bias="attention_bias", out_bias=False), moe(extra=(shared(),)), norms(2)),
        defaults={"head_dim": 128},
    ),
    "afmoe": afmoe,
    "aria_text": Architecture(
        blocks=(
            gqa(bias="attention_bias"),
            moe(
                "intermediate_size",
                extra=(shared("intermediate_size", bias="mlp_bias", even_none=True),),
            ),
            norms(2),
        ),
        defaults={**BIASED, **KV_IS_HEADS, "mlp_bias": False},
    ),
    "bailing_moe": Architecture(
        blocks=(
            gqa(bias="use_qkv_bias", out_bias="use_bias", norms="use_qk_norm"),
            choose(moe(extra=(ling_bias, shared())), dense()),
            norms(2),
        ),
        defaults={**UNTIED, "use_qkv_bias": False, "use_bias": False, "use_qk_norm": False},
    ),
    "cohere2_moe": Architecture(
        blocks=(
            gqa(bias="attention_bias"),
            choose(
                moe("intermediate_size", extra=(shared("intermediate_size"),)),
                cohere_dense,
            ),
            norms(1),
        ),
        defaults={
            "tie_word_embeddings": True,
            "attention_bias": False,
            **KV_IS_HEADS,
            "head_dim": 128,
            "n_shared_experts": 0,
            "sliding_window_pattern": 4,
            "layer_types": layer_types.every_nth_full(
                "sliding_window_pattern", "sliding_attention"
            ),
        },
    ),
    "ernie4_5_moe": ernie,
    "ernie4_5_vl_moe_text": ernie.variant(
        blocks=(
            gqa(bias="use_bias"),
            choose(ernie_vl_moe, dense(bias="use_bias")),
            norms(2),
        ),
        defaults={"moe_intermediate_size": (1536, 512)},
        top=top(),
    ),
    "exaone_moe": Architecture(
        blocks=(
            gqa(norms="head"),
            choose(moe(extra=(shared(),)), dense()),
            norms(2),
        ),
        defaults={
            **UNTIED,
            "sliding_window_pattern": 4,
            "layer_types": layer_types.every_nth_full(
                "sliding_window_pattern", "sliding_attention"
            ),
        },
    ),
    "flint": Architecture(
        blocks=(
            gqa(bias="attention_bias", norms="head", extra=(sinks,)),
            choose(
                moe(extra=(shared("shared_expert_intermediate_size", counted=False),)),
                dense(),
            ),
            norms(2),
        ),
        defaults={
            **BIASED,
            "head_dim": 128,
            "layer_types": flint_types,
        },
    ),
    "hunyuan": Architecture(
        blocks=(
            cross_layer_attention,
            moe("intermediate_size", extra=(shared("intermediate_size"),)),
            norms(2),
        ),
        defaults={**UNTIED, "use_cla": False},
    ),
    "hunyuan_v1_moe": Architecture(
        blocks=(
            gqa(bias="attention_bias", norms="head"),
            moe("intermediate_size", extra=(one_shared("intermediate_size"),)),
            norms(2),
        ),
        defaults={**BIASED, **KV_IS_HEADS},
    ),
    "hy_v3": Architecture(
        blocks=(
            gqa(bias="attention_bias", norms="head"),
            choose(
                moe(extra=(shared(bias="mlp_bias", even_none=True),)),
                dense(bias="mlp_bias"),
            ),
            norms(2),
        ),
        defaults={**BIASED, "head_dim": 128, "mlp_bias": False},
    ),
    "kolibri1": Architecture(
        blocks=(
            gqa(norms="head"),
            moe(extra=(shared("shared_expert_intermediate_size", counted=False),)),
            norms(4),
        ),
        defaults={
            **UNTIED,
            "head_dim": 128,
            "layer_types": layer_types.every_nth_full(5, "sliding_attention"),
        },
    ),
    "laguna": Architecture(
        blocks=(
            gated_per_layer,
            choose(
                moe(
                    score_bias=True,
                    extra=(shared("shared_expert_intermediate_size", counted=False),),
                ),
                dense(),
            ),
            norms(2),
        ),
        defaults={
            **BIASED,
            "head_dim": 128,
            "gating": True,
            "layer_types": layer_types.all_of("full_attention"),
        },
    ),
    "llama4_text": Architecture(
        blocks=(
            chunked,
            choose(
                moe("intermediate_size", extra=(one_shared("intermediate_size"),)),
                dense("intermediate_size_mlp"),
            ),
            norms(2),
        ),
        defaults={
            **BIASED,
            **KV_IS_HEADS,
            "head_dim": 128,
            "attention_chunk_size": 8192,
            "no_rope_layer_interval": 4,
            "layer_types": layer_types.every_nth_full(
                "no_rope_layer_interval", "chunked_attention"
            ),
        },
    ),
    "minimax_m3_vl_text": Architecture(
        blocks=(
            m3_attention,
            choose(
                moe(
                    "intermediate_size", extra=(shared("shared_intermediate_size", counted=False),)
                ),
                dense("dense_intermediate_size"),
            ),
            norms(2),
        ),
        defaults={
            **UNTIED,
            "head_dim": 128,
            "index_topk_blocks": 16,
            "index_block_size": 128,
            "layer_types": layer_types.all_of("full_attention"),
        },
    ),
    "step3p5": Architecture(
        blocks=(
            gated_per_layer,
            choose(
                moe(
                    extra=(
                        shared("shared_expert_intermediate_size", counted=False, bias="mlp_bias"),
                    )
                ),
                dense(bias="mlp_bias"),
            ),
            norms(2),
        ),
        defaults={
            **BIASED,
            "head_dim": 128,
            "gating": True,
            "mlp_bias": False,
            "layer_types": layer_types.all_of("full_attention"),
        },
        overrides=step3_sliding,
    ),
}
