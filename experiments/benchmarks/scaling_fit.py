"""How fast a law is fitted with its uncertainty: Clark's form on his S-BASE runs, 1,000 bootstrap
repetitions, against plain scipy; and how long a power study of 500 draws x 5 truths takes.

    MOE_LAB_DATA=... python experiments/benchmarks/scaling_fit.py

Both sides minimise the same objective from the same starts for the same resampled runs. The plain
side is the law written out with its derivatives, in a loop over scipy's `L-BFGS-B` (the published
practice, tolerance 1e-14) and over `least_squares`, timed on some of the repetitions and scaled up.
Times are seconds of processor time, so that other work on the machine does not enter, beside those
of the wall clock.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from scipy.optimize import least_squares, minimize

from moe_lab.scaling import SQUARES, Design, bootstrap, default_truths, fit, power, published
from moe_lab.scaling.fit import make_problem
from moe_lab.scaling.fit_problem import Problem
from moe_lab.scaling.law import LN10
from moe_lab.scaling.uncertainty import bootstrap_starts

REPETITIONS = 1000


def timed(work: Callable[[], object]) -> tuple[object, float, float]:
    wall, processor = time.perf_counter(), time.process_time()
    result = work()
    return result, time.perf_counter() - wall, time.process_time() - processor


class Plain:
    """Clark's law written out for one set of resampled runs, with its derivatives: what a script
    would hand to scipy.
    """

    def __init__(self, problem: Problem, counts: np.ndarray):
        names = ("d", "a", "b", "c", "Estart", "Emax")
        self.order = [problem.names.index(name) for name in names]
        self.n, self.ratio = np.log(problem.point["active_params"]), problem.point["ratio"]
        self.target, self.root = problem.target[0], np.sqrt(counts)

    def residual(self, theta: np.ndarray) -> np.ndarray:
        return self._both(theta)[0]

    def jacobian(self, theta: np.ndarray) -> np.ndarray:
        return self._both(theta)[1]

    def squares(self, theta: np.ndarray) -> tuple[float, np.ndarray]:
        residual, jacobian = self._both(theta)
        value = 0.5 * float(residual @ residual)
        return (value, residual @ jacobian) if np.isfinite(value) else (1e300, np.zeros(len(theta)))

    def _both(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        d, a, b, c, start, maximum = theta[self.order]
        with np.errstate(all="ignore"):
            start, maximum = np.exp(start), np.exp(maximum)
            offset = 1 / (1 / start - 1 / maximum)
            inner = 1 / (self.ratio - 1 + offset)
            e = -np.log(inner + 1 / maximum)
            slope = b + c * self.n / LN10
            by_offset = inner**2 / (inner + 1 / maximum)  # d e / d offset
            by_start = slope * by_offset * offset**2 / start
            by_maximum = slope * (
                1 / maximum / (inner + 1 / maximum) - by_offset * offset**2 / maximum
            )
            residual = (d + a * self.n + slope * e - self.target) * self.root
            jacobian = np.empty((len(self.n), 6))
            for column, value in zip(
                self.order, (1.0, self.n, e, self.n * e / LN10, by_start, by_maximum), strict=True
            ):
                jacobian[:, column] = value * self.root
        return residual, jacobian


def with_lbfgs(plain: Plain, start: np.ndarray) -> float:
    options = {"maxiter": 20000, "maxfun": 100000, "ftol": 1e-14, "gtol": 1e-12}
    return float(minimize(plain.squares, start, jac=True, method="L-BFGS-B", options=options).fun)


def with_least_squares(plain: Plain, start: np.ndarray) -> float:
    tolerances: dict[str, Any] = {"ftol": 1e-14, "xtol": 1e-14, "gtol": 1e-14}
    return float(
        least_squares(
            plain.residual,
            start,
            plain.jacobian,  # type: ignore[arg-type]  # scipy's default "2-point" is read as str
            x_scale="jac",
            max_nfev=5000,
            **tolerances,
        ).cost
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--data", type=Path, help="folder of published data (default: MOE_LAB_DATA)"
    )
    parser.add_argument(
        "--plain", type=int, default=20, help="repetitions the plain loops are timed on"
    )
    arguments = parser.parse_args()
    runs = published("clark", arguments.data).filter(
        (pl.col("routing_frequency") == 0.5) & (pl.col("k") == 1) & (pl.col("seed") == 42)
    )
    runs = runs.filter(pl.col("router_type").is_in(["S-Base", "Dense"]))
    result, wall_fit, cpu_fit = timed(lambda: fit("clark", runs, delta=SQUARES))
    drawn, wall, cpu = timed(lambda: bootstrap(result, REPETITIONS))  # type: ignore[arg-type]
    print(
        f"batched: fit {wall_fit:.2f} s (processor {cpu_fit:.2f}), {REPETITIONS} repetitions "
        f"{wall:.2f} s (processor {cpu:.2f})"
    )
    base = make_problem(result.law, runs, SQUARES, None)  # type: ignore[attr-defined]
    starts = bootstrap_starts(base, result)  # type: ignore[arg-type]
    counts = np.random.default_rng(0).multinomial(
        runs.height, np.full(runs.height, 1 / runs.height), REPETITIONS
    )
    batched = drawn.draws["objective"].to_numpy()[: arguments.plain]  # type: ignore[attr-defined]
    for name, method in (("L-BFGS-B", with_lbfgs), ("least_squares", with_least_squares)):
        resampled = [Plain(base, row) for row in counts[: arguments.plain]]
        best, _, plain = timed(
            lambda method=method, resampled=resampled: [
                min(method(p, s) for s in starts) for p in resampled
            ]
        )
        scaled = plain * REPETITIONS / arguments.plain
        worse = float((np.array(best) > batched * (1 + 1e-6)).mean())
        text = f"{scaled:.0f} s of processor for {REPETITIONS} repetitions"
        times = f"{scaled / cpu:.0f} times the batched path"
        print(
            f"plain scipy {name}: {text}, {times}; "
            f"a worse optimum in {worse:.0%} of the repetitions"
        )
    design = Design(tuple(2.0**e for e in range(10)), 3, 1e7, 1e9)
    _, wall, cpu = timed(lambda: power(design, default_truths(), noise_sd=0.006, draws=500))
    print(
        f"power study, 500 draws x {len(default_truths())} truths: {wall:.2f} s (processor "
        f"{cpu:.2f})"
    )


if __name__ == "__main__":
    main()
