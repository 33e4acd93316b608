"""The largest of many cells by chance, for comparison with a headline that names the largest.

Among thousands of cells some ratio of count to expectation is large although nothing is behind it.
Where cells count tokens, the null is independent Poisson counts, in closed form; where whole
documents carry a label, the labels are permuted over them, which also keeps what tokens of one
document share.
"""

from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import ArrayLike
from scipy.special import pdtr

from moe_lab.analysis.aligned_rows import by_layer
from moe_lab.analysis.document_bootstrap import MIN_DOCUMENTS
from moe_lab.analysis.document_sums import documents, unit_sizes
from moe_lab.analysis.slot_counts import unit_counts
from moe_lab.analysis.token_groups import grouping
from moe_lab.measures import jensen_shannon_bits
from moe_lab.trace import Trace

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
    groups = grouping(trace, column, "domain")
    docs = documents(trace, len(groups) * max(layer.num_choices for layer in trace.meta.layers))
    sizes_UG = unit_sizes(trace, docs, groups).astype(np.float64)
    here_UG = sizes_UG > 0
    if (here_UG.sum(axis=1) > 1).any() or here_UG.sum(axis=0).min() < MIN_DOCUMENTS:
        return None
    chosen = pl.Series(groups.values).is_in(pl.Series(domains, dtype=groups.values.dtype).implode())
    kept = np.flatnonzero(chosen.to_numpy())
    used = here_UG.any(axis=1)
    generator = np.random.default_rng(seed)
    label_U = here_UG[used].argmax(axis=1)
    dealt_BU = np.stack([generator.permutation(label_U) for _ in range(deals)])
    sizes_U = sizes_UG[used].sum(axis=1)
    ratio_B, bits_B = np.zeros(deals), np.zeros(deals)
    for counts_UGE in unit_counts(trace, by_layer(trace), docs, groups):
        load_UE = counts_UGE.sum(axis=1)[used].astype(np.float64)
        share_E = load_UE.sum(axis=0) / max(sizes_U.sum(), 1)
        loads = []
        for group in range(len(groups)):
            mine_BU = (dealt_BU == group).astype(np.float64)
            count_BE, size_B = mine_BU @ load_UE, mine_BU @ sizes_U
            loads.append(count_BE)
            if group in kept:
                expected_BE = size_B[:, None] * share_E
                ratio = np.where(expected_BE >= LEAST_EXPECTED, count_BE, 0)
                ratio /= np.maximum(expected_BE, LEAST_EXPECTED)
                ratio_B = np.maximum(ratio_B, ratio.max(axis=1))
        for a in range(len(groups)):
            for b in range(a):
                bits_B = np.fmax(bits_B, jensen_shannon_bits(loads[a], loads[b]))
    return LargestOfDeals(float(np.quantile(ratio_B, LEVEL)), float(np.quantile(bits_B, LEVEL)))
