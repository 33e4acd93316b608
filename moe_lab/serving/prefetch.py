"""``prefetch``: how many of the experts that a token will use a predictor names before they are
needed.

Each predictor names as many experts of a layer as a token uses there in the mean; ``found`` is the
share of the experts then used that were named. Tables and lists are learned on the other half of
the documents.

- ``last_token``: the experts of the token before in the layer (target "next_token").
- ``transition``: by a table of which experts follow which, from the token before in the layer
  ("next_token") or from the same token's previous layer ("next_layer").
- ``static``: the experts most used, whatever the token: what a predictor must beat.

Shape letters: T decoded tokens, L layers, E experts.
"""

from collections.abc import Sequence
from itertools import product

import numpy as np
import polars as pl
from numpy.typing import NDArray

from moe_lab.analysis.document_bootstrap import MIN_DOCUMENTS, RESAMPLES, Floats, Resampling
from moe_lab.analysis.document_sums import Documents, documents, nulls
from moe_lab.analysis.map_reduce import Sum, appended, reduced
from moe_lab.errors import AnalysisError, require
from moe_lab.serving.expert_sets import ExpertSets, expert_sets
from moe_lab.trace import LayerMeta, Trace
from moe_lab.trace.rows import EMPTY_SLOT

PREDICTORS = ("last_token", "transition", "static")
MAX_TOKENS = 50_000
FOUND = {
    "layer": pl.UInt32,
    **dict.fromkeys(("target", "predictor"), pl.String),
    "named": pl.Int64,
    **dict.fromkeys(("hits", "used"), pl.List(pl.Float64)),
    **dict.fromkeys(("tokens", "documents"), pl.Int64),
}


def prefetch(
    trace: Trace,
    predictors: Sequence[str] = PREDICTORS,
    *,
    max_tokens: int = MAX_TOKENS,
    resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = 0.95,
) -> pl.DataFrame:
    """Share of the next experts that each predictor names.

    Args:
        trace: of tokens in their order; decoded tokens are judged.
        max_tokens: decoded tokens that are read, from the front.

    Returns:
        [layer (null: mean over layers), target, predictor, named, found, lo, hi, n_tokens, n_docs,
        note]: learned predictors are null with one document, and ``note`` says so.

    Raises:
        AnalysisError: as ``expert_sets``. ConfigError: unknown predictors.

    Example:
        >>> prefetch(open_trace("traces/x")).filter(pl.col("layer").is_null())
    """
    require(set(predictors) <= set(PREDICTORS), f"predictors among {PREDICTORS}", list(predictors))
    require(max_tokens >= 1, "at least 1 token", max_tokens, field="max_tokens")
    sets = expert_sets(trace)
    docs = documents(trace)
    # Tables and lists are learned on the documents of the other fold.
    fold_D = np.random.default_rng(seed).permutation(len(docs.docs)) % 2
    has_tokens = (None,) if trace.has_tokens else ()
    sums = []
    for at in range(len(sets.layers)):
        pair = sets.layers[max(at - 1, 0) : at + 1]
        arguments = pair, sets.ordered, docs, fold_D, tuple(dict.fromkeys(predictors)), max_tokens
        tables = *(layer.layer for layer in pair), *has_tokens
        sums.append(Sum(_found, (trace,), tables, appended, arguments, whole=True))
    frame = pl.concat(frame for frames in reduced(sums) for frame in frames)
    resampling = Resampling(resamples, seed, level)
    rows = []
    for (target, predictor), group in frame.group_by("target", "predictor", maintain_order=True):
        hits_UL, used_UL = (np.array(group[name].to_list()).T for name in ("hits", "used"))

        def found(weights: Floats, hits: Floats = hits_UL, used: Floats = used_UL) -> Floats:
            below = weights @ used
            share = np.divide(
                weights @ hits, below, out=np.full_like(below, np.nan), where=below > 0
            )
            return np.hstack([share, share.mean(axis=1, keepdims=True)])

        tokens, number = group.row(0, named=True)["tokens"], group.row(0, named=True)["documents"]
        low, high = resampling.interval(found, docs.units, number)
        value = found(np.ones((1, docs.units)))[0]
        note = (
            "" if number >= MIN_DOCUMENTS else f"No interval: fewer than {MIN_DOCUMENTS} documents."
        )
        if predictor != "last_token" and number < 2:
            note = "A predictor learned on other documents needs at least 2 documents."
        named = [*group["named"], round(float(np.mean(group["named"].to_numpy())))]
        for place, name in enumerate([*group["layer"], None]):
            rows.append(
                [name, target, predictor, named[place], value[place], low[place], high[place],
                 tokens, number, note]
            )  # fmt: skip
    schema = {
        "layer": pl.UInt32,
        "target": pl.String,
        "predictor": pl.String,
        "named": pl.Int64,
        **dict.fromkeys(("found", "lo", "hi"), pl.Float64),
        **dict.fromkeys(("n_tokens", "n_docs"), pl.Int64),
        "note": pl.String,
    }
    return nulls(pl.DataFrame(rows, schema=schema, orient="row"))


