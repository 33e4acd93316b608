"""Driving a sweep: long runs first, each done once, whatever dies on the way.

The same call on the same folder continues what an earlier one left: finished runs are kept, interrupted ones resume from their
checkpoints, failed ones get another chance. Two sweeps on one folder share the work.
"""

import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from moe_lab.config import require
from moe_lab.files import write_text
from moe_lab.sweeps.claims import acquire
from moe_lab.sweeps.config import SweepConfig
from moe_lab.sweeps.launchers import TRAIN, Ending, Job, Launcher, Result, build_launcher
from moe_lab.sweeps.planning import describe
from moe_lab.sweeps.progress import View, build_view
from moe_lab.sweeps.store import DONE, ERROR, RunState, RunStore

RETRIES = 2
"""How often a run is taken up again after its worker died, within one sweep."""
POLL_SECONDS = 0.2
FOREIGN_SECONDS = 1.0


@dataclass(frozen=True)
class FailedRun:
    run: str
    name: str
    reason: str


@dataclass(frozen=True)
class SweepOutcome:
    """How a sweep ended, by run hash.

    Attributes:
        finished: whole runs, those found finished included.
        failed: with the reason of each in one line.
        interrupted: neither, because the sweep was told to stop; the same command continues them.
        seconds: wall time of this call.
    """

    finished: tuple[str, ...]
    failed: tuple[FailedRun, ...]
    interrupted: tuple[str, ...]
    seconds: float

    @property
    def complete(self) -> bool:
        return not self.failed and not self.interrupted


def run(
    sweep: SweepConfig,
    out: Path | str,
    workers: int | None = None,
    progress: bool = True,
    *,
    launcher: str = "local",
    launcher_options: Mapping[str, str] | None = None,
    max_hours: float | None = None,
    trainer: str = TRAIN,
) -> SweepOutcome:
    """Do every run of ``sweep`` that is not finished in the folder ``out``, and say how each ended.

    Args:
        workers: processes; None takes one per core, or per GPU where a run wants CUDA.
        progress: show it: live bars on a terminal, plain lines elsewhere.
        launcher: a name in ``launchers.LAUNCHERS``.
        launcher_options: of that launcher, as texts (``RayOptions``, ``SlurmOptions``).
        max_hours: after so long no further run starts; those that train go on to their end, and the same command continues the rest.
        trainer: ``module:function(config values, run folder)`` for workers to call instead of ``moe_lab.training.train``.

    Ctrl-C and SIGTERM stop the workers and return an outcome with ``interrupted`` runs. A run that fails does not stop the others.
    Raises ``RunError`` where the folder cannot be written, also when its disk fills up on the way, or where no worker starts;
    ``CorpusError`` where the text is unfit.
    """
    require(max_hours is None or max_hours >= 0, "max_hours of at least 0", max_hours)
    began = time.monotonic()
    store = RunStore(out)
    store.check_writable()
    if trainer == TRAIN:
        _tokenize(sweep)
    store.add(sweep)
    jobs = _jobs(sweep, store)
    driver = _Driver(store, jobs)
    with closing(build_view(progress, store, jobs)) as view, _stop_signals() as stop:
        driver.begin(view)
        if driver.queue:
            with closing(build_launcher(launcher, list(driver.queue), workers, trainer, launcher_options)) as pool:
                driver.drive(pool, view, stop, None if max_hours is None else began + 3600 * max_hours)
    return driver.outcome(time.monotonic() - began)


def _tokenize(sweep: SweepConfig) -> None:
    """Fill the token cache before any worker wants it: unfit text is one error for the sweep, and no two workers learn one tokenizer."""
    from moe_lab.text import load_tokens

    for text in dict.fromkeys(run.text for run in sweep.runs):
        load_tokens(text)


