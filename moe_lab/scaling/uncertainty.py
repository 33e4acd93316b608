"""How far a fit can be trusted: bootstraps, profile likelihood, leaving the largest runs out, and
whether E_max was found at all.

A fitted E_max follows the edge of the grid: on Clark's own data E <= 64 gives 130-150, E <= 128
gives 205-230 and all of it 239-470. `saturation` therefore reports it only where its bounds lie
within twice the largest ratio measured and close together.
"""

import math
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np
import polars as pl
from scipy.special import chdtri, fdtrc

from moe_lab.errors import AnalysisError, expected, require
from moe_lab.scaling.fit import Fit, fit, make_problem
from moe_lab.scaling.fit_problem import Problem, to_coefficients, to_theta, unknowns
from moe_lab.scaling.minimise import minimise

EMAX_SPREAD = (
    1.0,
    0.35,
    4.0,
)  # a draw's optimum may sit far from the fit's: start on either side of it
PROFILE_POINTS = 41
REFINEMENTS, INSIDE = 5, 8
DRAW_ITERATIONS, DRAW_TOLERANCE = (
    400,
    1e-11,
)  # a draw needs its optimum to a thousandth of the spread between draws
CONFIDENCE = 0.95
EDGE_FACTOR, WIDEST = 2.0, 4.0


class Resample(StrEnum):
    """The units that are redrawn: runs, whole groups of runs, or noise around the fitted law."""

    RUNS = "runs"
    CLUSTER = "cluster"
    PARAMETRIC = "parametric"


def bootstrap(
    result: Fit,
    repetitions: int = 1000,
    *,
    kind: Resample | str = Resample.RUNS,
    cluster: str | None = None,
    seed: int = 0,
) -> Fit:
    """The fit with ``draws`` [repetitions rows, a column per coefficient and ``objective``].

    ``cluster`` names the column whose groups are redrawn together (runs of one size share what is
    wrong with that size); with few groups its intervals are too narrow still. All repetitions are
    minimised together.
    """
    require(
        result.law.terms,
        "a fit of a law of terms",
        result.law.name,
        "wall_verdict, which compares the forms of the ratio",
        error=AnalysisError,
        field="law",
    )
    base = make_problem(result.law, result.frame, result.delta, result.weight, result.log)
    rng = np.random.default_rng(seed)
    problem = _RESAMPLERS[Resample(kind)](base, result, repetitions, cluster, rng)
    starts = bootstrap_starts(base, result)
    best = np.full(repetitions, np.inf)
    theta = np.tile(starts[0], (repetitions, 1))
    for start in starts:
        points, values, _ = minimise(
            problem.objective,
            problem.curved,
            np.tile(start, (repetitions, 1)),
            iterations=DRAW_ITERATIONS,
            tolerance=DRAW_TOLERANCE,
        )
        better = values < best
        theta[better], best[better] = points[better], values[better]
    return replace(
        result, draws=pl.DataFrame({**to_coefficients(result.law, theta), "objective": best})
    )


def bootstrap_starts(problem: Problem, result: Fit) -> np.ndarray:
    """The fit itself and, for a law that saturates, the fit with E_max moved along its valley."""
    theta = to_theta(result.law, result.coefficients)
    if not result.law.shape:
        return theta[None]
    column = problem.names.index(result.law.shape[1])
    starts = []
    for factor in EMAX_SPREAD:
        held = theta.copy()
        held[column] += math.log(factor)
        held[column] = max(held[column], theta[problem.names.index(result.law.shape[0])] + 0.2)
        starts.append(_hold(problem, column, np.array([held]))[0][0])
    return np.array(starts)


