"""``distinct_experts``: how many experts of a layer a batch of requests, or a window of consecutive
tokens of one request, touches: what one decoding step reads.

Measured on the trace, beside the two formulas of capacity plans: tokens that choose on their own by
the measured load (``sum_e 1 - (1 - q_e)^n``), and by equal load (``E (1 - (1 - k/E)^n)``), q_e the
share of tokens that run expert e and k the experts a token runs in the mean.

A batch is one token of each of B documents, drawn without regard to position; a window is n tokens
of one document in a row (speculative decoding verifies such a window at once).
Shape letters: D documents, T tokens, L layers, E experts, K slots.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import polars as pl
from numpy.typing import NDArray

from moe_lab.analysis.document_bootstrap import (
    MIN_DOCUMENTS,
    RESAMPLES,
    Floats,
    Resampling,
    expanded_interval,
)
from moe_lab.analysis.document_sums import Documents, documents, nulls
from moe_lab.analysis.map_reduce import cells, counted
from moe_lab.errors import AnalysisError, expected, require
from moe_lab.serving.expert_sets import ExpertSets, expert_sets
from moe_lab.trace import Trace
from moe_lab.trace.rows import EMPTY_SLOT

SIZES = (1, 2, 4, 8, 16, 32)
DRAWS = 200
"""Batches that are drawn of each size."""
KEPT_TOKENS = 256
"""Tokens of each document that batches are drawn from, evenly spaced."""
MAX_KEPT = 2**26
"""Ids that are kept at most: those of the first documents where there are more."""
_Total = tuple[NDArray, list[NDArray[np.uint16]]]
SCHEMA = {
    "layer": pl.UInt32,
    "kind": pl.String,
    "size": pl.Int64,
    **dict.fromkeys(("measured", "lo", "hi", "by_load", "by_equal_load"), pl.Float64),
    "n": pl.Int64,
    "n_docs": pl.Int64,
    "note": pl.String,
}


def distinct_experts(
    trace: Trace,
    batch: Sequence[int] = (),
    window: Sequence[int] = (),
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = 0.95,
) -> pl.DataFrame:
    """Distinct experts of batches and windows of decoded tokens, per layer and over all layers.

    Args:
        trace: of tokens in their order.
        batch: numbers of documents that decode together.
        window: numbers of consecutive tokens of one document; windows are disjoint, what is left
            over at the end of a document is not used. ``SIZES`` where neither is given.
        resamples, seed, level: of the interval over documents; ``seed`` also draws the batches.

    Returns:
        [layer (null: mean over layers), kind ("batch", "window"), size, measured, lo, hi, by_load,
        by_equal_load, n, n_docs, note]: ``n`` batches or windows. Null where the trace has fewer
        documents than a batch, or no document as long as a window; ``note`` says so.

    Raises:
        AnalysisError: as ``expert_sets``; no decoded token.

    Example:
        >>> distinct_experts(open_trace("traces/x"), batch=[8], window=[4, 16])
    """
    sets = expert_sets(trace)
    if not batch and not window:
        batch = window = SIZES
    sizes = [*batch, *window]
    whole = all(isinstance(size, int | np.integer) and size >= 1 for size in sizes)
    require(whole, "sizes as whole numbers of at least 1", sizes)
    table = _Decoded(sets, sorted(set(window)))
    resampling = Resampling(resamples, seed, level)
    rows = []
    for size in sorted(set(window)):
        measured, low, high = table.windows(size, resampling)
        number = int(table.window_count[size].sum())
        note = "" if number else f"No document has {size} decoded tokens."
        rows += table.rows("window", size, measured, low, high, number, note)
    for size in sorted(set(batch)):
        measured, low, high = table.batches(size, resampling)
        enough = len(table.kept) >= size
        note = "" if enough else f"A batch of {size} needs {size} documents."
        rows += table.rows("batch", size, measured, low, high, DRAWS if enough else 0, note)
    return nulls(pl.DataFrame(rows, schema=SCHEMA, orient="row"))


class _Decoded:
    """Sums over the decoded tokens of a trace, by document.

    Attributes:
        load_LE: slots of each expert.
        window_sum, window_count: by size: [U, L] distinct experts and [U] windows of each unit.
        kept: of each document, ids [T, L, K] of evenly spaced tokens.
    """

    def __init__(self, sets: ExpertSets, sizes: list[int]) -> None:
        self.layers = sets.layers
        self.experts = np.array([layer.num_experts for layer in self.layers])
        docs = documents(sets.trace, sum(self.experts))
        self.units, layers = docs.units, len(self.layers)
        slots = max(layer.top_k for layer in self.layers)
        last = docs.docs[: max(1, MAX_KEPT // (KEPT_TOKENS * layers * slots))][-1:]
        loads, windows = layers * int(self.experts.max()), (self.units, len(sizes), layers + 1)
        add = counted((1 + loads + int(np.prod(windows)),))

        def fold(total: _Total | None, frame: pl.DataFrame) -> _Total:
            table, kept = total or (None, [])
            ids_TLK = np.frombuffer(frame["ids"][0], np.uint16).reshape(-1, layers, slots)
            parts = np.split(ids_TLK, np.cumsum(frame["tokens"][0].to_numpy())[:-1])
            table = add(table, frame["sums"][0].struct.unnest())
            return table, [*kept, *(part for part in parts if len(part))]

        sums, self.kept = sets.summed(_sums, fold, (docs, sizes, last))
        self.tokens = int(sums[0])
        if not self.tokens:
            raise AnalysisError(expected("a trace with decoded tokens", "prompts alone"))
        self.load_LE = sums[1 : 1 + loads].reshape(layers, -1)
        tables = sums[1 + loads :].reshape(windows).astype(np.float64)
        self.window_sum = {size: tables[:, at, :-1] for at, size in enumerate(sizes)}
        self.window_count = {size: tables[:, at, -1] for at, size in enumerate(sizes)}

    def windows(self, size: int, resampling: Resampling) -> tuple[Floats, Floats, Floats]:
        """[L + 1] measured, lower and upper end; the mean over layers last."""
        sums, count = self.window_sum[size], self.window_count[size]

        def mean(weights: Floats) -> Floats:
            number = (weights @ count)[:, None]
            values = np.divide(
                weights @ sums, number, out=np.full((len(weights), sums.shape[1]), np.nan),
                where=number > 0,
            )  # fmt: skip
            return np.hstack([values, values.mean(axis=1, keepdims=True)])

        low, high = resampling.interval(mean, self.units, int((count > 0).sum()))
        return mean(np.ones((1, self.units)))[0], low, high

    def batches(self, size: int, resampling: Resampling) -> tuple[Floats, Floats, Floats]:
        """The same of batches of one token each of ``size`` documents: every resample of documents
        draws its batches anew, so the interval covers documents and draws.
        """
        generator = np.random.default_rng(resampling.seed)
        number = len(self.kept)
        if number < size:
            nothing = np.full(len(self.layers) + 1, np.nan)
            return nothing, nothing, nothing
        measured = self._draw(generator, np.arange(number), size, DRAWS)
        if number < MIN_DOCUMENTS:
            return measured, np.full_like(measured, np.nan), np.full_like(measured, np.nan)
        drawn = np.stack(
            [
                self._draw(generator, generator.integers(number, size=number), size, DRAWS // 10)
                for _ in range(resampling.resamples)
            ]
        )
        return measured, *expanded_interval(drawn, resampling.level, number)

    def _draw(
        self, generator: np.random.Generator, pool: NDArray[np.int64], size: int, draws: int
    ) -> Floats:
        different = np.unique(pool)
        repeated = len(different) < size  # different documents, as far as the resample has enough
        ids = np.stack(
            [
                self.kept[doc][generator.integers(len(self.kept[doc]))]
                for _ in range(draws)
                for doc in generator.choice(different, size, replace=repeated)
            ]
        )
        values = _distinct(ids, size).mean(axis=0)
        return np.append(values, values.mean())

    def rows(
        self,
        kind: str,
        size: int,
        measured: Floats,
        low: Floats,
        high: Floats,
        number: int,
        note: str,
    ) -> list[list]:
        """Rows of every layer and of their mean."""
        share_LE = self.load_LE / self.tokens
        by_load = (1 - (1 - share_LE.clip(max=1)) ** size).sum(axis=1)
        equal = self.experts * (1 - (1 - share_LE.sum(axis=1) / self.experts).clip(min=0) ** size)
        formulas = [np.append(values, values.mean()) for values in (by_load, equal)]
        documents_used = len(self.kept)
        if kind == "window":
            documents_used = int((self.window_count[size] > 0).sum())
        if not note and documents_used < MIN_DOCUMENTS:
            note = f"No interval: fewer than {MIN_DOCUMENTS} documents."
        names = [*(layer.layer for layer in self.layers), None]
        return [
            [name, kind, size, measured[at], low[at], high[at], formulas[0][at], formulas[1][at],
             number, documents_used, note]
            for at, name in enumerate(names)
        ]  # fmt: skip


def _distinct(ids_TLK: NDArray[np.uint16], size: int) -> NDArray[np.int64]:
    """[W, L] different experts of each run of ``size`` tokens."""
    tokens, layers, slots = ids_TLK.shape
    ids = ids_TLK.reshape(tokens // size, size, layers, slots).transpose(0, 2, 1, 3)
    ordered = np.sort(ids.reshape(tokens // size, layers, size * slots), axis=2)
    first = np.ones_like(ordered, bool)
    first[:, :, 1:] = ordered[:, :, 1:] != ordered[:, :, :-1]
    return (first & (ordered != EMPTY_SLOT)).sum(axis=2)


def _sums(
    trace: Trace, docs: Documents, sizes: list[int], last: NDArray[np.uint32]
) -> pl.DataFrame:
    """[sums, tokens, ids], one row: ``cells`` of the decoded tokens, of the load of each layer, and
    for each unit and size of the distinct experts of windows in each layer and of the windows; then
    the number of kept tokens of each document up to ``last``, and their ids as bytes.
    """
    sets, kept = expert_sets(trace), []
    load_LE = np.zeros(
        (len(sets.layers), max(layer.num_experts for layer in sets.layers)), np.int64
    )
    windows = np.zeros((docs.units, len(sizes), len(sets.layers) + 1), np.int64)
    tokens = 0
    for doc, ids_TLK in _documents(sets):
        tokens += len(ids_TLK)
        for load_E, ids_TK in zip(load_LE, ids_TLK.swapaxes(0, 1), strict=True):
            load_E += np.bincount(ids_TK[ids_TK != EMPTY_SLOT], minlength=len(load_E))
        unit = int(docs.unit(np.array([doc]))[0])
        for at, size in enumerate(sizes):
            if whole := len(ids_TLK) // size:
                windows[unit, at, :-1] += _distinct(ids_TLK[: whole * size], size).sum(axis=0)
                windows[unit, at, -1] += whole
        if doc <= last:
            step = max(1, len(ids_TLK) // KEPT_TOKENS)
            kept.append(ids_TLK[::step][:KEPT_TOKENS])
    sums = np.concatenate([[tokens], load_LE.ravel(), windows.ravel()])
    return pl.DataFrame(
        {
            "sums": [cells(sums).to_struct()],
            "tokens": [[len(ids) for ids in kept]],
            "ids": [b"".join(ids.tobytes() for ids in kept)],
        }
    )


def _documents(sets: ExpertSets) -> Iterator[tuple[int, NDArray[np.uint16]]]:
    """(number, ids [T, L, K]) of the decoded tokens of each document that has some."""
    held: list[NDArray[np.uint16]] = []
    current = -1
    for key_T, decode_T, ids_TLK in sets.tokens():
        doc_T = (key_T[decode_T] >> np.uint64(32)).astype(np.int64)
        decoded_TLK = ids_TLK[decode_T]
        cuts = np.flatnonzero(doc_T[1:] != doc_T[:-1]) + 1
        for start, end in pairwise([0, *cuts.tolist(), len(doc_T)]):
            if start < end and doc_T[start] != current:
                if held:
                    yield current, np.concatenate(held)
                held, current = [], int(doc_T[start])
            held.append(decoded_TLK[start:end])
    if current >= 0:
        yield current, np.concatenate(held)
