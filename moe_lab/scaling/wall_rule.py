"""The rule of the wall verdict: W1, W2, W3 and the chance of the last gain (docs/scaling.md), for
one
sweep or for many simulated ones at once. Numbers in, numbers out, no prose.

W1  equivalence: from r* on, the interval of every gain per doubling lies inside (-margin, margin).
    A gain that is merely not significant proves nothing: on a straight line the rule "gain below
    two standard errors" calls a wall in 38-82 % of sweeps. Ratios closer than a factor of two are
    compared over a whole doubling, where the noise is a smaller part of the gain.
W2  model choice: a form with a break beats both the line and the power law by dAICc >= 6, and its
    break is placed, with confidence, at least three doublings before the last ratio. The break must
    be one: a hinge or plateau whose deviance is 6 below that of a bend spread over three doublings
    or more. Smooth laws fade so (Clark's near E_max, Ludziejewski's at 20 tokens a parameter), and
    a fade is what diminishing returns look like.
W3  the average gain per doubling over the last two doublings, as an elasticity d ln C_equivalent /
    d ln ratio where it is divided by dL/dlnC.

    wall          W1 and W2
    below margin  the upper limit of W3 lies below the margin, and so does the last gain itself. The
                  claim is about that average, whatever the curve's shape, so 5 % is its error.
    no wall       `gain_process` says that the last gain, with the router's growth taken off, is
                  above the margin with probability .95; W3's interval lies above 0; and the last
                  ratio is better by the margin per doubling than every ratio two doublings smaller
                  or more. Where the noise grows with the ratio, the measured last gain itself has
                  to be above the margin too: the process would trust the quieter ratios before it.
                  (The same everywhere would cost power, .92 to .85 on a line of 1.5 margins at .006
                  nats x 3 seeds, and halve the error, .17 to .09, where a gain of 2 margins drops
                  to .6 in the last doubling alone.)
    cannot tell   everything else

A sweep with an outlying run (`two_way`) is never "no wall", and is another outcome only if it is so
without that run too.
"""

from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np
from scipy.special import chdtri, fdtri  # scipy.stats takes a second to import

from moe_lab.scaling.frontier_forms import FADE, FORMS, SMOOTH, FormFit, fit_form
from moe_lab.scaling.gain_process import Posterior, posterior
from moe_lab.scaling.two_way import Estimate, Layout, estimate

DOUBLINGS_BEYOND = 3.0
DELTA_AICC = 6.0
ROUNDING = 1e-9
GROWING_LEVEL = 0.05
"""Error of the test that returns grow with the ratio, over all pairs of gains."""


class Outcome(StrEnum):
    WALL = "wall"
    BELOW_MARGIN = "below margin"
    NO_WALL = "no wall"
    CANNOT_TELL = "cannot tell"


@dataclass(frozen=True)
class Price:
    """What a doubling must buy: ``margin`` nats, its standard ``error``, and ``charge`` [P] nats
    per
    doubling that the extra active compute of each of `doublings` would have bought by itself.
    """

    margin: float
    error: float = 0.0
    charge: np.ndarray | None = None


@dataclass(frozen=True)
class Judgement:
    """The judgement of B sweeps. Arrays over B draws. ``steps`` [P, 2] are the ratios compared;
    ``gains`` and ``half`` [B, P]: nats per doubling of the ratio and the half-width of their
    interval; ``aicc`` form -> [B]; ``wall_from`` [B] index of the ratio W1 starts at (-1 where it
    holds nowhere); ``break_form`` [B], the best form with a break; ``break_at``, ``break_lower``,
    ``break_upper`` [B] log2 ratio; ``sharpness`` [B] deviance by which it beats a bend over three
    doublings (NaN where it leads no smooth form); ``slope``, ``slope_half`` [B] W3, nats per
    doubling; ``last`` what `gain_process` says of the last gain, of those draws alone for which "no
    wall" needs it (of one draw always); ``best_last`` [B] whether the last ratio is better than all
    that are two doublings smaller or more by the margin per doubling; ``paid_to``, ``ended_by`` [B]
    index of the ratio up to which a doubling still paid and past which none did (-1: not found);
    ``growing`` [B] whether returns grow.
    """

    found: Estimate
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
    last: Posterior
    best_last: np.ndarray
    paid_to: np.ndarray
    ended_by: np.ndarray
    growing: np.ndarray
    w1: np.ndarray
    w2: np.ndarray
    wall: np.ndarray
    below: np.ndarray
    no_wall: np.ndarray

    without: np.ndarray | None = None
    """[B] outcomes without the flagged run, the same where none is flagged."""

    def outcomes(self) -> np.ndarray:
        """[B] of `Outcome`, by the module's rule."""
        with_all = self.outcomes_of_all()
        if self.without is None:
            return with_all
        agreed = (with_all == self.without) & (with_all != Outcome.NO_WALL)
        return np.where((self.found.outlier >= 0) & ~agreed, Outcome.CANNOT_TELL, with_all)

    def outcomes_of_all(self) -> np.ndarray:
        """[B] of `Outcome` of all runs, the outlying ones among them."""
        choices = {
            Outcome.WALL: self.wall,
            Outcome.BELOW_MARGIN: self.below,
            Outcome.NO_WALL: self.no_wall,
        }
        return np.select(list(choices.values()), list(choices), Outcome.CANNOT_TELL)

    def best_form(self) -> np.ndarray:
        names = np.array(list(self.aicc))
        return names[np.stack(list(self.aicc.values())).argmin(0)]


