"""A second process that reads and makes parts of a large page while this one makes others.

A part is a function of a module whose arguments can be pickled. The parts that are begun wait in a
queue: the second process takes the first, and what it has not begun when the page needs it is made
here. The page is the same either way.

This module imports nothing heavy, so that the second process starts while this one still imports.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from moe_lab.runs.layout import PLAN
from moe_lab.worker_processes import WorkerProcesses

T = TypeVar("T")
LEAST_RUNS, LEAST_ROWS, LEAST_BYTES = 1_000, 2_000_000, 50_000_000
"""A page of fewer run folders, and of a trace with fewer rows or smaller files, is made while a
process starts.
"""
FILES_SEEN = 1_000
"""Files whose sizes are added up, at most, of each source."""


class SecondProcess:
    """Where parts are begun; without ``worker`` each is made here, when it is asked for."""

    def __init__(self, worker: WorkerProcesses | None = None) -> None:
        self._worker = worker

    def begin(self, make: Callable[..., T], *arguments: Any, **here: Any) -> Callable[[], T]:
        """Begin ``make(*arguments)``; returns the call that gives its result.

        Args:
            here: further arguments of a call in this process, such as what it holds already.

        Example::

            study = beside.begin(judged_runs, table, True, frames=frames)
            ...  # make other parts here
            draw(study())
        """
        if self._worker is None:
            return partial(make, *arguments, **here)
        worker, task = self._worker, self._worker.submit(partial(make, *arguments))
        return lambda: make(*arguments, **here) if task.cancel() else worker.result(task)


@contextmanager
def second_process(sources: Sequence[Any], wanted: bool = True) -> Iterator[SecondProcess]:
    """One for a page of large ``sources`` on a machine with a second core, if it is ``wanted``."""
    if not wanted or _cores() < 2 or not any(map(_large, sources)):
        yield SecondProcess()
        return
    worker = WorkerProcesses(1)
    folders = [Path(source) for source in sources if isinstance(source, str | Path)]
    if any((folder / PLAN).is_file() for folder in folders):
        worker.submit(import_judging)
        if "numpy" not in sys.modules:
            # Sums are then equal to the bit in both processes, and threads wait for no other.
            os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    try:
        yield SecondProcess(worker)
    finally:
        worker.close()


def import_judging() -> None:
    """Called in the second process, while the run folders are read."""
    for name in ("moe_lab.report.wall_section", "moe_lab.scaling"):
        importlib.import_module(name)


def _large(source: Any) -> bool:
    if not isinstance(source, str | Path):
        return source.num_tokens * len(source.meta.layers) >= LEAST_ROWS
    folder = Path(source)
    if (folder / PLAN).is_file():
        with os.scandir(folder) as entries:
            if len(list(islice(entries, LEAST_RUNS))) == LEAST_RUNS:
                return True
    files = islice(folder.rglob("*.parquet"), FILES_SEEN)
    return sum(map(_size, files)) >= LEAST_BYTES


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:  # gone meanwhile
        return 0


def _cores() -> int:
    """That this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS or Windows
    return len(affinity(0)) if affinity else os.cpu_count() or 1
