"""W1, W2 and W3 of docs/scaling.md, for one sweep or for many simulated ones at once. Numbers in,
numbers out, no prose.

W1  equivalence: from r* on, the interval of every gain per doubling lies inside (-margin, margin). A gain that is merely not
    significant proves nothing: on a straight line the rule "gain below two standard errors" calls a wall in 38-82 % of sweeps.
    Ratios closer than a factor of two are compared over a whole doubling, where the noise is a smaller part of the gain.
W2  model choice: a form with a break beats both the line and the power law by dAICc >= 6, and its break is placed, with
    confidence, at least three doublings before the last ratio. The break must be one: a hinge or plateau whose deviance is 6 below
    that of a bend spread over three doublings or more. Smooth laws fade so (Clark's near E_max, Ludziejewski's at 20 tokens a
    parameter), and a fade is what diminishing returns look like.
W3  elasticity d ln C_equivalent / d ln ratio over the last two doublings.
"""

from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from scipy.special import chdtri, fdtri, ndtri, stdtrit  # scipy.stats takes a second to import

from moe_lab.scaling.frontier_forms import FADE, FORMS, SMOOTH, FormFit, fit_form

DOUBLINGS_BEYOND = 3.0
DELTA_AICC = 6.0
ROUNDING = 1e-9


class Outcome(StrEnum):
    WALL = "wall"
    NO_WALL = "no wall"
    CANNOT_TELL = "cannot tell"


@dataclass(frozen=True)
class Noise:
    """Residual sum of squares ``within`` [B] on ``df`` degrees of freedom, or a standard deviation
    ``known`` from elsewhere.
    """

    within: np.ndarray
    df: int
    known: float | None = None

    @property
    def sd(self) -> np.ndarray:
        if self.known is not None:
            return np.full(len(self.within), self.known)
        return np.sqrt(self.within / self.df) if self.df else np.full(len(self.within), np.nan)

    def quantile(self, confidence: float) -> float:
        """Half-width of a two-sided interval in standard errors."""
        tail = (1 + confidence) / 2
        return float(ndtri(tail) if self.known is not None else stdtrit(max(self.df, 1), tail))


@dataclass(frozen=True)
class Judgement:
    """Arrays over B draws. ``steps`` [P, 2] are the ratios compared; ``gains`` and ``half`` [B, P]:
    nats per doubling of the ratio and the half-width of their interval; ``aicc`` form -> [B];
    ``wall_from`` [B] index of the ratio W1 starts at (-1 where it holds nowhere); ``break_form``
    [B], the best form with a break; ``break_at``, ``break_lower``, ``break_upper`` [B] log2 ratio;
    ``sharpness`` [B] deviance by which it beats a bend over three doublings (NaN where it leads no
    smooth form); ``slope``, ``slope_half`` [B] nats per doubling over the last two doublings.
    """

    steps: np.ndarray
    gains: np.ndarray
    half: np.ndarray
    aicc: dict[str, np.ndarray]
    fits: dict[str, FormFit]
    wall_from: np.ndarray
    break_form: np.ndarray
    break_delta: np.ndarray
    break_at: np.ndarray
    break_lower: np.ndarray
    break_upper: np.ndarray
    sharpness: np.ndarray
    slope: np.ndarray
    slope_half: np.ndarray
    w1: np.ndarray
    w2: np.ndarray
    wall: np.ndarray
    no_wall: np.ndarray

    def outcomes(self) -> np.ndarray:
        """[B] of `Outcome`: a wall needs W1 and W2, no wall the last gain above the margin."""
        return np.select(
            [self.wall, self.no_wall], [Outcome.WALL, Outcome.NO_WALL], Outcome.CANNOT_TELL
        )

    def best_form(self) -> np.ndarray:
        names = np.array(list(self.aicc))
        return names[np.stack(list(self.aicc.values())).argmin(0)]


