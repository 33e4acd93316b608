"""A second process that makes parts of a large page while this one makes others.

A part is a function of a module that takes pickled subjects and the ``Frames`` of its process. The
parts of one page wait in a queue: the second process takes the first, and what it has not begun
when the page needs it is made here. The page is the same either way.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from moe_lab.analysis.map_reduce import is_mapped
from moe_lab.analysis.worker_processes import WorkerProcesses
from moe_lab.report.frames import Frames
from moe_lab.report.sources import Material

T = TypeVar("T")
LEAST_ROWS, LEAST_RUNS = 2_000_000, 2_000
"""A page of fewer rows of routing in a trace, and of fewer runs, is made while a process starts."""


class SecondProcess:
    """Where parts are begun; without ``worker`` all are made here, when they are asked for."""

    def __init__(self, frames: Frames, worker: WorkerProcesses | None) -> None:
        self._frames, self._worker = frames, worker

    def begin(self, make: Callable[..., T], *subjects: Any) -> Callable[[], T]:
        """Begin ``make(*subjects, frames)``; returns the call that gives its result.

        Example::

            study = beside.begin(judged, table)
            ...  # make other parts here
            draw(study())
        """
        here = partial(make, *subjects, self._frames)
        if self._worker is None:
            return here
        worker, task = self._worker, self._worker.submit(partial(_made, make, subjects))
        return lambda: here() if task.cancel() else worker.result(task)


@contextmanager
def second_process(material: Material, frames: Frames) -> Iterator[SecondProcess]:
    """One for a large page on a machine with a second core, unless workers read the traces."""
    large = len(material.runs) >= LEAST_RUNS or any(
        named.trace.num_tokens * len(named.layers) >= LEAST_ROWS for named in material.traces
    )
    if not large or is_mapped() or _cores() < 2:
        yield SecondProcess(frames, None)
        return
    worker = WorkerProcesses(1, threads=None)
    try:
        yield SecondProcess(frames, worker)
    finally:
        worker.close()


def _made(make: Callable[..., T], subjects: tuple[Any, ...]) -> T:
    """Called in the second process, whose parts share no frames."""
    return make(*subjects, Frames())


def _cores() -> int:
    """That this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS or Windows
    return len(affinity(0)) if affinity else os.cpu_count() or 1
