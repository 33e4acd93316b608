"""DeepSeek (V2, V3, V3.2, V4) and the models that took over its block: Kimi K2, dots, Mistral 4,
GLM, and others.
"""

from collections.abc import Mapping
from typing import Any

from moe_lab.accounting import layer_types
from moe_lab.accounting.architecture import Architecture
from moe_lab.accounting.block_factories import (
    Block,
    choose,
    dense,
    gqa,
    indexer,
    layer_type,
    mla,
    moe,
    norms,
    shared,
    sinks,
    top,
    width,
)
from moe_lab.cost import attention_cost, layer_cost
from moe_lab.cost.parts import Attend, Index, Part, Piece, Pieces, linear, norm, vector
from moe_lab.errors import ConfigError, expected
from moe_lab.hf.architectures import sparse
from moe_lab.hf.fields import Fields

BASE = {"tie_word_embeddings": False, "attention_bias": False}


def v2_attention(f: Fields) -> Pieces:
    """Latent attention, or with ``use_mla`` false (DeepSeek-OCR) plain attention."""
    return (mla() if f.truth("use_mla", True) else gqa(bias="attention_bias"))(f)


deepseek_v3 = Architecture(
    blocks=(
        mla(),
        choose(moe(extra=(shared(),)), dense()),
        norms(2),
    ),
    defaults=BASE,
)
deepseek_v2 = deepseek_v3.variant(
    blocks=(
        v2_attention,
        choose(
            moe(extra=(shared(bias="mlp_bias", even_none=True),)),
            dense(bias="mlp_bias"),
        ),
        norms(2),
    ),
    defaults={"mlp_bias": False, "num_key_value_heads": layer_types.kv_is_heads},
)
deepseek_v32 = deepseek_v3.variant(
    blocks=(mla(index=indexer), *deepseek_v3.blocks[1:]),
    defaults={"layer_types": layer_types.all_of("indexed_attention")},
)
deepseek_ocr2 = deepseek_v2.variant(
    blocks=(
        gqa(bias="attention_bias"),
        choose(
            moe(extra=(shared(bias="mlp_bias", even_none=True),)),
            dense(bias="mlp_bias"),
        ),
        norms(2),
    ),
    defaults={"num_key_value_heads": layer_types.kv_is_heads},
)
dots1 = deepseek_v3.variant(
    blocks=(gqa(bias="attention_bias", norms="head"), *deepseek_v3.blocks[1:]),
)
mistral4 = deepseek_v3
axk1 = deepseek_v3.variant(
    blocks=(
        mla(),
        choose(
            moe(extra=(shared(), lambda f: (norm("post_mlp_norm", width(f)),))),
            dense(),
        ),
        norms(2),
    ),
)


# --------------------------------------------------------------------------------------------------
# DeepSeek-V4

CSA, HCA = "compressed_sparse_attention", "heavily_compressed_attention"
_BY_RATIO = {0: "sliding_attention", 4: CSA, 128: HCA}
_USUAL_RATE = {CSA: 4, HCA: 128}


def v4_types(f: Fields) -> list[str]:
    """From ``compress_ratios``: 0 sliding window, 4 compressed sparse, 128 heavily compressed."""
    if f.find("compress_ratios") is not None:
        ratios = f.numbers("compress_ratios")
        if unknown := sorted(set(ratios) - set(_BY_RATIO)):
            raise ConfigError(expected("compress_ratios of 0, 4 and 128", unknown))
        return [_BY_RATIO[ratio] for ratio in f.per_layer("compress_ratios")]
    types = [HCA if layer < 2 or layer % 2 == 0 else CSA for layer in range(f.num_layers)]
    return layer_types.usual_types(f, types, f"{HCA} and {CSA} in turn after two of the former")


