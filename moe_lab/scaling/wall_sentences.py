"""The text of a verdict: one sentence that a report prints first, and the reasons under it.

In: a `Case`, the sweep with everything computed from it. Out: strings. Each sentence has one
condition; the tests list them. What would settle a sweep is not said here: `wall_planner` computes
it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtri

from moe_lab.number_format import count_of, magnitude
from moe_lab.scaling.compute_slope import ComputeSlope
from moe_lab.scaling.sweep_losses import TOKENS_PER_EXPERT, Sweep
from moe_lab.scaling.two_way import Unlike
from moe_lab.scaling.wall_rule import (
    DELTA_AICC,
    DOUBLINGS_BEYOND,
    ROUNDING,
    Judgement,
    Outcome,
    Price,
)

WORTH_SAYING = 0.02  # difference in active parameters below which nothing is said of it
SILENT = 1e-9  # nats: no two runs that differ agree this well


@dataclass(frozen=True)
class Case:
    """One judged sweep, as the sentences describe it.

    ``without`` is what the outcome would be without the outlying run, ``unlike`` the ratio whose
    runs disagree too much.
    """

    sweep: Sweep
    slope: ComputeSlope
    price: Price
    multiplier: float
    confidence: float
    charge: np.ndarray
    judged: Judgement
    outcome: Outcome
    without: Outcome
    unlike: Unlike | None

    @property
    def tokens_per_expert(self) -> float:
        """At the largest ratio: tokens x k / E, what a balanced router gives one expert."""
        return self.sweep.tokens / float(self.sweep.ratios[-1])

    @property
    def blind(self) -> bool:
        """Whether the noise between runs is unknown."""
        return not self.judged.found.sd[0] > SILENT

    @property
    def starved(self) -> bool:
        """Whether the experts of the largest ratio saw too few tokens to be past early training."""
        return self.tokens_per_expert < TOKENS_PER_EXPERT

    @property
    def outlier(self) -> int | None:
        """Index of the outlying run."""
        index = int(self.judged.found.outlier[0])
        return None if index < 0 or self.blind else index

    @property
    def last_gain(self) -> tuple[float, float]:
        """Nats per doubling, and the half-width of its interval."""
        return float(self.judged.gains[0, -1]), float(self.judged.half[0, -1])

    @property
    def average(self) -> tuple[float, float]:
        """W3 in nats per doubling, and the half-width of its interval."""
        return float(self.judged.slope[0]), float(self.judged.slope_half[0])

    @property
    def elasticity(self) -> tuple[float, float]:
        """d ln C / d ln ratio = (dL/dlnr) / (dL/dlnC), and the half-width of its interval (delta
        method where the slope was measured).
        """
        value, half = (nats / math.log(2) / self.slope.value for nats in self.average)
        if self.slope.error is not None:
            relative = self.slope.error / self.slope.value
            half = math.hypot(half, self.judged.found.quantile(self.confidence) * value * relative)
        return value, half

    @property
    def r_star(self) -> tuple[float | None, float | None]:
        """Ratios up to which a doubling still paid and past which none did; None where not found,
        or where returns grow with the ratio, or nothing can be said.
        """
        judged = self.judged
        if self.blind or self.starved or judged.growing[0]:
            return None, None
        low, high = (
            None if index < 0 else float(self.sweep.ratios[index])
            for index in (int(judged.paid_to[0]), int(judged.ended_by[0]))
        )
        return low, high

    @property
    def fades(self) -> bool:
        """Whether a form with a break fits best, but the end of returns is not sharp enough to be a
        wall.
        """
        return bool(not math.isnan(self.judged.sharpness[0]) and not self.judged.w2[0])


def reasons(case: Case) -> list[str]:
    """The reasons for the outcome, one line each."""
    parts = (
        _noise,
        _diverged,
        _outlying,
        _unlike,
        _starvation,
        _equivalence,
        _paid,
        _crossing,
        _shape,
        _average,
        _chance,
        lambda c: c.slope.source,
        _router_growth,
        _one_budget,
    )
    return [text for part in parts if (text := part(case))]


def _noise(case: Case) -> str:
    sweep, found = case.sweep, case.judged.found
    if found.df and case.blind:
        return (
            "all seeds gave the same loss to the last bit: the noise between runs is not what they "
            "measured"
        )
    if case.blind:
        return (
            f"{_seeds(sweep)} over {len(sweep.ratios)} ratios gives no estimate of the noise "
            "between runs"
        )
    if found.known is not None:
        return f"the noise between runs, {found.known:.4f} nats, was given, not measured here"
    how = "each seed's own effect removed" if sweep.layout.nuisance else "pooled within ratios"
    text = (
        f"the noise between runs is {found.sd[0]:.4f} nats ({how}, "
        f"{count_of(found.df, 'degree')} of freedom)"
    )
    if not found.growth[0]:
        return text
    last = found.sd[0] * math.exp(found.growth[0] * (sweep.log2[-1] - sweep.log2[0]))
    return text + f" at ratio {sweep.ratios[0]:g} and grows to {last:.4f} at {sweep.ratios[-1]:g}"


def _diverged(case: Case) -> str:
    lost = case.sweep.diverged
    if not lost:
        return ""
    runs = ", ".join(f"ratio {ratio:g} seed {seed}" for ratio, seed in lost)
    return (
        f"left out, as the loss is not finite: {runs}; the runs that remain may be the luckier ones"
    )


def _outlying(case: Case) -> str:
    if case.outlier is None:
        return ""
    found = case.judged.found
    return (
        f"the run at {case.sweep.run(case.outlier)} lies {found.deviation[0]:.1f} standard errors "
        f"from what its ratio and seed say: with it the outcome is "
        f'"{case.judged.outcomes_of_all()[0]}", without it "{case.without}"'
    )


def _unlike(case: Case) -> str:
    if case.unlike is None:
        return ""
    sweep, unlike = case.sweep, case.unlike
    return (
        f"the {sweep.layout.counts[unlike.ratio]} runs at ratio {sweep.ratios[unlike.ratio]:g} "
        f"disagree by {unlike.sd:.4f} nats where the noise of the other ratios is "
        f"{unlike.expected:.4f}: look at each of them, as it is not known which are off"
    )


def _starvation(case: Case) -> str:
    if not case.starved:
        return ""
    return (
        f"at ratio {case.sweep.ratios[-1]:g} an expert saw {magnitude(case.tokens_per_expert)} "
        "tokens, fewer than in any published sweep (2M): this measures early training"
    )


def _equivalence(case: Case) -> str:
    judged, ratios = case.judged, case.sweep.ratios
    if case.blind:
        return ""
    start = int(judged.wall_from[0])
    if start >= 0:
        text = f"W1: from ratio {ratios[start]:g} on every gain lies within {_margin(case)}"
        needs = f"{DOUBLINGS_BEYOND:g} doublings, after gains that were larger"
        return text if judged.w1[0] else f"{text}; a wall needs it over {needs}"
    gain, half = case.last_gain
    margin = case.price.margin
    above, below = gain - half > margin, gain + half < -margin
    verb = "is above" if above else "is below" if below else "overlaps"
    return f"W1: the last gain, {_interval(gain, half)} nats per doubling, {verb} {_margin(case)}"


def _paid(case: Case) -> str:
    """How far the loss demonstrably still fell, where that is short of the end."""
    judged = case.judged
    paying = judged.gains[0] - np.maximum(case.charge, 0) - judged.half[0] > case.price.margin
    above = np.flatnonzero(paying)
    if case.blind or case.outcome is Outcome.NO_WALL or not len(above):
        return ""
    reached = case.sweep.ratios[judged.steps[above[-1], 1]]
    worth = f"still worth more than {_percent(case)} of compute"
    return f"up to ratio {reached:g} a doubling was {worth}"


def _crossing(case: Case) -> str:
    if case.blind or case.starved:
        return ""
    if case.judged.growing[0]:
        return (
            "r*: returns grow with the ratio somewhere, so there is no one ratio where they stop "
            "to pay"
        )
    text = r_star_text(case.r_star, case.confidence)
    return f"r*: {text}, if returns do not grow with the ratio" if text else ""


def r_star_text(r_star: tuple[float | None, float | None], confidence: float) -> str:
    """``a doubling still paid at 8 and no longer past 32 (90 %)``; empty if neither is known."""
    low, high = r_star
    parts = [f"a doubling still paid at {low:g}"] if low is not None else []
    if high is not None:
        parts.append(
            f"{'' if parts else 'a doubling '}no longer {'' if parts else 'paid '}past {high:g}"
        )
    return f"{' and '.join(parts)} ({100 * confidence:g} %)" if parts else ""


def _shape(case: Case) -> str:
    judged, sweep = case.judged, case.sweep
    best, delta = str(judged.break_form[0]), float(judged.break_delta[0])
    if case.blind:
        return ""
    if not math.isfinite(delta):
        return (
            f"W2: {sweep.layout.runs} runs on {len(sweep.ratios)} ratios are too few to fit a form "
            "with a break"
        )
    if delta < DELTA_AICC:
        return (
            f"W2: no form with a break leads the line and the power law by {DELTA_AICC:g} in AICc "
            f"({best} {delta:+z.1f})"
        )
    upper = float(judged.break_upper[0])
    limit = float(sweep.ratios[-1]) / 2**DOUBLINGS_BEYOND
    where = "not identified" if math.isinf(upper) else f"below {2**upper:.0f}"
    lead = f"W2: {best} leads line and power law by {delta:.1f} in AICc, its break {where}"
    if upper > math.log2(limit) + ROUNDING:
        return f"{lead} (a wall needs it below {limit:g})"
    if case.fades:
        return (
            f"{lead}, but a bend spread over three doublings fits as well: gains that fade, as "
            "smooth laws' do, and no break"
        )
    return f"{lead} (far enough inside the grid)"


def _average(case: Case) -> str:
    value, half = case.elasticity
    if math.isnan(half):
        return f"W3: elasticity {value:z.2f} over the last two doublings, without an interval"
    margin = math.log2(case.multiplier)
    return (
        f"W3: elasticity {_interval(value, half, 2)} over the last two doublings ({margin:.2f} is "
        "the margin)"
    )


def _chance(case: Case) -> str:
    if case.blind:
        return ""
    charge = float(case.charge[-1])
    growth = f" plus the {charge:.4f} of the router's growth" if charge >= 0.00005 else ""
    return (
        f"a Gaussian process over all gains puts the last one at {_smoothed(case)} nats, above the "
        f"margin{growth} with probability {case.judged.last.above[0]:.2f}"
    )


def _router_growth(case: Case) -> str:
    """Router rows count as active parameters: what the larger ratios cost is taken off before a
    gain counts as paying.
    """
    spread = float(case.sweep.active.max() / case.sweep.active.min()) - 1
    if spread < WORTH_SAYING:
        return ""
    gain, charge = case.last_gain[0], float(case.charge[-1])
    return (
        f"active parameters differ by {100 * spread:.0f} % over the ratios (the router grows): "
        f"charged as compute, the last gain is {gain - charge:z.4f} instead of {gain:z.4f}"
    )


def _one_budget(case: Case) -> str:
    if case.outcome is Outcome.NO_WALL or case.blind:
        return ""
    if case.slope.error is not None:
        return (
            "an end of returns that moves with the tokens is a shortage of data: compare the "
            "verdicts of the other budgets"
        )
    return "one token budget does not tell an end of returns from experts short of data"


def _wall_sentence(case: Case, at: float | None) -> str:
    judged, ratios = case.judged, case.sweep.ratios
    quiet = f"from {ratios[judged.wall_from[0]]:g} to {ratios[-1]:g}"
    return (
        f"A wall at ratio {at:.3g}: {quiet} no doubling was worth {_percent(case)} of compute (all "
        f"{100 * case.confidence:g} % intervals within ±{case.price.margin:.4f} nats) and the "
        f"{judged.break_form[0]} form leads by {judged.break_delta[0]:.0f} in AICc, at "
        f"{_budget(case)}."
    )


def _below_sentence(case: Case, at: float | None) -> str:
    ratios = case.sweep.ratios
    first = ratios[case.sweep.log2 >= case.sweep.log2[-1] - 2 - ROUNDING][0]
    crossing = r_star_text(case.r_star, case.confidence)
    gain, half = case.last_gain
    rises = (
        f"; the last gain, {_interval(gain, half)} nats, is a loss that rises: mistuned or "
        f"short of "
        "data"
        if gain + half < -case.price.margin
        else ""
    )
    return (
        f"Below the margin: from ratio {first:g} to {ratios[-1]:g} a doubling bought "
        f"{_interval(*case.average)} nats on average, less than the {case.price.margin:.4f} that "
        f"{_percent(case)} of compute would"
        + (f"; {crossing}" if crossing else "")
        + f"{rises}, at {_budget(case)}."
    )


def _no_wall_sentence(case: Case, at: float | None) -> str:
    return (
        f"No wall up to ratio {at:g}: the last doubling still bought {_smoothed(case)} nats, above "
        f"the {case.price.margin:.4f} that {_percent(case)} of compute would with probability "
        f"{case.judged.last.above[0]:.2f} (elasticity {_interval(*case.elasticity, 2)}), at "
        f"{_budget(case)}."
    )


def _cannot_tell_sentence(case: Case, at: float | None) -> str:
    ratios = case.sweep.ratios
    grid = f"{len(ratios)} ratios ({ratios[0]:g}-{ratios[-1]:g})"
    return f"Cannot tell: {_seeds(case.sweep)} on {grid} at {_budget(case)} {_shortfall(case)}."


def _shortfall(case: Case) -> str:
    gain, half = case.last_gain
    margin = case.price.margin
    if case.blind:
        return "left the noise between runs unknown"
    if case.starved:
        return (
            f"measured early training, as experts saw fewer than {magnitude(TOKENS_PER_EXPERT)} "
            "tokens: a wall of sparsity and a shortage of data look alike there (it takes 1M per "
            "expert)"
        )
    if case.outlier is not None:
        return (
            f"hold an outlying run, {case.sweep.run(case.outlier)}: with it the outcome is "
            f'"{case.judged.outcomes_of_all()[0]}", without it "{case.without}"'
        )
    paying = case.judged.last.above[0] >= (1 + case.confidence) / 2
    if paying and not case.judged.best_last[0]:
        return (
            "put the last gain above the margin, but the last ratio is not better than every "
            "ratio before that by the margin per doubling"
        )
    if paying and case.average[0] <= case.average[1]:
        return "put the last gain above the margin, but W3's interval holds 0"
    if paying:
        return (
            f"put the last gain above the margin only by the gains before it: measured alone it is "
            f"{_interval(gain, half)} nats, not above {margin + max(case.charge[-1], 0):.4f}, and "
            "the noise grows with the ratio"
        )
    if gain - half > margin and case.charge[-1] > 0:
        low = case.judged.steps[-1, 0]
        growth = float(case.sweep.active[-1] / case.sweep.active[low]) - 1
        return (
            f"put the last gain at {_interval(gain, half)} nats, above the {margin:.4f} margin "
            f"only "
            f"until the {100 * growth:.0f} % more active parameters of that step are charged"
        )
    average, spread = case.average
    return (
        f"put the last gain at {_interval(gain, half)} nats and the average of the last two "
        f"doublings at {_interval(average, spread)}, neither on one side of the {margin:.4f} "
        f"margin "
        f"({_percent(case)} of compute)"
    )


def _smoothed(case: Case) -> str:
    last = case.judged.last
    return _interval(float(last.mean[0]), float(ndtri((1 + case.confidence) / 2) * last.sd[0]))


def _seeds(sweep: Sweep) -> str:
    counts = sweep.layout.counts
    low, high = int(counts.min()), int(counts.max())
    if low != high:
        return f"{low} to {high} seeds"
    return "one seed" if high == 1 else f"{high} seeds"


def _budget(case: Case) -> str:
    return (
        f"{magnitude(case.sweep.tokens)} tokens ({magnitude(case.tokens_per_expert)} per expert at "
        f"ratio {case.sweep.ratios[-1]:g})"
    )


def _percent(case: Case) -> str:
    return f"{100 * (case.multiplier - 1):.3g} %"


def _margin(case: Case) -> str:
    return f"±{case.price.margin:.4f} nats ({_percent(case)} of compute)"


def _interval(value: float, half: float, digits: int = 4) -> str:
    return f"{value:z.{digits}f} [{value - half:z.{digits}f}, {value + half:z.{digits}f}]"


_SENTENCES: dict[Outcome, Callable[[Case, float | None], str]] = {
    Outcome.WALL: _wall_sentence,
    Outcome.BELOW_MARGIN: _below_sentence,
    Outcome.NO_WALL: _no_wall_sentence,
    Outcome.CANNOT_TELL: _cannot_tell_sentence,
}


def sentence(case: Case, at: float | None) -> str:
    """The verdict in one sentence, which a report prints first."""
    text = _SENTENCES[case.outcome](case, at)
    if case.unlike is None or case.outcome is Outcome.CANNOT_TELL:
        return text
    return (
        f"{text} But the seeds at ratio {case.sweep.ratios[case.unlike.ratio]:g} disagree by more "
        "than the noise of the other ratios: the outcome may rest on runs that are off."
    )
