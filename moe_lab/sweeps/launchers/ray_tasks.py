"""Analyses on a Ray cluster: each group of files of a trace is one task, and its frame comes back
(extra ``ray``).

    with mapped(RayTasks(options={"address": "auto"})):
        load = expert_load(trace)

Every node must see the trace at the same path. A task whose worker or node dies is computed again.
"""

import io
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import polars as pl

from moe_lab.analysis.map_reduce import Task
from moe_lab.config import require
from moe_lab.errors import RunError, expected
from moe_lab.sweeps.launchers.options import last_line, read_options
from moe_lab.sweeps.launchers.ray import WATCH_SECONDS, RayOptions, connected, lost
from moe_lab.worker_processes import MOST_DEATHS


@dataclass
class _Submitted:
    task: Task
    reference: Any
    deaths: int = 0


class RayTasks:
    """Computes tasks on a Ray cluster; the methods are those of ``map_reduce.Workers``.

    Args:
        workers: tasks at once; as many as the cluster has CPUs for by default.
        options: of ``RayOptions``, as texts: address, cpus and memory_gb of a task.

    Raises:
        ConfigError: an unknown option, or fewer than 1 worker.
        RunError: no Ray, or no cluster at the address.
    """

    def __init__(
        self, workers: int | None = None, options: Mapping[str, str] | None = None
    ) -> None:
        require(workers is None or workers >= 1, "at least 1 worker", workers, field="workers")
        chosen = read_options(RayOptions, options or {})
        self._ray, self._head, task = connected(chosen)
        memory = {"memory": int(chosen.memory_gb * 2**30)} if chosen.memory_gb else {}
        self._task = task(_frame).options(num_cpus=chosen.cpus, **memory)
        cores = self._ray.cluster_resources().get("CPU", 1)
        self.ahead = workers or max(1, 2 * int(cores / chosen.cpus))

    def submit(self, task: Task) -> _Submitted:
        return _Submitted(task, self._task.remote(task))

    def result(self, submitted: _Submitted) -> pl.DataFrame:
        errors = self._ray.exceptions
        while True:
            self._head.check()
            try:
                content = self._ray.get(submitted.reference, timeout=WATCH_SECONDS)
                return pl.read_ipc(io.BytesIO(content))
            except errors.GetTimeoutError:
                continue
            except errors.RayTaskError as error:
                raise getattr(error, "cause", None) or error from error
            except (ConnectionError, errors.RaySystemError) as error:
                raise RunError(lost(last_line(error))) from error
            except errors.RayError as error:
                self._again(submitted, type(error).__name__)

    def _again(self, submitted: _Submitted, cause: str) -> None:
        submitted.deaths += 1
        if submitted.deaths == MOST_DEATHS:
            what = f"Ray workers that live; {MOST_DEATHS} with one task ended one after another"
            raise RunError(expected(what, cause, "fewer workers"), field="workers")
        line = f"a Ray worker died ({cause}); another computes its task again"
        warnings.warn(line, stacklevel=4)
        submitted.reference = self._task.remote(submitted.task)

    def close(self) -> None:
        if self._head.answers():
            with suppress(Exception):  # the cluster may be going
                self._ray.shutdown()


def _frame(task: Task) -> bytes:
    content = io.BytesIO()
    task().write_ipc(content, compression="zstd")
    return content.getvalue()