def v4_core(f: Fields) -> Pieces:
    """Queries from a latent, one key-value head of which keys are values, grouped low-rank output
    (arXiv 2606.19348), and a sliding window.
    """
    d, heads, dim, rank = (
        width(f),
        f.size("num_attention_heads"),
        f.size("head_dim"),
        f.size("q_lora_rank"),
    )
    groups, rank_out = f.size("o_groups"), f.size("o_lora_rank")
    a = Part.ATTENTION
    return (
        linear(a, "q_a_proj", d, rank),
        norm("q_a_norm", rank),
        linear(a, "q_b_proj", rank, heads * dim),
        linear(a, "kv_proj", d, dim),
        norm("kv_norm", dim),
        linear(a, "o_a_proj", heads * dim // groups, groups * rank_out),
        linear(a, "o_b_proj", groups * rank_out, d),
        vector(a, "sinks", heads),
        attention_cost.scores(Attend(heads, dim, dim, window=f.size("sliding_window"), cached=dim)),
    )


def v4_attention(f: Fields) -> Pieces:
    kind = layer_type(f)
    compressed = {CSA: v4_sparse, HCA: v4_heavy}[kind](f) if kind != "sliding_attention" else ()
    return (*v4_core(f), *compressed)


def _compressor(name: str, d: int, dim: int, rate: int, doubled: int) -> Pieces:
    """Pools ``rate`` positions into one key; CSA blocks overlap, hence two sets of weights
    (``doubled`` 2).
    """
    return (
        linear(Part.ATTENTION, f"{name}.kv_proj", d, doubled * dim),
        linear(Part.ATTENTION, f"{name}.gate_proj", d, doubled * dim),
        vector(Part.ATTENTION, f"{name}.position_bias", rate * doubled * dim),
        norm(f"{name}.norm", dim),
    )


def _rate(f: Fields, kind: str) -> int:
    return f.check_size(
        f"compress_rates.{kind}", f.table("compress_rates").get(kind, _USUAL_RATE[kind])
    )


def v4_heavy(f: Fields) -> Pieces:
    heads, dim, rate = f.size("num_attention_heads"), f.size("head_dim"), _rate(f, HCA)
    return (
        *_compressor("compressor", width(f), dim, rate, 1),
        attention_cost.scores(Attend(heads, dim, dim, stride=rate, cached=dim)),
    )


def v4_sparse(f: Fields) -> Pieces:
    heads, dim, rate = f.size("num_attention_heads"), f.size("head_dim"), _rate(f, CSA)
    index_heads, index_dim, d = f.size("index_n_heads"), f.size("index_head_dim"), width(f)
    return (
        *_compressor("compressor", d, dim, rate, 2),
        *_compressor("indexer", d, index_dim, rate, 2),
        linear(Part.ATTENTION, "indexer.q_b_proj", f.size("q_lora_rank"), index_heads * index_dim),
        linear(Part.ATTENTION, "indexer.weights_proj", d, index_heads),
        Piece(
            Part.ATTENTION,
            "indexer.scores",
            kernel=Index(index_heads, index_dim, rate, cached=index_dim),
        ),
        attention_cost.scores(
            Attend(heads, dim, dim, stride=rate, top=f.size("index_topk"), cached=dim)
        ),
    )


def hyper_connections(outputs: int, per_stream: int, scales: int) -> Block:
    """Two per layer, around attention and around the feed-forward: ``outputs + per_stream * n``
    groups of n mixing weights.
    """

    def block(f: Fields) -> Pieces:
        n, d = f.size("hc_mult"), width(f)
        made = (
            layer_cost.hyper_connection(n, d, (outputs + per_stream * n) * n, scales, name)
            for name in ("attn_hc", "ffn_hc")
        )
        return tuple(piece for pieces in made for piece in pieces)

    return block


def hyper_head(f: Fields) -> Pieces:
    """Mixes the streams into one before the head."""
    return layer_cost.hyper_connection(f.size("hc_mult"), width(f), f.size("hc_mult"), 1, "hc_head")


def v4_shared(f: Fields) -> Pieces:
    """One shared expert, of the routed ones' width."""
    copies = f.size_or("n_shared_experts", 1)
    if copies != 1:
        f.note(
            "n_shared_experts",
            f"one shared expert (transformers builds one, the configuration has n_shared_experts "
            f"= {copies})",
        )
    return layer_cost.gated_ffn(
        Part.SHARED, width(f), f.size("moe_intermediate_size"), f.flag("mlp_bias")
    )


deepseek_v4 = Architecture(
    blocks=(v4_attention, moe(extra=(v4_shared,)), norms(2), hyper_connections(2, 1, 3)),
    defaults={**BASE, "mlp_bias": False, "layer_types": v4_types},
    top=top(extra=(hyper_head,)),
)


# -------------------------------------------------------------------------------------------
# further users of latent attention


def gated_norms(f: Fields) -> Pieces:
    """A.X-K2: norms with a small gating network; the second one only before an MoE."""
    d, rank = width(f), f.size("gated_norm_rank")
    gated = 2 if f.mark(sparse) else 1
    gates = (
        linear(Part.OTHER, f"norm_gate_{name}_{index}", *size)
        for index in range(gated)
        for name, size in _gate(d, rank)
    )
    return (norm("input_norm", d), norm("post_attention_norm", d), *gates)


def _gate(d: int, rank: int) -> tuple[tuple[str, tuple[int, int]], ...]:
    return (("down", (d, rank)), ("up", (rank, d)))


def axk2_attention(f: Fields) -> Pieces:
    """Latent attention whose query projection reads the latent and its norm side by side and also
    yields the output gate.
    """
    d, heads, rank = width(f), f.size("num_attention_heads"), f.size("q_lora_rank")
    rank_kv, nope, rope, v = (
        f.size("kv_lora_rank"),
        f.size("qk_nope_head_dim", 0),
        f.size("qk_rope_head_dim", 0),
        f.size("v_head_dim"),
    )
    bias = f.flag("attention_bias")
    return (
        linear(Part.ATTENTION, "q_a_proj", d, rank, bias),
        norm("q_a_norm", rank),
        linear(Part.ATTENTION, "q_gate_proj", 2 * rank, heads * (nope + rope + v)),
        *attention_cost.mla_kv(d, heads, rank_kv, nope, rope, v, bias=bias),
        *indexer(f),
        attention_cost.mla_scores(heads, rank_kv, nope, rope, v, top=f.size("index_topk")),
    )


def dots3_extras(f: Fields) -> Pieces:
    """A norm of the shared rotary key and one output gate per head."""
    d, heads = width(f), f.size("num_attention_heads")
    return (
        norm("k_rope_norm", f.size("qk_rope_head_dim")),
        linear(Part.ATTENTION, "gate_proj", d, heads),
    )


def dots3_types(f: Fields) -> list[str]:
    types = [
        "indexed_attention" if layer < 2 or layer % 4 == 1 else "sliding_attention"
        for layer in range(f.num_layers)
    ]
    return layer_types.usual_types(
        f,
        types,
        "indexed_attention in the first two and every fourth layer, else sliding_attention",
    )


DOTS3_SLIDING = {
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "q_lora_rank": 1024,
    "kv_lora_rank": 1024,
    "head_dim": 256,
    "qk_nope_head_dim": 192,
    "v_head_dim": 128,
}


def dots3_sliding(f: Fields) -> Mapping[int, Mapping[str, Any]]:
    """Sliding layers have latent attention of other sizes, in fields that begin with ``swa_``."""
    layers = [
        layer
        for layer, kind in enumerate(f.per_layer("layer_types"))
        if kind == "sliding_attention"
    ]
    if not layers:
        return {}
    for name, usual in DOTS3_SLIDING.items():
        if f.find(f"swa_{name}") is None:
            f.assume(f"swa_{name}", usual)
    own = {name: f.size_or(f"swa_{name}", usual) for name, usual in DOTS3_SLIDING.items()}
    rope = f.size_or("swa_qk_rope_head_dim", own["head_dim"] - own["qk_nope_head_dim"])
    return {layer: {**own, "qk_rope_head_dim": rope} for layer in layers}


def hy4_indexers(f: Fields) -> list[str]:
    f.note(
        "indexer_types",
        "every fourth layer selects tokens, the next three share its selection (no indexer_types)",
    )
    return ["full" if not layer or layer % 4 == 1 else "shared" for layer in range(f.num_layers)]


def hy4_gate(f: Fields) -> Pieces:
    return (
        linear(
            Part.ATTENTION,
            "gate_proj",
            width(f),
            f.size("num_attention_heads") * f.size("v_head_dim"),
        ),
    )


axk2 = axk1.variant(
    blocks=(axk2_attention, choose(moe(extra=(shared(),)), dense()), gated_norms),
    defaults={"layer_types": layer_types.all_of("indexed_attention")},
)
dots3_note = deepseek_v32.variant(
    blocks=(
        mla(index=indexer, extra=(dots3_extras,)),
        choose(
            moe(extra=(shared("shared_experts_intermediate_size"),)),
            dense(),
        ),
        norms(2),
    ),
    defaults={"layer_types": dots3_types},
    overrides=dots3_sliding,
)
hy_v4 = deepseek_v32.variant(
    blocks=(
        mla(index=indexer, extra=(hy4_gate, sinks)),
        choose(moe(extra=(shared(),)), dense()),
        norms(2),
        hyper_connections(2, 0, 2),
    ),
    defaults={
        "indexer_types": hy4_indexers,
    },
    top=top(extra=(hyper_head,)),
)

sarvam_mla = deepseek_v3.variant(defaults={"q_lora_rank": None})

ROWS = {
    "deepseek_v2": deepseek_v2,
    "deepseek_v3": deepseek_v3,
    "deepseek_v32": deepseek_v32,
    "deepseek_v4": deepseek_v4,
    "deepseek_ocr2_text": deepseek_ocr2,
    "unlimited_ocr_text": deepseek_ocr2,
    "dots1": dots1,
    "dots3_note_text": dots3_note,
    "mistral4": mistral4,
    "axk1": axk1,
    "axk2": axk2,
    "hy_v4": hy_v4,
    "sarvam_mla": sarvam_mla,
}