def judge(
    x: np.ndarray,
    means: np.ndarray,
    counts: np.ndarray,
    noise: Noise,
    margin: float,
    *,
    charge: np.ndarray | None = None,
    confidence: float = 0.9,
) -> Judgement:
    """``x`` [R] log2 ratio, ``means`` [B, R], ``counts`` [R] runs per ratio, ``margin`` in nats per
    doubling, ``charge`` [P] what the extra active compute of each of `doublings` would have bought
    by itself (nats per doubling): a sweep shows "no wall" only if its last gain passes the margin
    with that taken off.
    """
    steps = doublings(x)
    low, high = steps.T
    length = x[high] - x[low]
    gains = (means[:, low] - means[:, high]) / length
    width = noise.quantile(confidence)
    half = width * noise.sd[:, None] * np.sqrt(1 / counts[low] + 1 / counts[high]) / length
    fits = {name: fit_form(form, x, means, counts) for name, form in FORMS.items()}
    aicc = {name: _aicc(fit, counts, noise) for name, fit in fits.items()}
    wall_from = _suffix_within(gains, half, margin, low)
    form, delta, at, lower, upper, falls = _break(fits, aicc, noise, confidence)
    beyond = x[-1] - DOUBLINGS_BEYOND + ROUNDING
    w1 = (wall_from > 0) & (x[np.maximum(wall_from, 0)] <= beyond)
    led = (delta >= DELTA_AICC) & (upper <= beyond) & falls
    sharpness = _sharpness(x, means, counts, noise, fits, led)
    w2 = led & (form != "saturation") & (sharpness >= DELTA_AICC)
    slope, slope_half = _edge_slope(x, means, counts, noise, width)
    charged = 0.0 if charge is None else max(0.0, float(charge[-1]))
    no_wall = gains[:, -1] - charged - half[:, -1] > margin
    breaks = (form, delta, at, lower, upper, sharpness)
    return Judgement(
        steps,
        gains,
        half,
        aicc,
        fits,
        wall_from,
        *breaks,
        slope,
        slope_half,
        w1,
        w2,
        w1 & w2,
        no_wall,
    )


def doublings(x: np.ndarray) -> np.ndarray:
    """[P, 2]: each ratio with the first at least twice as large, the last pair ending at the last
    ratio; ``x`` [R] log2 ratio.
    """
    high = np.searchsorted(x, x + 1 - ROUNDING)
    pairs = [(low, top) for low, top in enumerate(high.tolist()) if top < len(x)]
    last = len(x) - 1
    if (
        not pairs or pairs[-1][1] < last
    ):  # a grid that ends in a wider or a narrower step than its others
        pairs.append((max(np.searchsorted(x, x[-1] - 1 + ROUNDING, side="right") - 1, 0), last))
    return np.array(pairs)


def form_scores(
    x: np.ndarray, means: np.ndarray, counts: np.ndarray, noise: Noise
) -> dict[str, np.ndarray]:
    """AICc of each form, [B]."""
    return {
        name: _aicc(fit_form(form, x, means, counts), counts, noise) for name, form in FORMS.items()
    }


def _aicc(fit: FormFit, counts: np.ndarray, noise: Noise) -> np.ndarray:
    """Second-order AIC of the R means, whose noise is known, or estimated on ``noise.df`` degrees
    of freedom of its own.

    The deviance is that of the means and the noise together, with the variance at its best: (df +
    R) ln(1 + rss / within).
    """
    ratios, k = len(counts), fit.form.parameters
    if ratios - k - 1 <= 0 and k > 2:
        return np.full(len(fit.rss), np.inf)
    penalty = 2 * k + 2 * k * (k + 1) / max(ratios - k - 1, 1)
    return _deviance(fit.rss, ratios, noise) + penalty


