"""Timing that survives a noisy machine: contestants take turns, medians and quartiles are kept,
ratios are taken round by round.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import polars as pl
import torch

from moe_lab.files import atomic_path
from moe_lab.versions import provenance

RESULTS = Path(__file__).parent / "results"


def take_turns(
    contestants: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Seconds of each call, ``rounds`` per contestant, in rotating order after ``warmup`` uncounted
    rounds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    for number in range(-warmup, rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            began = time.perf_counter()
            contestants[name]()
            if number >= 0:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def summary(seconds: Mapping[str, list[float]], against: str) -> pl.DataFrame:
    """One row per contestant: median and quartiles in milliseconds, and the median of the paired
    ratios to ``against``.
    """
    rows = []
    for name, values in seconds.items():
        low, middle, high = statistics.quantiles(values, n=4)
        ratios = sorted(value / base for value, base in zip(values, seconds[against], strict=True))
        low_ratio, ratio, high_ratio = statistics.quantiles(ratios, n=4)
        rows.append(
            {
                "name": name, "rounds": len(values), "ms": middle * 1e3, "ms_q1": low * 1e3,
                "ms_q3": high * 1e3,
                "ratio": ratio, "ratio_q1": low_ratio, "ratio_q3": high_ratio,
            }
        )  # fmt: skip
    return pl.DataFrame(rows)


def save(frame: pl.DataFrame, name: str) -> Path:
    """``results/NAME.parquet``, with the provenance as columns of every row."""
    path = RESULTS / f"{name}.parquet"
    record = provenance() | {"threads": str(torch.get_num_threads())}
    if torch.cuda.is_available():
        record["device"] = torch.cuda.get_device_name()
    with atomic_path(path) as temporary:
        frame.with_columns(pl.lit(value).alias(key) for key, value in record.items()).write_parquet(
            temporary
        )
    return path