def _jobs(sweep: SweepConfig, store: RunStore) -> list[Job]:
    """The sweep's runs, the longest first: a long one that starts last would leave the other workers idle."""
    jobs = [
        Job(run_hash, run.name, store.path(run_hash), run.to_dict(), describe(run, run_hash)["flops"], run.device)
        for run_hash, run in zip(sweep.hashes, sweep.runs, strict=True)
    ]
    return sorted(jobs, key=lambda job: -job.cost)


class _Driver:
    """Which runs wait, run, run elsewhere, are finished and have failed."""

    def __init__(self, store: RunStore, jobs: list[Job]) -> None:
        self.store = store
        self.jobs = {job.run: job for job in jobs}
        self.queue: deque[Job] = deque()
        self.active: dict[str, Job] = {}
        self.foreign: dict[str, Job] = {}  # claimed by a process of another sweep
        self.finished: list[str] = []
        self.failed: dict[str, str] = {}
        self.deaths: Counter[str] = Counter()

    def begin(self, view: View) -> None:
        for job in self.jobs.values():
            if (job.folder / DONE).exists():
                self.finished.append(job.run)
            else:
                self.queue.append(job)
        view.opened([self.jobs[run] for run in self.finished])

    def drive(self, pool: Launcher, view: View, stop: threading.Event, deadline: float | None) -> None:
        looked = time.monotonic()
        while (self.queue or self.active or self.foreign) and not stop.is_set():
            spent = deadline is not None and time.monotonic() >= deadline
            if spent and not self.active:
                return
            while self.queue and not spent and len(self.active) < pool.slots:
                job = self.queue.popleft()
                self.active[job.run] = job
                pool.submit(job)
                view.started(job)
            for ending in pool.poll(POLL_SECONDS):
                self._ended(ending, view)
            if self.foreign and time.monotonic() - looked >= FOREIGN_SECONDS:
                looked = time.monotonic()
                self._look_at_foreign(view)
            view.refresh(list(self.active.values()))

    def _ended(self, ending: Ending, view: View) -> None:
        job = self.active.pop(ending.run)
        if ending.result is Result.BUSY:
            self.foreign[job.run] = job
        elif ending.result is Result.DIED and self.deaths[job.run] < RETRIES:
            self.deaths[job.run] += 1
            self.queue.appendleft(job)
        elif ending.result is Result.DIED:
            ending = Ending(job.run, Result.FAILED, f"{ending.reason}, {RETRIES + 1} times")
            _record_failure(job, ending.reason)
        self._settle(job, ending, view)

    def _settle(self, job: Job, ending: Ending, view: View) -> None:
        if ending.result is Result.FINISHED:
            self.finished.append(job.run)
        elif ending.result is Result.FAILED:
            self.failed[job.run] = ending.reason
        view.ended(job, ending)
        if ending.result is Result.FAILED:
            self.store.check_writable()  # a full disk would fail every other run too: stop with one line instead

    def _look_at_foreign(self, view: View) -> None:
        for job in list(self.foreign.values()):
            state = self.store.state(job.run)
            if state is RunState.RUNNING:
                continue
            del self.foreign[job.run]
            if state is RunState.FINISHED:
                self._settle(job, Ending(job.run, Result.FINISHED), view)
            elif state is RunState.FAILED:
                self._settle(job, Ending(job.run, Result.FAILED, self.store.error(job.run)), view)
            else:
                self.queue.append(job)

    def outcome(self, seconds: float) -> SweepOutcome:
        failed = tuple(FailedRun(run, self.jobs[run].name, reason) for run, reason in self.failed.items())
        settled = {*self.finished, *self.failed}
        return SweepOutcome(tuple(self.finished), failed, tuple(run for run in self.jobs if run not in settled), seconds)


def _record_failure(job: Job, reason: str) -> None:
    """Write the dead worker's ``error.txt`` for it, unless someone else has taken the run up by now."""
    claim = acquire(job.folder)
    if claim is not None:
        with claim:
            if not (job.folder / DONE).exists():
                write_text(job.folder / ERROR, reason + "\n")


@contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """Set the event on SIGINT and SIGTERM instead of dying. Outside the main thread signals stay as they are."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