def _sharpness(
    x: np.ndarray,
    means: np.ndarray,
    counts: np.ndarray,
    noise: Noise,
    fits: dict[str, FormFit],
    rows: np.ndarray,
) -> np.ndarray:
    """By how much a hinge or plateau has less deviance than a bend over three doublings, of the
    draws in ``rows`` [B].
    """
    found = np.full(len(means), np.nan)
    if rows.any():
        some = Noise(noise.within[rows], noise.df, noise.known)
        fade = fit_form(FADE, x, means[rows], counts).rss
        sharp = np.minimum(fits["hinge"].rss[rows], fits["plateau"].rss[rows])
        found[rows] = _deviance(fade, len(x), some) - _deviance(sharp, len(x), some)
    return found


def _deviance(rss: np.ndarray, ratios: int, noise: Noise) -> np.ndarray:
    if noise.known is not None:
        return rss / noise.known**2
    return (noise.df + ratios) * np.log1p(rss / np.maximum(noise.within, 1e-300))


def _suffix_within(
    gains: np.ndarray, half: np.ndarray, margin: float, low: np.ndarray
) -> np.ndarray:
    """Index of the first ratio from which every later gain's interval lies inside the margin, -1
    where even the last does not.
    """
    inside = np.abs(gains) + half < margin
    held = np.logical_and.accumulate(inside[:, ::-1], axis=1).sum(1)
    return np.where(held > 0, low[np.minimum(gains.shape[1] - held, gains.shape[1] - 1)], -1)


def _break(
    fits: dict[str, FormFit], aicc: dict[str, np.ndarray], noise: Noise, confidence: float
) -> tuple[np.ndarray, ...]:
    """The best form with a break: its name, its lead over the best smooth form, the break, the
    break's limits, and whether the loss falls on the way to it. The limits come from the profile
    likelihood, with F in place of chi2 for an estimated noise.
    """
    names = [name for name, fit in fits.items() if fit.breaks is not None]
    scores = np.stack([aicc[name] for name in names])
    smooth = np.stack([aicc[name] for name in SMOOTH]).min(0)
    best = scores.argmin(0)
    with np.errstate(invalid="ignore"):
        delta = np.where(np.isfinite(scores.min(0)), smooth - scores.min(0), -np.inf)
    if noise.known is None:
        threshold = fdtri(1, noise.df, confidence) if noise.df else np.inf
        variance = noise.within / noise.df if noise.df else np.zeros(len(best))
    else:
        threshold, variance = chdtri(1, 1 - confidence), np.full(len(best), noise.known**2)
    at, lower, upper, falls = (np.zeros(len(best), dtype) for dtype in (float, float, float, bool))
    for index, name in enumerate(names):
        rows = best == index
        fit = fits[name]
        assert fit.breaks is not None
        assert fit.profile is not None
        profile = fit.profile[rows]
        low = profile.min(1, keepdims=True)
        inside = profile - low <= threshold * np.maximum(variance[rows], 1e-300)[:, None]
        last = len(fit.breaks) - 1 - inside[:, ::-1].argmax(1)
        at[rows] = fit.breaks[profile.argmin(1)]
        lower[rows] = fit.breaks[inside.argmax(1)]
        upper[rows] = np.where(last == len(fit.breaks) - 1, np.inf, fit.breaks[last])
        falls[rows] = fit.coefficients[rows, 0] < 0
    return np.array(names)[best], delta, at, lower, upper, falls


def _edge_slope(
    x: np.ndarray, means: np.ndarray, counts: np.ndarray, noise: Noise, width: float
) -> tuple[np.ndarray, np.ndarray]:
    """Nats per doubling over the last two doublings (at least the last two ratios): weighted slope
    and half-width of its interval.
    """
    keep = x >= min(x[-1] - 2 - ROUNDING, x[-2])
    weight = counts[keep] / counts[keep].sum()
    centred = x[keep] - weight @ x[keep]
    spread = (weight * centred**2).sum()
    slope = -(means[:, keep] @ (weight * centred)) / spread
    return slope, width * noise.sd / np.sqrt(counts[keep].sum() * spread)
