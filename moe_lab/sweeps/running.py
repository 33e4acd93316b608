"""The driver of a sweep: long runs first, each run done once, also when workers die.

The same call on the same folder continues what an earlier one left: finished runs are kept,
interrupted ones resume from their checkpoints, failed ones stay failed unless ``retry_failed``
gives them another chance. Two sweeps on one folder share the work.
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
from moe_lab.free_memory import free_memory
from moe_lab.runs.failures import Failure, FailureKind
from moe_lab.runs.layout import RunState
from moe_lab.runs.record import Progress
from moe_lab.runs.store import Store, open_store
from moe_lab.sweeps.admission import Admission
from moe_lab.sweeps.config import SweepConfig
from moe_lab.sweeps.launchers import (
    TRAIN,
    Ending,
    Job,
    Launcher,
    Result,
    build_launcher,
)
from moe_lab.sweeps.memory import run_memory, too_large
from moe_lab.sweeps.planning import describe
from moe_lab.sweeps.progress import View, build_view
from moe_lab.sweeps.waiting import Waiting

RETRIES = 2
"""How often in a row a run is taken up again whose worker died before it had a newer checkpoint,
within one sweep.
"""
POLL_SECONDS = 0.2
FOREIGN_SECONDS = 1.0


@dataclass(frozen=True)
class FailedRun:
    run: str
    name: str
    reason: str


@dataclass(frozen=True)
class SweepOutcome:
    """The outcome of a sweep, by run hash.

    Attributes:
        finished: whole runs, those found finished included.
        failed: with the reason of each in one line.
        interrupted: neither, because the sweep was asked to stop; the same command continues them.
        seconds: wall time of this call.
        stopped: why it left runs to a later call, in one line; empty where it did not.
    """

    finished: tuple[str, ...]
    failed: tuple[FailedRun, ...]
    interrupted: tuple[str, ...]
    seconds: float
    stopped: str = ""

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
    max_flops: float | None = None,
    retry_failed: bool = False,
    trainer: str = TRAIN,
) -> SweepOutcome:
    """Do every run of ``sweep`` that is not finished in the folder or store ``out``, and say how
    each ended.

    Args:
        out: a folder that every worker sees, or an fsspec URL such as ``s3://bucket/sweep`` (extra
            ``store``): then each worker trains in a scratch folder of its own machine and copies
            the run's files there (`object_store`, `mirror`).
        workers: processes; None takes one per core, or per GPU where a run wants CUDA.
        progress: show it: live bars on a terminal, plain lines elsewhere.
        launcher: a name in ``launchers.LAUNCHERS``.
        launcher_options: of that launcher, as texts (``RayOptions``, ``SlurmOptions``).
        max_hours: after so long no further run starts, and a cluster gives back those in its queue;
            those that train go on to their end, and the same command continues the rest.
        max_flops: no run starts that would take this call past so many training FLOPs, as ``plan``
            counts them; a resumed run counts with what it has left. A shorter run that still fits
            goes before a longer one that does not.
        retry_failed: train runs again that failed in an earlier call. (One that failed because the
            disk was full is always continued.)
        trainer: ``module:function(config values, run folder)`` for workers to call instead of
            ``moe_lab.training.train``.

    The local launcher starts no run while those that run are expected to fill the memory
    (``memory.run_memory``), but always one. Ctrl-C and SIGTERM stop the workers and return an
    outcome with ``interrupted`` runs. A run that fails does not stop the others. Raises
    ``RunError`` where the folder cannot be written, also when its disk fills up on the way, or
    where no worker starts; ``CorpusError`` where the text is unfit.
    """
    require(
        max_hours is None or max_hours >= 0, "max_hours of at least 0", max_hours, field="max_hours"
    )
    began = time.monotonic()
    admission = Admission(None if max_hours is None else began + 3600 * max_hours, max_flops)
    store = open_store(out)
    store.check_writable()
    if trainer == TRAIN:
        _check_runnable(sweep, launcher)
    store.add(sweep)
    jobs = _jobs(sweep, store)
    driver = _Driver(store, jobs, admission)
    with closing(build_view(progress, store, jobs)) as view, _stop_signals() as stop:
        driver.begin(view, retry_failed)
        if driver.queue:
            if launcher == "local":  # a cluster's scheduler places runs on its nodes itself
                driver.share_memory(view)
            with (
                closing(
                    _pool(store, launcher, list(driver.queue), workers, trainer, launcher_options)
                ) as pool,
                closing(Waiting(store, jobs, view)) as waiting,
            ):
                driver.drive(pool, view, stop, waiting)
    return driver.outcome(time.monotonic() - began)


def _check_runnable(sweep: SweepConfig, launcher: str) -> None:
    """Refuse, before the first run, what would fail in every worker: unfit text, a device that is
    not here, a tracker that is not installed. Fills the token cache, so that no two workers learn
    one tokenizer.
    """
    from moe_lab.text import load_tokens
    from moe_lab.training import check_device, check_text
    from moe_lab.training.tracking import chosen

    if launcher == "local":  # a cluster's nodes have other devices than its driver
        for device in dict.fromkeys(run.device for run in sweep.runs):
            check_device(device)
    chosen(())
    runs = {(run.text, run.model.vocab_size, run.seq_length): run for run in sweep.runs}
    tokens = {text: load_tokens(text) for text in dict.fromkeys(run.text for run in sweep.runs)}
    for run in runs.values():
        check_text(run, tokens[run.text])


def _pool(
    store: Store,
    launcher: str,
    jobs: list[Job],
    workers: int | None,
    trainer: str,
    options: Mapping[str, str] | None,
) -> Launcher:
    """The launcher; where the store is no folder, with every run's files copied to it."""
    if store.is_folder:
        return build_launcher(launcher, jobs, workers, trainer, options)
    from moe_lab.sweeps.launchers import mirror

    require(
        not str(store.folder).startswith("memory:"),
        "a store that worker processes see",
        store.folder,
        "a folder or s3://...",
        field="store",
    )
    return mirror.MirrorLauncher(
        build_launcher(launcher, jobs, workers, mirror.TRAINER, options), store, trainer
    )


