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

import numpy as np
import polars as pl
from numpy.typing import NDArray

from moe_lab.analysis.document_bootstrap import MIN_DOCUMENTS, RESAMPLES, Floats, Resampling
from moe_lab.analysis.document_sums import documents, nulls
from moe_lab.errors import AnalysisError, require
from moe_lab.serving.expert_sets import expert_sets
from moe_lab.trace import Trace
from moe_lab.trace.rows import EMPTY_SLOT

PREDICTORS = ("last_token", "transition", "static")
TARGETS = ("next_token", "next_layer")
MAX_TOKENS = 50_000


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
    keys, ids = [], []
    for key_T, decode_T, ids_TLK in sets.tokens():
        keys.append(key_T[decode_T])
        ids.append(ids_TLK[decode_T])
        if sum(map(len, keys)) >= max_tokens:
            break
    require(any(map(len, keys)), "a trace with decoded tokens", "none of them", error=AnalysisError)
    key_T = np.concatenate(keys)[:max_tokens]
    ids_TLK = np.concatenate(ids)[:max_tokens]
    docs = documents(trace)
    doc_T = (key_T >> np.uint64(32)).astype(np.uint32)
    unit_T = docs.unit(doc_T)
    # A token follows another where it is the next position of the same document.
    follows_T = np.append(False, np.diff(key_T) == 1)
    order = np.random.default_rng(seed).permutation(len(docs.docs)) % 2
    fold_T = order[np.searchsorted(docs.docs, doc_T)]
    number = len(np.unique(doc_T))
    resampling = Resampling(resamples, seed, level)
    jobs = [
        (target, predictor)
        for target in TARGETS
        for predictor in dict.fromkeys(predictors)
        if (target, predictor) != ("next_layer", "last_token")
    ]
    rows = []
    for target, predictor in jobs:
        sums, counts, named, names = [], [], [], []
        for at, layer in enumerate(sets.layers):
            if target == "next_layer" and at == 0:
                continue
            now = _hot(ids_TLK[:, at], layer.num_experts)
            if target == "next_token":
                judged = follows_T
                before = np.roll(now, 1, axis=0)
            else:
                judged = np.ones(len(now), bool)
                before = _hot(ids_TLK[:, at - 1], sets.layers[at - 1].num_experts)
            size = max(1, round(float(now.sum(axis=1).mean())))
            learned = predictor != "last_token"
            guess = before if not learned else _guess(predictor, before, now, judged, fold_T, size)
            hits_T = (guess & now).sum(axis=1) * judged
            used_T = now.sum(axis=1) * judged
            if learned and number < 2:
                hits_T, used_T = hits_T * 0, used_T * 0
            sums.append(np.bincount(unit_T, weights=hits_T, minlength=docs.units))
            counts.append(np.bincount(unit_T, weights=used_T, minlength=docs.units))
            named.append(size)
            names.append(layer.layer)
        if not sums:
            continue
        hits_UL, used_UL = np.stack(sums, axis=1), np.stack(counts, axis=1)

        def found(weights: Floats, hits: Floats = hits_UL, used: Floats = used_UL) -> Floats:
            below = weights @ used
            share = np.divide(
                weights @ hits, below, out=np.full_like(below, np.nan), where=below > 0
            )
            return np.hstack([share, share.mean(axis=1, keepdims=True)])

        low, high = resampling.interval(found, docs.units, number)
        value = found(np.ones((1, docs.units)))[0]
        note = (
            "" if number >= MIN_DOCUMENTS else f"No interval: fewer than {MIN_DOCUMENTS} documents."
        )
        if predictor != "last_token" and number < 2:
            note = "A predictor learned on other documents needs at least 2 documents."
        for place, name in enumerate([*names, None]):
            size = named[place] if name is not None else round(float(np.mean(named)))
            rows.append(
                [name, target, predictor, size, value[place], low[place], high[place],
                 len(key_T), number, note]
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
