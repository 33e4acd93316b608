"""Many small minimisations at once, one problem per row: damped Gauss-Newton, then BFGS with a weak
Wolfe line search.

Scaling-law objectives are sums of a nearly absolute loss (Huber 1e-3) whose valleys are long and
flat. The usual one-start, default-tolerance L-BFGS-B stops inside them (the cause of the Chinchilla
paper's own misfit, 2404.10102), so a problem here ends only when several steps in a row no longer
lower its value. The line search is that of Lewis & Overton (Math. Program. 141, 2013): bisection on
sufficient decrease and curvature, which also holds for functions that are not smooth.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Objective = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
Curved = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray]]
SUFFICIENT, CURVATURE = 1e-4, 0.9
STALLED_STEPS = 3
LEVENBERG_STEPS = 60
LIGHT, HEAVY = (
    1e-2,
    1e8,
)  # damping, as a share of the Hessian, below which a step is Newton's and above which it is none
RIDGE = 1e-8
LINE_STEPS = 40


@dataclass
class _State:
    """Problems still running, by ``rows``: points, values, gradients, inverse Hessians, steps
    without progress.
    """

    rows: np.ndarray
    point: np.ndarray
    value: np.ndarray
    gradient: np.ndarray
    inverse: np.ndarray
    stalled: np.ndarray

    def keep(self, mask: np.ndarray) -> "_State":
        return _State(
            *(
                array[mask]
                for array in (
                    self.rows,
                    self.point,
                    self.value,
                    self.gradient,
                    self.inverse,
                    self.stalled,
                )
            )
        )


def minimise(
    objective: Objective,
    curved: Curved,
    start: np.ndarray,
    *,
    iterations: int = 1000,
    tolerance: float = 1e-14,
    floor: float = 0.0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Minimise B problems of p unknowns from ``start`` [B, p]: Levenberg-Marquardt first, then BFGS
    to the end.

    ``objective(points [b, p], rows [b]) -> (values [b], gradients [b, p])`` evaluates the problems
    named by ``rows`` (inf is allowed); ``curved`` returns (values, gradients, approximate Hessians
    [b, p, p]). ``tolerance`` is the relative decrease that counts and ``floor`` a value that is as
    good as zero. Returns points [B, p], values [B], and whether each ended before ``iterations``
    [B].
    """
    steps = min(LEVENBERG_STEPS, iterations)
    points, values, done = levenberg(
        curved, start, iterations=steps, tolerance=tolerance, floor=floor
    )
    rows = np.flatnonzero(~done)
    if not len(rows):
        return points, values, done
    value, gradient = objective(points[rows], rows)
    state = _State(
        rows,
        points[rows],
        value,
        gradient,
        _metric(curved, points[rows], rows),
        np.zeros(len(rows), int),
    )
    for _ in range(iterations):
        state = _step(state, objective, curved, tolerance)
        points[state.rows], values[state.rows] = state.point, state.value
        ended = (state.stalled >= STALLED_STEPS) | (state.value <= floor)
        done[state.rows[ended]] = True
        state = state.keep(~ended)
        if not len(state.rows):
            break
    return points, values, done