def _found(
    trace: Trace,
    pair: tuple[LayerMeta, ...],
    ordered: bool,
    docs: Documents,
    fold_D: NDArray[np.int64],
    predictors: tuple[str, ...],
    max_tokens: int,
) -> pl.DataFrame:
    """[layer, target, predictor, named, hits, used, tokens, documents] of the last layer of
    ``pair``: ``hits`` and ``used`` are lists [U] of experts.
    """
    key_T, ids_TLK = _decoded(ExpertSets(trace, pair, ordered), max_tokens)
    doc_T = (key_T >> np.uint64(32)).astype(np.uint32)
    unit_T, fold_T = docs.unit(doc_T), fold_D[np.searchsorted(docs.docs, doc_T)]
    number = len(np.unique(doc_T))
    *above, now = (_hot(ids_TLK[:, at], layer.num_experts) for at, layer in enumerate(pair))
    size = max(1, round(float(now.sum(axis=1).mean())))
    # A token follows another where it is the next position of the same document.
    follows_T = np.append(False, np.diff(key_T) == 1)
    known = {"next_token": (np.roll(now, 1, axis=0), follows_T)}
    if above:
        known["next_layer"] = above[0], np.ones(len(now), bool)
    rows = []
    for target, predictor in product(known, predictors):
        before, judged_T = known[target]
        learned = predictor != "last_token"
        if target == "next_layer" and not learned:
            continue
        guess = _guess(predictor, before, now, judged_T, fold_T, size) if learned else before
        counted_T = judged_T & (number >= 2 or not learned)
        hits_U, used_U = (
            np.bincount(unit_T, hot.sum(axis=1) * counted_T, docs.units).tolist()
            for hot in (guess & now, now)
        )
        rows.append([pair[-1].layer, target, predictor, size, hits_U, used_U, len(key_T), number])
    return pl.DataFrame(rows, schema=FOUND, orient="row")


def _decoded(sets: ExpertSets, tokens: int) -> tuple[NDArray[np.uint64], NDArray[np.uint16]]:
    """Keys [T] and ids [T, L, K] of the first decoded tokens."""
    keys, ids = [], []
    for key_T, decode_T, ids_TLK in sets.tokens():
        keys.append(key_T[decode_T])
        ids.append(ids_TLK[decode_T])
        if sum(map(len, keys)) >= tokens:
            break
    require(any(map(len, keys)), "a trace with decoded tokens", "none of them", error=AnalysisError)
    return np.concatenate(keys)[:tokens], np.concatenate(ids)[:tokens]


def _hot(ids_TK: NDArray[np.uint16], experts: int) -> NDArray[np.bool_]:
    """[T, E] whether the token uses the expert."""
    table = np.zeros((len(ids_TK), experts + 1), bool)
    columns = np.where(ids_TK == EMPTY_SLOT, experts, ids_TK)
    table[np.arange(len(ids_TK))[:, None], columns] = True
    return table[:, :experts]


def _guess(
    predictor: str,
    before: NDArray[np.bool_],
    now: NDArray[np.bool_],
    judged: NDArray[np.bool_],
    fold_T: NDArray[np.int64],
    size: int,
) -> NDArray[np.bool_]:
    """[T, E] the ``size`` experts named for each token, learned on the other fold."""
    guess = np.zeros_like(now)
    for fold in (0, 1):
        known, asked = judged & (fold_T != fold), fold_T == fold
        if not known.any() or not asked.any():
            continue
        load = now[known].sum(axis=0, dtype=np.float32)
        if predictor == "static":
            score = np.broadcast_to(load, (int(asked.sum()), len(load)))
        else:
            table = before[known].T.astype(np.float32) @ now[known].astype(np.float32)
            table /= np.maximum(before[known].sum(axis=0, dtype=np.float32)[:, None], 1)
            # A trace of the load decides ties, and tokens of which nothing is known.
            score = before[asked].astype(np.float32) @ table + 1e-6 * load / load.max(initial=1)
        chosen = np.argpartition(-score, size - 1, axis=1)[:, :size]
        rows = np.flatnonzero(asked)
        guess[rows[:, None], chosen] = True
    return guess
