"""Intervals and p values of a correlation from per-document sums, and the false discovery rate.

A correlation is ``sum xy / sqrt(sum xx sum yy)`` of rows that are already centred, so a bootstrap
sample of documents is a row of weights times three columns of per-document sums. Tokens of one
document are not independent: the naive interval is given beside, to be compared.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtr, stdtrit

from moe_lab.analysis.aligned_rows import CHUNK_ROWS
from moe_lab.analysis.document_bootstrap import (
    MIN_DOCUMENTS,
    Floats,
    document_weights,
    expanded_quantiles,
)

MAX_CLUSTERS = 4096


@dataclass(frozen=True, eq=False)
class Moments:
    """Sums over the tokens of each of D documents.

    Attributes:
        value: the correlation over all tokens; NaN where one of the rows has no spread.
        n, xy, xx, yy: [D] tokens, and sums of the products, each scaled by the token's
            ``inflation``.
    """

    value: float
    n: Floats
    xy: Floats
    xx: Floats
    yy: Floats

    def drawn(self, weights_BD: Floats) -> Floats:
        """[B] the correlation in samples of documents, moved so that the whole sample has
        ``value``.
        """
        xy, xx, yy = (weights_BD @ column for column in (self.xy, self.xx, self.yy))
        scale = np.sqrt(np.maximum(xx * yy, np.finfo(float).tiny))
        whole = self.xy.sum() / np.sqrt(self.xx.sum() * self.yy.sum())
        return xy / scale - whole + self.value

    def merged(self, clusters: NDArray[np.int64] | None) -> "Moments":
        """The same with documents of one cluster [D] as one document; None: each is its own."""
        if clusters is None:
            return self
        sums = [np.bincount(clusters, column) for column in (self.n, self.xy, self.xx, self.yy)]
        return Moments(self.value, *(column.astype(np.float64) for column in sums))

    @property
    def effective_documents(self) -> float:
        """Documents of equal length that would weigh as much: ``(sum n)^2 / sum n^2``."""
        return float(self.n.sum() ** 2 / max((self.n**2).sum(), 1.0))


def moments(
    x: Floats,
    y: Floats,
    document_starts: np.ndarray,
    inflation: Floats | None = None,
    moved: tuple[Floats, Floats, Floats] | None = None,
) -> Moments:
    """Per-document sums of two centred rows whose documents lie one after another.

    Args:
        inflation: [n] scales what each token's products count for.
        moved: [D] each, added to the sums of xy, xx and yy: what the documents do through the ranks
            of all others (``RankShift``).
    """

    bounds = np.append(document_starts, len(x))
    whole, sums = np.zeros(3), np.empty((3, len(document_starts)))
    edges = np.searchsorted(document_starts, np.arange(0, len(x), CHUNK_ROWS))
    for first, last in pairwise([*np.unique(edges), len(document_starts)]):
        rows = slice(bounds[first], bounds[last])  # whole documents, that fit the cache
        starts = document_starts[first:last] - bounds[first]
        for place, (one, other) in enumerate(((x, y), (x, x), (y, y))):
            product = one[rows] * other[rows]
            whole[place] += product.sum()
            if inflation is not None:
                product *= inflation[rows]
            sums[place, first:last] = np.add.reduceat(product, starts)
    xy, xx, yy = map(float, whole)
    value = xy / np.sqrt(xx * yy) if xx > 0 and yy > 0 else float("nan")
    lengths = np.diff(bounds).astype(np.float64)
    if moved is not None:
        sums += np.stack(moved)
    return Moments(value, lengths, *sums)


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % (or ``level``) interval, the 90 % interval of the equivalence test, and
    p of no association at all.
    """

    value: float
    lo: float
    hi: float
    lo90: float
    hi90: float
    se: float
    p: float

    @classmethod
    def missing(cls, value: float = float("nan"), p: float = float("nan")) -> "Interval":
        return cls(
            value, value, value, value, value, 0.0 if np.isfinite(value) else float("nan"), p
        )

    def inside(self, band: float) -> bool:
        """Whether the 90 % interval lies within plus or minus ``band`` (two one-sided tests at 5
        %).
        """
        return -band < self.lo90 and self.hi90 < band

    def beyond(self, band: float) -> int:
        """1 where the 90 % interval lies above ``band``, -1 below ``-band``, else 0."""
        return int(self.lo90 > band) - int(self.hi90 < -band)


MISSING = Interval.missing()


class Bootstrap:
    """Samples of documents, the same for every statistic.

    More than ``MAX_CLUSTERS`` documents are first divided at random into as many bundles, which are
    independent too: memory stays bounded.
    """

    def __init__(self, documents: int, resamples: int, seed: int, level: float) -> None:
        self.level = level
        self.bundle: np.ndarray | None = None
        if documents > MAX_CLUSTERS:
            self.bundle = np.random.default_rng(seed).permutation(documents) % MAX_CLUSTERS
            documents = MAX_CLUSTERS
        self.weights = (
            list(document_weights(documents, resamples, seed)) if documents >= MIN_DOCUMENTS else []
        )

    def samples(self, of: Moments) -> Floats:
        return np.concatenate([of.drawn(weights) for weights in self.weights])

    def bundled(self, of: Moments) -> Moments:
        if self.bundle is None:
            return of
        sums = [
            np.bincount(self.bundle, column, MAX_CLUSTERS).astype(np.float64)
            for column in (of.n, of.xy, of.xx, of.yy)
        ]
        return Moments(of.value, *sums)

    def interval(self, of: Moments) -> Interval:
        """Percentile interval over documents, its tails widened as Student's t is wider than the
        normal (Hesterberg 2015, "expanded percentile"), since percentiles of few documents are too
        narrow; p from the t of value over standard error.
        """
        if not self.weights or not np.isfinite(of.value):
            return (
                Interval.missing()
                if not np.isfinite(of.value)
                else Interval(of.value, *[float("nan")] * 6)
            )
        of = self.bundled(of)
        samples = self.samples(of)
        effective = max(of.effective_documents, 2.0)
        lo, hi = map(float, expanded_quantiles(samples, self.level, effective))
        lo90, hi90 = map(float, expanded_quantiles(samples, 0.90, effective))
        se = float(samples.std()) * np.sqrt(effective / (effective - 1))
        p = 2 * float(stdtr(effective - 1, -abs(of.value) / se)) if se > 0 else float(of.value == 0)
        return Interval(of.value, lo, hi, lo90, hi90, se, p)


def naive_interval(value: float, tokens: int, level: float = 0.95) -> tuple[float, float]:
    """The interval of Fisher's z that takes tokens for independent: what a naive analysis would
    print, for comparison only.
    """
    if tokens < 4 or not abs(value) < 1:
        return float("nan"), float("nan")
    half = float(stdtrit(1e9, (1 + level) / 2)) / np.sqrt(tokens - 3)
    centre = np.arctanh(value)
    return float(np.tanh(centre - half)), float(np.tanh(centre + half))


def false_discovery(p: Floats) -> Floats:
    """[n] q values of Benjamini and Hochberg (1995): the smallest rate of false discoveries at
    which each would be one. NaN stays.
    """
    q = np.full(len(p), np.nan)
    known = np.flatnonzero(np.isfinite(p))
    if not len(known):
        return q
    order = known[np.argsort(p[known], kind="stable")]
    raised = p[order] * len(order) / np.arange(1, len(order) + 1)
    q[order] = np.minimum(np.minimum.accumulate(raised[::-1])[::-1], 1)
    return q
