"""The local launcher: worker processes on this machine, one thread each, as many as cores or GPUs.

One thread per worker and as many workers as cores beats many threads on small matrices. A worker
stays for many runs; one that dies takes only its current run with it, and the next submit starts
another. So does one that is killed because its run stands still.
"""

import json
import math
import os
import selectors
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import IO, Annotated

from moe_lab.config import Config, at_least, require
from moe_lab.errors import RunError, expected
from moe_lab.runs.failures import FailureKind
from moe_lab.runs.layout import STATUS
from moe_lab.runs.waits import Wait
from moe_lab.sweeps.launchers.options import read_options
from moe_lab.sweeps.launchers.protocol import MEMORY_HINT, Ending, Job, Result

THREADS = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "POLARS_MAX_THREADS",
    "RAYON_NUM_THREADS",
)
ONE_THREAD: dict[str, str] = dict.fromkeys(THREADS, "1")
PATIENCE_SECONDS = 3.0
"""Between asking a worker to stop and killing it."""


@dataclass(frozen=True)
class LocalOptions(Config):
    """
    Attributes:
        stall_minutes: a worker is killed whose run's ``status.json`` was not written for so long,
            and counts as died; 0 waits without end. The status stands still while a run is set up
            and evaluated, so this must be longer than either.
    """

    stall_minutes: Annotated[float, at_least(0)] = 0.0


def available_cores() -> int:
    """Cores this process may use: the smaller of its affinity and its control group's quota."""
    affinity = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return max(1, min(affinity, _quota(Path("/sys/fs/cgroup")) or affinity))


