"""Models of which transformers has no class: Grok, Klear, Ring-Linear, Nomic's embedding model.

Their pieces follow the code that came with each release; totals are compared with what the
laboratories print.
"""

from moe_lab.accounting import layer_types
from moe_lab.accounting.architecture import Architecture
from moe_lab.accounting.block_factories import (
    by_type,
    choose,
    dense,
    gqa,
    head_dim,
    moe,
    norms,
    shared,
    used,
    width,
)
from moe_lab.accounting.families.grouped_shared import ling_bias
from moe_lab.cost import attention_cost, layer_cost
from moe_lab.cost.parts import Attend, Part, Piece, Pieces, Recur, linear, norm, times, vector
from moe_lab.hf.fields import Fields

UNTIED = {"tie_word_embeddings": False, "attention_bias": False}


def grok_ffn(f: Fields) -> Pieces:
    """Grok-2 (``residual_moe``): a dense feed-forward beside the experts, which are narrower."""
    residual = f.truth("residual_moe")
    size = "moe_intermediate_size" if f.find("moe_intermediate_size") else "intermediate_size"
    return (*moe(size)(f), *(dense()(f) if residual else ()))


def klear_ffn(f: Fields) -> Pieces:
    """Selection biases, shared experts, and a gate that weighs the two sums."""
    gate = linear(Part.SHARED, "coefficient", width(f), 2, bias=True)
    return (*moe(score_bias=True, extra=(shared(),))(f), gate)


def ring_linear(f: Fields) -> Pieces:
    """Lightning attention with norms of heads, a gate of its full width and a grouped norm."""
    d, heads = width(f), f.size("num_attention_heads")
    dim = head_dim(f, heads)
    whole = heads * dim
    a = Part.ATTENTION
    return (
        linear(a, "query_key_value", d, 3 * whole, f.flag("use_qkv_bias")),
        linear(a, "g_proj", d, whole),
        linear(a, "dense", whole, d, f.flag("use_bias")),
        norm("g_norm", whole),
        *attention_cost.qk_norms("head" if f.flag("use_qk_norm") else "none", heads, heads, dim),
        Piece(a, "recurrence", kernel=Recur(2 * heads * dim * dim), state=heads * dim * dim),
    )


def ring_types(f: Fields) -> list[str]:
    """Softmax attention in every ``layer_group_size``-th layer, and in those after the last whole
    group.
    """
    group, layers = f.size("layer_group_size"), f.num_layers
    return [
        "full_attention"
        if (layer + 1) % group == 0 or layer >= layers // group * group
        else "linear_attention"
        for layer in range(layers)
    ]


def nomic_attention(f: Fields) -> Pieces:
    d, heads = width(f), f.size("num_attention_heads")
    dim, bias = head_dim(f, heads), f.flag("qkv_proj_bias")
    kernel = Attend(heads, dim, dim, causal=False)
    return attention_cost.gqa(d, heads, heads, dim, kernel, bias=bias, out_bias=bias)


def nomic_experts(f: Fields) -> Pieces:
    """Two matrices for each expert and one bias for all of them."""
    experts, run = used(f)
    d = width(f)
    return (
        linear(Part.ROUTER, "router", d, experts),
        *times(layer_cost.plain_ffn(Part.ROUTED, d, f.size("n_inner")), experts, run),
        vector(Part.OTHER, "experts.bias", d),
    )


def nomic_dense(f: Fields) -> Pieces:
    return layer_cost.plain_ffn(Part.DENSE, width(f), f.size("n_inner"), f.flag("mlp_fc1_bias"))


def nomic_ends(f: Fields) -> Pieces:
    """Word and type embeddings and their norm; no head."""
    d, types = width(f), f.size("type_vocab_size", 0)
    return (
        Piece(Part.EMBEDDING, "word_embeddings", f.size("vocab_size") * d),
        Piece(Part.EMBEDDING, "token_type_embeddings", types * d),
        norm("emb_ln", d, bias=True),
    )


ROWS = {
    "grok1": Architecture(blocks=(gqa(), grok_ffn, norms(4)), defaults=UNTIED),
    "klear": Architecture(
        blocks=(gqa(bias="attention_bias", norms="head"), choose(klear_ffn, dense()), norms(2)),
        defaults=UNTIED,
    ),
    "bailing_moe_linear": Architecture(
        blocks=(
            by_type(
                {
                    "full_attention": gqa(
                        bias="use_qkv_bias", out_bias="use_bias", norms="use_qk_norm"
                    ),
                    "linear_attention": ring_linear,
                }
            ),
            choose(moe(extra=(ling_bias, shared())), dense()),
            norms(2),
        ),
        defaults={
            **UNTIED,
            "use_qkv_bias": False,
            "use_bias": False,
            "use_qk_norm": True,
            "layer_types": ring_types,
            "num_key_value_heads": layer_types.kv_is_heads,
        },
    ),
    "nomic_bert": Architecture(
        blocks=(nomic_attention, choose(nomic_experts, nomic_dense), norms(2, bias=True)),
        defaults={"qkv_proj_bias": True, "mlp_fc1_bias": True, "type_vocab_size": 1},
        top=nomic_ends,
    ),
}