def judge(
    layout: Layout,
    losses: np.ndarray,
    price: Price,
    *,
    known: float | None = None,
    confidence: float = 0.9,
) -> Judgement:
    """Judge ``losses`` [B, n] of one ``layout``; ``known`` states the noise between runs (nats)."""
    judged = _judge_all(layout, losses, price, known, confidence)
    outlier, without = judged.found.outlier, judged.outcomes_of_all()
    # of many draws only those whose outcome can depend on it; one sweep is told both
    needed = (outlier >= 0) & (judged.wall | judged.below | (len(losses) == 1))
    for run in np.unique(outlier[needed]).tolist():
        rows, fewer = needed & (outlier == run), layout.without(run)
        if len(fewer.x) < len(layout.x):  # the run was the only one of its ratio
            without[rows] = Outcome.CANNOT_TELL
            continue
        part = np.delete(losses[rows], run, axis=1)
        rest = _judge_all(fewer, part, price, known, confidence)
        without[rows] = rest.outcomes_of_all()
    return replace(judged, without=without)


def _judge_all(
    layout: Layout, losses: np.ndarray, price: Price, known: float | None, confidence: float
) -> Judgement:
    x, counts = layout.x, layout.counts
    found = estimate(layout, losses, known)
    steps = doublings(x)
    differences = _per_doubling(x, steps)
    gains, half = _measured(found, differences, confidence)
    fits = {name: fit_form(form, x, found.means, counts) for name, form in FORMS.items()}
    aicc = {name: _aicc(fit, counts, found) for name, fit in fits.items()}
    uncertain = found.quantile(confidence) * price.error
    margin = price.margin
    wall_from = _suffix_within(gains, np.hypot(half, uncertain), margin, steps[:, 0])
    breaks = _break(fits, aicc, found, confidence)
    form, delta, at, lower, upper, falls = breaks
    beyond = x[-1] - DOUBLINGS_BEYOND + ROUNDING
    w1 = (wall_from > 0) & (x[np.maximum(wall_from, 0)] <= beyond)
    led = (delta >= DELTA_AICC) & (upper <= beyond) & falls
    sharpness = _sharpness(x, counts, found, fits, led)
    w2 = led & (form != "saturation") & (sharpness >= DELTA_AICC)
    edge = _edge(x, counts)
    slope, slope_half = (value[:, 0] for value in _measured(found, edge[None], confidence))
    below = (slope + np.hypot(slope_half, uncertain) < margin) & (gains[:, -1] < margin)
    charge = np.zeros(len(steps)) if price.charge is None else np.maximum(price.charge, 0)
    threshold = margin + float(charge[-1])
    best_last = _best_last(x, found.means, margin)
    unsure_end = (found.growth > 0) & (gains[:, -1] <= threshold)
    possible = (slope > slope_half) & best_last & ~below & ~unsure_end
    asked = possible | (len(losses) == 1)  # the process takes most of the time
    last = posterior(x, found.rows(asked), differences[-1], threshold, margin, price.error)
    no_wall = possible.copy()
    no_wall[asked] &= last.above >= (1 + confidence) / 2
    paid_to, ended_by = _crossing(x, found, price, charge, confidence)
    return Judgement(
        found,
        steps,
        gains,
        half,
        aicc,
        fits,
        wall_from,
        form,
        delta,
        at,
        lower,
        upper,
        sharpness,
        slope,
        slope_half,
        last,
        best_last,
        paid_to,
        ended_by,
        _growing(found, differences, gains),
        w1,
        w2,
        w1 & w2,
        below,
        no_wall,
    )


