"""Best points: compute-optimal splits of a law, isoFLOP parabolas through runs, and the best ratio
under a constraint (W4).

A best ratio at fixed total parameters, bytes or time (W4) can exist with no wall at all: it is
reported apart from the verdict.
"""

import math
from dataclasses import dataclass
from typing import cast

import numpy as np
import polars as pl
from scipy.optimize import minimize_scalar

from moe_lab.errors import AnalysisError, require
from moe_lab.scaling.fit import find_law
from moe_lab.scaling.law import Law, Values

SAME = 1.05  # within this factor a constraint holds
EDGE = 1.01  # within this factor of the last ratio an optimum is taken to lie past the grid


def compute_optimal(
    law: str | Law,
    compute: float,
    point: Values | None = None,
    coefficients: Values | str | None = None,
) -> tuple[float, float]:
    """(active parameters, tokens) that minimise a law's loss with 6 N D = ``compute`` FLOPs;
    ``point`` holds its other variables.
    """
    chosen = find_law(law)
    other = dict(point or {})

    def loss(log_active: float) -> float:
        active = math.exp(log_active)
        return float(
            chosen.predict(
                {**other, "active_params": active, "tokens": compute / 6 / active}, coefficients
            )
        )

    middle = 0.5 * math.log(compute / 6)
    found = minimize_scalar(
        loss, bounds=(middle - 12, middle + 12), method="bounded", options={"xatol": 1e-10}
    )
    active = math.exp(float(found.x))  # type: ignore[attr-defined]
    return active, compute / 6 / active


@dataclass(frozen=True)
class Isoflop:
    """The best sizes of several compute budgets. ``optima`` [compute, active_params, tokens, loss,
    runs]; N* = ``active_amplitude`` C^``active_exponent``, likewise tokens.
    """

    optima: pl.DataFrame
    active_exponent: float
    active_amplitude: float
    token_exponent: float
    token_amplitude: float


def isoflop(frame: pl.DataFrame, *, span: float = math.inf) -> Isoflop:
    """A parabola in ln N through the runs of each compute budget, and power laws through the minima
    (Llama 3's method, 2407.21783 3.2.1).

    ``frame`` [compute (equal within a budget), active_params, tokens, loss]. Budgets whose parabola
    has no minimum inside its runs are left out. ``span`` keeps runs within this factor of the
    smallest loss's size: wide parabolas are biased (2603.21862 gives sizes).
    """
    rows = []
    for (compute,), runs in frame.sort("compute", "active_params").group_by(
        "compute", maintain_order=True
    ):
        size = np.log(runs["active_params"].cast(pl.Float64).to_numpy())
        loss = runs["loss"].to_numpy()
        near = (
            np.abs(size - size[loss.argmin()]) <= math.log(span)
            if math.isfinite(span)
            else np.ones(len(size), bool)
        )
        if near.sum() < 4 or len(np.unique(size[near])) < 3:
            continue
        curve = np.polyfit(size[near], loss[near], 2)
        best = -curve[1] / (2 * curve[0])
        if curve[0] <= 0 or not size[near].min() < best < size[near].max():
            continue
        log_product = float(
            np.mean(size[near] + np.log(runs["tokens"].cast(pl.Float64).to_numpy()[near]))
        )
        rows.append(
            {
                "compute": float(compute),  # type: ignore[arg-type]
                "active_params": math.exp(best),
                "tokens": math.exp(log_product - best),
                "loss": float(np.polyval(curve, best)),
                "runs": int(near.sum()),
            }
        )
    require(
        len(rows) >= 2,
        "two or more budgets with a minimum inside their runs",
        len(rows),
        "more sizes per budget",
        error=AnalysisError,
        field="budgets",
    )
    optima = pl.DataFrame(rows)
    log_compute = np.log(optima["compute"].to_numpy())
    active = np.polyfit(log_compute, np.log(optima["active_params"].to_numpy()), 1)
    tokens = np.polyfit(log_compute, np.log(optima["tokens"].to_numpy()), 1)
    return Isoflop(
        optima, float(active[0]), math.exp(active[1]), float(tokens[0]), math.exp(tokens[1])
    )


@dataclass(frozen=True)
class Optimum:
    """The ratio of the smallest loss under a constraint, its bootstrap ``interval`` (0 and inf
    where
    it reaches past the grid), and whether it lies ``inside`` the grid.
    """

    ratio: float
    interval: tuple[float, float]
    inside: bool
    sentence: str


