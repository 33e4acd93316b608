"""How often the wall verdict is wrong, and how often it answers, on truths drawn at random.

    python experiments/verdict_rates.py                  # five minutes of one core; resumes
    python experiments/verdict_rates.py --settings 40    # a quick look

A setting is a truth (hard wall, exponential or power fade, broken law of any width, U-shape,
plateau after which returns resume, line) and a design (1M to 1B active parameters, 20 to 500 tokens
a parameter, grids of doublings to 64-512, two to five seeds, a noise of .1 to 1.2 margins), all
drawn at random; each is judged on `SWEEPS` simulated sweeps by `wall_rule.judge`, as real ones are.
Noise: equal and Gaussian; tripling over the grid; Student's t with 2.5 degrees of freedom; one
spiked run of 3 to 300 standard deviations; one missing run. ``power`` repeats the truths at 10M
active, 1B tokens, ratios 1 to 256, .006 nats and three seeds. ``other families`` are `OTHER_TRUTHS`
settings of eight families that the rule was not designed on, each with one of the five noises.

Blocks of settings are written as they end, so the same command continues after an interruption.
Out: ``experiments/verdict_rates/{settings,rates}.parquet`` and the tables in docs/scaling.md.
"""

import argparse
import math
import multiprocessing
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl

from moe_lab.files import atomic_path, write_text
from moe_lab.scaling.two_way import Layout
from moe_lab.scaling.wall_power import Design
from moe_lab.scaling.wall_rule import Outcome, judge
from moe_lab.versions import provenance

HERE = Path(__file__).parent / "verdict_rates"
DOCS = Path(__file__).parents[1] / "docs" / "scaling.md"
BEGIN, END = "<!-- verdict rates -->", "<!-- end of verdict rates -->"
SETTINGS, SWEEPS, BLOCK = 1000, 60, 40
OTHER_TRUTHS = 200
FINE = 1 / 64
ROUNDING = 1e-6
TYPICAL = Design(tuple(2.0**e for e in range(9)), 3, 1e7, 1e9)
TYPICAL_NOISE = 0.006

Gain = Callable[[np.ndarray], np.ndarray]


def hard_wall(rng: np.random.Generator, span: float) -> Gain:
    """A constant gain up to a ratio, and up to .6 margins after it."""
    before, after, at = (
        rng.uniform(1.2, 5),
        rng.choice([0, rng.uniform(0, 0.6)]),
        rng.uniform(1, span),
    )
    return lambda x: np.where(x < at, before, after)


def exponential_fade(rng: np.random.Generator, span: float) -> Gain:
    start, length = rng.uniform(1, 8), rng.uniform(0.5, 6)
    return lambda x: start * np.exp(-x / length)


def power_fade(rng: np.random.Generator, span: float) -> Gain:
    start, length, power = rng.uniform(1, 8), rng.uniform(0.5, 4), rng.uniform(0.5, 3)
    return lambda x: start / (1 + x / length) ** power


def broken_law(rng: np.random.Generator, span: float) -> Gain:
    """Two gains with a logistic change of any width between them."""
    before, after = rng.uniform(1, 5), rng.uniform(0, 1)
    at, width = rng.uniform(0.5, span), np.exp(rng.uniform(np.log(0.05), np.log(3)))
    return lambda x: after + (before - after) / (1 + np.exp(np.clip((x - at) / width, -500, 500)))


def u_shape(rng: np.random.Generator, span: float) -> Gain:
    start, zero = rng.uniform(1, 5), rng.uniform(0.4, 1.6) * span
    return lambda x: start * (1 - x / zero)


def resuming(rng: np.random.Generator, span: float) -> Gain:
    """Returns stop over some doublings and resume."""
    before, after = rng.uniform(1, 4), rng.uniform(0.5, 4)
    stop = rng.uniform(0.5, span - 1)
    again = rng.uniform(stop, span)
    return lambda x: np.where(x < stop, before, np.where(x < again, 0.0, after))


def line(rng: np.random.Generator, span: float) -> Gain:
    gain = rng.uniform(0, 2)
    return lambda x: np.full(np.shape(x), gain)


TRUTHS = (hard_wall, exponential_fade, power_fade, broken_law, u_shape, resuming, line)


# Families that the rule was not designed on
def rough_gains(rng: np.random.Generator, span: float) -> Gain:
    """A Gaussian process with a squared exponential kernel, around any level."""
    places = np.arange(0, span + 0.5, 0.5)
    apart = places[:, None] - places
    kernel = np.exp(-((apart / rng.uniform(0.7, 4)) ** 2) / 2) + 1e-9 * np.eye(len(places))
    size, level = rng.uniform(0.2, 2), rng.uniform(0, 2.5)
    gains = level + size * np.linalg.cholesky(kernel) @ rng.normal(size=len(places))
    return lambda x: np.interp(x, places, gains)


