"""Sums over the tokens of each document of a trace: what ``document_bootstrap`` draws from.

Where there are more than ``MAX_UNITS`` documents (or the table of sums would be too large), each
unit that is drawn is a bundle of documents, filled in turn: still independent units, only fewer,
and memory stays bounded.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from moe_lab.analysis.aligned_rows import MAX_CELLS, Ints, add_counts
from moe_lab.analysis.document_bootstrap import Floats, Resampling
from moe_lab.analysis.map_reduce import Sum, appended, cells, counted, reduced
from moe_lab.analysis.token_groups import Grouping
from moe_lab.trace import Trace

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
        consecutive = len(self.docs) and self.docs[-1] - self.docs[0] == len(self.docs) - 1
        row = doc - self.docs[0] if consecutive else np.searchsorted(self.docs, doc)
        row = row.astype(np.int64)
        return row if self.units >= len(self.docs) else row % max(self.units, 1)


def documents(trace: Trace, cells: int = 1) -> Documents:
    """The documents of a trace, in as many units as keep a table of ``cells`` numbers a unit within
    bounds.
    """
    first = min(trace.meta.layers, key=lambda layer: layer.layer).layer
    (found,) = reduced([Sum(_docs, (trace,), (first,), appended, (first,))])
    return in_units(pl.concat(found)["doc"].unique().sort().to_numpy(), cells)


def in_units(docs: NDArray[np.uint32], cells: int) -> Documents:
    """Documents [D] with these numbers, rising, as ``documents`` returns them."""
    return Documents(docs, min(len(docs), MAX_UNITS, max(2, MAX_CELLS // max(cells, 1))))


def _docs(trace: Trace, layer: int) -> pl.DataFrame:
    found = [frame.unique() for frame in trace.batches(layer, ["doc"])]
    return pl.concat(found or [pl.DataFrame(schema={"doc": pl.UInt32})]).unique().sort("doc")


def unit_sizes(trace: Trace, docs: Documents, groups: Grouping) -> NDArray[np.int64]:
    """[U, G] tokens of each unit in each group."""
    fold = counted((docs.units, len(groups)))
    (table,) = reduced([Sum(_sizes, (trace,), (None,), fold, (docs, groups), groups.whole)])
    return table


def _sizes(trace: Trace, docs: Documents, groups: Grouping) -> pl.DataFrame:
    table = np.zeros(docs.units * len(groups), dtype=np.int64)
    for frame in groups.codes(trace):
        frame = frame.drop_nulls("code")
        add_counts(
            table, docs.unit(frame["doc"].to_numpy()) * len(groups) + frame["code"].to_numpy()
        )
    return cells(table)


def unit_sums(
    docs: Documents, batches: Iterable[tuple[NDArray, NDArray]], width: int
) -> pl.DataFrame:
    """[unit, 0, 1, ..]: sums of values [T, ``width``] over each unit's tokens, batch by batch.

    Sums of floats depend on their order, so batches are added by ``unit_table``.
    """
    sums: list[tuple[Ints, Floats]] = [(np.zeros(0, dtype=np.int64), np.zeros((0, width)))]
    for doc_T, values_TM in batches:
        unit_T = docs.unit(doc_T)
        here = np.flatnonzero(np.bincount(unit_T, minlength=docs.units))
        columns = np.asarray(values_TM, dtype=np.float64).T
        found = [np.bincount(unit_T, column, minlength=docs.units)[here] for column in columns]
        sums.append((here, np.stack(found, axis=1).astype(np.float64)))
    values = np.concatenate([table for _, table in sums])
    return pl.DataFrame(
        {"unit": np.concatenate([units for units, _ in sums])}
        | {str(place): column for place, column in enumerate(values.T)}
    )


def unit_table(docs: Documents, width: int) -> Callable[[Floats | None, pl.DataFrame], Floats]:
    """A fold that adds up frames of ``unit_sums`` in a table [U, M]."""

    def fold(total: Floats | None, frame: pl.DataFrame) -> Floats:
        table = np.zeros((docs.units, width)) if total is None else total
        values = frame.select(map(str, range(width))).to_numpy()
        np.add.at(table, frame["unit"].to_numpy(), values)
        return table

    return fold


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
