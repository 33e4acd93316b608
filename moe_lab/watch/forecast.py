"""The time that the runs of a place still need, from how fast they train."""

import math
from collections.abc import Iterable, Mapping
from statistics import median

from moe_lab.runs import RunRecord, RunState
from moe_lab.runs.record import number


def run_seconds_left(record: RunRecord, tokens_per_step: float) -> float | None:
    """Seconds until the training of a running run ends, at its last logged speed; None: not known.

    Args:
        tokens_per_step: 0: not known.
    """
    progress = record.progress
    speed = progress.tokens_per_second
    if record.state is not RunState.RUNNING or not (progress.steps and speed and tokens_per_step):
        return None
    seconds = (progress.steps - progress.step) * tokens_per_step / speed
    return max(0.0, seconds) if math.isfinite(seconds) else None


def seconds_left(
    records: Iterable[RunRecord], tokens_per_step: Mapping[str, float]
) -> float | None:
    """Seconds until all runs are done, if as many train at once as now; None: not known, or none
    trains.

    A run that waits is taken to need what runs of its arm and ratio needed, else those of the
    nearest ratio.

    Args:
        tokens_per_step: by the name of the run's folder.
    """
    records = list(records)
    needed: dict[tuple[str, float], list[float]] = {}
    left, training, waiting = 0.0, 0, []
    for record in records:
        own = run_seconds_left(record, tokens_per_step.get(record.folder.name, 0.0))
        if own is not None:
            fraction = 1 - record.progress.fraction
            left, training = left + own, training + 1
            if fraction:
                needed.setdefault(_point(record), []).append(own / fraction)
        elif record.state is RunState.FINISHED:
            if seconds := number(record.result.get("seconds")):
                needed.setdefault(_point(record), []).append(seconds)
        elif record.state is not RunState.FAILED:
            waiting.append(record)
    if not training:
        return None
    for record in waiting:
        left += (1 - record.progress.fraction) * _likely(_point(record), needed)
    longest = max(
        run_seconds_left(record, tokens_per_step.get(record.folder.name, 0.0)) or 0.0
        for record in records
    )
    return max(left / training, longest)


def _point(record: RunRecord) -> tuple[str, float]:
    return str(record.result.get("arm", "")), number(record.result.get("ratio")) or 1.0


def _likely(point: tuple[str, float], needed: Mapping[tuple[str, float], list[float]]) -> float:
    if not needed:
        return 0.0

    def distance(other: tuple[str, float]) -> tuple[float, bool]:
        ratios = max(point[1], 1e-9), max(other[1], 1e-9)
        return abs(math.log(ratios[0] / ratios[1])), point[0] != other[0]

    return median(needed[min(needed, key=distance)])
