"""The decoders of ``moe_lab.model``, from their plain configuration: wiring, attention, n-gram
tables, multi-token prediction.
"""

from collections.abc import Mapping
from typing import Any

from moe_lab.accounting.architecture import Architecture, mtp_module
from moe_lab.accounting.blocks import dense, gqa, mla, norms, top, width
from moe_lab.accounting.families.longcat import ngram
from moe_lab.accounting.families.own import flatten_layer, hash_layer, layer
from moe_lab.cost import formulas
from moe_lab.cost.parts import Part, Pieces, linear, norm, prefixed
from moe_lab.hf.fields import Fields, nested


def flatten(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """``DecoderConfig.to_dict()`` under the names used here.

    Configurations of before a part existed lack its fields.
    """
    moe, latent = nested(values, "moe"), nested(values, "latent_attention")
    index, tables, mtp = (
        nested(values, "sparse_attention"),
        nested(values, "ngram"),
        nested(values, "mtp"),
    )
    flat: dict[str, Any] = {
        "vocab_size": values.get("vocab_size"),
        "num_hidden_layers": values.get("num_layers"),
        "num_attention_heads": values.get("num_heads"),
        "num_key_value_heads": values.get("num_kv_heads") or values.get("num_heads"),
        "head_dim": values.get("head_dim"),
        "tie_word_embeddings": values.get("tie_embeddings"),
        "num_dense_layers": values.get("num_dense_layers", 0) if moe else values.get("num_layers"),
        "num_hash_layers": values.get("num_hash_layers", 0),
        "intermediate_size": values.get("d_dense"),
        "context_length": values.get("context_length"),
        "wiring": values.get("wiring", "plain"),
        "qk_norm": values.get("qk_norm", "none"),
        "amplification": values.get("amplification", "none"),
        "q_lora_rank": latent.get("q_rank"),
        "kv_lora_rank": latent.get("kv_rank"),
        "qk_nope_head_dim": latent.get("nope_dim"),
        "qk_rope_head_dim": latent.get("rope_dim"),
        "v_head_dim": latent.get("value_dim"),
        "index_topk": index.get("top_k"),
        "index_n_heads": index.get("num_heads"),
        "index_head_dim": index.get("head_dim"),
        "index_share": index.get("share"),
        "ngram_max_n": tables.get("max_n"),
        "ngram_splits": tables.get("num_splits"),
        "ngram_ratio": tables.get("table_ratio"),
        "ngram_layers": tables.get("layers"),
        "num_nextn_predict_layers": mtp.get("num_modules", 0),
        "mtp_intermediate_size": mtp.get("d_hidden"),
    }
    d_expert, top_k, copies = (
        moe.get("d_expert"),
        nested(moe, "router").get("top_k"),
        moe.get("num_shared_experts", 0),
    )
    if flat["intermediate_size"] is None and all(
        isinstance(size, int) for size in (d_expert, top_k, copies)
    ):
        flat["intermediate_size"] = d_expert * (top_k + copies)  # type: ignore[operator]
    return {**(flatten_layer(moe) if moe else {}), **flat, "hidden_size": values.get("d_model")}


# --------------------------------------------------------------------------------------------------------------
# attention


def is_double(f: Fields) -> bool:
    return f.text("wiring") != "plain"


def indexers(f: Fields) -> list[tuple[bool, ...]]:
    """For each layer: which of its attention blocks have an indexer of their own."""
    each, share = 2 if is_double(f) else 1, f.size_or("index_share", 1, 1)
    return [
        tuple((each * number + half) % share == 0 for half in range(each))
        for number in range(f.num_layers)
    ]


def attention(f: Fields) -> Pieces:
    """One attention block over all positions."""
    return (
        mla(bias=False)(f)
        if f.find("kv_lora_rank") is not None
        else gqa(norms=f.text("qk_norm"))(f)
    )


def sparse_attention(f: Fields, owner: bool) -> Pieces:
    """One attention block over the positions that its indexer chose, or that of a block before."""
    pieces = tuple(formulas.sparse(piece, f.size("index_topk")) for piece in attention(f))
    if not owner:
        return pieces
    rank = f.find("q_lora_rank")
    source = width(f) if rank is None else f.check_size("q_lora_rank", rank)
    return (
        *pieces,
        *formulas.indexer(width(f), source, f.size("index_n_heads"), f.size("index_head_dim")),
    )


def attentions(f: Fields) -> Pieces:
    if f.find("index_topk") is None:
        blocks = [attention(f)] * (2 if is_double(f) else 1)
    else:
        blocks = [sparse_attention(f, owner) for owner in f.mark(indexers)]
    return tuple(
        piece
        for number, pieces in enumerate(blocks)
        for piece in prefixed(f"attention.{number}", pieces)
    )


# -----------------------------------------------------------------------------------------------------------
# feed-forward


def kinds(f: Fields) -> list[str]:
    """For each layer: what feed-forward it has."""
    first, hashed = f.size("num_dense_layers", 0), f.size_or("num_hash_layers", 0)
    return ["dense"] * first + ["hash"] * hashed + ["sparse"] * (f.num_layers - first - hashed)


def feed_forward(f: Fields) -> Pieces:
    """A dense or a sparse one; both halves of a double layer have a dense one beside the sparse
    one.
    """
    kind = f.mark(kinds)
    sparse = {"dense": lambda _: (), "hash": hash_layer, "sparse": layer}[kind](f)
    if is_double(f):
        return (*prefixed("0", dense()(f)), *prefixed("1", dense()(f)), *sparse)
    return dense()(f) if kind == "dense" else sparse


def layer_norms(f: Fields) -> Pieces:
    return norms(4 if is_double(f) else 2)(f)


# -----------------------------------------------------------------------------------------------------
# tables, prediction

tables = ngram("ngram_max_n", "ngram_splits", "ngram_ratio")


def places(f: Fields) -> list[bool]:
    """For each layer: does it read n-gram tables?"""
    chosen = f.numbers("ngram_layers")
    return [number in chosen for number in range(f.num_layers)]


def memory(f: Fields) -> Pieces:
    """Tables that a layer reads through a gate: a key projection and two norms beside the tables."""
    if f.find("ngram_max_n") is None or not f.mark(places):
        return ()
    d = width(f)
    gate = (
        linear(Part.NGRAM_PROJECTION, "ngram_key", d, d),
        norm("ngram_query_norm", d),
        norm("ngram_key_norm", d),
    )
    return (*tables(f), *gate)


def beside_embedding(f: Fields) -> Pieces:
    amplified = (
        (norm("embedding_norm", width(f), bias=True),) if f.text("amplification") == "norm" else ()
    )
    whole = f.find("ngram_max_n") is not None and not f.numbers("ngram_layers")
    return (*amplified, *(tables(f) if whole else ()))


def module(architecture: Architecture, f: Fields, index: int) -> Pieces:
    """A multi-token-prediction module: one attention over all positions, one dense feed-forward."""
    size = (
        "intermediate_size" if f.find("mtp_intermediate_size") is None else "mtp_intermediate_size"
    )
    return mtp_module(f, (*attention(f), *dense(size)(f), *norms(2)(f)))


ROWS = {
    "moe_lab": Architecture(
        blocks=(attentions, feed_forward, layer_norms, memory),
        top=top(extra=(beside_embedding,)),
        mtp=module,
        prepare=flatten,
    )
}