def constrained_optimum(
    frame: pl.DataFrame, *, constraint: str = "total_params", repetitions: int = 1000, seed: int = 0
) -> Optimum:
    """W4: the best ratio of an arm [ratio, seed, loss] run at one value of ``constraint`` (checked
    within 5 % where the column exists).

    A parabola in log2 ratio through the best ratio and two neighbours on either side; the interval
    redraws the noise between runs of a ratio (one run per ratio leaves it a point).
    """
    for name in ("ratio", "seed", "loss"):
        require(
            name in frame.columns,
            "columns ratio, seed, loss",
            f"none called {name}",
            error=AnalysisError,
        )
    require(
        frame["ratio"].n_unique() >= 3,
        "three or more ratios",
        frame["ratio"].n_unique(),
        error=AnalysisError,
        field="ratio",
    )
    if constraint in frame.columns:
        low, high = float(frame[constraint].min()), float(frame[constraint].max())  # type: ignore[arg-type]
        require(
            high <= SAME * low,
            f"one value of {constraint} (within 5 %)",
            f"{low:g} to {high:g}",
            "constraint= another column",
            error=AnalysisError,
            field=constraint,
        )
    ratios = frame["ratio"].unique().sort().to_numpy().astype(float)
    losses = [frame.filter(pl.col("ratio") == ratio)["loss"].to_numpy() for ratio in ratios]
    rng = np.random.default_rng(seed)
    x = np.log2(ratios)
    best = _vertex(x, np.array([values.mean() for values in losses]))
    counts = np.array([len(values) for values in losses])
    df = int((counts - 1).sum())
    spread = (
        math.sqrt(sum(((values - values.mean()) ** 2).sum() for values in losses) / df)
        if df
        else 0.0
    )
    noise = rng.standard_t(max(df, 1), (repetitions, len(x))) * spread / np.sqrt(counts)
    means = np.array([values.mean() for values in losses]) + noise
    drawn = np.array([_vertex(x, row) for row in means])
    low, high = (float(2**q) for q in np.quantile(drawn, (0.05, 0.95)))
    open_below, open_above = low <= ratios[0] * EDGE, high >= ratios[-1] / EDGE
    ratio = float(2**best)
    if open_below and open_above:
        best_ratio = "not found: the noise reaches from one end of the grid to the other"
    elif open_above:
        best_ratio = f"at least {low:.3g} (95 %): the loss has not risen when the grid ends"
    elif open_below:
        best_ratio = f"at most {high:.3g} (95 %): the loss rises from the grid's start"
    else:
        best_ratio = f"{ratio:.3g} (90 % {low:.3g} to {high:.3g}), inside the grid"
    sentence = f"At fixed {constraint} the best ratio is {best_ratio}"
    interval = (0.0 if open_below else low, math.inf if open_above else high)
    return Optimum(ratio, interval, not (open_above or open_below), sentence)


def fixed_total_optima(frame: pl.DataFrame) -> dict[str, Optimum]:
    """`constrained_optimum` of every arm of ``frame`` [arm, ratio, seed, loss, total_params,
    active_params] that has one total and several active sizes: W4, apart from any verdict.
    """
    if not {"arm", "ratio", "seed", "loss", "total_params", "active_params"} <= set(frame.columns):
        return {}
    found = {}
    for (arm,), runs in frame.drop_nulls(
        ["arm", "ratio", "loss", "total_params", "active_params"]
    ).group_by("arm", maintain_order=True):
        total, active = (runs[name].cast(pl.Float64) for name in ("total_params", "active_params"))
        (least_total, most_total), (least, most) = (
            (cast(float, size.min()), cast(float, size.max())) for size in (total, active)
        )
        fixed = most_total <= SAME * least_total and most > SAME * least
        if fixed and runs["ratio"].n_unique() >= 3:
            found[str(arm)] = constrained_optimum(runs)
    return found


def _vertex(x: np.ndarray, loss: np.ndarray) -> float:
    """log2 of the best ratio: the vertex of a parabola around the smallest mean, held within the
    grid.
    """
    middle = int(loss.argmin())
    near = slice(max(0, middle - 2), middle + 3)
    if len(x[near]) < 3:
        return float(x[middle])
    curve = np.polyfit(x[near], loss[near], 2)
    if curve[0] <= 0:
        return float(x[middle])
    return float(np.clip(-curve[1] / (2 * curve[0]), x[0], x[-1]))