def levenberg(
    curved: Curved, start: np.ndarray, *, iterations: int, tolerance: float, floor: float = 0.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Damped Gauss-Newton steps, each problem with its own damping. Returns points, values, and
    which are at their minimum: there an all but undamped step promises less than ``tolerance`` of
    the value. Squares end so; nearly absolute losses seldom do.
    """
    rows, points, done = np.arange(len(start)), start.copy(), np.zeros(len(start), bool)
    values, gradient, hessian = curved(points, rows)
    damping = np.full(len(start), 1e-3)
    for _ in range(iterations):
        diagonal = np.einsum("bpp->bp", hessian)
        lift = (
            damping[rows, None] * np.maximum(diagonal, 1e-9 * diagonal.max(1, keepdims=True))
            + 1e-300
        )
        step = _solve(hessian + lift[:, :, None] * np.eye(points.shape[1]), -gradient)
        promise = -0.5 * (gradient * step).sum(1)
        ended = (values[rows] <= floor) | (
            (promise <= tolerance * values[rows]) & (damping[rows] <= LIGHT)
        )
        done[rows[ended]] = True
        keep = ~ended & (damping[rows] < HEAVY)
        rows, gradient, hessian, step = rows[keep], gradient[keep], hessian[keep], step[keep]
        if not len(rows):
            break
        trial = points[rows] + step
        value, new_gradient, new_hessian = curved(trial, rows)
        better = value < values[rows]
        points[rows[better]], values[rows[better]] = trial[better], value[better]
        gradient[better], hessian[better] = new_gradient[better], new_hessian[better]
        damping[rows] = np.where(better, damping[rows] * 0.2, damping[rows] * 8)
    return points, values, done


def _metric(curved: Curved, points: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The inverse of the slightly ridged Hessian."""
    hessian = curved(points, rows)[2]
    diagonal = np.einsum("bpp->bp", hessian)
    ridge = RIDGE * np.maximum(diagonal, diagonal.max(1, keepdims=True) * 1e-6) + 1e-12
    matrix = hessian + ridge[:, :, None] * np.eye(points.shape[1])
    try:
        return np.linalg.inv(matrix)
    except np.linalg.LinAlgError:
        return np.linalg.pinv(matrix, hermitian=True)


def _solve(matrix: np.ndarray, right: np.ndarray) -> np.ndarray:
    """[B, p]; the shortest solution if runs leave a direction open, as in designs of one size."""
    try:
        return np.linalg.solve(matrix, right[:, :, None])[:, :, 0]
    except np.linalg.LinAlgError:
        return np.einsum("bpq,bq->bp", np.linalg.pinv(matrix, hermitian=True), right)


def _step(state: _State, objective: Objective, curved: Curved, tolerance: float) -> _State:
    direction = -np.einsum("bij,bj->bi", state.inverse, state.gradient)
    slope = np.einsum("bi,bi->b", direction, state.gradient)
    uphill = ~(slope < 0)
    direction[uphill] = -state.gradient[uphill]
    slope[uphill] = -(state.gradient[uphill] ** 2).sum(1)
    point, value, gradient = _line_search(state, direction, slope, objective)
    fall = state.value - value
    small = ~(fall > tolerance * np.abs(state.value))
    stalled = np.where(small, state.stalled + 1, 0)
    inverse = _update(state.inverse, point - state.point, gradient - state.gradient)
    if (
        small.any()
    ):  # a stale Hessian can stall a problem that is not finished: start over from the local metric
        inverse[small] = _metric(curved, point[small], state.rows[small])
    return _State(state.rows, point, value, gradient, inverse, stalled)


def _line_search(
    state: _State, direction: np.ndarray, slope: np.ndarray, objective: Objective
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    point, value, gradient = state.point.copy(), state.value.copy(), state.gradient.copy()
    low, high, length = np.zeros(len(point)), np.full(len(point), np.inf), np.ones(len(point))
    todo = np.arange(len(point))
    for _ in range(LINE_STEPS):
        trial = state.point[todo] + length[todo, None] * direction[todo]
        trial_value, trial_gradient = objective(trial, state.rows[todo])
        decreased = trial_value <= state.value[todo] + SUFFICIENT * length[todo] * slope[todo]
        flat = np.einsum("bi,bi->b", trial_gradient, direction[todo]) >= CURVATURE * slope[todo]
        good = todo[decreased]
        point[good], value[good], gradient[good] = (
            trial[decreased],
            trial_value[decreased],
            trial_gradient[decreased],
        )
        high[todo[~decreased]] = length[todo[~decreased]]
        low[good] = length[good]
        todo = todo[~(decreased & flat)]
        if not len(todo):
            break
        length[todo] = np.where(np.isinf(high[todo]), 2 * low[todo], (low[todo] + high[todo]) / 2)
    return point, value, gradient


def _update(inverse: np.ndarray, step: np.ndarray, change: np.ndarray) -> np.ndarray:
    """The BFGS update of the inverse Hessian, skipped where curvature is not positive."""
    curvature = np.einsum("bi,bi->b", step, change)
    good = curvature > 1e-300
    rho = np.where(good, 1 / np.where(good, curvature, 1), 0)
    image = np.einsum("bij,bj->bi", inverse, change)
    quadratic = np.einsum("bi,bi->b", change, image)
    outer = step[:, :, None] * image[:, None, :]
    second = (rho * (1 + rho * quadratic))[:, None, None] * step[:, :, None] * step[:, None, :]
    updated = inverse - rho[:, None, None] * (outer + outer.transpose(0, 2, 1)) + second
    return np.where(good[:, None, None] & np.isfinite(updated), updated, inverse)
