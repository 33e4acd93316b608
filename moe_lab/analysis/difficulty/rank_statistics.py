"""Rank statistics of two rows of numbers, from one sort: mid-ranks, Spearman, Somers' D and
Chatterjee's xi.

``Order`` sorts a row once; everything else is a pass over it. Compute is a small integer with many
ties, so ranks are mid-ranks and Somers' D (Somers 1962) counts pairs that differ in difficulty; xi
(Chatterjee 2021, arXiv 1909.10140, eq. 2) also sees a dependence that is not monotone.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import polars as pl
from numpy.typing import NDArray

from moe_lab.analysis.document_bootstrap import Floats

Ints = NDArray[np.int64]


def stable_order(values: NDArray) -> Ints:
    """[n] places in rising order of value, ties in order of place: ``numpy.argsort`` with a stable
    sort, which takes polars less than half the time.
    """
    order = pl.DataFrame({"value": values}).select(pl.arg_sort_by("value", maintain_order=True))
    return order.to_series().to_numpy().astype(np.int64)


@dataclass(frozen=True, eq=False)
class Order:
    """A row of n finite values, sorted.

    Attributes:
        by_value: [n] places in rising order of value, ties in order of place.
        bounds: [groups + 1] where each group of equal values begins in ``by_value``.
    """

    by_value: Ints
    bounds: Ints

    @classmethod
    def of(cls, values: NDArray) -> "Order":
        by_value = stable_order(values)
        ordered = values[by_value]
        starts = np.flatnonzero(
            np.concatenate([[True], ordered[1:] != ordered[:-1]])[: len(ordered)]
        )
        return cls(by_value, np.append(starts, len(ordered)))

    @cached_property
    def group(self) -> Ints:
        """[n] which group of equal values each place belongs to, from 0 for the lowest."""
        group = np.empty(len(self.by_value), dtype=np.int64)
        group[self.by_value] = np.repeat(np.arange(len(self.bounds) - 1), np.diff(self.bounds))
        return group

    def midranks(self) -> Floats:
        """[n] mean rank from 1 of each value's group."""
        return ((self.bounds[:-1] + self.bounds[1:] + 1) / 2)[self.group]

    def quantile_bins(self, bins: int) -> Ints:
        """[n] bin 0..bins - 1 of about equal size; equal values share a bin."""
        middle = (self.bounds[:-1] + self.bounds[1:]) / 2
        share = np.minimum(middle * bins / max(len(self.by_value), 1), bins - 1).astype(np.int64)
        return share[self.group]


def standard_ranks(order: Order) -> Floats:
    """[n] mid-ranks with mean 0 and standard deviation 1; all 0 where there is one value only."""
    ranks = order.midranks()
    ranks -= ranks.mean() if len(ranks) else 0
    scale = ranks.std() if len(ranks) else 0
    return ranks / scale if scale > 0 else np.zeros(len(ranks))


def xi(x: Order, y_group: Ints) -> float:
    """Chatterjee's coefficient of y as a function of x, in [-1/2, 1]; ties of x in order of place.
    NaN for a constant y.

    Args:
        y_group: [n] groups of equal y, as ``Order.group``.
    """
    n = len(y_group)
    counts = np.bincount(y_group)
    at_most = np.cumsum(counts)  # by group: how many values are not above it
    at_least = n - at_most + counts
    spread = float((counts * at_least * (n - at_least)).sum())
    steps = np.abs(np.diff(at_most[_in_order(x, y_group)])).sum()
    return 1 - n * float(steps) / (2 * spread) if spread > 0 else float("nan")


