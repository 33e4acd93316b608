"""Planning a sweep: the probability of each verdict for one design and its variations, and the
cheapest that suffices.

In: the design of a recipe, the noise between seeds and candidate truths. Out: the chance of each
verdict, and of every variation of the design (larger grids, more seeds, enough tokens for the
experts) the one with the fewest FLOPs that settles each truth.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from moe_lab.errors import AnalysisError, require
from moe_lab.number_format import magnitude
from moe_lab.progress import tracked
from moe_lab.scaling.frontier_forms import FORMS, curve, fit_form
from moe_lab.scaling.laws import LAWS
from moe_lab.scaling.sweep_losses import TOKENS_PER_EXPERT, Sweep
from moe_lab.scaling.wall_power import (
    TARGET,
    Design,
    Truth,
    cheapest,
    default_truths,
    draw,
    law_truth,
    line_truth,
    power,
    right_answers,
    saturation_truth,
    wall_truth,
)
from moe_lab.scaling.wall_verdict import Verdict

NOISE: tuple[tuple[float, float, str], ...] = (
    (3e7, 0.006, "tiny models, 3-12M parameters: .0035-.008"),
    (1e8, 0.003, "between tiny models and those of 130M"),
    (math.inf, 0.0007, "Clark's three dense 130M runs; OLMo's reruns .0005"),
)
"""Active parameters up to, nats between seeds, where from (docs/scaling.md)."""
LARGEST_RATIO, SMALLEST_REACH = 512.0, 64.0
SEEDS = (2, 3, 5, 8)
LONGER = (1, 4)
QUICK, SCREENED, SLACK = 20, 100, 0.1
"""Draws (of what would settle a sweep, of a plan) after which a design that misses the target by
so much is given up."""
LADDER = (2, 3, 5, 8, 12, 20)
MOST_SEEDS = LADDER[-1]
MOST_RUNS = 512
"""Larger sweeps are not simulated to see what would settle one: that would take minutes."""
LIGHTEST = 0.05
"""Akaike weight below which a form is not simulated."""
TRUTHS: dict[str, Callable[[str], Truth]] = {
    "line": lambda value: line_truth(*_number(value)),
    "saturation": lambda value: saturation_truth(*_number(value)),
    "wall": lambda value: wall_truth(*_number(value)),
    "law": lambda value: law_truth(_law(value)),
}
"""``kind:value`` of a candidate truth: a line's worth of compute per doubling, E_max, the ratio of
a wall, the name of a law.
"""


@dataclass(frozen=True)
class Plan:
    """A planned sweep beside its variations. ``own`` and ``others``: `power`'s table for the design
    itself and for its variations by rising FLOPs, up to the first that settles every truth with
    probability ``target``: that is ``best`` (None where none does). ``noise`` its assumed nats and
    ``noise_source``.
    """

    design: Design
    own: pl.DataFrame
    others: pl.DataFrame
    designs: tuple[Design, ...]
    best: Design | None
    target: float
    noise: float
    noise_source: str


def typical_noise(active_params: float) -> tuple[float, str]:
    """Nats between seeds of a model of this size, and which measurements say so."""
    return next((sd, source) for limit, sd, source in NOISE if active_params < limit)


def plan_power(
    design: Design,
    *,
    noise_sd: float | None = None,
    truths: Sequence[Truth] | None = None,
    draws: int = 500,
    target: float = TARGET,
    flops_per_second: float | None = None,
    seed: int = 0,
) -> Plan:
    """The chances of ``design``'s verdicts and its cheapest sufficient variation. ``noise_sd``
    (nats) by default that of its size; ``truths`` by default `default_truths`; ``flops_per_second``
    gives hours.
    """
    noise, source = (
        (noise_sd, "as given") if noise_sd is not None else typical_noise(design.active_params)
    )
    chosen = truths if truths is not None else default_truths()
    variations = _variations(design)
    options = {
        "noise_sd": noise,
        "draws": draws,
        "seed": seed,
        "flops_per_second": flops_per_second,
    }
    own = power(design, chosen, **options)  # type: ignore[arg-type]
    tables, best = [], None
    for number, variation in enumerate(variations):
        screen = options | {"draws": min(draws, SCREENED)}
        table = power(variation, chosen, **screen)  # type: ignore[arg-type]
        if draws > SCREENED and cheapest(table, target - SLACK) is not None:
            table = power(variation, chosen, **options)  # type: ignore[arg-type]
        tables.append(table.with_columns(design=pl.lit(number)))
        if table["draws"][0] == draws and cheapest(table, target) is not None:
            best = variation
            break
    return Plan(
        design,
        own,
        pl.concat(tables),
        tuple(variations[: len(tables)]),
        best,
        target,
        noise,
        source,
    )


def what_would_settle(sweep: Sweep, verdict: Verdict, *, draws: int = 80, seed: int = 0) -> str:
    """The smallest sweep that would give a verdict where one cannot tell, by simulation from the
    forms that fit it (Akaike weights) under its own noise: more seeds, even or at the end, and
    larger ratios.

    Empty where nothing can be simulated: an unknown noise, or experts short of data. Sweeps of more
    than `MOST_RUNS` runs are not simulated, and the answer says so where it matters.
    """
    noise = verdict.noise_sd
    starved = sweep.tokens / sweep.ratios[-1] < TOKENS_PER_EXPERT
    if starved or not (math.isfinite(noise) and noise > 0):
        return ""
    start = Design(
        tuple(sweep.ratios.tolist()),
        int(sweep.layout.counts.min()),
        sweep.size,
        sweep.tokens,
        active_at=tuple(sweep.active.tolist()),
        compute_slope=verdict.compute_slope,
    )
    larger = _larger(start)
    plans = [plan for plan in larger if plan.runs <= MOST_RUNS]
    if not plans:
        return f"not simulated, as it would be a sweep of more than {MOST_RUNS} runs"
    truths = _own_truths(sweep, verdict)
    for number, plan in enumerate(tracked(plans, "simulating larger sweeps")):
        rng = np.random.default_rng([seed, number])
        settled = 0.0
        for number_drawn in (QUICK, draws):
            settled = sum(
                weight * _settled(truth, plan, noise, number_drawn, rng)
                for truth, weight in truths.items()
            )
            if settled < TARGET - SLACK:
                break
        if settled >= TARGET:
            counts = plan.counts
            seeds = f"{counts[0]}" if len(set(counts)) == 1 else f"{counts[0]} to {counts[-1]}"
            return (
                f"{seeds} seeds on {len(plan.ratios)} ratios up to {plan.ratios[-1]:g} at "
                f"{magnitude(plan.tokens)} tokens ({plan.runs} runs) settle it in "
                f"{100 * settled:.0f} % of simulated sweeps"
            )
    cut = f", of at most {MOST_RUNS} runs," if len(plans) < len(larger) else ""
    reach = max(plan.ratios[-1] for plan in plans)
    return (
        f"no sweep of up to {MOST_SEEDS} seeds and ratios up to {reach:g}{cut} settles it in "
        f"{100 * TARGET:.0f} % of simulated sweeps"
    )


def _own_truths(sweep: Sweep, verdict: Verdict) -> dict[Truth, float]:
    """The forms that fit the sweep, drawn on to other ratios, and their weights."""
    x, counts = sweep.log2, sweep.layout.counts
    means = sweep.estimate().means

    def truth(name: str) -> Truth:
        fit = fit_form(FORMS[name], x, means, counts)
        return Truth(name, lambda r, d: curve(fit, x, means, counts, np.log2(r))[0], (name,))

    weights = {form.name: form.weight for form in verdict.forms if form.weight >= LIGHTEST}
    total = sum(weights.values())
    return {truth(name): weight / total for name, weight in weights.items()}


def _settled(
    truth: Truth, plan: Design, noise: float, draws: int, rng: np.random.Generator
) -> float:
    right = right_answers(truth, plan)
    if not right:
        return 0.0
    judged = draw(truth, plan, noise, draws, rng)
    return float(np.isin(judged.outcomes(), list(right)).mean())


def _larger(start: Design) -> list[Design]:
    """``start`` with more seeds, even or at the end, and up to eight times the largest ratio, by
    rising FLOPs.
    """
    grids = [start.ratios]
    for _ in range(3):
        grids.append((*grids[-1], 2 * grids[-1][-1]))
    numbers = (start.seeds, *(number for number in LADDER if number > start.seeds))
    plans = [
        start.replace(
            ratios=grid,
            seeds=seeds,
            seeds_at=placed,
            active_at=_active(start, grid),
            tokens=max(start.tokens, TOKENS_PER_EXPERT * grid[-1]),
        )
        for grid in grids
        for seeds in numbers
        for placed in ((), seeds_at_the_end(len(grid), seeds))
    ]
    return sorted(set(plans) - {start}, key=lambda plan: (plan.flops, plan.ratios))


def parse_truth(text: str) -> Truth:
    """``line``, ``line:1.2``, ``saturation:300``, ``wall:32`` or ``law:ludziejewski``."""
    kind, _, value = text.partition(":")
    require(
        kind in TRUTHS,
        "a truth such as line, saturation:300, wall:32 or law:ludziejewski",
        repr(text),
        error=AnalysisError,
        field="truth",
    )
    return TRUTHS[kind](value)


def _variations(design: Design) -> list[Design]:
    """Grids of doublings from the design's smallest ratio to several largest ones, with other
    seeds, even or placed at the end, and with the tokens that the largest ratio's experts need or
    four times as many; by rising FLOPs.
    """
    first = design.ratios[0]
    top = max(design.ratios[-1], SMALLEST_REACH)
    reach = [first * 2.0**e for e in range(round(math.log2(LARGEST_RATIO / first)) + 1)]
    ends = [end for end in reach if top / 4 <= end <= max(LARGEST_RATIO, design.ratios[-1])]
    plans = [
        design.replace(
            ratios=grid,
            seeds=seeds,
            seeds_at=placed,
            active_at=_active(design, grid),
            tokens=factor * max(design.tokens, TOKENS_PER_EXPERT * grid[-1]),
        )
        for end in ends
        for grid in [tuple(first * 2.0**e for e in range(round(math.log2(end / first)) + 1))]
        if len(grid) >= 3
        for seeds in SEEDS
        for placed in ((), seeds_at_the_end(len(grid), seeds))
        for factor in LONGER
    ]
    return sorted({design, *plans}, key=lambda plan: (plan.flops, plan.ratios))


def seeds_at_the_end(ratios: int, seeds: int) -> tuple[int, ...]:
    """About ``ratios`` x ``seeds`` runs with one seed fewer at all but the last three ratios and
    those runs added there: 2 x 6 + 5 x 3 in place of 3 x 9.
    """
    early = max(1, seeds - 1)
    late = round((ratios * seeds - early * (ratios - 3)) / 3)
    return (early,) * (ratios - 3) + (late,) * 3


def _active(design: Design, grid: tuple[float, ...]) -> tuple[float, ...]:
    """Active parameters on another grid: linear in the ratio, as a router's rows are."""
    if not design.active_at:
        return ()
    slope, start = np.polyfit(design.ratios, design.active_at, 1)
    return tuple(float(start + slope * ratio) for ratio in grid)


def _number(value: str) -> tuple[float, ...]:
    if not value:
        return ()
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    require(
        number > 1,
        "a number above 1 after the colon of a truth",
        repr(value),
        "wall:32",
        error=AnalysisError,
        field="truth",
    )
    return (number,)


def _law(value: str) -> str:
    known = [
        name
        for name, law in LAWS.items()
        if law.output == "loss" and "ratio" in law.variables and law.published
    ]
    require(
        not value or value in known,
        f"a law of losses with a ratio ({', '.join(known)})",
        repr(value),
        error=AnalysisError,
        field="truth",
    )
    return value or "ludziejewski"
