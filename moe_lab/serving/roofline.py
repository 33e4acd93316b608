"""``Roofline``: the time of one MoE layer on a device, with constants fitted to measured kernels.

    t = start + touch * experts + ((bytes / bandwidth)^p + (operations / speed)^p)^(1/p)

``experts`` are the distinct experts that the step touches, bytes are their weights and the tokens'
activations, operations are those of gated feed-forwards; p says how well reading and computing
overlap (large: the slower one counts). A fit is judged on shapes of layers that it did not see.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from moe_lab.errors import AnalysisError, expected
from moe_lab.sandbox import read_parquet

COLUMNS = ("num_tokens", "hidden_size", "inter_size", "topk", "num_experts", "latency")
SHAPE = ("hidden_size", "inter_size", "topk", "num_experts")
BYTES = 2.0
"""Of a weight or activation: the kernels are of bfloat16."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Roofline:
    """
    Attributes:
        bandwidth: bytes a second.
        speed: floating point operations a second.
        start: seconds of a layer that does nothing.
        touch: seconds for each expert touched, beyond its bytes.
        overlap: the exponent p.
        error, error_90: median and 90 % point of the relative error on shapes held out.
        shapes, rows: that it was fitted to.
    """

    bandwidth: float
    speed: float
    start: float
    touch: float
    overlap: float
    error: float = float("nan")
    error_90: float = float("nan")
    shapes: int = 0
    rows: int = 0

    def seconds(
        self, tokens: Floats | float, experts: Floats | float, *, d_model: Floats | float,
        d_expert: Floats | float, top_k: Floats | float,
    ) -> Floats:  # fmt: skip
        """Time of a layer.

        Args:
            tokens: of the step.
            experts: distinct experts that they touch (``distinct_experts``, or ``by_equal_load``).
            d_model, d_expert, top_k: of the layer.
        """
        slots = np.asarray(tokens) * top_k
        weights = np.asarray(experts) * 3 * d_model * d_expert
        moved = BYTES * (weights + slots * (2 * np.asarray(d_model) + 3 * np.asarray(d_expert)))
        work = 6.0 * slots * d_model * d_expert
        reading, computing = moved / self.bandwidth, work / self.speed
        slower = np.maximum(reading, computing)
        ratio = np.minimum(reading, computing) / slower
        both = slower * (1 + ratio**self.overlap) ** (1 / self.overlap)
        return self.start + self.touch * np.asarray(experts) + both


def fit_roofline(times: pl.DataFrame | Path | str) -> Roofline:
    """Fit the constants to measured times, and their error on shapes held out one at a time.

    Args:
        times: num_tokens, hidden_size, inter_size, topk, num_experts, latency (milliseconds) of
            whole layers on one device, and optionally moe_ep_size and distribution: of those only
            rows of one device and of balanced load are used. Rows with a number that is missing or
            not above 0 are left out. A frame or a Parquet file.

    Raises:
        AnalysisError: columns are missing, or fewer than 3 shapes or 30 rows.
    """
    frame = times if isinstance(times, pl.DataFrame) else read_parquet(Path(times), AnalysisError)
    if missing := [name for name in COLUMNS if name not in frame.columns]:
        raise AnalysisError(expected(f"columns {', '.join(COLUMNS)}", f"none of {missing}"))
    for name, value in (("moe_ep_size", 1), ("distribution", "balanced")):
        frame = frame.filter(pl.col(name) == value) if name in frame.columns else frame
    numbers = pl.col(COLUMNS).cast(pl.Float64, strict=False)
    measured = pl.all_horizontal((pl.col(COLUMNS) > 0) & pl.col(COLUMNS).is_finite())
    frame = frame.with_columns(numbers).drop_nulls(list(COLUMNS)).filter(measured)
    shape_R = frame.select(pl.struct(*SHAPE).rank("dense")).to_series().to_numpy() - 1
    shapes = len(np.unique(shape_R))
    if shapes < 3 or frame.height < 30:
        raise AnalysisError(
            expected("times of at least 3 shapes and 30 rows", f"{shapes} and {frame.height}")
        )
    rows = _Rows(frame)
    errors = np.zeros(frame.height)
    whole = _fitted(rows, np.ones(frame.height, bool), None)
    for shape in range(shapes):
        held = shape_R == shape
        errors[held] = rows.error(_fitted(rows, ~held, whole))[held]
    constants = [float(value) for value in _constants(whole)]
    return Roofline(
        *constants,
        error=float(np.median(errors)),
        error_90=float(np.quantile(errors, 0.9)),
        shapes=shapes,
        rows=frame.height,
    )


class _Rows:
    def __init__(self, frame: pl.DataFrame) -> None:
        tokens, hidden, inter, slots, experts, latency = (
            frame[name].to_numpy().astype(np.float64) for name in COLUMNS
        )
        self.seconds = latency * 1e-3
        self.tokens = tokens
        self.sizes = {"d_model": hidden, "d_expert": inter, "top_k": slots}
        self.touched = experts * (1 - (1 - slots / experts) ** tokens)

    def error(self, logs: Floats) -> Floats:
        """[R] relative error."""
        return np.abs(self.predicted(logs) / self.seconds - 1)

    def predicted(self, logs: Floats) -> Floats:
        return Roofline(*_constants(logs)).seconds(self.tokens, self.touched, **self.sizes)


def _constants(logs: Floats) -> Floats:
    values = np.exp(np.clip(logs, -60, 60))
    values[4] = 1 + min(values[4], 50.0)
    return values


def _fitted(rows: _Rows, kept: NDArray[np.bool_], near: Floats | None) -> Floats:
    """Logs of the constants with the least soft-l1 loss of log times."""
    from scipy.optimize import least_squares

    first = np.log([2e12, 4e14, 2e-5, 1e-7, 1.0]) if near is None else near
    found = least_squares(
        lambda logs: (np.log(rows.predicted(logs)) - np.log(rows.seconds))[kept],
        first,
        loss="soft_l1",
        f_scale=0.1,
        max_nfev=60 if near is None else 20,
    )
    return found.x