def _hold(problem: Problem, column: int, start: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Minimise over everything but one unknown, kept where ``start`` [B, p] has it.

    Returns points [B, p] and values [B].
    """
    free = [i for i in range(start.shape[1]) if i != column]

    def whole(points: np.ndarray, rows: np.ndarray) -> np.ndarray:
        theta = start[rows].copy()
        theta[:, free] = points
        return theta

    def objective(points: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        value, gradient = problem.objective(whole(points, rows), np.zeros(len(rows), int))
        return value, gradient[:, free]

    def curved(points: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        value, gradient, hessian = problem.curved(whole(points, rows), np.zeros(len(rows), int))
        return value, gradient[:, free], hessian[:, free][:, :, free]

    points, values, _ = minimise(objective, curved, start[:, free])
    return whole(points, np.arange(len(start))), values


def _redraw_runs(
    base: Problem, result: Fit, repetitions: int, cluster: str | None, rng: np.random.Generator
) -> Problem:
    runs = base.weights.shape[1]
    counts = rng.multinomial(runs, np.full(runs, 1 / runs), repetitions)
    return replace(base, weights=counts * base.weights)


def _redraw_clusters(
    base: Problem, result: Fit, repetitions: int, cluster: str | None, rng: np.random.Generator
) -> Problem:
    if cluster is None or cluster not in result.frame.columns:
        raise AnalysisError(
            expected("the column of the groups as cluster=", cluster, "active_params"),
            field="cluster",
        )
    groups, index = np.unique(result.frame[cluster].to_numpy(), return_inverse=True)
    require(
        len(groups) >= 3,
        "three or more groups to resample",
        f"{len(groups)} in {cluster}",
        "kind='runs'",
        error=AnalysisError,
    )
    counts = rng.multinomial(len(groups), np.full(len(groups), 1 / len(groups)), repetitions)
    return replace(base, weights=counts[:, index] * base.weights)


def _redraw_noise(
    base: Problem, result: Fit, repetitions: int, cluster: str | None, rng: np.random.Generator
) -> Problem:
    fitted = base.response(to_theta(result.law, result.coefficients)[None])[0]
    runs = fitted.shape[1]
    sd = result.rmse * math.sqrt(runs / (runs - len(base.names)))
    return replace(base, target=fitted + rng.normal(0, sd, (repetitions, runs)))


_RESAMPLERS = {
    Resample.RUNS: _redraw_runs,
    Resample.CLUSTER: _redraw_clusters,
    Resample.PARAMETRIC: _redraw_noise,
}


def profile(result: Fit, name: str, values: np.ndarray | None = None) -> pl.DataFrame:
    """Profile likelihood of one coefficient: [value, objective, deviance], everything else refitted
    at each value.

    By default the values of a shape coefficient run from a tenth to a thousand times the fit's,
    others half to twice, and finer where the deviance crosses its 95 % point.
    """
    problem = make_problem(result.law, result.frame, result.delta, result.weight, result.log)
    names = unknowns(result.law)
    require(
        name in names,
        f"a coefficient of {result.law.name} ({', '.join(names)})",
        name,
        error=AnalysisError,
        field="name",
    )
    if values is not None:
        return _profile_at(problem, result, name, np.asarray(values, float))
    low, high = (0.1, 1000.0) if name in result.law.shape else (0.5, 2.0)
    grid = result.coefficients[name] * np.geomspace(low, high, PROFILE_POINTS)
    table = _profile_at(problem, result, name, grid)
    limit = float(chdtri(1, 1 - CONFIDENCE))
    for _ in range(REFINEMENTS):  # until the interval holds enough points to interpolate its ends
        value, deviance = table["value"].to_numpy(), table["deviance"].to_numpy()
        inside = np.flatnonzero(deviance <= limit)
        if len(inside) >= INSIDE:
            break
        near = inside if len(inside) else np.array([deviance.argmin()])
        ends = value[max(near[0] - 1, 0)], value[min(near[-1] + 1, len(value) - 1)]
        finer = _profile_at(problem, result, name, np.linspace(*ends, PROFILE_POINTS))
        table = pl.concat([table, finer]).unique("value").sort("value")
    return table


def _profile_at(problem: Problem, result: Fit, name: str, values: np.ndarray) -> pl.DataFrame:
    values = np.sort(values)
    thetas = np.array(
        [to_theta(result.law, {**result.coefficients, name: value}) for value in values]
    )
    column = problem.names.index(name)
    if result.law.shape and name == result.law.shape[1]:
        other = problem.names.index(result.law.shape[0])
        thetas[:, other] = np.minimum(thetas[:, other], thetas[:, column] - 0.2)
    _, objective = _hold(problem, column, thetas)
    lowest = min(result.objective, float(objective.min()))
    deviance = _deviance(problem, result, objective - lowest)
    return pl.DataFrame({"value": values, "objective": objective, "deviance": deviance})


def _deviance(problem: Problem, result: Fit, rise: np.ndarray) -> np.ndarray:
    """The rise of the objective as a deviance that is compared with chi2 of one degree of freedom.

    2 rise E[psi'] / E[psi^2] for the derivative psi of Huber's loss (Huber & Ronchetti 2009, 13.2),
    with Student's degrees of freedom: for squares the ratio is one over the variance. E[psi'] of a
    small ``delta`` is twice ``delta`` times the density of the residuals around zero. A robust fit
    passes almost through as many runs as it has coefficients; these tell nothing of the density and
    are left out (with them the 95 % interval of Hoffmann's alpha covers .86).
    """
    theta = to_theta(result.law, result.coefficients)
    residual = (problem.response(theta[None])[0] - problem.target)[0]
    weights, df = problem.weights[0], max(1, len(residual) - len(problem.names))
    psi = np.clip(residual, -problem.delta, problem.delta)
    spread = float((weights * psi**2).sum() / df)
    slope = 1.0
    if not math.isinf(problem.delta):
        order = np.argsort(np.abs(residual))[len(problem.names) :]
        rest, kept = np.abs(residual)[order], weights[order]
        width = max(problem.delta, 1.5 * float(np.median(rest)))
        slope = float(np.average(rest <= width, weights=kept)) * min(1.0, problem.delta / width)
    statistic = 2 * np.maximum(rise, 0) * slope / max(spread, 1e-300)
    tail = fdtrc(1, df, statistic)
    return np.where(tail > 1e-300, chdtri(1, np.maximum(tail, 1e-300)), statistic)


def profile_interval(table: pl.DataFrame, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """(low, high) where the deviance crosses chi2, its square root interpolated; -inf or inf at an
    end that it does not reach.
    """
    limit = float(chdtri(1, 1 - confidence))
    table = table.sort("value")
    value, deviance = table["value"].to_numpy(), table["deviance"].to_numpy()
    inside = np.flatnonzero(deviance <= limit)
    if not len(inside):
        inside = np.array([deviance.argmin()])
    first, last = int(inside[0]), int(inside[-1])

    def crossing(within: int, beyond: int) -> float:
        start, end = math.sqrt(deviance[within]), math.sqrt(deviance[beyond])
        share = (math.sqrt(limit) - start) / (end - start) if end > start else 0.0
        return float(value[within] + (value[beyond] - value[within]) * np.clip(share, 0, 1))

    low = -math.inf if first == 0 else crossing(first, first - 1)
    high = math.inf if last == len(value) - 1 else crossing(last, last + 1)
    return low, high


@dataclass(frozen=True)
class Saturation:
    """E_max of a fit: ``value`` is None where it was not found; ``low`` and ``high`` bound it;
    ``edge`` is the largest ratio measured.
    """

    value: float | None
    low: float
    high: float
    edge: float
    sentence: str


def saturation(result: Fit, repetitions: int = 400) -> Saturation:
    """E_max with the wider of its profile and bootstrap 95 % bounds (drawn here where the fit has
    no draws), and whether the runs identify it.

    Found means that the upper bound stays within twice the largest ratio measured, and that the
    bounds are less than a factor of four apart: on Clark's S-BASE runs up to 512 experts the bounds
    100 and 754 meet the first and say little.
    """
    require(
        "Emax" in result.law.shape and result.law.terms,
        "a fitted law that saturates in the ratio",
        result.law.name,
        "clark or ludziejewski",
        error=AnalysisError,
        field="law",
    )
    edge = float(result.frame["ratio"].max())  # type: ignore[arg-type]
    drawn = result if result.draws is not None else bootstrap(result, repetitions)
    bounds = (profile_interval(profile(result, "Emax")), drawn.interval("Emax"))
    low, high = max(0.0, min(low for low, _ in bounds)), max(high for _, high in bounds)
    interval = f"95 % {low:.0f} to {'no bound' if high > 1e6 * edge else f'{high:.0f}'}"
    if high > EDGE_FACTOR * edge:
        return Saturation(
            None,
            low,
            high,
            edge,
            f"E_max not identified: {interval}, past twice the largest ratio {edge:g}",
        )
    if high > WIDEST * low:
        return Saturation(
            None,
            low,
            high,
            edge,
            f"E_max not identified: {interval}, more than a factor of {WIDEST:g} apart",
        )
    value = result.coefficients["Emax"]
    return Saturation(
        value,
        low,
        high,
        edge,
        f"E_max = {value:.0f} ({interval}), within twice the largest ratio {edge:g}",
    )


def leave_largest_out(result: Fit, by: str, count: int = 1) -> pl.DataFrame:
    """Refit without the ``count`` largest values of ``by`` and predict them: [held_out, runs, bias,
    rmse], nats (predicted - measured).
    """
    require(
        by in result.frame.columns,
        f"a column of {', '.join(result.frame.columns)}",
        by,
        error=AnalysisError,
        field="by",
    )
    held = result.frame[by].unique().sort(descending=True)[:count]
    rest, out = (
        result.frame.filter(~pl.col(by).is_in(held.implode())),
        result.frame.filter(pl.col(by).is_in(held.implode())),
    )
    refitted = fit(
        result.law,
        rest,
        delta=result.delta,
        log=result.log,
        weight=result.weight,
        initial=result.coefficients,
    )
    error = refitted.predict(out) - out["loss"].to_numpy()
    table = out.select(held_out=pl.col(by)).with_columns(error=pl.Series(error))
    grouped = table.group_by("held_out", maintain_order=True).agg(
        runs=pl.len(), bias=pl.col("error").mean(), rmse=(pl.col("error") ** 2).mean().sqrt()
    )
    return grouped.sort("held_out")
