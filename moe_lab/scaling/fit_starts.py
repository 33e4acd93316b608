"""Where to start a fit: random exponents and shapes, with the amplitudes (linear once those are
chosen) solved for each.

A law of one term is linear in everything but its shape on the log scale: there the start is already
the least-squares optimum given (Estart, Emax), and only those two are drawn.
"""

import numpy as np

from moe_lab.scaling.fit_problem import Problem
from moe_lab.scaling.law import Base

# where an exponent is sought for a feature of scale +1; products with the saturated ratio ("ne",
# "de") bend gently
RANGES = {
    "n": (-0.7, -0.05),
    "t": (-0.9, -0.05),
    "d": (-0.7, -0.05),
    "g": (-1.2, -0.1),
    "x": (-0.5, 0.3),
    "e": (-0.6, 0.7),
}
GENTLE = (-0.04, 0.04)
DRAWS = 4000
DRAWS_SHAPE = 240
BATCH = 500


def starting_points(problem: Problem, count: int, seed: int) -> np.ndarray:
    """The ``count`` best [count, p] of many random points, for draw 0 of the problem."""
    rng = np.random.default_rng(seed)
    one_term = len(problem.law.terms) == 1
    draws = (DRAWS_SHAPE if problem.law.shape else 1) if one_term else DRAWS
    theta = _random(problem, rng, draws)
    theta = np.concatenate(
        [_solve(problem, part, one_term) for part in np.array_split(theta, -(-draws // BATCH))]
    )
    value = np.concatenate(
        [
            problem.objective(part, np.zeros(len(part), int))[0]
            for part in np.array_split(theta, -(-draws // BATCH))
        ]
    )
    order = np.argsort(value)
    return theta[order[np.isfinite(value[order])][:count]]


def _random(problem: Problem, rng: np.random.Generator, draws: int) -> np.ndarray:
    theta = np.zeros((draws, len(problem.names)))
    for term in problem.law.terms:
        for name, (letters, scale) in term.exponents.items():
            low, high = RANGES.get(letters, GENTLE)
            theta[:, problem.names.index(name)] = rng.uniform(low, high, draws) * np.sign(scale)
    if problem.law.shape:
        first, second = (problem.names.index(name) for name in problem.law.shape)
        start, span = shape_range(problem)
        theta[:, first] = rng.uniform(*start, draws)
        theta[:, second] = rng.uniform(*span, draws)
        theta[:, second] = np.maximum(theta[:, second], theta[:, first] + 0.2)
    return theta


def shape_range(problem: Problem) -> tuple[tuple[float, float], tuple[float, float]]:
    """Ranges of ln of the two shape coefficients: around one and up to 30 times the grid's end, in
    the variable they saturate.
    """
    logs = (
        problem.law.effective(problem.point, 1e-12, 1e12)
        if problem.law.effective is not None
        else np.zeros(1)
    )
    low, high = float(np.min(logs)), float(np.max(logs))
    return (low + 0.05, low + 0.35 * (high - low) + 1.5), (low + 0.4 * (high - low), high + 3.4)


def _solve(problem: Problem, theta: np.ndarray, one_term: bool) -> np.ndarray:
    """Fill in the amplitudes, or for a law of one term every coefficient but the shape, by weighted
    least squares.
    """
    shape = [problem.names.index(name) for name in problem.law.shape]
    predicted, jacobian = problem.model(theta)
    weight = np.sqrt(problem.weights[0])
    target = problem.target[0] if problem.log else np.log(problem.target[0])
    if one_term:
        free = [i for i in range(theta.shape[1]) if i not in shape]
        design = jacobian[:, :, free] * weight[:, None]
        # ln L is linear in these: the Jacobian is the design, and what the shape alone predicts is
        # zero
        theta[:, free] = np.einsum("bpn,n->bp", np.linalg.pinv(design), target * weight)
        return theta
    amplitudes = [
        problem.names.index(term.amplitude)
        for term in problem.law.terms
        if term.base is not Base.ONE
    ]
    # with every amplitude at one, the Jacobian of an amplitude is its term's share of the sum
    columns = jacobian[:, :, amplitudes] * np.exp(predicted)[:, :, None]
    relative = weight * np.exp(-target)
    scale = np.maximum(columns.mean(1, keepdims=True), 1e-300)
    solved = np.einsum("bpn,n->bp", np.linalg.pinv(columns / scale * relative[:, None]), weight)
    level = float(np.exp(target).mean())
    theta[:, amplitudes] = np.log(np.maximum(solved, 0.01 * level)) - np.log(scale[:, 0])
    return theta
