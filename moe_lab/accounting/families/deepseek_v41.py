"""DeepSeek-V4.1: a causal encoder-decoder. A prompt runs through the layers before the last one
that makes compressed keys (``kv_source_layer_ids``). The layers from there on all read these keys,
and run for generated tokens only.

Source: the released ``config.json`` and ``inference/model.py`` as several ports quote them, with
the shapes of the checkpoint (``engram.wkv`` [25600, 6144], ``hc_attn_fn`` [24, 20480]). Layer i has
compressed keys of ``compress_ratios[i]`` tokens (0: a sliding window alone). It makes them itself
in a layer of ``kv_source_layer_ids``, selects among them in one of ``index_source_layer_ids``, and
else takes over keys and selection of the last such layer.
"""

from moe_lab.accounting.architecture import Architecture, mtp_module
from moe_lab.accounting.block_factories import Block, join, moe, norms, top, width
from moe_lab.accounting.families.deepseek import (
    BASE,
    deepseek_v4,
    hyper_connections,
    v4_core,
    v4_shared,
)
from moe_lab.cost import attention_cost
from moe_lab.cost.parts import Attend, Index, Part, Piece, Pieces, linear, norm, vector
from moe_lab.errors import ConfigError, expected
from moe_lab.hf.configuration import edited
from moe_lab.hf.fields import Fields

A = Part.ATTENTION


def ratios(f: Fields) -> list[int]:
    """The compression of each layer; entries beyond the last layer describe draft modules."""
    return [f.check_size("compress_ratios", ratio, 0) for ratio in f.per_layer("compress_ratios")]


def makes_keys(f: Fields) -> list[bool]:
    listed = set(f.numbers("kv_source_layer_ids"))
    return [layer in listed for layer in range(f.num_layers)]


def selects(f: Fields) -> list[bool]:
    listed = set(f.numbers("index_source_layer_ids"))
    return [layer in listed for layer in range(f.num_layers)]


def generates(f: Fields) -> list[bool]:
    """The layers that a prompt does not run through."""
    sources = f.numbers("kv_source_layer_ids")
    if not sources:
        raise ConfigError(expected("kv_source_layer_ids with a layer", "none"))
    return [layer >= max(sources) for layer in range(f.num_layers)]


def table_rows(f: Fields) -> list[int]:
    """Rows of the n-gram table of each layer, 0 where it has none."""
    rows = dict(
        zip(f.numbers("engram_layer_ids"), f.numbers("engram_num_embeddings"), strict=False)
    )
    return [rows.get(layer, 0) for layer in range(f.num_layers)]


def keys(f: Fields) -> Pieces:
    """The compressed keys that a layer of ``kv_source_layer_ids`` makes for itself and the layers
    after it.
    """
    if not f.mark(makes_keys):
        return ()
    d, dim, pooled = width(f), f.size("head_dim"), f.mark(ratios) > 1
    index_dim = f.size("index_head_dim")
    return (
        linear(A, "compressor.kv_proj", d, dim),
        *((linear(A, "compressor.gate_proj", d, dim),) if pooled else ()),
        norm("compressor.norm", dim),
        linear(A, "indexer.k_proj", dim, index_dim),
        norm("indexer.k_norm", index_dim),
    )


def selection(f: Fields) -> Pieces:
    """Scores over the compressed keys, in the layers that select, and attention to the selected."""
    ratio, heads, dim = f.mark(ratios), f.size("num_attention_heads"), f.size("head_dim")
    if not ratio:
        return ()
    index_heads, index_dim = f.size("index_n_heads"), f.size("index_head_dim")
    own = (
        linear(A, "indexer.q_b_proj", f.size("q_lora_rank"), index_heads * index_dim),
        linear(A, "indexer.weights_proj", width(f), index_heads),
        Piece(A, "indexer.scores", kernel=Index(index_heads, index_dim, ratio)),
    )
    kept = dim + index_dim if f.mark(makes_keys) else 0
    chosen = Attend(heads, dim, dim, stride=ratio, top=f.size("index_topk"), cached=kept)
    return (*(own if f.mark(selects) else ()), attention_cost.scores(chosen))


def engram(f: Fields) -> Pieces:
    """An n-gram table whose rows become one key for each stream and one value."""
    rows = f.mark(table_rows)
    if not rows:
        return ()
    d, streams, dim = width(f), f.size("hc_mult"), f.size("engram_head_dim")
    looked_up = (f.size("engram_max_ngram_size", 2) - 1) * f.size("engram_n_heads") * dim
    return (
        Piece(Part.NGRAM_TABLE, "engram.embed", rows * dim),
        linear(Part.NGRAM_PROJECTION, "engram.wkv", looked_up, (streams + 1) * d),
        vector(Part.NGRAM_PROJECTION, "engram.q_weight", streams * d),
        vector(Part.NGRAM_PROJECTION, "engram.k_weight", streams * d),
    )


def staged(*blocks: Block) -> Block:
    """The blocks of a layer; of a layer of the decoder, a prompt uses none of them."""

    def block(f: Fields) -> Pieces:
        decode_only = f.mark(generates)
        return tuple(piece._replace(decode_only=decode_only) for piece in join(f, blocks))

    return block


def ends(f: Fields) -> Pieces:
    """Embedding, norm and head; a prompt runs the embedding alone."""
    f.note(
        "prefill",
        "a prompt runs the layers before the last of kv_source_layer_ids and makes the keys of "
        "that layer (the few tokens in the window of the decoder are left out)",
    )
    return tuple(piece._replace(decode_only=piece.part is not Part.EMBEDDING) for piece in top()(f))


def draft(architecture: Architecture, f: Fields, index: int) -> Pieces:
    """A module of DSpark: a layer with a window alone and experts of its own number."""
    f.note("mtp", "a draft module is a layer with dspark_n_routed_experts and DeepSeek-V3's rest")
    own = {
        "num_experts": f.size_or("dspark_n_routed_experts", f.size("num_experts"), 1),
        "num_experts_per_tok": f.size_or(
            "dspark_num_experts_per_tok", f.size("num_experts_per_tok"), 1
        ),
        **{"compress_ratios": [0], "num_hidden_layers": 1, "num_nextn_predict_layers": 0},
        "kv_source_layer_ids": [1],
    }
    module = Fields(edited({**f.values, "engram_layer_ids": []}, own), f.family, f.defaults)
    return mtp_module(f, join(module.at(0), architecture.blocks))


ROWS = {
    "deepseek_v41_text": deepseek_v4.variant(
        blocks=(
            keys,
            staged(
                v4_core,
                selection,
                moe(extra=(v4_shared,)),
                norms(2),
                hyper_connections(2, 1, 3),
                engram,
            ),
        ),
        defaults={**BASE, "mlp_bias": False},
        top=ends,
        mtp=draft,
    ),
}