def somers_d(x: Order, y_group: Ints) -> float:
    """Somers' D(y | x): of the pairs that differ in x, the share where y is larger with x less the
    share where it is smaller.

    Args:
        y_group: [n] groups of equal y, of which there are few (one pass over the row for each).
    """
    top, ordered = int(y_group.max(initial=0)), _in_order(x, y_group)
    sizes = np.diff(x.bounds)
    lower = np.repeat(x.bounds[:-1], sizes)  # how many values of x are below each
    # A token of level y meets C(y) tokens of lower x and lower y, and all of lower x but C(y + 1)
    # of higher y, where C(t) counts the tokens of lower x whose level is below t.
    balance, met = 0, np.zeros(len(ordered) + 1, dtype=np.int64)
    below = lower[np.flatnonzero(ordered == 0)]
    for level in range(1, top + 1):
        np.cumsum(ordered < level, out=met[1:])
        balance += int(met[below].sum() - below.sum())
        below = lower[np.flatnonzero(ordered == level)]
        balance += int(met[below].sum())
    n = float(len(ordered))
    differing = (n * n - float((sizes.astype(np.float64) ** 2).sum())) / 2
    return balance / differing if differing > 0 else float("nan")


def _in_order(x: Order, y_group: Ints) -> NDArray[np.unsignedinteger]:
    """[n] groups of y in the order of x, in few bytes: they are read at random."""
    return y_group.astype(np.min_scalar_type(y_group.max(initial=0)))[x.by_value]


@dataclass(frozen=True, eq=False)
class RankShift:
    """The change of ranks when a document is drawn more often: a token at x raises the rank of
    every token above x.

    A sum ``sum_j r_j f_j`` over ranks r of x therefore changes, per token i drawn once more, by
    ``sum_j f_j (1[x_i <= x_j] - F(x_j)) / n`` beside its own term: the second half of the influence
    function of rank correlations (Croux and Dehon 2010, section 3). Without it the interval of a
    strong Spearman correlation is wrong.

    Attributes:
        order: of x.
        sorted_documents: [n] document of each token, in the order of x.
        documents: D.
        unit: how much one step of the distribution function moves the standardised rank, over n.
    """

    order: Order
    sorted_documents: Ints
    documents: int
    unit: float

    @classmethod
    def of(cls, order: Order, documents: Ints, number: int) -> "RankShift":
        spread = order.midranks().std()
        return cls(order, documents[order.by_value], number, 1 / spread if spread > 0 else 0.0)

    def per_document(self, values: Floats) -> Floats:
        """[D] the effect of each document on ``sum_j r_j values_j`` through the ranks; sums to
        0.
        """
        below = np.zeros(len(values) + 1)
        np.cumsum(values[self.order.by_value], out=below[1:])
        bounds = self.order.bounds
        if len(bounds) < len(below):
            below = below[bounds]
        above = below[-1] - (below[1:] + below[:-1]) / 2
        if len(bounds) <= len(values):
            above = np.repeat(above, np.diff(bounds))
        above -= above.mean()
        return self.unit * np.bincount(
            self.sorted_documents, weights=above, minlength=self.documents
        ).astype(np.float64)


@dataclass(frozen=True, eq=False)
class LevelShift:
    """``RankShift`` for a row of few levels.

    Attributes:
        levels: [n] level of each token, from 0.
        by_document: [D, levels] tokens of each document at each level.
    """

    levels: Ints
    by_document: Floats

    @classmethod
    def of(cls, levels: Ints, documents: Ints, number: int) -> "LevelShift":
        width = int(levels.max()) + 1
        table = np.bincount(documents * width + levels, minlength=number * width).reshape(
            number, width
        )
        return cls(levels, table.astype(np.float64))

    def per_document(self, values: Floats) -> Floats:
        """[D] as ``RankShift.per_document``."""
        counts = self.by_document.sum(axis=0)
        midranks = np.cumsum(counts) - (counts - 1) / 2
        spread = np.sqrt(
            (counts @ (midranks - (counts @ midranks) / counts.sum()) ** 2) / counts.sum()
        )
        total = np.cumsum(np.bincount(self.levels, weights=values, minlength=len(counts)))
        above = total[-1] - (np.append(0, total[:-1]) + total) / 2
        above -= (counts @ above) / counts.sum()
        return np.asarray(self.by_document @ above / spread, dtype=np.float64)
