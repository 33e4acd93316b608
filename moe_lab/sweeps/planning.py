"""The cost of a sweep before it is run: parameters and FLOPs in closed form, minutes from a few
timed training steps.
"""

import heapq
import math
from collections.abc import Hashable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_lab.sweeps.config import SweepConfig
from moe_lab.sweeps.launchers.local import available_cores
from moe_lab.sweeps.memory import run_memory
from moe_lab.sweeps.timing import run_minutes

if TYPE_CHECKING:
    import polars as pl

    from moe_lab.scaling import Design, Plan
    from moe_lab.training import RunConfig


MAX_ROWS = 200
"""Rows of a plan that a terminal gets."""


def describe(run: "RunConfig", run_hash: str | None = None) -> dict[str, Any]:
    """One planned run: run, name, arm, ratio, seed, total_params, active_params (mean, convention
    A), tokens, flops (of training), memory_bytes (expected peak, `run_memory`).
    """
    total, active, flops_per_token = _cost(run.model, run.seq_length)
    tokens = run.steps * run.tokens_per_step
    return {
        "run": run_hash or run.hash(),
        "name": run.name,
        "arm": run.arm,
        "ratio": float(run.ratio),
        "seed": run.seed,
        "total_params": total,
        "active_params": active,
        "tokens": tokens,
        "flops": float(flops_per_token * tokens),
        "memory_bytes": run_memory(run),
    }


@lru_cache(maxsize=4096)
def _cost(model: Hashable, seq_length: int) -> tuple[int, float, float]:
    from moe_lab.accounting import count, flops

    parameters = count(model)
    return (
        parameters.total,
        parameters.active_without_tables(),
        flops(model, context=seq_length, phase="train").training_with_mtp,
    )


def plan(
    sweep: SweepConfig, calibrate: bool = True, *, cache_dir: Path | None = None
) -> "pl.DataFrame":
    """One row per run, in the sweep's order: the columns of ``describe`` and minutes (null without
    ``calibrate``).

    Calibration trains each distinct shape for a few steps on one thread in a temporary folder and
    extrapolates to all steps and the validation pass; a run that branches off a longer one of the
    sweep trains its decay alone. Timings are cached per shape and machine in ``cache_dir``
    (default: MOE_LAB_CACHE, else ``~/.cache/moe_lab``). Raises ``MoELabError`` where the runs could
    not be trained at all.
    """
    import polars as pl

    rows = [describe(run, run_hash) for run_hash, run in zip(sweep.hashes, sweep.runs, strict=True)]
    minutes: list[float] | list[None] = [None] * len(rows)
    if calibrate:
        left = _left_to_train(sweep)
        minutes = [
            whole * share
            for whole, share in zip(run_minutes(sweep.runs, cache_dir), left, strict=True)
        ]
    return pl.DataFrame(rows, infer_schema_length=None).with_columns(
        minutes=pl.Series(minutes, dtype=pl.Float64)
    )


def _left_to_train(sweep: SweepConfig) -> list[float]:
    """The share of its steps that each run trains itself: all, or the decay where the sweep has the
    long run it branches off.
    """
    from moe_lab.training.branching import branch_steps, trunk_hash

    family = {run: trunk_hash(run) for run in sweep.runs if run.budgets}
    trunks = {family[run] for run in family if branch_steps(run)}
    shares = []
    for run in sweep.runs:
        branches = run.budgets and run.train_tokens != run.budgets[-1] and family[run] in trunks
        shares.append(1 - run.decay_step(run.train_tokens) / run.steps if branches else 1.0)
    return shares


def wall_minutes(frame: "pl.DataFrame", workers: int | None = None) -> float:
    """Wall time of a calibrated plan when ``workers`` (default: one per core) take its runs in
    turn, the longest first.
    """
    free = [0.0] * (workers or available_cores())
    for length in frame["minutes"].sort(descending=True):
        heapq.heapreplace(free, free[0] + length)
    return max(free)


PLAN_COLUMNS = (
    *("run", "name", "arm", "ratio", "seed", "total", "active", "tokens", "FLOPs", "GB", "min"),
)


def plan_rows(frame: "pl.DataFrame") -> list[tuple[str, ...]]:
    """The first ``MAX_ROWS`` rows of a plan as text, in the order of ``PLAN_COLUMNS``."""
    return [
        (
            row["run"],
            row["name"],
            row["arm"],
            f"{row['ratio']:g}",
            str(row["seed"]),
            *map(_short, (row["total_params"], row["active_params"], row["tokens"])),
            _power(row["flops"]),
            f"{row['memory_bytes'] / 1e9:.2g}",
            "" if row["minutes"] is None else f"{row['minutes']:.1f}",
        )
        for row in frame.head(MAX_ROWS).iter_rows(named=True)
    ]


