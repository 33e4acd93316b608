"""Losses of a sweep as ratio + seed + noise: least squares with cells missing, unequal seeds and
noise that grows with the ratio, for one sweep or for many simulated ones at once.

Runs that share a seed share their data order, so the seed's own effect is removed from the noise
wherever the seeds link the ratios (docs/scaling.md). Two checks come with the fit:

outlier  the largest externally studentised residual against Student's quantile of df - 1 degrees of
         freedom, Bonferroni over the runs: at most 1 % of Gaussian sweeps are flagged. One spiked
         run moves a gain and its standard error alike, so a confident answer needs none.
         Runs of one ratio that are off together hide one another: `unlike_ratio` tests the ratio.
trend    whether squared residuals grow with log2 ratio (Cook & Weisberg 1983, the score of a
         log-linear variance, its 95 % point simulated for the design); where they do, the rate of
         growth is fitted by restricted likelihood and the means are weighted by it.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.special import chdtri, fdtri, ndtri, stdtrit  # scipy.stats takes a second to import

FALSE_FLAGS = 0.01
FALSE_WARNINGS = 0.001
TREND_LEVEL = 0.95
TREND_DRAWS = 2000
GROWTHS = np.linspace(0.0, 1.0, 21)
"""Candidates for d ln(sd) / d log2 ratio: 1 is a noise that grows as ratio^1.44."""


@dataclass(frozen=True)
class Layout:
    """The ratio and the seed of each of n runs: ``x`` [R] log2 ratio ascending, ``ratio`` [n] and
    ``seed`` [n] indices.
    """

    x: np.ndarray
    ratio: np.ndarray
    seed: np.ndarray

    @classmethod
    def grid(cls, x: np.ndarray, seeds: np.ndarray) -> "Layout":
        """Seeds 0 to ``seeds`` [R] - 1 at each ratio."""
        ratio = np.repeat(np.arange(len(x)), seeds)
        return cls(x, ratio, np.concatenate([np.arange(count) for count in seeds]))

    def without(self, runs: int | np.ndarray) -> "Layout":
        """The layout without these runs, and without a ratio or seed that had no other."""
        keep = ~np.isin(np.arange(len(self.ratio)), runs)
        ratios, ratio = np.unique(self.ratio[keep], return_inverse=True)
        return Layout(self.x[ratios], ratio, np.unique(self.seed[keep], return_inverse=True)[1])

    @property
    def runs(self) -> int:
        return len(self.ratio)

    @cached_property
    def counts(self) -> np.ndarray:
        """[R] runs of each ratio."""
        return np.bincount(self.ratio, minlength=len(self.x))

    @cached_property
    def nuisance(self) -> int:
        """Seed effects that are removed: none where seeds do not link the ratios, or where nothing
        would be left to measure the noise by.
        """
        effects = int(self.seed.max())
        full = len(self.x) + effects
        edges = (np.ones(self.runs), (self.ratio, len(self.x) + self.seed))
        graph = coo_array(edges, shape=(full + 1, full + 1))
        linked = connected_components(graph, directed=False, return_labels=False) == 1
        return effects if linked and self.runs > full else 0

    @cached_property
    def design(self) -> np.ndarray:
        """[n, p]: a column per ratio, then centred ones per seed, so that the coefficient of a
        ratio is its loss at the mean of the seeds.
        """
        return self._columns(paired=self.nuisance > 0)

    def _columns(self, *, paired: bool) -> np.ndarray:
        ratio = np.eye(len(self.x))[self.ratio]
        seed = np.eye(int(self.seed.max()) + 1)[self.seed]
        return np.hstack([ratio, (seed - seed.mean(0))[:, 1:]]) if paired else ratio

    @property
    def df(self) -> int:
        return self.runs - self.design.shape[1]


@dataclass(frozen=True)
class Estimate:
    """B sweeps of one layout: ``means`` [B, R] nats/token; ``spread`` [G, R, R] covariance of the
    means in units of the noise variance and ``group`` [B] which of them a draw has; ``counts`` [R]
    runs per ratio; ``within`` [B] residual sum of squares on ``df`` degrees of freedom; ``known`` a
    standard deviation from elsewhere; ``outlier`` [B] index of the run that is flagged (-1: none);
    ``deviation`` [B] its studentised residual; ``growth`` [B] d ln(sd) / d log2 ratio.
    """

    means: np.ndarray
    spread: np.ndarray
    group: np.ndarray
    counts: np.ndarray
    within: np.ndarray
    df: int
    known: float | None
    outlier: np.ndarray
    deviation: np.ndarray
    growth: np.ndarray

    @property
    def sd(self) -> np.ndarray:
        """[B] nats between runs of one ratio, of the smallest ratio where the noise grows; NaN
        where it is unknown.
        """
        if self.known is not None:
            return np.full(len(self.within), self.known)
        return np.sqrt(self.within / self.df) if self.df else np.full(len(self.within), np.nan)

    def quantile(self, confidence: float) -> float:
        """Half-width of a two-sided interval in standard errors."""
        tail = (1 + confidence) / 2
        return float(ndtri(tail) if self.known is not None else stdtrit(max(self.df, 1), tail))

    def error(self, contrasts: np.ndarray) -> np.ndarray:
        """[B, C] standard errors of ``contrasts`` [C, R] of the means."""
        return self._scaled((contrasts @ self.spread * contrasts).sum(-1))

    def error_between(
        self, contrasts: np.ndarray, first: np.ndarray, second: np.ndarray
    ) -> np.ndarray:
        """[B, N] standard errors of the differences of N pairs ``first`` [N] and ``second`` [N] of
        ``contrasts`` [C, R].
        """
        joint = contrasts @ self.spread @ contrasts.T
        own = np.diagonal(joint, axis1=1, axis2=2)
        return self._scaled(own[:, first] + own[:, second] - 2 * joint[:, first, second])

    def _scaled(self, unit: np.ndarray) -> np.ndarray:
        """[B, N] standard errors of variances [G, N] in units of the noise variance."""
        return self.sd[:, None] * np.sqrt(np.maximum(unit, 0))[self.group]

    def rows(self, mask: np.ndarray) -> "Estimate":
        """The draws in ``mask`` [B]."""
        per_draw = ("means", "group", "within", "outlier", "deviation", "growth")
        kept = {name: getattr(self, name)[mask] for name in per_draw}
        return Estimate(
            spread=self.spread, counts=self.counts, df=self.df, known=self.known, **kept
        )


def estimate(layout: Layout, losses: np.ndarray, known: float | None = None) -> Estimate:
    """Fit ``losses`` [B, n]; ``known`` states the noise between runs (nats)."""
    means, covariance, within, residual = _least_squares(layout, losses, 0.0)
    leverage = _leverage(layout, covariance)
    draws, ratios = len(losses), len(layout.x)
    outlier, deviation = _outlier(layout, residual, leverage, within)
    spreads, group, growth = [covariance[:ratios, :ratios]], np.zeros(draws, int), np.zeros(draws)
    if layout.df > 1 and known is None:
        score = _trend_score(layout, residual, leverage, within)
        rising = np.flatnonzero(score > _trend_limit(layout))
        if len(rising):
            fits = [_least_squares(layout, losses[rising], rate) for rate in GROWTHS]
            pairs = zip(fits, GROWTHS, strict=True)
            scores = [_restricted(layout, fit[1], fit[2], rate) for fit, rate in pairs]
            best = np.argmax(scores, axis=0)
            spreads = [fit[1][:ratios, :ratios] for fit in fits]
            group[rising], growth[rising] = best, GROWTHS[best]
            for number, fit in enumerate(fits):
                rows = best == number
                means[rising[rows]], within[rising[rows]] = fit[0][rows], fit[2][rows]
    return Estimate(
        means,
        np.array(spreads),
        group,
        layout.counts,
        within,
        layout.df,
        known,
        outlier,
        deviation,
        growth,
    )


@dataclass(frozen=True)
class Unlike:
    """A ratio (its index) whose runs disagree by ``sd`` nats where the others say ``expected``."""

    ratio: int
    sd: float
    expected: float


def unlike_ratio(layout: Layout, losses: np.ndarray, known: float | None = None) -> Unlike | None:
    """The ratio whose runs [n] disagree most, if by more than the noise of the other ratios allows.

    The test of the extra sum of squares, F, with the growth of the noise that the others show;
    chi2 where the noise is ``known``; `FALSE_WARNINGS` over all ratios.
    """
    residual = _least_squares(layout, losses[None], 0.0)[3][0]
    own = np.bincount(layout.ratio, residual**2) / np.maximum(layout.counts - 1, 1)
    ratio = int(np.where(layout.counts > 1, own, -1.0).argmax())
    there = np.flatnonzero(layout.ratio == ratio)
    others, rest = layout.without(there), np.delete(losses, there)[None]
    df = layout.df - others.df
    if df < 1 or (others.df < 1 and known is None):
        return None
    rate = float(estimate(others, rest, known).growth[0])
    shift = rate * (others.x[0] - layout.x[0])
    within = float(_least_squares(others, rest, rate)[2][0]) * np.exp(-2 * shift)
    extra = (float(_least_squares(layout, losses[None], rate)[2][0]) - within) / df
    level = 1 - FALSE_WARNINGS / len(layout.x)
    if known is None:
        variance, limit = within / others.df, float(fdtri(df, others.df, level))
    else:
        variance, limit = known**2, float(chdtri(df, 1 - level)) / df
    if not extra > limit * variance:
        return None
    here = np.exp(rate * (layout.x[ratio] - layout.x[0]))
    return Unlike(ratio, here * np.sqrt(extra), here * np.sqrt(variance))


def _least_squares(layout: Layout, losses: np.ndarray, rate: float) -> tuple[np.ndarray, ...]:
    """Means [B, R], covariance [p, p] of the coefficients in units of the smallest ratio's noise,
    weighted residual sum of squares [B] and residuals [B, n], with a noise that grows at ``rate``.
    """
    root = np.exp(-rate * (layout.x - layout.x[0]))[layout.ratio]
    design, target = layout.design * root[:, None], losses * root
    covariance = np.linalg.inv(design.T @ design)  # of full rank: ``Layout.nuisance``
    coefficients = (target @ design) @ covariance
    residual = target - coefficients @ design.T
    return coefficients[:, : len(layout.x)], covariance, (residual**2).sum(1), residual


def _leverage(layout: Layout, covariance: np.ndarray) -> np.ndarray:
    """[n] leverages of the runs under equal noise."""
    return (layout.design @ covariance * layout.design).sum(1)


def _outlier(
    layout: Layout, residual: np.ndarray, leverage: np.ndarray, within: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The flagged run of each draw (-1: none) and its studentised residual."""
    draws, df = len(residual), layout.df - 1
    if df < 1:
        return np.full(draws, -1), np.zeros(draws)
    alone = residual**2 / np.maximum(1 - leverage, 1e-9)
    alone[:, leverage > 1 - 1e-9] = 0.0  # a run that is the only one of its ratio or seed
    worst = alone.argmax(1)
    largest = alone[np.arange(draws), worst]
    size = np.sqrt(largest / np.maximum((within - largest) / df, 1e-300))
    limit = stdtrit(df, 1 - FALSE_FLAGS / (2 * layout.runs))
    return np.where((size > limit) & (within > 0), worst, -1), size


