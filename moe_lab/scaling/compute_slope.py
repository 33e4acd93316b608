"""The worth of a gain in compute: dL/dlnC, and with it the margin (nats per doubling of the ratio)
that W1 tests against.

A margin in nats is not scale-free (5 % of compute is .015 nats at 3M x 300M tokens and .002 at 50B
x 35T), so it is stated as a compute multiplier and converted here: from runs at other budgets where
the user has them, else from Ludziejewski's joint law (2502.05172 table 3) with active size and
tokens grown together, C^1/2 each.
"""

from dataclasses import dataclass

import numpy as np
import polars as pl

from moe_lab.errors import AnalysisError, require
from moe_lab.scaling.laws import LAWS
from moe_lab.scaling.sweep_losses import COLUMNS

MARGIN = 1.05  # compute multiplier below which a doubling of the ratio is taken to buy nothing
SMALLEST_RANGE = 1.5  # budgets closer than this factor in compute give a slope that is noise


@dataclass(frozen=True)
class ComputeSlope:
    """-dL/dlnC in nats per e-fold of training compute, its standard error (None where a law gave
    it), and how it was obtained.
    """

    value: float
    error: float | None
    source: str


def law_slope(
    active: float, tokens: float, ratio: float, law: str = "ludziejewski"
) -> ComputeSlope:
    """The slope from a published law, at fixed ``ratio``: ``active`` and ``tokens`` each grow as
    C^1/2.

    Says when this extrapolates.
    """
    chosen = LAWS[law]
    point = {"active_params": active, "tokens": tokens, "ratio": ratio}
    value = -0.5 * float(
        chosen.derivative("active_params", point) + chosen.derivative("tokens", point)
    )
    outside = chosen.outside(point)
    source = (
        f"the margin's dL/dlnC = {value:z.4f} nats is that of compute spent on active parameters "
        f"and tokens alike, by {chosen.title} at {active:.3g} active, {tokens:.3g} tokens, ratio "
        f"{ratio:.3g}"
    )
    return ComputeSlope(
        value,
        None,
        source
        + (f", extrapolated beyond {'; '.join(outside)}" if outside else ", inside its range"),
    )


def measured_slope(frame: pl.DataFrame) -> ComputeSlope:
    """The slope from runs of the same ratios at two or more compute budgets (6 x active x tokens),
    one slope shared by the ratios.

    Raises ``AnalysisError`` where the budgets do not share a ratio or span less than a factor of
    1.5.
    """
    missing = [name for name in COLUMNS if name not in frame.columns]
    require(
        not missing,
        f"columns {', '.join(COLUMNS)} in budgets",
        f"none called {', '.join(missing)}",
        error=AnalysisError,
    )
    runs = frame.select(
        "ratio", "loss", lnc=(6 * pl.col("active_params").cast(pl.Float64) * pl.col("tokens")).log()
    )
    runs = runs.with_columns(
        pl.col("lnc") - pl.col("lnc").mean().over("ratio"),
        pl.col("loss") - pl.col("loss").mean().over("ratio"),
    )
    x, y = runs["lnc"].to_numpy(), runs["loss"].cast(pl.Float64).to_numpy()
    span = float(np.exp(x.max() - x.min()))
    require(
        np.isfinite(y).all() and span >= SMALLEST_RANGE,
        "finite losses of shared ratios at budgets 1.5x apart or more",
        f"a range of {span:.2f}x",
        "4x the tokens",
        error=AnalysisError,
        field="budgets",
    )
    slope = float(-(x @ y) / (x @ x))
    df = runs.height - runs["ratio"].n_unique() - 1
    error = float(np.sqrt(((y + slope * x) ** 2).sum() / df / (x @ x))) if df > 0 else None
    require(
        slope > 0,
        "losses that fall with compute",
        f"dL/dlnC = {-slope:+z.4f}",
        "checking the budgets' learning rates",
        error=AnalysisError,
        field="budgets",
    )
    spent = "tokens" if _one_size(frame) else "active parameters and tokens as these runs do"
    interval = "" if error is None else f" (standard error {error:.4f})"
    return ComputeSlope(
        slope,
        error,
        f"the margin's dL/dlnC = {slope:z.4f} nats{interval} is measured over a {span:.3g}x "
        f"range of "
        f"compute spent on {spent}, and averaged over that range",
    )


def _one_size(frame: pl.DataFrame) -> bool:
    """Whether runs of a ratio differ in tokens and not in active parameters."""
    sizes = frame.group_by("ratio").agg(
        pl.col("active_params").max() / pl.col("active_params").min()
    )
    return float(sizes["active_params"].max()) < SMALLEST_RANGE  # type: ignore[arg-type]