def _jobs(sweep: SweepConfig, store: Store) -> list[Job]:
    """The sweep's runs, the longest first: a long one that starts last would leave the other
    workers idle.
    """
    jobs = [
        Job(
            run_hash,
            run.name,
            store.path(run_hash),
            run.to_dict(),
            describe(run, run_hash)["flops"],
            run.device,
            run_memory(run),
            store.is_folder,
        )
        for run_hash, run in zip(sweep.hashes, sweep.runs, strict=True)
    ]
    return sorted(jobs, key=lambda job: -job.cost)


class _Driver:
    """Which runs wait, run, run elsewhere, are finished and have failed."""

    def __init__(self, store: Store, jobs: list[Job], admission: Admission) -> None:
        self.store, self.admission = store, admission
        self.jobs = {job.run: job for job in jobs}
        self.queue: deque[Job] = deque()
        self.active: dict[str, Job] = {}
        self.foreign: dict[str, Job] = {}  # claimed by a process of another sweep
        self.finished: list[str] = []
        self.failed: dict[str, str] = {}
        self.deaths: Counter[str] = Counter()  # since the last checkpoint
        self.kept: dict[str, float] = {}  # share of the training that the last death left

    def begin(self, view: View, retry_failed: bool) -> None:
        left: dict[str, float] = {}
        for run, state in self.store.states(self.jobs).items():
            failure = self.store.failure(run) if state is RunState.FAILED else Failure()
            if state is RunState.FINISHED:
                self.finished.append(run)
            elif failure.reason and not retry_failed and not failure.kind.is_continued:
                self.failed[run] = failure.reason
            else:
                if failure.kind is FailureKind.CHECKPOINT:
                    self.store.set_checkpoint_aside(run)
                self.queue.append(self.jobs[run])
                if state is not RunState.PENDING:
                    left[run] = 1 - _share_kept(self.jobs[run], self.store.progress(run))
        self.store.tidy(self.finished)
        self.admission.left = left
        view.opened(
            [self.jobs[run] for run in self.finished], [self.jobs[run] for run in self.failed]
        )

    def share_memory(self, view: View) -> None:
        """Let no more runs at once than fit into this machine, and say which do not fit at all."""
        device = "cuda" if any(job.device.startswith("cuda") for job in self.queue) else "cpu"
        self.admission.memory = free_memory(device)
        needs = {job.name: job.memory_bytes for job in self.queue}
        if self.admission.memory is not None and (line := too_large(needs, self.admission.memory)):
            view.say(line)

    def drive(self, pool: Launcher, view: View, stop: threading.Event, waiting: Waiting) -> None:
        looked, withdrawn = time.monotonic(), False
        while (self.queue or self.active or self.foreign) and not stop.is_set():
            while len(self.active) < pool.slots and (
                job := self.admission.next(self.queue, self.active.values())
            ):
                self.queue.remove(job)
                self.active[job.run] = job
                pool.submit(job)
                view.started(job)
            if (
                not self.active
                and (self.queue or self.admission.out_of_time)
                and self.admission.exhausted(self.queue)
            ):
                return
            if self.admission.out_of_time and not withdrawn:
                withdrawn = True
                pool.withdraw()
            for ending in pool.poll(POLL_SECONDS):
                self._ended(ending, view)
            if self.foreign and time.monotonic() - looked >= FOREIGN_SECONDS:
                looked = time.monotonic()
                self._look_at_foreign(view)
            waits = pool.waits()
            waiting.tell(waits)
            view.refresh([job for run, job in self.active.items() if run not in waits])

    def _ended(self, ending: Ending, view: View) -> None:
        job = self.active.pop(ending.run)
        if ending.result is Result.BUSY:
            self.foreign[job.run] = job
            self.admission.give_back(job)
        elif ending.result is Result.WITHDRAWN:
            self.queue.append(job)
        elif ending.result is Result.DIED and self._deaths_in_place(job) <= RETRIES:
            self.queue.appendleft(job)
        elif ending.result is Result.DIED:
            reason = f"{ending.reason}, {RETRIES + 1} times"
            if ending.kind.is_continued:
                reason += "; the same command tries again"
            ending = Ending(job.run, Result.FAILED, reason, ending.kind)
            self.store.record_failure(job.run, Failure(reason, ending.kind))
        self._settle(job, ending, view)

    def _deaths_in_place(self, job: Job) -> int:
        """Deaths of a run since its last checkpoint, with this one: on nodes that are taken away
        again and again it still gets on.
        """
        kept = _share_kept(job, self.store.progress(job.run))
        if kept > self.kept.get(job.run, 0.0):
            self.kept[job.run], self.deaths[job.run] = kept, 0
        self.deaths[job.run] += 1
        return self.deaths[job.run]

    def _settle(self, job: Job, ending: Ending, view: View) -> None:
        if ending.result is Result.FINISHED:
            self.finished.append(job.run)
        elif ending.result is Result.FAILED:
            self.failed[job.run] = ending.reason
        view.ended(job, ending)
        if ending.result is Result.FAILED:
            self.store.check_writable()  # a full disk would fail every other run too: stop instead

    def _look_at_foreign(self, view: View) -> None:
        for job in list(self.foreign.values()):
            state = self.store.state(job.run)
            if state is RunState.RUNNING:
                continue
            del self.foreign[job.run]
            if state is RunState.FINISHED:
                self._settle(job, Ending(job.run, Result.FINISHED), view)
            elif state is RunState.FAILED:
                self._settle(
                    job, Ending(job.run, Result.FAILED, self.store.failure(job.run).reason), view
                )
            else:
                self.queue.append(job)

    def outcome(self, seconds: float) -> SweepOutcome:
        failed = tuple(
            FailedRun(run, self.jobs[run].name, reason) for run, reason in self.failed.items()
        )
        settled = {*self.finished, *self.failed}
        interrupted = tuple(run for run in self.jobs if run not in settled)
        return SweepOutcome(tuple(self.finished), failed, interrupted, seconds, self._why_stopped())

    def _why_stopped(self) -> str:
        """The budget that keeps runs waiting, if one does."""
        waiting = [job for job in self.queue if job.run not in self.active]
        if not waiting or not self.admission.exhausted(waiting):
            return ""
        if self.admission.out_of_time:
            why = "the hours of max_hours are over; the same command goes on"
        else:
            least = min(map(self.admission.cost, waiting))
            left = f"{self.admission.flops:.3g} FLOPs of max_flops are left"
            why = f"{left}, the smallest of them needs {least:.3g}"
        return f"{len(waiting)} runs wait: {why}"


def _share_kept(job: Job, progress: Progress) -> float:
    """Of a run's training, what its last checkpoint keeps; its status may be some steps ahead."""
    every = job.config.get("checkpoint_every", 1)
    return progress.step // every * every / progress.steps if progress.steps else 0.0


@contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """Set the event on SIGINT and SIGTERM instead of dying.

    Outside the main thread signals stay as they are.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {
        number: signal.signal(number, lambda *_: stop.set())
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