def _trend_score(
    layout: Layout, residual: np.ndarray, leverage: np.ndarray, within: np.ndarray
) -> np.ndarray:
    """[B] standardised score of ln(variance) on log2 ratio, at no trend."""
    kept = leverage < 1 - 1e-9
    variance = np.maximum(within / layout.df, 1e-300)[:, None]
    squares = residual[:, kept] ** 2 / (1 - leverage[kept]) / variance
    x = layout.x[layout.ratio[kept]]
    centred = x - x.mean()
    return squares @ centred / np.sqrt(2 * (centred**2).sum())


def _trend_limit(layout: Layout) -> float:
    return _simulated_limit(
        tuple(layout.x.tolist()), tuple(layout.ratio.tolist()), tuple(layout.seed.tolist())
    )


@lru_cache(maxsize=256)
def _simulated_limit(x: tuple[float, ...], ratio: tuple[int, ...], seed: tuple[int, ...]) -> float:
    layout = Layout(np.array(x), np.array(ratio), np.array(seed))
    losses = np.random.default_rng(0).normal(size=(TREND_DRAWS, layout.runs))
    _, covariance, within, residual = _least_squares(layout, losses, 0.0)
    score = _trend_score(layout, residual, _leverage(layout, covariance), within)
    return float(np.quantile(score, TREND_LEVEL))


def _restricted(
    layout: Layout, covariance: np.ndarray, within: np.ndarray, rate: float
) -> np.ndarray:
    """[B] restricted log likelihood of a noise that grows at ``rate``, its level profiled out."""
    log_roots = -rate * (layout.counts @ (layout.x - layout.x[0]))
    volume = np.linalg.slogdet(covariance)[1]
    return log_roots + 0.5 * volume - 0.5 * layout.df * np.log(np.maximum(within, 1e-300))
