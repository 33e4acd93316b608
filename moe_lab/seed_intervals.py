"""Means over seeds with Student's t-intervals, of one series and of every arm and ratio."""

import numpy as np
import polars as pl

from moe_lab.errors import AnalysisError, require

CONFIDENCE = 0.95


def mean_interval(
    values: np.ndarray, confidence: float = CONFIDENCE
) -> tuple[float, float | None, float | None]:
    """(mean, lo, hi) of [n] values by Student's t; no ends for a single value."""
    mean = float(values.mean())
    if len(values) < 2:
        return mean, None, None
    half = float(
        _quantile(len(values) - 1, (1 + confidence) / 2) * values.std(ddof=1) / len(values) ** 0.5
    )
    return mean, mean - half, mean + half


def seed_intervals(
    frame: pl.DataFrame, *, value: str = "loss", level: float = CONFIDENCE
) -> pl.DataFrame:
    """Mean of ``value`` over the seeds of each arm and ratio.

    Args:
        frame: one row per run with columns arm, ratio, seed and ``value``.
        value: the column to average.
        level: coverage of the interval, between 0 and 1.

    Returns:
        Columns arm, ratio, n (runs), mean, sd, lo, hi. With one run sd, lo and hi are null: one
        seed says nothing about the spread.
    """
    require(0 < level < 1, "a level between 0 and 1", level, "0.95", error=AnalysisError)
    groups = frame.group_by("arm", "ratio", maintain_order=True).agg(
        n=pl.len(),
        mean=pl.col(value).mean(),
        sd=pl.when(pl.len() > 1).then(pl.col(value).std(ddof=1)),
    )
    quantiles = [_quantile(n - 1, (1 + level) / 2) if n > 1 else None for n in groups["n"]]
    half = (
        pl.Series("half", quantiles, dtype=pl.Float64)
        * groups["sd"]
        / groups["n"].cast(pl.Float64).sqrt()
    )
    return groups.with_columns(lo=groups["mean"] - half, hi=groups["mean"] + half).sort(
        "arm", "ratio"
    )


def _quantile(freedom: int, probability: float) -> float:
    """Of Student's t. scipy is imported on the first call: it takes time and 20 MB."""
    from scipy.special import stdtrit  # scipy.stats takes a second to import

    return float(stdtrit(freedom, probability))
