"""Multi-head latent attention outside DeepSeek: GLM-4.7-Flash, GLM-5 and Mistral Large 4."""

from moe_lab.accounting import layer_types
from moe_lab.accounting.block_factories import (
    by_type,
    choose,
    dense,
    indexer,
    layer_type,
    mla,
    moe,
    norms,
    shared,
    shares_selection,
    top,
    width,
)
from moe_lab.accounting.families.deepseek import BASE, deepseek_v3, deepseek_v32, hyper_connections
from moe_lab.accounting.families.linear import kimi_delta
from moe_lab.cost import attention_cost
from moe_lab.cost.parts import Part, Pieces, linear, norm, vector
from moe_lab.errors import require
from moe_lab.hf.fields import Fields


def pooled_indexer(f: Fields) -> Pieces:
    """GLM-5-Next scores keys that pool ``index_kpool`` positions."""
    pieces, dim, stride = indexer(f), f.size("index_head_dim"), f.size("index_kpool")
    if not pieces:
        return ()
    pool = (
        vector(Part.ATTENTION, "indexer.pool_bias", stride * dim),
        linear(Part.ATTENTION, "indexer.pool_gate", width(f), dim),
    )
    strided = (
        piece._replace(kernel=piece.kernel._replace(stride=stride)) if piece.kernel else piece
        for piece in pieces
    )
    return (*strided, *pool)  # type: ignore[arg-type]


def borrows_latent(f: Fields) -> list[bool]:
    """The layers that read the key-value latent of an earlier one (``kv_source_layers``)."""
    sources = f.numbers("kv_source_layers", range(f.num_layers))
    require(
        len(sources) == f.num_layers,
        f"kv_source_layers with num_hidden_layers = {f.num_layers} entries",
        len(sources),
    )
    return [source != layer for layer, source in enumerate(sources)]


def rotary_layers(f: Fields) -> list[bool]:
    """``no_rope_layers`` has 1 where there are rotary positions; without it every
    ``no_rope_layer_interval``-th layer has none.
    """
    if f.find("no_rope_layers") is not None:
        return [bool(mark) for mark in f.per_layer("no_rope_layers")]
    step = f.size("no_rope_layer_interval")
    return [(layer + 1) % step != 0 for layer in range(f.num_layers)]


def large4_attention(f: Fields) -> Pieces:
    """Latent attention without a query latent; some layers have no rotary part, some share the
    latent of an earlier layer.
    """
    d, heads, rank, v = (
        width(f),
        f.size("num_attention_heads"),
        f.size("kv_lora_rank"),
        f.size("v_head_dim"),
    )
    nope, rope = f.size("qk_nope_head_dim", 0), f.size("qk_rope_head_dim", 0)
    rotary = f.mark(rotary_layers)
    split = (nope, rope) if rotary else (nope + rope, 0)
    latent = not f.mark(borrows_latent)
    return (
        *attention_cost.mla_query(d, heads, None, nope + rope),
        *attention_cost.mla_kv(
            d,
            heads,
            rank,
            *split,
            v,
            bias=f.flag("attention_bias"),
            latent=latent,
        ),
        vector(Part.ATTENTION, "softmax_scale", 2 * heads),
        *large4_indexer(f),
        attention_cost.mla_scores(
            heads,
            rank,
            *split,
            v,
            top=f.size("index_topk") if layer_type(f) == "indexed_attention" else None,
            latent=latent,
        ),
    )


def large4_indexer(f: Fields) -> Pieces:
    """Reads the normed stream; each index head has a learned scale and shift."""
    if shares_selection(f):
        return ()
    d, heads, dim = width(f), f.size("index_n_heads"), f.size("index_head_dim")
    return (
        *attention_cost.indexer(d, d, heads, dim),
        norm("indexer.q_input_norm", d, bias=True),
        vector(Part.ATTENTION, "indexer.softmax_scale", 2 * heads),
    )


def rotary_scale(f: Fields) -> Pieces:
    """One learned factor per rotary frequency for the whole model: a buffer in transformers 5.23, a
    parameter since 5.24, stored by both.
    """
    return (vector(Part.OTHER, "rotary_emb.alpha", (f.size("qk_rope_head_dim") + 1) // 2),)


glm_moe_dsa = deepseek_v32.variant(defaults={"indexer_types": layer_types.indexer_types})

ROWS = {
    "glm4_moe_lite": deepseek_v3.variant(
        blocks=(
            mla(),
            choose(moe(extra=(shared(),)), dense()),
            norms(2),
        )
    ),
    "glm_moe_dsa": glm_moe_dsa,
    "glm5_next_text": glm_moe_dsa.variant(
        blocks=(
            by_type(
                {"linear_attention": kimi_delta, "indexed_attention": mla(index=pooled_indexer)}
            ),
            choose(moe(extra=(shared(),)), dense()),
            norms(2),
            hyper_connections(2, 1, 3),
        ),
        defaults={
            "layer_types": layer_types.every_nth_full(4, "linear_attention", "indexed_attention")
        },
    ),
    "mistral_large4_text": deepseek_v32.variant(
        blocks=(large4_attention, *deepseek_v32.blocks[1:]),
        defaults={
            **BASE,
            "no_rope_layer_interval": 4,
            "indexer_types": layer_types.indexer_types,
        },
        top=top(extra=(rotary_scale,)),
    ),
}
