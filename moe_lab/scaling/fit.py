"""Fitting a law to runs: the sum of Huber's loss on the log loss, many starts, descent to the end;
and measures of the fit.

Conventions (docs/scaling.md): Huber 1e-3 on ln L, summed; tolerance 1e-14; 80 starts chosen from
thousands of random points with the amplitudes solved; AICc from the squared log residuals.
The tests hold it against the same objective through scipy, one start at a time.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import polars as pl

from moe_lab.errors import AnalysisError, expected, require
from moe_lab.html_table import html_table
from moe_lab.scaling.fit_problem import Problem, to_coefficients, to_theta, unknowns
from moe_lab.scaling.fit_starts import starting_points
from moe_lab.scaling.frontier_forms import FORMS, START, fit_form
from moe_lab.scaling.law import LETTERS, Law, Values
from moe_lab.scaling.laws import LAW_ALIASES, LAWS
from moe_lab.scaling.minimise import minimise

HUBER = 1e-3
STARTS = 80
SQUARES = math.inf
SCREENING, FINALISTS = (
    60,
    16,
)  # every start gets this many steps, the best of them as many as they need
NEGLIGIBLE = 1e-24  # mean square of ln loss below which losses are reproduced exactly
SINGULAR = 1e-7  # of the largest singular value: below it a direction is not in the data
SHARE = 0.05  # of a null direction, from which a coefficient counts as in it
TIED = 1e-6  # of a correlation from one, or of a spread in ln: variables that move together
AGREE = 1e-6  # relative: starts that end this close to the best objective found the same optimum


@dataclass(frozen=True)
class Fit:
    """A law fitted to runs. ``coefficients`` as the paper writes them; ``objective`` the weighted
    sum of Huber losses; ``rmse`` and ``aicc`` of its residuals (ln loss, or the loss where ``log``
    is False); ``agreed`` the share of the best sixteen starts that ended at that objective;
    ``draws`` a row of coefficients per repetition once `bootstrap` has run; ``unidentified`` the
    coefficients that these runs cannot fix (`unidentified`); ``frame`` the runs.
    """

    law: Law
    coefficients: dict[str, float]
    objective: float
    rmse: float
    aicc: float
    runs: int
    agreed: float
    delta: float
    log: bool
    frame: pl.DataFrame = field(repr=False)
    weight: str | None = None
    unidentified: tuple[str, ...] = ()
    draws: pl.DataFrame | None = field(default=None, repr=False)

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={value:.4g}" for name, value in self.coefficients.items())
        loose = f"; not identified: {', '.join(self.unidentified)}" if self.unidentified else ""
        return f"Fit({self.law.name}, {self.runs} runs, rmse {self.rmse:.3g}: {values}{loose})"

    def _repr_html_(self) -> str:
        """Coefficients, with 95 % intervals once `bootstrap` has run."""
        drawn = () if self.draws is None else self.draws.columns
        rows = [
            (name, value, *(self.interval(name) if name in drawn else (None, None)))
            for name, value in self.coefficients.items()
        ]
        caption = f"{self.law.title} ({self.law.source}) on {self.runs} runs, rmse {self.rmse:.3g}"
        loose = f"not identified: {', '.join(self.unidentified)}" if self.unidentified else ""
        return html_table(("coefficient", "value", "95 % from", "to"), rows, caption, loose)

    def predict(self, point: Values | pl.DataFrame) -> np.ndarray:
        """Loss in nats/token at each row of a frame, or at a mapping of variables."""
        return np.asarray(self.law.predict(columns(point, self.law), self.coefficients))

    def residuals(self) -> np.ndarray:
        """ln predicted - ln measured, [n]."""
        return np.log(self.predict(self.frame)) - np.log(self.frame["loss"].to_numpy())

    def interval(self, name: str, confidence: float = 0.95) -> tuple[float, float]:
        """Percentile interval of a coefficient over the bootstrap draws."""
        if self.draws is None:
            raise AnalysisError(
                expected("a fit with bootstrap draws", "none", "bootstrap(fit)"), field="draws"
            )
        tail = (1 - confidence) / 2
        values = self.draws[name].to_numpy()
        return float(np.quantile(values, tail)), float(np.quantile(values, 1 - tail))


def columns(frame: Values | pl.DataFrame, law: Law) -> dict[str, Any]:
    """The law's variables out of a frame, as float arrays.

    Raises ``AnalysisError`` where one is missing, empty or not positive.
    """
    if not isinstance(frame, pl.DataFrame):
        return dict(frame)
    missing = [name for name in law.variables if name not in frame.columns]
    require(
        not missing,
        f"columns {', '.join(law.variables)} for the law {law.name}",
        f"none called {', '.join(missing)}",
        error=AnalysisError,
        field=missing[0] if missing else "",
    )
    point = {name: frame[name].cast(pl.Float64).to_numpy() for name in law.variables}
    for name, values in point.items():
        require(
            (np.isfinite(values) & (values > 0)).all(),
            f"{name} above 0 in every run",
            f"{values[~(values > 0)][:1]}",
            "dropping those runs",
            error=AnalysisError,
            field=name,
        )
    return point


def fit(
    law: str | Law,
    frame: pl.DataFrame,
    *,
    delta: float = HUBER,
    log: bool = True,
    starts: int = STARTS,
    seed: int = 0,
    weight: str | None = None,
    initial: Mapping[str, float] | None = None,
) -> Fit:
    """Fit ``law`` to runs [loss (nats/token), the law's variables].

    ``delta`` of Huber's loss (``SQUARES`` for least squares) on ln loss, or on the loss with
    ``log=False``; ``weight`` a column of run weights; ``initial`` adds a start. A form of the ratio
    alone (line, saturation, hinge, plateau) is fitted by least squares on the loss over a grid of
    its breaks. Raises ``AnalysisError`` for unknown laws, missing columns, losses that are not
    positive, or fewer runs than coefficients.
    """
    chosen = find_law(law)
    if chosen.formula is not None:
        return _fit_of_ratio(chosen, frame)
    every_run = make_problem(chosen, frame, delta, weight, log)
    problem, within = _of_cells(every_run) if delta == SQUARES else (every_run, 0.0)
    points = starting_points(problem, starts, seed)
    given = [initial] if initial is not None else []
    extra = [to_theta(chosen, values) for values in (*chosen.published.values(), *given)]
    points = np.concatenate([points, np.array(extra).reshape(-1, points.shape[1])])
    floor = NEGLIGIBLE * float(problem.weights.sum())
    first, value, _ = minimise(
        problem.objective, problem.curved, points, iterations=SCREENING, floor=floor
    )
    finalists = first[np.argsort(value)[:FINALISTS]]
    theta, value, _ = minimise(problem.objective, problem.curved, finalists, floor=floor)
    best = int(np.nanargmin(value))
    require(
        np.isfinite(value[best]),
        "a fit with a finite objective",
        f"none from {len(points)} starts",
        "another law or more runs",
        error=AnalysisError,
    )
    value = value + within
    agreed = float(np.mean(value <= value[best] * (1 + AGREE) + floor))
    return _report(every_run, frame, theta[best], float(value[best]), agreed, weight)


def _of_cells(problem: Problem) -> tuple[Problem, float]:
    """Least squares on the mean of the runs that agree in every variable, and the part of the
    objective within them, which is the same at every theta.
    """
    variables = np.stack([problem.point[name] for name in problem.law.variables])
    _, first, cell = np.unique(variables, axis=1, return_index=True, return_inverse=True)
    (target,), (weights,) = problem.target, problem.weights
    total = np.bincount(cell, weights)
    means = np.bincount(cell, weights * target) / np.where(total > 0, total, 1)
    within = 0.5 * float((weights * (target - means[cell]) ** 2).sum())
    point = {name: values[first] for name, values in problem.point.items()}
    return replace(problem, point=point, target=means[None], weights=total[None]), within


def find_law(law: str | Law) -> Law:
    if isinstance(law, Law):
        return law
    name = LAW_ALIASES.get(law.lower(), law)
    require(name in LAWS, f"a law of {', '.join(LAWS)}", law, error=AnalysisError, field="law")
    return LAWS[name]


def make_problem(
    law: Law, frame: pl.DataFrame, delta: float, weight: str | None, log: bool = True
) -> Problem:
    names = unknowns(law)
    loss = check_losses(frame, len(names))
    weights = np.ones(len(loss)) if weight is None else frame[weight].cast(pl.Float64).to_numpy()
    return Problem(
        law,
        columns(frame, law),
        (np.log(loss) if log else loss)[None],
        weights[None],
        delta,
        names,
        log,
    )


def check_losses(frame: pl.DataFrame, coefficients: int) -> np.ndarray:
    require(
        "loss" in frame.columns,
        "a column loss",
        f"columns {', '.join(frame.columns)}",
        "renaming yours",
        error=AnalysisError,
        field="loss",
    )
    require(
        frame["loss"].dtype.is_numeric(),
        "numbers in loss",
        frame["loss"].dtype,
        "casting the column",
        error=AnalysisError,
    )
    loss = frame["loss"].cast(pl.Float64).to_numpy()
    require(
        (np.isfinite(loss) & (loss > 0)).all(),
        "finite losses above 0",
        f"{loss[~(loss > 0)][:1]}",
        "dropping the runs that diverged",
        error=AnalysisError,
        field="loss",
    )
    require(
        len(loss) > coefficients,
        f"more runs than coefficients ({coefficients})",
        len(loss),
        "a simpler law",
        error=AnalysisError,
        field="law",
    )
    return loss


def _report(
    problem: Problem,
    frame: pl.DataFrame,
    theta: np.ndarray,
    value: float,
    agreed: float,
    weight: str | None,
) -> Fit:
    residual = (problem.response(theta[None])[0] - problem.target)[0]
    runs, k = len(residual), len(problem.names) + 1
    mean_square = float(np.average(residual**2, weights=problem.weights[0]))
    coefficients = {name: float(v) for name, v in to_coefficients(problem.law, theta).items()}
    return Fit(
        problem.law,
        coefficients,
        value,
        math.sqrt(mean_square),
        aicc(mean_square, runs, k),
        runs,
        agreed,
        problem.delta,
        problem.log,
        frame,
        weight,
        unidentified(problem, theta),
    )


def unidentified(problem: Problem, theta: np.ndarray) -> tuple[str, ...]:
    """Coefficients that the runs cannot fix at ``theta``: those in the null space of the Jacobian
    (columns scaled to one), and those of variables that are constant or tied over the runs, so that
    two terms of the law are one.
    """
    jacobian = problem.response(theta[None])[1][0] * np.sqrt(problem.weights[0])[:, None]
    size = np.linalg.norm(jacobian, axis=0)
    scaled = np.where(size > 0, jacobian / np.maximum(size, 1e-300), 0.0)
    _, values, vectors = np.linalg.svd(scaled, full_matrices=False)
    null = np.abs(vectors[values < SINGULAR * values.max()]).max(0, initial=0.0) > SHARE
    found = {name for name, lost in zip(problem.names, null, strict=True) if lost}
    return tuple(name for name in problem.names if name in found | _tied(problem))


def _tied(problem: Problem) -> set[str]:
    """Exponents of variables whose logarithms are constant, or linear in another's."""
    law = problem.law
    logs = {LETTERS[letter]: letter for letter in LETTERS if LETTERS[letter] in law.variables}
    columns = {letter: np.log(problem.point[name]) for name, letter in logs.items()}
    centred = {letter: value - value.mean() for letter, value in columns.items()}
    lost = {letter for letter, value in centred.items() if np.ptp(value) < TIED}
    rest = [letter for letter in centred if letter not in lost]
    for place, one in enumerate(rest):
        for other in rest[place + 1 :]:
            norms = np.linalg.norm(centred[one]) * np.linalg.norm(centred[other])
            if abs(centred[one] @ centred[other]) > (1 - TIED) * norms:
                lost |= {one, other}
    lost |= {"e"} if "x" in lost else set()
    if not lost:
        return set()
    terms = [term for term in law.terms if any(lost & set(z) for z, _ in term.exponents.values())]
    names = {n for term in terms for n, (z, _) in term.exponents.items() if lost & set(z)}
    # a constant variable leaves amplitude and exponent one number; with the level, two terms
    flat = any(np.ptp(centred[letter]) < TIED for letter in lost if letter in centred)
    amplitudes = {term.amplitude for term in terms} if flat else set()
    return (names | amplitudes) & set(problem.names)


def aicc(mean_square: float, runs: int, k: int) -> float:
    """Second-order AIC of Gaussian residuals, ``k`` counting their variance (inf where there are
    too few runs).
    """
    return (
        runs * math.log(max(mean_square, 1e-300))
        + 2 * k
        + (2 * k * (k + 1) / (runs - k - 1) if runs > k + 1 else math.inf)
    )


_SHAPE_NAMES = {"line": (), "saturation": ("Emax",), "hinge": ("t",), "plateau": ("t",)}
_SLOPE_NAMES = ("s", "u")


def _fit_of_ratio(law: Law, frame: pl.DataFrame) -> Fit:
    """Variable projection over the shapes of `forms`, on the mean of each ratio's runs: the squares
    within a ratio are the same for every shape. The residuals are nats.
    """
    loss = check_losses(frame, len(_SHAPE_NAMES[law.name]) + 2)
    log_ratio = np.log2(columns(frame, law)["ratio"])
    x, cell, counts = np.unique(log_ratio, return_inverse=True, return_counts=True)
    means = np.bincount(cell, loss) / counts
    within = float(((loss - means[cell]) ** 2).sum())
    form = FORMS[law.name]
    found = fit_form(form, x, means[None], counts, form.shapes(np.sort(log_ratio)))
    coefficients = {
        name: -float(value)
        for name, value in zip(_SLOPE_NAMES, found.coefficients[0], strict=False)
    }
    coefficients |= {
        name: float(2.0**value)
        for name, value in zip(_SHAPE_NAMES[law.name], found.shape[0], strict=True)
    }
    if law.shape:
        coefficients["Estart"] = START
    coefficients["c"] = float(
        np.average(
            means - np.asarray(law.predict({"ratio": 2.0**x}, {**coefficients, "c": 0.0})),
            weights=counts,
        )
    )
    square = (float(found.rss[0]) + within) / len(loss)
    runs, k = len(loss), form.parameters + 1
    return Fit(
        law,
        coefficients,
        0.5 * runs * square,
        math.sqrt(square),
        aicc(square, runs, k),
        runs,
        1.0,
        SQUARES,
        False,
        frame,
    )