def falling_steps(rng: np.random.Generator, span: float) -> Gain:
    """A staircase of two to six gains in falling order."""
    count = rng.integers(2, 7)
    gains = np.sort(rng.uniform(0, 4, count))[::-1]
    ends = np.sort(rng.uniform(0, span, count - 1))
    return lambda x: gains[np.searchsorted(ends, x)]


def falling_lines(rng: np.random.Generator, span: float) -> Gain:
    """Gains that fall along three to six straight pieces."""
    count = rng.integers(3, 7)
    places = np.concatenate([[0], np.sort(rng.uniform(0, span, count - 2)), [span]])
    gains = np.sort(rng.uniform(-0.5, 4, count))[::-1]
    return lambda x: np.interp(x, places, gains)


def ripple(rng: np.random.Generator, span: float) -> Gain:
    """A fade with a wave on it."""
    start, length = rng.uniform(1, 5), rng.uniform(1, 8)
    size, period, phase = rng.uniform(0.1, 1), rng.uniform(1, 6), rng.uniform(0, 2 * np.pi)
    return lambda x: start * np.exp(-x / length) + size * np.sin(2 * np.pi * x / period + phase)


def hump(rng: np.random.Generator, span: float) -> Gain:
    """Returns that rise to a best ratio and fall again: a loss of S-shape."""
    top, at, width = rng.uniform(1, 5), rng.uniform(0, span), rng.uniform(0.5, 3)
    return lambda x: top * np.exp(-(((x - at) / width) ** 2) / 2)


def late_rise(rng: np.random.Generator, span: float) -> Gain:
    """Little, and more in the last one to three doublings."""
    before, after, last = rng.uniform(0, 1.2), rng.uniform(0.5, 4), rng.uniform(1, 3)
    return lambda x: np.where(x < span - last, before, after)


def saturating(rng: np.random.Generator, span: float) -> Gain:
    """Clark's effective ratio with any maximum: the gain of ln(effective ratio)."""
    start, maximum, gain = rng.uniform(1, 4), 2 ** rng.uniform(1, span + 4), rng.uniform(1, 5)
    added = 1 / (1 / start - 1 / max(maximum, 2 * start))

    def log_effective(x: np.ndarray) -> np.ndarray:
        inner = 1 / (2.0**x - 1 + added)
        return -np.log2(inner + 1 / max(maximum, 2 * start))

    return lambda x: gain * (log_effective(x + 1e-3) - log_effective(x - 1e-3)) / 2e-3


def random_walk(rng: np.random.Generator, span: float) -> Gain:
    """Gains that take a random step at each doubling."""
    steps = rng.normal(-0.2, rng.uniform(0.1, 0.8), int(np.ceil(span)) + 1)
    gains = rng.uniform(0.5, 4) + np.cumsum(steps)
    return lambda x: gains[np.floor(x).astype(int)]


OTHERS = (
    rough_gains,
    falling_steps,
    falling_lines,
    ripple,
    hump,
    late_rise,
    saturating,
    random_walk,
)


def spiked(noise: np.ndarray, rng: np.random.Generator, layout: Layout, sd: float) -> np.ndarray:
    """``noise`` with one run of each sweep moved by 3 to 300 standard deviations."""
    run = rng.integers(layout.runs, size=len(noise))
    size = sd * np.exp(rng.uniform(np.log(3), np.log(300), len(noise)))
    moved = noise.copy()
    moved[np.arange(len(noise)), run] += size * rng.choice([1, -1, 1], len(noise))
    return moved


def draw_noise(kind: str, rng: np.random.Generator, layout: Layout, sd: float) -> np.ndarray:
    shape = (SWEEPS, layout.runs)
    if kind == "t, 2.5 degrees":
        return sd * rng.standard_t(2.5, shape) / math.sqrt(2.5 / 0.5)
    noise = rng.normal(0, sd, shape)
    if kind == "tripling":
        x = layout.x[layout.ratio]
        return noise * 3 ** ((x - x.min()) / (x.max() - x.min())) / math.sqrt(3)
    return spiked(noise, rng, layout, sd) if kind == "one spike" else noise


NOISES = ("equal", "tripling", "t, 2.5 degrees", "one spike", "one missing")
LINES = {"lines at the margin": 1.0, "lines of 1.5 margins": 1.5}
OTHER = "other families"
KINDS = (*NOISES, "power", *LINES, OTHER)


