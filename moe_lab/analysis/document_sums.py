"""Sums over the tokens of each document of a trace: what ``document_bootstrap`` draws from.

Where there are more than ``MAX_UNITS`` documents (or the table of sums would be too large), each
unit that is drawn is a bundle of documents, filled in turn: still independent units, only fewer,
and memory stays bounded.
"""

from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from moe_lab.analysis.aligned_rows import MAX_CELLS, add_counts, chunks
from moe_lab.analysis.document_bootstrap import Floats, Resampling
from moe_lab.analysis.token_groups import Grouping, coded_batches
from moe_lab.trace import LayerMeta, Trace
from moe_lab.trace.rows import EMPTY_SLOT, expert_slots

MAX_UNITS = 4096


@dataclass(frozen=True)
class Documents:
    """The documents of a trace and the unit of each.

    Attributes:
        docs: [D] their numbers, rising.
        units: how many units are drawn from.
    """

    docs: NDArray[np.uint32]
    units: int

    def unit(self, doc: NDArray) -> NDArray[np.int64]:
        """[T] the unit of each token's document."""
        return np.searchsorted(self.docs, doc) % max(self.units, 1)


def documents(trace: Trace, cells: int = 1) -> Documents:
    """The documents of a trace, in as many units as keep a table of ``cells`` numbers a unit within
    bounds.
    """
    first = min(trace.meta.layers, key=lambda layer: layer.layer)
    docs = [np.zeros(0, dtype=np.uint32)]
    for batch in trace.batches(first.layer, ["doc"]):
        docs = [np.union1d(docs[0], batch["doc"].to_numpy())]
    return Documents(docs[0], min(len(docs[0]), MAX_UNITS, max(2, MAX_CELLS // max(cells, 1))))


def unit_counts(
    trace: Trace, layer: LayerMeta, docs: Documents, groups: Grouping | None = None
) -> NDArray[np.uint32]:
    """[U, G, E] slots of each expert by each unit's tokens of each group (G = 1 without groups)."""
    size, bins = len(groups) if groups else 1, layer.num_choices + 1
    table = np.zeros((docs.units * size + 1) * bins, dtype=np.uint32)
    for frame, codes_T in coded_batches(trace, layer, groups):
        ids_TK = expert_slots(layer, frame["experts"])
        row_T = docs.unit(frame["doc"].to_numpy()) * size + codes_T
        row_T = np.where(codes_T < 0, docs.units * size, row_T) * bins
        for part in chunks(len(ids_TK)):
            expert = np.where(ids_TK[part] == EMPTY_SLOT, layer.num_choices, ids_TK[part])
            add_counts(table, (row_T[part, None] + expert).ravel())
    return table.reshape(-1, bins)[:-1, :-1].reshape(docs.units, size, layer.num_choices)


def unit_sizes(docs: Documents, groups: Grouping) -> NDArray[np.int64]:
    """[U, G] tokens of each unit in each group."""
    table = np.zeros(docs.units * len(groups), dtype=np.int64)
    for frame in groups.codes():
        frame = frame.drop_nulls("code")
        add_counts(
            table, docs.unit(frame["doc"].to_numpy()) * len(groups) + frame["code"].to_numpy()
        )
    return table.reshape(docs.units, len(groups))


def unit_sums(docs: Documents, doc: NDArray, values_TM: NDArray) -> Floats:
    """[U, M] sums of values [T, M] over each unit's tokens."""
    unit = docs.unit(doc)
    columns = np.asarray(values_TM, dtype=np.float64).T
    return np.stack(
        [np.bincount(unit, column, minlength=docs.units) for column in columns], axis=1
    ).astype(np.float64)


def ratio_interval(sums_UM: Floats, resampling: Resampling) -> tuple[Floats, Floats, Floats]:
    """Ratios of columns 1.. to column 0 of sums [U, M], with the ends of their intervals: three
    arrays [M - 1].
    """

    def ratios(weights: Floats) -> Floats:
        totals = weights @ sums_UM
        return over(totals[:, 1:], totals[:, :1])

    value = ratios(np.ones((1, len(sums_UM))))[0]
    return value, *resampling.interval(ratios, len(sums_UM))


def over(numerator: NDArray, denominator: NDArray) -> Floats:
    """Quotient, NaN where the denominator is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(denominator > 0, numerator / denominator, np.nan)


def nulls(frame: pl.DataFrame) -> pl.DataFrame:
    """The values with NaN, which means that a number is not defined, replaced by null."""
    return frame.with_columns(pl.col(pl.Float64).fill_nan(None))
