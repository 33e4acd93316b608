"""The oracle of `fit`: the same objective and starts, one `scipy.optimize.least_squares` after
another.
"""

import math
from typing import Any

import numpy as np
import polars as pl
from scipy.optimize import least_squares

from moe_lab.scaling.fit import HUBER, Fit, find_law, make_problem
from moe_lab.scaling.fit import _report as report
from moe_lab.scaling.fit_problem import Problem
from moe_lab.scaling.fit_starts import starting_points
from moe_lab.scaling.law import Law


def plain_fit(
    law: str | Law, frame: pl.DataFrame, *, delta: float = HUBER, starts: int = 20, seed: int = 0
) -> Fit:
    """The oracle: the same objective and starts, one `least_squares` of scipy after another."""
    problem = make_problem(find_law(law), frame, delta, None)
    results = [plain_minimum(problem, start) for start in starting_points(problem, starts, seed)]
    theta, value = min(results, key=lambda result: result[1])
    return report(problem, frame, theta, value, math.nan, None)


def plain_minimum(problem: Problem, start: np.ndarray) -> tuple[np.ndarray, float]:
    root = np.sqrt(problem.weights[0])

    def residual(theta: np.ndarray) -> np.ndarray:
        return (problem.response(theta[None])[0] - problem.target)[0] * root

    def jacobian(theta: np.ndarray) -> np.ndarray:
        return problem.response(theta[None])[1][0] * root[:, None]

    robust: dict[str, Any] = (
        {} if math.isinf(problem.delta) else {"loss": "huber", "f_scale": problem.delta}
    )
    with np.errstate(all="ignore"):
        result = least_squares(
            residual,
            start,
            jacobian,  # type: ignore[arg-type]  # scipy's default "2-point" is read as str
            x_scale="jac",
            ftol=1e-15,
            xtol=1e-15,
            gtol=1e-15,
            max_nfev=5000,
            **robust,
        )
    return result.x, float(result.cost)
