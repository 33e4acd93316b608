"""What a sweep could tell before it is run, and the cheapest one that could: `power` around one
planned design.

In: the design of a recipe, the noise between seeds and candidate truths. Out: the chance of each
verdict, and of every variation of the design (larger grids, more seeds, enough tokens for the
experts) the one with the fewest FLOPs that settles each truth.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import polars as pl

from moe_lab.errors import AnalysisError, expected
from moe_lab.scaling.laws import LAWS
from moe_lab.scaling.wall_power import (
    TARGET,
    Design,
    Truth,
    cheapest,
    default_truths,
    law_truth,
    line_truth,
    power,
    saturation_truth,
    wall_truth,
)
from moe_lab.scaling.wall_sentences import TOKENS_PER_EXPERT

NOISE: tuple[tuple[float, float, str], ...] = (
    (3e7, 0.006, "tiny models, 3-12M parameters: .0035-.008"),
    (1e8, 0.003, "between tiny models and those of 130M"),
    (math.inf, 0.0007, "Clark's three dense 130M runs; OLMo's reruns .0005"),
)
"""Active parameters up to, nats between seeds, where from (docs/scaling.md)."""
LARGEST_RATIO, SMALLEST_REACH = 512.0, 64.0
SEEDS = (2, 3, 5, 8)
LONGER = (1, 4)
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
    """``own`` and ``others``: `power`'s table for the design itself and for its variations by
    rising FLOPs, up to the first that
    settles every truth with probability ``target``: that is ``best`` (None where none does).
    ``noise`` its assumed nats and ``noise_source``.
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
        table = power(variation, chosen, **options).with_columns(design=pl.lit(number))  # type: ignore[arg-type]
        tables.append(table)
        if cheapest(table, target) is not None:
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


def parse_truth(text: str) -> Truth:
    """``line``, ``line:1.2``, ``saturation:300``, ``wall:32`` or ``law:ludziejewski``."""
    kind, _, value = text.partition(":")
    if kind not in TRUTHS:
        raise AnalysisError(
            expected(
                "a truth such as line, saturation:300, wall:32 or law:ludziejewski", repr(text)
            )
        )
    return TRUTHS[kind](value)


def _variations(design: Design) -> list[Design]:
    """Grids of doublings from the design's smallest ratio to several largest ones, with other
    seeds, and with the tokens that the largest ratio's experts need or four times as many.
    """
    first = design.ratios[0]
    top = max(design.ratios[-1], SMALLEST_REACH)
    reach = [
        first * 2.0**e
        for e in range(round(math.log2(LARGEST_RATIO / first)) + 1)
        if top / 4 <= first * 2.0**e
    ]
    reach = [ratio for ratio in reach if ratio <= max(LARGEST_RATIO, design.ratios[-1])]
    grids = [
        tuple(first * 2.0**e for e in range(round(math.log2(end / first)) + 1)) for end in reach
    ]
    plans = [
        design.replace(
            ratios=grid,
            seeds=seeds,
            tokens=factor * max(design.tokens, TOKENS_PER_EXPERT * grid[-1]),
        )
        for grid in grids
        if len(grid) >= 3
        for seeds in SEEDS
        for factor in LONGER
    ]
    return sorted({design, *plans}, key=lambda plan: (plan.flops, plan.ratios))


def _number(value: str) -> tuple[float, ...]:
    if not value:
        return ()
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not number > 1:
        raise AnalysisError(
            expected("a number above 1 after the colon of a truth", repr(value), "wall:32")
        )
    return (number,)


def _law(value: str) -> str:
    known = [
        name
        for name, law in LAWS.items()
        if law.output == "loss" and "ratio" in law.variables and law.published
    ]
    if value and value not in known:
        raise AnalysisError(
            expected(f"a law of losses with a ratio ({', '.join(known)})", repr(value))
        )
    return value or "ludziejewski"