def plan_totals(frame: "pl.DataFrame") -> str:
    """Runs, tokens and FLOPs of a plan, and how many rows ``plan_rows`` leaves out."""
    hidden = len(frame) - MAX_ROWS
    left_out = f"; the other {hidden:,} rows: --json" if hidden > 0 else ""
    tokens, flops = (float(frame[name].sum()) for name in ("tokens", "flops"))
    totals = f"{len(frame)} runs, {_short(tokens)} tokens, {_power(flops)} FLOPs"
    return totals + left_out


def design_of(
    frame: "pl.DataFrame", *, ratios: tuple[float, ...] | None = None, seeds: int | None = None
) -> "Design":
    """The sweep that a verdict would judge, out of a plan: its arm with most ratios at the largest
    token budget.

    ``ratios`` and ``seeds`` replace the plan's. Seeds are those of the ratio that has fewest.
    """
    import numpy as np
    import polars as pl

    from moe_lab.scaling import Design, main_arm

    runs, _ = main_arm(frame)
    runs = runs.filter(pl.col("tokens") == pl.col("tokens").max())
    at = (
        runs.group_by("ratio")
        .agg(pl.col("seed").n_unique(), pl.col("active_params").cast(pl.Float64).mean())
        .sort("ratio")
    )
    size = math.exp(float(at["active_params"].log().mean()))  # type: ignore[arg-type]
    if ratios is not None:  # rows of a router are linear in the ratio
        slope, start = np.polyfit(at["ratio"], at["active_params"], 1)
        active = tuple(float(start + slope * ratio) for ratio in ratios)
        placed: tuple[int, ...] = ()
    else:
        active, placed = tuple(at["active_params"].to_list()), tuple(at["seed"].to_list())
    return Design(
        ratios=ratios or tuple(at["ratio"].to_list()),
        seeds=seeds or int(at["seed"].min()),  # type: ignore[arg-type]
        active_params=size,
        tokens=float(runs["tokens"][0]),
        seeds_at=() if seeds is not None or len(set(placed)) == 1 else placed,
        active_at=active,
    )


def flops_per_second(frame: "pl.DataFrame", workers: int | None = None) -> float:
    """6 x active parameters x tokens of a calibrated plan over its wall time: the rate at which
    designs of `Design.flops` pass.
    """
    return float((6 * frame["active_params"] * frame["tokens"]).sum()) / (
        60 * wall_minutes(frame, workers)
    )


def power_text(power: "Plan", speed: float | None) -> str:
    noise = f"noise {power.noise:g} nats between seeds ({power.noise_source})"
    return f"{_design_text(power.design, speed)}; {noise}"


POWER_COLUMNS = ("wall", "below_margin", "no_wall", "cannot_tell", "settled", "wrong")


def power_rows(power: "Plan") -> list[tuple[str, ...]]:
    """A truth, then the chance of each of ``POWER_COLUMNS``."""
    return [
        (row["truth"], *(f"{100 * row[name]:.0f} %" for name in POWER_COLUMNS))
        for row in power.own.iter_rows(named=True)
    ]


def cheapest_text(power: "Plan", speed: float | None) -> str:
    goal = f"settles each of these truths with probability {power.target:g}"
    if power.best is None:
        import polars as pl

        worst = power.others.group_by("design").agg(
            pl.col("settled").min().alias("worst"), pl.col("flops").first()
        )
        last = worst.sort("worst", "flops", descending=[True, False]).row(0, named=True)
        closest = _design_text(power.designs[last["design"]], speed)
        reached = f"reaches {last['worst']:.2f}: a larger model has less noise"
        return f"no design tried {goal}; the closest, {closest}, {reached}"
    if power.best == power.design:
        return f"this sweep {goal}, and none cheaper was found"
    return f"the cheapest design that {goal}: {_design_text(power.best, speed)}"


def _seeds(design: "Design") -> str:
    """``3``, or ``2 to 5`` where the ratios differ."""
    low, high = min(design.counts), max(design.counts)
    return f"{low}" if low == high else f"{low} to {high}"


def _design_text(design: "Design", speed: float | None) -> str:
    hours = (
        "" if speed is None else f", {design.flops / speed / 3600:.3g} hours at this machine's rate"
    )
    grid = f"{len(design.ratios)} ratios {design.ratios[0]:g}-{design.ratios[-1]:g}"
    size = f"{_short(design.active_params)} active on {_short(design.tokens)} tokens"
    cost = f"{design.runs} runs, {_power(design.flops)} FLOPs{hours}"
    return f"{grid} x {_seeds(design)} seeds of {size}: {cost}"


def _short(number: float) -> str:
    """1234567 -> 1.2M."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.3g}{unit}"
    return f"{number:.3g}"


def _power(number: float) -> str:
    """1.2e15, without the plus sign, which costs a column its place in 80 characters."""
    return f"{number:.1e}".replace("e+", "e")