def setting(kind: str, number: int) -> tuple[dict[str, object], Layout, np.ndarray, Design]:
    """One truth and design, and its sweeps."""
    rng = np.random.default_rng([KINDS.index(kind), number])
    family = OTHERS if kind == OTHER else TRUTHS
    maker = family[number % len(family)]
    noisy = NOISES[(number // len(family)) % len(NOISES)] if kind == OTHER else kind
    typical = kind == "power" or kind in LINES
    design = TYPICAL if typical else random_design(rng)
    margin = design.price().margin
    sd = TYPICAL_NOISE if typical else margin * rng.uniform(0.1, 1.2)
    layout = design.layout
    if noisy == "one missing":
        layout = layout.without(int(rng.integers(layout.runs)))
    gain = maker(rng, layout.x[-1])
    if kind in LINES:
        maker, gain = line, partial(np.full_like, fill_value=LINES[kind])
    fine = np.arange(0, layout.x[-1] + FINE / 2, FINE)
    integral = np.concatenate([[0], np.cumsum(gain((fine[1:] + fine[:-1]) / 2)) * FINE])
    loss = 3 - margin * np.interp(layout.x, fine, integral)
    doubling = (integral[64:] - integral[:-64]) / 1.0
    below = np.flatnonzero(doubling < 1)
    facts = {
        "kind": kind,
        "number": number,
        "truth": maker.__name__.replace("_", " "),
        "largest": design.ratios[-1],
        "seeds": design.seeds,
        "noise": sd / margin,
        "last": float(doubling[-1]),
        "average": float((integral[-1] - integral[-129]) / 2),
        "r_star": float(fine[below[0]]) if len(below) else math.inf,
        "grows": bool((np.diff(doubling) > ROUNDING).any()),
    }
    noise = draw_noise(noisy, rng, layout, sd)
    return facts, layout, loss[layout.ratio] + noise, design


def random_design(rng: np.random.Generator) -> Design:
    active = 10 ** rng.uniform(6, 9)
    ratios = tuple(2.0**e for e in range(rng.integers(7, 11)))
    return Design(ratios, int(rng.integers(2, 6)), active, active * 10 ** rng.uniform(1.3, 2.7))


def measure(kind: str, number: int) -> dict[str, object]:
    """The shares of outcomes of one setting, and of sweeps whose interval holds r*."""
    facts, layout, losses, design = setting(kind, number)
    judged = judge(layout, losses, design.price())
    outcomes = judged.outcomes()
    low = np.where(judged.paid_to >= 0, layout.x[judged.paid_to], -np.inf)
    high = np.where(judged.ended_by >= 0, layout.x[judged.ended_by], np.inf)
    low, high = (
        np.where(judged.growing, end, own) for end, own in ((-np.inf, low), (np.inf, high))
    )
    at = facts["r_star"]
    shares = {str(name): float((outcomes == name).mean()) for name in Outcome}
    return facts | shares | {
        "covered": float(((low <= at) & (at <= high)).mean()),
        "found": float((np.isfinite(low) & np.isfinite(high)).mean()),
        "flagged": float((judged.found.outlier >= 0).mean()),
        "sweeps": len(outcomes),
    }  # fmt: skip


def block(folder: Path, sizes: dict[str, int], job: tuple[str, int]) -> None:
    """One block of settings, unless its file is there."""
    kind, first = job
    path = folder / f"{KINDS.index(kind)}-{first:05d}.parquet"
    if not path.exists():
        numbers = range(first, min(first + BLOCK, sizes[kind]))
        frame = pl.DataFrame([measure(kind, number) for number in numbers])
        with atomic_path(path) as temporary:
            frame.write_parquet(temporary)


def rates(table: pl.DataFrame) -> pl.DataFrame:
    """[question, kind, target, rate, worst truth, its rate, its error, settings, sweeps]; the error
    is the standard error of the worst truth's rate over its settings.
    """
    wrong_below = pl.col("average") >= 1
    wrong_none = pl.col("last") < 1
    rows: list[tuple[object, ...]] = []

    def add(question: str, kind: str, target: str, rows_of: pl.DataFrame, column: str) -> None:
        if rows_of.is_empty():
            return
        error = pl.col(column).std() / pl.len().sqrt()
        by_truth = rows_of.group_by("truth").agg(pl.col(column).mean(), error=error).sort(column)
        worst = by_truth.row(0 if target.startswith(">") else -1)
        count = rows_of.height
        rows.append(
            (question, kind, target, rows_of[column].mean(), *worst, count, rows_of["sweeps"].sum())
        )

    for kind in (*NOISES, OTHER):
        part = table.filter(pl.col("kind") == kind)
        claim = '"below margin", average gain at or above it'
        add(claim, kind, "<= .06", part.filter(wrong_below), "below margin")
        claim = '"no wall", last gain below the margin'
        add(claim, kind, "<= .06", part.filter(wrong_none), "no wall")
        claim = '"wall", average gain at or above the margin'
        add(claim, kind, "<= .06", part.filter(wrong_below), "wall")
        claim = "r* in its interval, returns that do not grow"
        add(claim, kind, ">= .90", part.filter(~pl.col("grows")), "covered")
    power = table.filter(pl.col("kind") == "power").with_columns(
        answered=pl.col("below margin") + pl.col("wall")
    )
    ends = ("hard wall", "exponential fade", "power fade", "broken law")
    falling = power.filter(pl.col("truth").is_in(ends))
    for name, chosen in (
        ("average at or below .6 margins", pl.col("average") <= 0.6),
        ("last gain at or below .6, average below 1", (pl.col("last") <= 0.6) & ~wrong_below),
    ):
        question = f'"below margin" or "wall", {name}'
        add(question, "1-256, .006 x 3", ">= .85", falling.filter(chosen), "answered")
    for kind, question, target, column in (
        ("lines of 1.5 margins", '"no wall"', ">= .85", "no wall"),
        ("lines at the margin", '"below margin"', "<= .06", "below margin"),
        ("lines at the margin", '"no wall"', "<= .06", "no wall"),
    ):
        part = table.filter(pl.col("kind") == kind)
        add(f"{question}, {kind}", "1-256, .006 x 3", target, part, column)
    schema = ["question", "noise", "target", "rate", "worst truth", "its rate", "its error"]
    return pl.DataFrame(rows, schema=[*schema, "settings", "sweeps"], orient="row")


def markdown(table: pl.DataFrame) -> str:
    lines = [
        "| question | noise | target | rate | worst truth (standard error) | settings | sweeps |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {question} | {noise} | {target.replace('<=', 'at most').replace('>=', 'at least')} | "
        f"{rate:.3f} | {worst} {its:.3f} ({error or 0:.3f}) | {settings:,} | {sweeps:,} |"
        for question, noise, target, rate, worst, its, error, settings, sweeps in table.rows()
    ]
    return "\n".join(lines)


def other_families(table: pl.DataFrame) -> str:
    """A line for each of `OTHERS`: how often an answer was given, and how often a wrong one."""
    wrong_below = pl.when(pl.col("average") >= 1).then(pl.col("below margin") + pl.col("wall"))
    wrong_none = pl.when(pl.col("last") < 1).then(pl.col("no wall"))
    found = (
        table.filter(pl.col("kind") == OTHER)
        .with_columns(
            answered=1 - pl.col("cannot tell"),
            wrong=wrong_below.fill_null(0) + wrong_none.fill_null(0),
        )
        .group_by("truth", maintain_order=True)
        .agg(
            pl.len(),
            *((pl.col(name) * pl.col("sweeps")).sum() for name in ("answered", "wrong")),
            pl.col("sweeps").sum(),
        )
        .sort("truth")
    )
    lines = ["| family | truths | sweeps | answered | wrong answers |", "|---|---|---|---|---|"]
    rows = [*found.rows(), ("all", *found.drop("truth").sum().row(0))]
    lines += [
        f"| {truth} | {truths} | {sweeps:,} | {answered / sweeps:.2f} | "
        f"{wrong:,.0f} ({wrong / sweeps:.4f}) |"
        for truth, truths, answered, wrong, sweeps in rows
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--settings", type=int, default=SETTINGS, help="of each kind of noise")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=HERE, help="keeps blocks and results")
    parser.add_argument("--write-docs", action="store_true", help="put the table into docs")
    args = parser.parse_args()
    os.nice(10)
    blocks = args.out / "blocks"
    blocks.mkdir(parents=True, exist_ok=True)
    sizes: dict[str, int] = dict.fromkeys(KINDS, int(args.settings))
    sizes |= dict.fromkeys(LINES, int(args.settings) // 10) | {OTHER: OTHER_TRUTHS}
    jobs = [(kind, first) for kind in KINDS for first in range(0, sizes[kind], BLOCK)]
    with multiprocessing.get_context("spawn").Pool(args.workers) as pool:
        for _ in pool.imap_unordered(partial(block, blocks, sizes), jobs):
            pass
    table = pl.concat(pl.read_parquet(path) for path in sorted(blocks.glob("*.parquet")))
    found = rates(table)
    record = {name: pl.lit(value) for name, value in provenance().items()}
    for name, frame in (("settings", table), ("rates", found)):
        with atomic_path(args.out / f"{name}.parquet") as path:
            frame.with_columns(**record).write_parquet(path)
    title = "Truths of the other families (`OTHERS`), all noises together:"
    tables = f"{markdown(found)}\n\n{title}\n\n{other_families(table)}"
    print(tables)
    if args.write_docs:
        text = DOCS.read_text(encoding="utf-8")
        before, _, rest = text.partition(BEGIN)
        after = rest.partition(END)[2]
        write_text(DOCS, f"{before}{BEGIN}\n{tables}\n{END}{after}")


if __name__ == "__main__":
    main()