def _per_doubling(x: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """[P, R] contrasts: loss at the first ratio less that at the second, per doubling."""
    low, high = steps.T
    rows = np.arange(len(steps))
    contrasts = np.zeros((len(steps), len(x)))
    contrasts[rows, low] = 1 / (x[high] - x[low])
    contrasts[rows, high] = -1 / (x[high] - x[low])
    return contrasts


def _measured(
    found: Estimate, contrasts: np.ndarray, confidence: float
) -> tuple[np.ndarray, np.ndarray]:
    """Values of ``contrasts`` [C, R] and half-widths of their intervals, [B, C]."""
    return found.means @ contrasts.T, found.quantile(confidence) * found.error(contrasts)


def _edge(x: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """[R] contrast: minus the weighted slope over the last two doublings (at least two ratios)."""
    keep = x >= min(x[-1] - 2 - ROUNDING, x[-2])
    weight = counts * keep / (counts * keep).sum()
    centred = x - weight @ x
    return -weight * centred / (weight * centred**2).sum()


def _best_last(x: np.ndarray, means: np.ndarray, margin: float) -> np.ndarray:
    """[B] whether the last ratio is better by the margin per doubling than every ratio two
    doublings
    smaller or more; the process judges the last doubling itself.
    """
    earlier = x <= x[-1] - 2 + ROUNDING
    needed = margin * (x[-1] - x[earlier])
    return (means[:, earlier] - means[:, -1:] > needed).all(1)


def _crossing(
    x: np.ndarray, found: Estimate, price: Price, charge: np.ndarray, confidence: float
) -> tuple[np.ndarray, np.ndarray]:
    """Fixed-sequence tests for where a doubling stops to pay, over windows of two doublings.

    Under returns that do not grow, an average above the margin over a window says that its first
    doubling paid, one below it that its second did not. From the start, windows pass up to the
    first that does not, and from the end likewise: each sequence has the error of one test.
    """
    steps = doublings(x)
    follows = {low: (index, high) for index, (low, high) in enumerate(steps.tolist())}
    chains = [
        (low, middle, follows[middle][1], index, follows[middle][0])
        for low, (index, middle) in follows.items()
        if middle in follows
    ]
    none = np.full(len(found.means), -1)
    if not chains:
        return none, none
    low, middle, high, first, second = np.array(sorted(chains)).T
    average, half = _measured(found, _per_doubling(x, np.stack([low, high], 1)), confidence)
    half = np.hypot(half, found.quantile(confidence) * price.error)
    extra = (charge[first] + charge[second]) / 2
    paid = np.logical_and.accumulate(average - extra - half > price.margin, axis=1).sum(1)
    ended = (average + half < price.margin)[:, ::-1]
    ended = np.logical_and.accumulate(ended, axis=1).sum(1)
    paid_to = np.where(paid > 0, low[np.maximum(paid - 1, 0)], -1)
    return paid_to, np.where(ended > 0, middle[np.minimum(len(low) - ended, len(low) - 1)], -1)


def _growing(found: Estimate, differences: np.ndarray, gains: np.ndarray) -> np.ndarray:
    """[B] whether some later gain is above an earlier one beyond chance (Bonferroni)."""
    early, late = np.triu_indices(len(differences), 1)
    if not len(early) or (found.known is None and not found.df):
        return np.zeros(len(gains), bool)
    error = found.error_between(differences, early, late)
    limit = found.quantile(1 - 2 * GROWING_LEVEL / len(early))
    with np.errstate(invalid="ignore"):
        grown = gains[:, late] - gains[:, early] > limit * error
    return np.logical_or.reduce(grown, axis=1)


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
    x: np.ndarray, means: np.ndarray, counts: np.ndarray, noise: Estimate
) -> dict[str, np.ndarray]:
    """AICc of each form, [B]."""
    return {
        name: _aicc(fit_form(form, x, means, counts), counts, noise) for name, form in FORMS.items()
    }


def _aicc(fit: FormFit, counts: np.ndarray, noise: Estimate) -> np.ndarray:
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
    counts: np.ndarray,
    found: Estimate,
    fits: dict[str, FormFit],
    rows: np.ndarray,
) -> np.ndarray:
    """By how much a hinge or plateau has less deviance than a bend over three doublings, of the
    draws in ``rows`` [B].
    """
    lead = np.full(len(found.means), np.nan)
    if rows.any():
        some = found.rows(rows)
        fade = fit_form(FADE, x, some.means, counts).rss
        sharp = np.minimum(fits["hinge"].rss[rows], fits["plateau"].rss[rows])
        lead[rows] = _deviance(fade, len(x), some) - _deviance(sharp, len(x), some)
    return lead


def _deviance(rss: np.ndarray, ratios: int, noise: Estimate) -> np.ndarray:
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
    fits: dict[str, FormFit], aicc: dict[str, np.ndarray], noise: Estimate, confidence: float
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
