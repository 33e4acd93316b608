"""The largest of many cells by chance, for comparison with a headline that names the largest.

Among thousands of cells some ratio of count to expectation is large although nothing is behind it.
Where cells count tokens, the null is independent Poisson counts, in closed form; where whole
documents carry a label, the labels are permuted over them, which also keeps what tokens of one
document share.
"""

from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import ArrayLike, NDArray
from scipy.special import pdtr

from moe_lab.analysis.document_bootstrap import MIN_DOCUMENTS, RESAMPLES
from moe_lab.analysis.specialisation import (
    Divergence,
    DomainCounts,
    Specialisation,
    domain_counts,
)
from moe_lab.measures import jensen_shannon_bits
from moe_lab.trace import LayerMeta, Trace

LEAST_EXPECTED = 5.0
"""Cells of which fewer are expected say nothing of a ratio, and are in no headline."""
LEVEL = 0.95
DEALS = 100
STEPS = 40


def largest_ratio(expected: ArrayLike, level: float = LEVEL) -> float | None:
    """The ``level`` point of the largest ``count / expected`` among independent Poisson counts.

    Args:
        expected: [n] of each cell; those below ``LEAST_EXPECTED`` are left out.

    None where no cell is left. Example: 1,000 cells of 100 each give 1.43.
    """
    cells = np.asarray(expected, dtype=np.float64)
    cells = cells[cells >= LEAST_EXPECTED]
    if not len(cells):
        return None
    # three digits are enough, and there are far fewer of them than cells
    digits = 10.0 ** (2 - np.floor(np.log10(cells)))
    means, number = np.unique(np.round(cells * digits) / digits, return_counts=True)
    low, high = 1.0, 2.0 + float(len(cells)) / LEAST_EXPECTED
    for _ in range(STEPS):
        middle = np.sqrt(low * high)
        with np.errstate(divide="ignore"):
            within = float(number @ np.log(pdtr(np.floor(middle * means), means)))
        low, high = (middle, high) if within < np.log(level) else (low, middle)
    return float(high)


@dataclass(frozen=True)
class LargestOfDeals:
    """95 % points under labels permuted over documents: ``ratio`` of the largest specialisation
    over that at random, ``bits`` of the widest divergence of two domains.
    """

    ratio: float
    bits: float


def largest_of_deals(
    trace: Trace, column: str, domains: list[object], *, deals: int = DEALS, seed: int = 0
) -> LargestOfDeals | None:
    """The largest cells of ``domain_specialisation`` and ``domain_divergence`` for a router that
    ignores the domain, over all layers, ``domains`` and experts.

    None where a document mixes domains, or a domain has fewer than 5 documents.
    """
    counted = domain_counts(trace, column)
    if not separate(counted):
        return None
    measure = Deals(counted, domains, deals, seed)
    counted.read_into(measure)
    return measure.largest


@dataclass(frozen=True)
class DomainTables:
    """``domain_specialisation``, ``domain_divergence`` and ``largest_of_deals`` of one column."""

    specialisation: pl.DataFrame
    divergence: pl.DataFrame
    largest: LargestOfDeals | None


def domain_tables(
    trace: Trace,
    column: str,
    domains: list[object],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = 0.95,
) -> DomainTables:
    """The three from one reading of the trace; without ``resamples`` no labels are permuted."""
    counted = domain_counts(trace, column)
    specialisation = Specialisation(counted, resamples, seed, level)
    divergence = Divergence(counted, resamples, seed, level)
    asked = resamples and separate(counted)
    deals = [Deals(counted, domains, DEALS, seed)] if asked else []
    counted.read_into(specialisation, divergence, *deals)
    largest = deals[0].largest if deals else None
    return DomainTables(specialisation.frame, divergence.frame, largest)


def separate(counted: DomainCounts) -> bool:
    """Whether each document has one domain, and each domain 5 documents or more."""
    here_UG = counted.sizes > 0
    mixed = (here_UG.sum(axis=1) > 1).any()
    return not mixed and here_UG.sum(axis=0).min() >= MIN_DOCUMENTS


class Deals:
    """The measure of ``largest_of_deals``."""

    def __init__(self, counted: DomainCounts, domains: list[object], deals: int, seed: int) -> None:
        sizes_UG = counted.sizes.astype(np.float64)
        here_UG, values = sizes_UG > 0, counted.groups.values
        chosen = values.is_in(pl.Series(domains, dtype=values.dtype).implode())
        self._kept = np.flatnonzero(chosen.to_numpy())
        self._used = here_UG.any(axis=1)
        generator = np.random.default_rng(seed)
        label_U = here_UG[self._used].argmax(axis=1)
        dealt_BU = np.stack([generator.permutation(label_U) for _ in range(deals)])
        self._sizes_U = sizes_UG[self._used].sum(axis=1)
        self._mine_GBU = [dealt_BU == group for group in range(len(values))]
        self._ratio_B, self._bits_B = np.zeros(deals), np.zeros(deals)

    @property
    def largest(self) -> LargestOfDeals:
        ratio, bits = (np.quantile(values, LEVEL) for values in (self._ratio_B, self._bits_B))
        return LargestOfDeals(float(ratio), float(bits))

    def add(self, layer: LayerMeta, counts_UGE: NDArray) -> None:
        load_UE = counts_UGE.sum(axis=1)[self._used].astype(np.float64)
        share_E = load_UE.sum(axis=0) / max(self._sizes_U.sum(), 1)
        loads = []
        for group, mine in enumerate(self._mine_GBU):
            mine_BU = mine.astype(np.float64)
            count_BE, size_B = mine_BU @ load_UE, mine_BU @ self._sizes_U
            loads.append(count_BE)
            if group in self._kept:
                expected_BE = size_B[:, None] * share_E
                ratio = np.where(expected_BE >= LEAST_EXPECTED, count_BE, 0)
                ratio /= np.maximum(expected_BE, LEAST_EXPECTED)
                self._ratio_B = np.maximum(self._ratio_B, ratio.max(axis=1))
        for a in range(len(loads)):
            for b in range(a):
                self._bits_B = np.fmax(self._bits_B, jensen_shannon_bits(loads[a], loads[b]))
