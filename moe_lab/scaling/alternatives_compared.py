"""Did something else beat more experts? Runs of an alternative beside the runs with experts of the
same total, paired by seed.

A sweep with ``--alternative`` trains, at each total, a model with more experts and one whose
parameters went into n-gram tables, layers or channels instead (`alternatives`). Seeds share
batches, so the difference of two runs of one seed is free of the seed's own effect; the interval is
Student's over seeds. Fewer than two pairs have none.
"""

import math
from enum import StrEnum

import polars as pl

from moe_lab.errors import AnalysisError, expected, require
from moe_lab.scaling.compute_slope import MARGIN
from moe_lab.scaling.run_files import main_arm
from moe_lab.seed_intervals import mean_interval

TOLERANCE = 0.02
"""Largest relative difference of two totals that count as one."""


class Alternative(StrEnum):
    """The use of the parameters beyond a smaller model."""

    EXPERTS = "experts"
    NGRAM = "ngram"
    DEPTH = "depth"
    WIDTH = "width"


class Result(StrEnum):
    """The result of an alternative: the interval of its difference lies below 0, above 0, within
    the margin, or holds 0 and more than the margin.
    """

    BETTER = "better"
    WORSE = "worse"
    NO_DIFFERENCE = "no difference"
    CANNOT_TELL = "cannot tell"


_SCHEMA = {
    "alternative": pl.String,
    "ratio": pl.Float64,
    "total_params": pl.Int64,
    "seeds": pl.Int64,
    **dict.fromkeys(("difference", "lo", "hi", "compute", "compute_lo", "compute_hi"), pl.Float64),
    "result": pl.String,
}


def against_experts(
    runs: pl.DataFrame, *, arm: str | None = None, compute_slope: float | None = None
) -> pl.DataFrame:
    """Each alternative against more experts at the same total.

    Args:
        runs: one row per run with columns arm, ratio, seed, loss (nats per token), total_params. An
            alternative is an arm called "ngram", "depth" or "width".
        arm: that of the runs with experts; "experts" has precedence, as what the recipes pair
            alternatives with (default: the arm with most ratios).
        compute_slope: -dL/dlnC, nats per e-fold of compute; without it a difference is not put into
            compute, and there is no margin.

    Returns:
        [alternative, ratio, total_params (both of the run with experts), seeds, difference (loss of
        the alternative less that of the experts, mean over seeds), lo, hi (95 %), compute (what the
        difference is worth as a multiplier of compute, above 1 where the alternative is better),
        compute_lo, compute_hi, result]; no rows where there is no alternative. The margin of "no
        difference" is 5 % of compute.

    Raises:
        AnalysisError: a column is missing, or runs of an alternative have no run with experts of
            the same seed within 2 % of their total.
    """
    missing = [
        name
        for name in ("arm", "ratio", "seed", "loss", "total_params")
        if name not in runs.columns
    ]
    require(
        not missing,
        "columns arm, ratio, seed, loss, total_params",
        f"none called {', '.join(missing)}",
        error=AnalysisError,
        field=missing[0] if missing else "",
    )
    alternatives = pl.col("arm").is_in(
        [kind.value for kind in Alternative if kind is not Alternative.EXPERTS]
    )
    others, experts = runs.filter(alternatives), runs.filter(arm=Alternative.EXPERTS.value)
    if others.is_empty():
        return pl.DataFrame(schema=_SCHEMA)
    if experts.is_empty():
        experts = main_arm(runs.filter(~alternatives), arm)[0]
    pairs = _pairs(others, experts)
    rows = []
    for (kind, ratio), group in pairs.group_by("arm", "ratio_experts", maintain_order=True):
        mean, low, high = mean_interval((group["loss"] - group["loss_experts"]).to_numpy())
        rows.append(
            {
                "alternative": kind,
                "ratio": ratio,
                "total_params": round(float(group["total_params_experts"].mean())),  # type: ignore[arg-type]
                "seeds": group.height,
                **{"difference": mean, "lo": low, "hi": high},
                "compute": _in_compute(mean, compute_slope),
                "compute_lo": _in_compute(high, compute_slope),
                "compute_hi": _in_compute(low, compute_slope),
                "result": result_of(
                    low, high, 0.0 if compute_slope is None else compute_slope * math.log(MARGIN)
                ).value,
            }
        )
    return pl.DataFrame(rows, schema=_SCHEMA).sort("alternative", "ratio")


def _in_compute(difference: float | None, slope: float | None) -> float | None:
    """A difference in nats as a multiplier of compute; None without a difference or a slope."""
    return None if difference is None or slope is None else math.exp(-difference / slope)


def _pairs(others: pl.DataFrame, experts: pl.DataFrame) -> pl.DataFrame:
    """Every run of an alternative with the run with experts of its seed whose total is nearest; its
    columns end in ``_experts``.
    """
    named = experts.select(
        "seed", **{f"{name}_experts": pl.col(name) for name in ("ratio", "loss", "total_params")}
    )
    apart = (pl.col("total_params") / pl.col("total_params_experts") - 1).abs()
    found = (
        others.select("arm", "seed", "loss", "total_params")
        .with_row_index("row")
        .join(named, on="seed")
        .with_columns(apart=apart)
    )
    found = (
        found.sort("row", "apart")
        .group_by("row", maintain_order=True)
        .first()
        .filter(pl.col("apart") <= TOLERANCE)
    )
    if found.height < others.height:
        lone = others.height - found.height
        what = f"a run with experts of the same seed within {TOLERANCE:.0%} of each total"
        raise AnalysisError(
            expected(
                what,
                f"none for {lone} of {others.height} runs",
                "running the sweep with --alternative to its end",
            ),
            field="arm",
        )
    return found.sort("arm", "ratio_experts", "seed")


def result_of(low: float | None, high: float | None, margin: float) -> Result:
    """The result that the interval of a difference shows; differences within ``margin`` (nats)
    count as none.
    """
    if low is None or high is None:
        return Result.CANNOT_TELL
    if high < 0:
        return Result.BETTER
    if low > 0:
        return Result.WORSE
    return Result.NO_DIFFERENCE if -margin < low and high < margin else Result.CANNOT_TELL


def crossing(table: pl.DataFrame) -> str:
    """The ratios between which the alternative of ``table`` ([ratio, result], one row per ratio)
    begins to beat more experts, if the intervals settle it.
    """
    won, lost = (
        sorted(table.filter(result=word.value)["ratio"].to_list())
        for word in (Result.BETTER, Result.WORSE)
    )
    listed = lambda ratios: ", ".join(f"{ratio:g}" for ratio in ratios)  # noqa: E731
    if won and lost and max(lost) < min(won):
        return (
            f"loses up to ratio {max(lost):g} and wins from ratio {min(won):g}: the curves cross "
            f"between"
        )
    if won and lost:
        return f"wins at ratio {listed(won)} and loses at ratio {listed(lost)}: no single crossing"
    if won or lost:
        verb, ratios, other = ("wins", won, "loses") if won else ("loses", lost, "wins")
        return (
            f"{verb} at ratio {listed(ratios)} and {other} at none: no crossing is seen in this "
            f"range"
        )
    return "cannot tell: the intervals settle no ratio"