def _quota(root: Path) -> int | None:
    """Whole cores (rounded up) that a container's control group grants, version 2 or 1; None for no
    limit.
    """
    groups = [("cpu.max", None), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")]
    for quota_name, period_name in groups:
        with suppress(OSError, ValueError, IndexError):
            words = (root / quota_name).read_text().split()
            if period_name:
                words.append((root / period_name).read_text().strip())
            if words[0] not in ("max", "-1"):
                return max(1, math.ceil(int(words[0]) / int(words[1])))
    return None


def available_gpus() -> list[str]:
    """Ids of the CUDA devices this process may use, in the form CUDA_VISIBLE_DEVICES takes."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip() not in ("", "-1")]
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]


class _Worker:
    """One worker process and the job it has, if any."""

    def __init__(self, trainer: str, environment: dict[str, str], errors: IO[bytes]) -> None:
        command = [sys.executable, "-P", "-m", "moe_lab.sweeps.launchers.worker", trainer]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=environment
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.input, self.output = self.process.stdin, self.process.stdout
        os.set_blocking(self.output.fileno(), False)
        self.job: Job | None = None
        self.was_ready = False
        self.leaving = False  # a worker ends itself after a failed run
        self.stalled = False
        self._unread = b""
        self._status, self._moved = (
            0,
            0.0,
        )  # when the run's status was written, and when that was seen to change

    def give(self, job: Job) -> None:
        self.job, self._moved = job, monotonic()
        line = {
            "run": job.run,
            "name": job.name,
            "folder": str(job.folder.absolute()),
            "config": job.config,
        }
        with suppress(
            BrokenPipeError
        ):  # it died just now: its end is seen at the next poll, and the job with it
            self.input.write(json.dumps(line).encode() + b"\n")
            self.input.flush()

    def stop_if_stalled(self, seconds: float) -> None:
        """Kill it where its run's status was not written for so long; until it is ready, it imports
        what it needs.
        """
        if self.job is None or self.stalled:
            return
        try:
            written = (self.job.folder / STATUS).stat().st_mtime_ns
        except OSError:
            written = 0
        if written != self._status or not self.was_ready:
            self._status, self._moved = written, monotonic()
        elif monotonic() - self._moved > seconds:
            self.stalled = True
            self.process.kill()

    def events(self) -> list[dict[str, str]]:
        """Whole lines that have arrived."""
        with suppress(BlockingIOError):
            while chunk := os.read(self.output.fileno(), 65536):
                self._unread += chunk
        *lines, self._unread = self._unread.split(b"\n")
        return [json.loads(line) for line in lines]

    def stop(self) -> None:
        """Ask it to end, without waiting."""
        if self.job is not None and self.process.poll() is None:
            self.process.terminate()
        with suppress(BrokenPipeError):
            self.input.close()

    def reap(self) -> int:
        """Wait for its end, with force if need be; its exit status."""
        try:
            code = self.process.wait(PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        self.output.close()
        return code


class LocalLauncher:
    """Runs jobs as worker processes on this machine; the methods are those of
    ``protocol.Launcher``.

    ``workers`` None takes one per GPU if any job wants one, else one per core; never more than
    jobs.
    """

    def __init__(
        self, jobs: Sequence[Job], workers: int | None, trainer: str, options: Mapping[str, str]
    ) -> None:
        if workers is not None and workers < 1:
            raise RunError(expected("at least 1 worker", workers), field="workers")
        self._options = read_options(LocalOptions, options)
        seen = not self._options.stall_minutes or all(job.shared for job in jobs)
        require(
            seen,
            "a folder as the store for stall_minutes",
            "an object store, where a run's status is elsewhere",
            field="stall_minutes",
        )
        devices = {job.device for job in jobs}
        self._gpus = (
            available_gpus() if "cuda" in devices else []
        )  # "cuda:1" names its device itself
        wanted = workers or len(self._gpus) or len(devices - {"cpu", "cuda"}) or available_cores()
        self.slots = min(wanted, max(1, len(jobs)))
        self._trainer = trainer
        self._workers: list[_Worker | None] = [None] * self.slots
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  (lives as long as the workers that write to it)
        self._selector = selectors.DefaultSelector()
        self._stillborn = 0

    def submit(self, job: Job) -> None:
        index = next(
            index
            for index, worker in enumerate(self._workers)
            if worker is None or worker.job is None
        )
        worker = self._workers[index] or self._start(index)
        worker.give(job)

    def _start(self, index: int) -> _Worker:
        # The parent's own import path, so that a worker finds what the parent found (a trainer in a
        # script's folder, say).
        environment = (
            os.environ
            | ONE_THREAD
            | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
        )
        if self._gpus:
            environment["CUDA_VISIBLE_DEVICES"] = self._gpus[index % len(self._gpus)]
        worker = _Worker(self._trainer, environment, self._errors)
        self._workers[index] = worker
        self._selector.register(worker.output, selectors.EVENT_READ)
        return worker

    def poll(self, timeout: float) -> list[Ending]:
        self._selector.select(timeout)
        endings: list[Ending] = []
        for index, worker in enumerate(self._workers):
            if worker is None:
                continue
            ended = (
                worker.process.poll() is not None
            )  # asked before reading, so that nothing said before the end is missed
            for event in worker.events():
                endings += self._heard(worker, event)
            if ended or worker.leaving:
                endings += self._buried(index, worker)
            elif self._options.stall_minutes:
                worker.stop_if_stalled(60 * self._options.stall_minutes)
        return endings

    def _heard(self, worker: _Worker, event: dict[str, str]) -> list[Ending]:
        if event["event"] == "broken":
            raise RunError(event["reason"])
        if event["event"] == "ready":
            worker.was_ready, self._stillborn = True, 0
            return []
        kind = FailureKind(event["kind"])
        ending = Ending(event["run"], Result(event["result"]), event["reason"], kind)
        worker.job, worker.leaving = None, ending.result is Result.FAILED
        return [ending]

    def _buried(self, index: int, worker: _Worker) -> list[Ending]:
        self._selector.unregister(worker.output)
        self._workers[index] = None
        worker.stop()
        code = worker.reap()
        self._stillborn += not worker.was_ready
        if self._stillborn >= 3 * self.slots:
            got = f"{self._stillborn} that ended before their first run"
            raise RunError(f"expected workers that start, got {got}; {self._last_words()}")
        if worker.job is None:
            return []
        minutes = f"{self._options.stall_minutes:g} minutes"
        stalled = f"worker killed because its run's status stood still for {minutes}"
        return [Ending(worker.job.run, Result.DIED, stalled if worker.stalled else _cause(code))]

    def _last_words(self) -> str:
        size = self._errors.seek(0, os.SEEK_END)
        self._errors.seek(max(0, size - 4096))
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return f"the last one said: {lines[-1]}" if lines else "the last one said nothing"

    def waits(self) -> dict[str, Wait]:
        return {}

    def withdraw(self) -> None:
        """Do nothing: a run begins when it is submitted, so none waits."""

    def close(self) -> None:
        workers = [worker for worker in self._workers if worker is not None]
        for worker in workers:
            worker.stop()
        for worker in workers:
            worker.reap()
        self._workers = [None] * self.slots
        self._selector.close()
        self._errors.close()


def _cause(code: int) -> str:
    """Why a worker is gone: a negative status is the signal that ended it."""
    if code >= 0:
        return f"worker ended with exit status {code}"
    name = next((known.name for known in signal.Signals if known == -code), f"signal {-code}")
    return f"worker killed by {name}" + (
        f" (out of memory? {MEMORY_HINT})" if name == "SIGKILL" else ""
    )
