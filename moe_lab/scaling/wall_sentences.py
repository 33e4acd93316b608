"""What a judged sweep is told as: one sentence that a report prints first, and the reasons under
it.

In: a `Case`, the sweep with everything computed from it. Out: strings. A sentence that cannot tell
names the seeds, the grid and the tokens per expert it had, and those that would settle it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from moe_lab.number_format import magnitude
from moe_lab.scaling.compute_slope import ComputeSlope
from moe_lab.scaling.sweep_means import Sweep
from moe_lab.scaling.wall_rule import (
    DELTA_AICC,
    DOUBLINGS_BEYOND,
    ROUNDING,
    Judgement,
    Noise,
    Outcome,
)

TOKENS_PER_EXPERT = (
    1e6  # the smallest published MoE sweep (misfit, 262M tokens, top-2 of 256) gave each expert 2e6
)
FULL_GRID = 8  # ratios a sweep should have for its form to be told (docs/scaling.md)
WORTH_SAYING = 0.02  # difference in active parameters below which nothing is said of it
SILENT = 1e-9  # nats: no two runs that differ agree this well
MOST_SEEDS = 20  # beyond this a larger model or more tokens are the cheaper answer


@dataclass(frozen=True)
class Case:
    """All that the prose needs to know about one judged sweep."""

    sweep: Sweep
    slope: ComputeSlope
    noise: Noise
    margin: float
    multiplier: float
    confidence: float
    charge: np.ndarray
    judged: Judgement

    @property
    def tokens_per_expert(self) -> float:
        """At the largest ratio: tokens x k / E, what a balanced router gives one expert."""
        return self.sweep.tokens / float(self.sweep.ratios[-1])

    @property
    def blind(self) -> bool:
        return not self.noise.sd[0] > SILENT

    @property
    def starved(self) -> bool:
        return self.tokens_per_expert < TOKENS_PER_EXPERT


def elasticity(case: Case) -> tuple[float, float]:
    """d ln C / d ln ratio = (dL/dlnr) / (dL/dlnC), and the half-width of its interval (delta method
    where the slope was measured).
    """
    value = float(case.judged.slope[0]) / math.log(2) / case.slope.value
    half = float(case.judged.slope_half[0]) / math.log(2) / case.slope.value
    if case.slope.error is not None:
        half = math.hypot(
            half, case.noise.quantile(case.confidence) * value * case.slope.error / case.slope.value
        )
    return value, half


def reasons(case: Case) -> list[str]:
    parts = (
        _noise_reason,
        _starvation_reason,
        _w1_reason,
        _paid_reason,
        _w2_reason,
        _w3_reason,
        lambda c: c.slope.source,
        _compute_reason,
        _budget_reason,
    )
    return [text for part in parts if (text := part(case))]


def _noise_reason(case: Case) -> str:
    sweep = case.sweep
    if sweep.df and case.blind:
        return "all seeds gave the same loss to the last bit: the noise between runs is not what they measured"
    if case.blind:
        return f"{_plural(sweep.seeds, 'seed')} over {len(sweep.ratios)} ratios gives no estimate of the noise between runs"
    if case.noise.known is not None:
        return f"the noise between runs, {case.noise.known:.4f} nats, was given, not measured here"
    how = "after removing each seed's own effect" if sweep.paired else "pooled within ratios"
    return f"the noise between runs is {case.noise.sd[0]:.4f} nats ({how}, {_plural(sweep.df, 'degree')} of freedom)"


def _starvation_reason(case: Case) -> str:
    if not case.starved:
        return ""
    return (
        f"at ratio {case.sweep.ratios[-1]:g} an expert saw {magnitude(case.tokens_per_expert)} tokens, fewer than in any published sweep "
        f"(2M): this measures early training"
    )


def _w1_reason(case: Case) -> str:
    judged, ratios = case.judged, case.sweep.ratios
    if case.blind:
        return ""
    start = int(judged.wall_from[0])
    if start >= 0:
        rest = (
            ""
            if judged.w1[0]
            else f"; a wall needs it over {DOUBLINGS_BEYOND:g} doublings, after gains that were larger"
        )
        return f"W1: from ratio {ratios[start]:g} on every gain lies within {_margin(case)}{rest}"
    gain, half = _last_gain(case)
    verb = (
        "is above"
        if gain - half > case.margin
        else "is below"
        if gain + half < -case.margin
        else "overlaps"
    )
    return f"W1: the last gain, {_interval(gain, half)} nats per doubling, {verb} {_margin(case)}"


def _last_gain(case: Case) -> tuple[float, float]:
    return float(case.judged.gains[0, -1]), float(case.judged.half[0, -1])


def _paid_reason(case: Case) -> str:
    """How far the loss demonstrably still fell, where that is short of the end."""
    above = np.flatnonzero(
        case.judged.gains[0] - np.maximum(case.charge, 0) - case.judged.half[0] > case.margin
    )
    if case.blind or case.judged.no_wall[0] or not len(above):
        return ""
    reached = case.sweep.ratios[case.judged.steps[above[-1], 1]]
    return (
        f"up to ratio {reached:g} a doubling was still worth more than {_percent(case)} of compute"
    )


def _w2_reason(case: Case) -> str:
    judged = case.judged
    best, delta = str(judged.break_form[0]), float(judged.break_delta[0])
    if case.blind:
        return ""
    if not math.isfinite(delta):
        return f"W2: {case.sweep.runs} runs on {len(case.sweep.ratios)} ratios are too few to fit a form with a break"
    if delta < DELTA_AICC:
        return f"W2: no form with a break leads the line and the power law by {DELTA_AICC:g} in AICc ({best} {delta:+.1f})"
    upper = float(judged.break_upper[0])
    limit = float(case.sweep.ratios[-1]) / 2**DOUBLINGS_BEYOND
    where = "not identified" if math.isinf(upper) else f"below {2**upper:.0f}"
    lead = f"W2: {best} leads line and power law by {delta:.1f} in AICc, its break {where}"
    if upper > math.log2(limit) + ROUNDING:
        return f"{lead} (a wall needs it below {limit:g})"
    if _fades(case):
        return f"{lead}, but a bend spread over three doublings fits as well: gains that fade, as smooth laws' do, and no break"
    return f"{lead} (far enough inside the grid)"


def _w3_reason(case: Case) -> str:
    value, half = elasticity(case)
    if math.isnan(half):
        return f"W3: elasticity {value:.2f} over the last two doublings, without an interval"
    return f"W3: elasticity {_interval(value, half, 2)} over the last two doublings ({math.log2(case.multiplier):.2f} is the margin)"


def _compute_reason(case: Case) -> str:
    """Router rows count as active parameters: what the larger ratios cost is taken off before a
    gain refutes a wall.
    """
    spread = float(case.sweep.active.max() / case.sweep.active.min()) - 1
    if spread < WORTH_SAYING:
        return ""
    gain, charge = float(case.judged.gains[0, -1]), float(case.charge[-1])
    return (
        f"active parameters differ by {100 * spread:.0f} % over the ratios (the router grows): charged as compute, the last gain is "
        f"{gain - charge:.4f} instead of {gain:.4f}"
    )


def _budget_reason(case: Case) -> str:
    if case.judged.no_wall[0] or case.blind:
        return ""
    if case.slope.error is not None:
        return "a wall that moves with the tokens is a shortage of data: compare the verdicts of the other budgets"
    return "one token budget cannot tell a wall of sparsity from experts short of data: a second, 4x larger, would"


def _wall_sentence(case: Case, at: float | None) -> str:
    judged, ratios = case.judged, case.sweep.ratios
    quiet = f"from {ratios[judged.wall_from[0]]:g} to {ratios[-1]:g}"
    return (
        f"A wall at ratio {at:.3g}: {quiet} no doubling was worth {_percent(case)} of compute "
        f"(all {100 * case.confidence:g} % intervals within ±{case.margin:.4f} nats) and the {judged.break_form[0]} form leads by "
        f"{judged.break_delta[0]:.0f} in AICc, at {_budget(case)}."
    )


def _no_wall_sentence(case: Case, at: float | None) -> str:
    gain, half = _last_gain(case)
    value, width = elasticity(case)
    return (
        f"No wall up to ratio {at:g}: the last doubling still bought {_interval(gain, half)} nats, more than the {case.margin:.4f} that "
        f"{_percent(case)} of compute would (elasticity {_interval(value, width, 2)}), at {_budget(case)}."
    )


def _cannot_tell_sentence(case: Case, at: float | None) -> str:
    sweep = case.sweep
    have = f"{_plural(sweep.seeds, 'seed')} on {len(sweep.ratios)} ratios ({sweep.ratios[0]:g}-{sweep.ratios[-1]:g}) at {_budget(case)}"
    return f"Cannot tell: {have} {_shortfall(case)}; {_settles(case)} would settle it."


def _shortfall(case: Case) -> str:
    if case.blind:
        return "left the noise between runs unknown"
    if case.starved:
        return "measured early training, where a wall of sparsity and a shortage of data look alike"
    gain, half = _last_gain(case)
    if abs(gain) + half < case.margin:
        if _fades(case):
            return "showed gains that fade to within the margin, as those of smooth laws do, and no break"
        return "showed the last gain within the margin, but no break placed three doublings before the end"
    if gain + half < -case.margin:
        return f"put the last gain at {_interval(gain, half)} nats: a loss that rises is mistuned or short of data, not walled"
    if gain - half > case.margin:
        growth = float(case.sweep.active[-1] / case.sweep.active[case.judged.steps[-1, 0]]) - 1
        return (
            f"put the last gain at {_interval(gain, half)} nats, above the {case.margin:.4f} margin only until the "
            f"{100 * growth:.0f} % more active parameters of that step are charged"
        )
    return f"put the last gain at {_interval(gain, half)} nats, on both sides of the {case.margin:.4f} margin ({_percent(case)} of compute)"


def _fades(case: Case) -> bool:
    """Whether all that a wall lacks is that its break be one."""
    judged = case.judged
    return bool(not math.isnan(judged.sharpness[0]) and not judged.w2[0])


def _settles(case: Case) -> str:
    sweep, needs = case.sweep, []
    gain, half = _last_gain(case)
    if not case.blind and gain + half < -case.margin:
        needs.append("learning rates bracketed at every ratio")
    if not case.blind and not case.starved and gain - half > case.margin:
        needs.append("wider layers, of which the router is a smaller part,")
    seeds = seeds_needed(case)
    if seeds is None:
        needs.append("three seeds")
    elif seeds > MOST_SEEDS:
        needs.append(f"quieter runs (these would take {seeds} seeds)")
    elif seeds > sweep.seeds:
        needs.append(f"{seeds} seeds")
    reach = _reach(case)
    if len(sweep.ratios) < FULL_GRID or reach > sweep.ratios[-1]:
        needs.append(f"{FULL_GRID} or more ratios up to {reach:g}")
    if case.starved or reach * TOKENS_PER_EXPERT > sweep.tokens:
        needs.append(f"{magnitude(TOKENS_PER_EXPERT * reach)} tokens (1M per expert)")
    if not needs:
        needs.append("a second token budget, 4x larger,")
    return needs[0] if len(needs) == 1 else ", ".join(needs[:-1]) + " and " + needs[-1]


def seeds_needed(case: Case) -> int | None:
    """Seeds that would put the last gain's interval on one side of the margin, were the gain as
    measured (at least m/2 from it).
    """
    if case.blind:
        return None
    low, high = case.sweep.log2[case.judged.steps[-1]]
    step = float(high - low)
    distance = max(abs(case.margin - abs(float(case.judged.gains[0, -1]))), case.margin / 2)
    # 1.645 for the interval and 1.28 so that nine sweeps in ten succeed
    return max(
        2, math.ceil(2 * ((1.645 + 1.28) * float(case.noise.sd[0]) / (distance * step)) ** 2)
    )


def _reach(case: Case) -> float:
    """The largest ratio a settling sweep needs: three doublings past where the gains seem to end."""
    ratios, judged = case.sweep.ratios, case.judged
    inside = np.abs(judged.gains[0]) < case.margin
    held = int(np.logical_and.accumulate(inside[::-1]).sum())
    start = float(ratios[judged.steps[len(inside) - held, 0]]) if held else 0.0
    past_break = start * 2**DOUBLINGS_BEYOND if 0 < held < len(inside) else 0.0
    full = float(ratios[0]) * 2.0 ** (FULL_GRID - 1) if len(ratios) < FULL_GRID else 0.0
    return max(float(ratios[-1]), past_break, full)


def _plural(number: int, noun: str) -> str:
    return f"{'one' if number == 1 else number} {noun}{'' if number == 1 else 's'}"


def _budget(case: Case) -> str:
    return f"{magnitude(case.sweep.tokens)} tokens ({magnitude(case.tokens_per_expert)} per expert at ratio {case.sweep.ratios[-1]:g})"


def _percent(case: Case) -> str:
    return f"{100 * (case.multiplier - 1):.3g} %"


def _margin(case: Case) -> str:
    return f"±{case.margin:.4f} nats ({_percent(case)} of compute)"


def _interval(value: float, half: float, digits: int = 4) -> str:
    return f"{value:.{digits}f} [{value - half:.{digits}f}, {value + half:.{digits}f}]"


_SENTENCES: dict[Outcome, Callable[[Case, float | None], str]] = {
    Outcome.WALL: _wall_sentence,
    Outcome.NO_WALL: _no_wall_sentence,
    Outcome.CANNOT_TELL: _cannot_tell_sentence,
}


def sentence(case: Case, outcome: Outcome, at: float | None) -> str:
    return _SENTENCES[outcome](case, at)
