"""The quality of a fit: how well the law follows the runs, its error on runs held out, rival laws
on the same runs, and the law beside the runs for a figure.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from moe_lab.errors import AnalysisError
from moe_lab.number_format import magnitude
from moe_lab.scaling.fit import SQUARES, Fit, aicc, fit
from moe_lab.scaling.fit_problem import unknowns
from moe_lab.scaling.law import LETTERS
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
MOST_CURVES = 6
CURVE_POINTS = 60
FEWEST_VALUES = 4
"""Values of a variable from which the largest can be held out."""


@dataclass(frozen=True)
class Quality:
    """How well a law fits its runs. ``r2`` of the loss; ``rmse`` and ``seed_sd`` (nats; None
    without repeated runs); ``by_size`` [<variable>, runs, bias, rmse] (nats, predicted less
    measured); ``held_out`` [held_out, runs, bias, rmse] without the largest value of ``variable``;
    ``rivals`` [law, coefficients, aicc, delta] by least squares on ln loss, the best first.
    """

    r2: float
    rmse: float
    seed_sd: float | None
    variable: str
    by_size: pl.DataFrame
    held_out: pl.DataFrame
    rivals: pl.DataFrame


@dataclass(frozen=True)
class LawCurves:
    """The law beside its runs, against ``variable``: ``points`` [x, loss, group], a row per run;
    ``curves`` [x, loss, group] the law at each group's medians of the other variables. A group is
    the runs of one budget and size (within half a doubling), at most six: those with most runs.
    """

    variable: str
    points: pl.DataFrame
    curves: pl.DataFrame


def law_curves(result: Fit) -> LawCurves:
    """The law and its runs as the frames that a figure draws."""
    frame = result.frame.select("loss", *result.law.variables).cast(pl.Float64)
    variable = _most_varied(result)
    others = [name for name in result.law.variables if name != variable]
    half_doublings = [(2 * pl.col(name).log(2)).round().alias(f"{name}, binned") for name in others]
    groups = frame.with_columns(*half_doublings, pl.lit(0).alias("all")).group_by(
        "all", *(f"{name}, binned" for name in others), maintain_order=True
    )
    parts = sorted((part for _, part in groups), key=lambda part: -part.height)[:MOST_CURVES]
    points, curves = [], []
    for part in parts:
        middle = {name: float(part[name].median()) for name in others}  # type: ignore[arg-type]
        group = pl.lit(", ".join(f"{name} {magnitude(value)}" for name, value in middle.items()))
        low, high = part[variable].min(), part[variable].max()
        x = np.geomspace(float(low), float(high), CURVE_POINTS)  # type: ignore[arg-type]
        loss = result.predict({**middle, variable: x})
        points.append(part.select(pl.col(variable).alias("x"), "loss", group=group))
        curves.append(pl.DataFrame({"x": x, "loss": loss}).with_columns(group=group))
    return LawCurves(variable, pl.concat(points), pl.concat(curves))


def _most_varied(result: Fit) -> str:
    """The variable with most values; of two such the ratio, then the size."""
    order = ("ratio", *LETTERS.values())
    names = sorted(result.law.variables, key=order.index)
    return max(names, key=lambda name: result.frame[name].n_unique())


def quality(result: Fit, *, rivals: Sequence[str] = RIVALS) -> Quality:
    """The quality of a fit; ``rivals`` are fitted too if the runs have their variables (up to
    seconds each).
    """
    frame, variables = result.frame, result.law.variables
    loss = frame["loss"].cast(pl.Float64).to_numpy()
    error = result.predict(frame) - loss
    table = frame.with_columns(error=pl.Series(error))
    variable = _most_varied(result)
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
        rivals=rival_laws(result, rivals) if rivals else pl.DataFrame(),
    )


def _seed_sd(frame: pl.DataFrame, variables: tuple[str, ...]) -> float | None:
    """Nats between runs that agree in every variable, pooled."""
    within = frame.select(pl.col("loss") - pl.col("loss").mean().over(variables))["loss"]
    df = frame.height - frame.select(variables).n_unique()
    return math.sqrt(float((within**2).sum()) / df) if df else None


def rival_laws(result: Fit, names: Sequence[str]) -> pl.DataFrame:
    """``Quality.rivals``: the law of ``result`` and those named, fitted to its runs."""
    rows = []
    for name in dict.fromkeys((result.law.name, *names)):
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
