"""What a fit is worth: which coefficients the runs can fix at all, how well the law follows them,
what
it misses on runs held out, and how rival laws do on the same runs.
"""

import math
from dataclasses import dataclass

import numpy as np
import polars as pl

from moe_lab.errors import AnalysisError
from moe_lab.scaling.fit import SQUARES, Fit, aicc, fit
from moe_lab.scaling.fit_problem import unknowns
from moe_lab.scaling.laws import LAWS
from moe_lab.scaling.uncertainty import leave_largest_out

RIVALS = (
    "clark",
    "bilinear",
    "separable",
    "sldbench",
    "hoffmann",
    "tied",
    "ludziejewski",
    "abnar",
    "line",
    "power",
    "saturation",
    "plateau",
)
FEWEST_VALUES = 4
"""Values of a variable from which the largest can be held out."""


@dataclass(frozen=True)
class Quality:
    """``r2`` of the loss; ``rmse`` and ``seed_sd`` (nats; None without repeated runs); ``by_size``
    [<variable>, runs, bias, rmse] (nats, predicted less measured); ``held_out`` [held_out, runs,
    bias, rmse] without the largest value of ``variable``; ``rivals`` [law, coefficients, aicc,
    delta] by least squares on ln loss, the best first.
    """

    r2: float
    rmse: float
    seed_sd: float | None
    variable: str
    by_size: pl.DataFrame
    held_out: pl.DataFrame
    rivals: pl.DataFrame


def quality(result: Fit, *, rivals: bool = True) -> Quality:
    """Of a fit; ``rivals`` fits the other laws whose variables the runs have (seconds each)."""
    frame, variables = result.frame, result.law.variables
    loss = frame["loss"].cast(pl.Float64).to_numpy()
    error = result.predict(frame) - loss
    table = frame.with_columns(error=pl.Series(error))
    variable = max(variables, key=lambda name: frame[name].n_unique())
    first = next((name for name in variables if frame[name].n_unique() > 1), variable)
    by_size = table.group_by(first).agg(
        runs=pl.len(), bias=pl.col("error").mean(), rmse=(pl.col("error") ** 2).mean().sqrt()
    )
    held = pl.DataFrame()
    if result.law.terms and frame[variable].n_unique() >= FEWEST_VALUES:
        try:
            held = leave_largest_out(result, variable)
        except AnalysisError:  # too few runs are left to fit
            held = pl.DataFrame()
    spread = float(((loss - loss.mean()) ** 2).sum())
    return Quality(
        r2=1 - float((error**2).sum()) / spread if spread else math.nan,
        rmse=float(np.sqrt((error**2).mean())),
        seed_sd=_seed_sd(frame, variables),
        variable=variable,
        by_size=by_size.sort(first),
        held_out=held,
        rivals=_rivals(result) if rivals else pl.DataFrame(),
    )


def _seed_sd(frame: pl.DataFrame, variables: tuple[str, ...]) -> float | None:
    """Nats between runs that agree in every variable, pooled."""
    within = frame.select(pl.col("loss") - pl.col("loss").mean().over(variables))["loss"]
    df = frame.height - frame.select(variables).n_unique()
    return math.sqrt(float((within**2).sum()) / df) if df else None


def _rivals(result: Fit) -> pl.DataFrame:
    rows = []
    for name in dict.fromkeys((result.law.name, *RIVALS)):
        law = LAWS.get(name, result.law)
        if not set(law.variables) <= set(result.frame.columns):
            continue
        try:
            other = fit(law, result.frame, delta=SQUARES)
        except AnalysisError:  # too few runs for this law
            continue
        count = len(unknowns(law)) if law.terms else len(other.coefficients)
        square = float(np.mean(other.residuals() ** 2))
        rows.append((name, count, aicc(square, other.runs, count + 1)))
    table = pl.DataFrame(rows, schema=["law", "coefficients", "aicc"], orient="row")
    return table.with_columns(delta=pl.col("aicc") - pl.col("aicc").min()).sort("aicc")
