"""The SLURM launcher: runs as job arrays through submitit (extra ``slurm``).

Runs that are submitted together become one array. A run that is preempted or reaches its time limit
is put back in the queue by submitit and resumes from its checkpoint; one whose job is killed or
cancelled is submitted again. ``cluster=local`` runs the same jobs as processes of this machine,
without SLURM. How jobs are doing is asked of ``squeue``: submitit asks ``sacct``, which knows
nothing where no accounting database runs, and a job that was killed there would never end.
"""

import os
import subprocess
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from moe_lab.config import Config, at_least, require
from moe_lab.errors import RunError, expected
from moe_lab.runs.failures import FailureKind
from moe_lab.runs.waits import Wait
from moe_lab.sweeps.launchers import worker
from moe_lab.sweeps.launchers.local import ONE_THREAD, available_cores
from moe_lab.sweeps.launchers.options import extra, import_path, last_line, read_options
from moe_lab.sweeps.launchers.protocol import MEMORY_HINT, Ending, Job, Result
from moe_lab.sweeps.launchers.remote_run import RemoteRun, settle

LOGS = "slurm"
"""Folder in which submitit keeps scripts, logs and results: of the sweep, or of the driver's own
folder where the sweep is in no shared one. Each array has its own folder in it: SLURM may give the
number of an old job to a new one, and so may this machine.
"""
ARRAY_RUNS = 1000
"""Runs of one array: SLURM's default MaxArraySize allows indices up to 1000."""
LOOK_SECONDS = {"local": 0.2, "slurm": 3.0}
"""Between two looks at the jobs, by cluster."""
RESULT_SECONDS = 10.0
"""For how long a job's result may be under way on a shared file system after SLURM called the job
ended.
"""
CANCEL_SECONDS = 60.0
"""For the end of cancelled processes of this machine."""
SIGNAL_SECONDS = 90
"""A run hears of its time limit so long before, or halfway for short limits."""
QUEUED = "PENDING"
ALIVE = (
    QUEUED, "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING",
    "STAGE_OUT", "RESIZING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT",
    "RESV_DEL_HOLD",
)  # fmt: skip
"""What ``squeue`` calls a job that is not over."""
TURNS = (
    "", "None", "(null)", "Priority", "Resources", "JobArrayTaskLimit", "BeginTime", "Dependency",
    "Licenses", "Cleaning", "Prolog",
)  # fmt: skip
"""Reasons of SLURM for a job that waits for its turn."""
HELD = "requeued held"
"""How SLURM's reasons end for a job that it could not launch and does not try again."""
WAIT_SECONDS = 30.0
"""Reasons come and go while the scheduler looks at jobs, and its controller may start again: what
stays for so long is shown.
"""
SILENT = "SLURM's controller does not answer; try scontrol ping"
HINTS = {
    "PartitionTimeLimit": "the launcher option minutes=",
    "PartitionConfig": "the launcher options partition=, cpus=, gpus=, memory_gb=",
}
"""What is advised for reasons that only another command ends."""
TAKEN = ("CANCELLED", "TIMEOUT", "PREEMPTED", "NODE_FAIL", "BOOT_FAIL", "DEADLINE", "REVOKED")
"""Endings that SLURM or its users gave a job; the run itself did nothing wrong."""


@dataclass(frozen=True)
class SlurmOptions(Config):
    """
    Attributes:
        cluster: "slurm", or "local" for processes of this machine.
        minutes: time limit of one run; it resumes after it.
        cpus, gpus, memory_gb: of one run; gpus on CUDA only, memory_gb 0 leaves the cluster's
            default.
        partition, account, qos: as sbatch takes them; empty leaves the cluster's default.
        requeues: how often a run may come back after its time limit.
    """

    cluster: str = "slurm"
    minutes: Annotated[int, at_least(1)] = 240
    cpus: Annotated[int, at_least(1)] = 1
    gpus: Annotated[int, at_least(1)] = 1
    memory_gb: Annotated[float, at_least(0)] = 0.0
    partition: str = ""
    account: str = ""
    qos: str = ""
    requeues: Annotated[int, at_least(0)] = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        known = self.cluster in LOOK_SECONDS
        require(known, "cluster=slurm or cluster=local", self.cluster, field="cluster")


class Requeued(RemoteRun):
    """A run that submitit puts back in the queue when SLURM takes its node away."""

    def checkpoint(self) -> Any:
        """Prepare to be requeued. submitit calls this in the signal's handler and then ends the
        process by ``SystemExit``.
        """
        worker.preempted.set()
        return extra("submitit.helpers", "slurm").DelayedSubmission(self)


class SlurmLauncher:
    """Runs jobs as job arrays; the methods are those of ``protocol.Launcher``. ``workers`` limits
    how many runs of an array run at once.
    """

    def __init__(
        self, jobs: Sequence[Job], workers: int | None, trainer: str, options: Mapping[str, str]
    ) -> None:
        if workers is not None and workers < 1:
            raise RunError(expected("at least 1 worker", workers))
        self._options = read_options(SlurmOptions, options)
        self._is_local = self._options.cluster == "local"
        if self._is_local:  # nothing else limits how many processes start
            self.slots = min(workers or available_cores(), len(jobs))
        else:  # one array keeps to the limit, several would not
            self.slots = min(ARRAY_RUNS, len(jobs)) if workers else len(jobs)
        self._trainer = trainer
        self._logs = (jobs[0].folder.absolute().parent if jobs[0].shared else Path.cwd()) / LOGS
        self._executor = _executor(self._options, self._logs, jobs, workers)
        self._waiting: list[Job] = []
        self._active: dict[str, Any] = {}
        self._withdrawing = False
        self._withdrawn: set[str] = set()  # cancelled by us, in the queue
        self._over_since: dict[str, float] = {}
        self._reasons: dict[str, tuple[str, float]] = {}  # of queued runs, and since when
        self._waits: dict[str, Wait] = {}
        self._answered = time.monotonic()
        self._looked = float("-inf")

    def submit(self, job: Job) -> None:
        self._waiting.append(job)

    def withdraw(self) -> None:
        """Take back runs that have not begun. Runs that come back to the queue later are cancelled
        when they are seen there.
        """
        self._withdrawing = True

    def waits(self) -> dict[str, Wait]:
        return self._waits

    def poll(self, timeout: float) -> list[Ending]:
        if self._withdrawing and self._waiting:
            unsent, self._waiting = self._waiting, []
            return [Ending(job.run, Result.WITHDRAWN) for job in unsent]
        self._flush()
        deadline = time.monotonic() + timeout
        while self._active:
            now, due = time.monotonic(), self._looked + LOOK_SECONDS[self._options.cluster]
            if now >= due:
                self._looked = now
                endings = self._look()
                if endings:
                    return endings
            elif min(due, deadline) > now:
                time.sleep(min(due, deadline) - now)
            if time.monotonic() >= deadline:
                break
        return []

    def _flush(self) -> None:
        """What was submitted since the last look, as arrays."""
        while self._waiting:
            some = self._waiting[:ARRAY_RUNS]
            remote_runs = [Requeued.of(job, self._trainer) for job in some]
            self._executor.folder = self._logs / uuid.uuid4().hex[:12]
            try:
                with (
                    _environment(ONE_THREAD | {"PYTHONPATH": import_path()}),
                    self._executor.batch(),
                ):
                    submitted = [self._executor.submit(one) for one in remote_runs]
            except (RuntimeError, OSError, subprocess.SubprocessError) as error:
                hint = "the launcher options partition=, account=, qos=, minutes="
                raise RunError(
                    expected("sbatch to accept the runs", last_line(error), hint)
                ) from error
            self._active |= {job.run: one for job, one in zip(some, submitted, strict=True)}
            del self._waiting[: len(some)]

    def _look(self) -> list[Ending]:
        queue = (
            {run: (job.state, "") for run, job in self._active.items()}
            if self._is_local
            else self._queue()
        )
        states = {run: state for run, (state, _) in queue.items()}
        if queue:
            self._answered = time.monotonic()
            self._note_reasons(queue)
        elif time.monotonic() - self._answered >= WAIT_SECONDS:
            self._waits = {run: Wait(job.job_id, SILENT) for run, job in self._active.items()}
        if self._withdrawing:
            self._withdrawn -= {
                run for run, state in states.items() if state in ALIVE and state != QUEUED
            }
            self._cancel_queued([run for run, state in states.items() if state == QUEUED])
        endings = [
            ending
            for run, state in states.items()
            if state not in ALIVE and (ending := self._ending(run, state))
        ]
        if not self._withdrawing:
            endings += self._cancel_held(queue)
        for ending in endings:
            del self._active[ending.run]
            for known in (self._over_since, self._reasons, self._waits):
                known.pop(ending.run, None)
        return endings

    def _note_reasons(self, queue: Mapping[str, tuple[str, str]]) -> None:
        """What keeps queued runs waiting beyond their turn."""
        now, before = time.monotonic(), self._reasons
        self._reasons = {
            run: before[run] if run in before and before[run][0] == reason else (reason, now)
            for run, (state, reason) in queue.items()
            if state == QUEUED and reason not in TURNS
        }
        self._waits = {}
        for run, (reason, since) in self._reasons.items():
            if now - since >= WAIT_SECONDS:
                usual = f"scontrol {'release' if 'Held' in reason else 'show job'}"
                hint = HINTS.get(reason, usual)
                told = f"SLURM says {reason}; try {hint}"
                self._waits[run] = Wait(self._active[run].job_id, told)

    def _cancel_held(self, queue: Mapping[str, tuple[str, str]]) -> list[Ending]:
        """The endings of runs whose jobs SLURM could not launch, and holds."""
        held = {run: reason for run, (_, reason) in queue.items() if reason.endswith(HELD)}
        self._scancel(list(held))
        return [
            Ending(
                run,
                Result.DIED,
                f"its job {self._active[run].job_id} could not be launched (SLURM says {reason})",
                FailureKind.CLUSTER,
            )
            for run, reason in held.items()
        ]

    def _cancel_queued(self, runs: list[str]) -> None:
        """Only those still queued when ``scancel`` gets to them: one that has begun meanwhile goes
        on.
        """
        self._withdrawn.update(self._scancel(runs, f"--state={QUEUED}"))

    def _scancel(self, runs: list[str], *options: str) -> list[str]:
        """The runs whose jobs the controller was asked to end; fewer while it does not answer."""
        asked: list[str] = []
        for first in range(0, len(runs), ARRAY_RUNS):
            some = runs[first : first + ARRAY_RUNS]
            command = ["scancel", *options, *(self._active[run].job_id for run in some)]
            with suppress(OSError, subprocess.SubprocessError):
                subprocess.run(command, capture_output=True, timeout=60)
                asked += some
        return asked

    def _queue(self) -> dict[str, tuple[str, str]]:
        """State, and reason where it waits, by run; "GONE" for a job that SLURM has forgotten, none
        at all while the controller does not answer.
        """
        command = ["squeue", "--me", "--noheader", "--array", "--states=all", "--format=%i %T %r"]
        try:
            output = subprocess.run(
                command, capture_output=True, text=True, check=True, timeout=60
            ).stdout
        except (OSError, subprocess.SubprocessError):
            return {}
        known: dict[str, tuple[str, str]] = {}
        for line in output.splitlines():
            if len(words := line.split(maxsplit=2)) > 1:
                reason = words[2] if len(words) > 2 else ""
                reason = reason.partition(", UnavailableNodes")[0]  # a list that changes
                known[words[0]] = words[1], reason.replace("_", " ").strip()
        return {run: known.get(job.job_id, ("GONE", "")) for run, job in self._active.items()}

    def _ending(self, run: str, state: str) -> Ending | None:
        """How a job ended that its cluster calls over; None while its result may still arrive."""
        job = self._active[run]
        if job.paths.result_pickle.exists():
            outcome, answer = extra("submitit.core.utils", "slurm").pickle_load(
                job.paths.result_pickle
            )
            return (
                settle(answer)
                if outcome == "success"
                else Ending(run, Result.FAILED, last_line(answer))
            )
        if run in self._withdrawn:
            return Ending(run, Result.WITHDRAWN)
        since = self._over_since.setdefault(run, time.monotonic())
        if not self._is_local and time.monotonic() - since < RESULT_SECONDS:
            return None
        return Ending(run, Result.DIED, _cause(job, state))

    def close(self) -> None:
        if self._is_local:
            for job in self._active.values():
                job.cancel()
            deadline = time.monotonic() + CANCEL_SECONDS
            while (
                any(job.state == "RUNNING" for job in self._active.values())
                and time.monotonic() < deadline
            ):
                time.sleep(0.05)
        else:
            self._scancel(list(self._active))
        self._active.clear()


def _cause(job: Any, state: str) -> str:
    if state in TAKEN:
        return f"its job {job.job_id} ended as {state}"
    if state == "OUT_OF_MEMORY":
        hint = f"{MEMORY_HINT}, or the launcher option memory_gb="
        return f"its job {job.job_id} ran out of memory ({hint})"
    said = last_line(job.stderr() or "")
    hint = f"out of memory? {MEMORY_HINT}"
    return f"its job {job.job_id} was killed or crashed ({hint}){said and ': '}{said}"


@contextmanager
def _environment(changes: Mapping[str, str]) -> Iterator[None]:
    """This process's environment with ``changes``: jobs inherit it as it is when they are
    submitted.
    """
    before = dict(os.environ)
    os.environ.update(changes)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _executor(options: SlurmOptions, folder: Path, jobs: Sequence[Job], workers: int | None) -> Any:
    submitit = extra("submitit", "slurm")
    gpus = {"gpus_per_node": options.gpus} if any(job.device != "cpu" for job in jobs) else {}
    signal_seconds = min(SIGNAL_SECONDS, 30 * options.minutes)
    if options.cluster == "local":
        executor = submitit.LocalExecutor(folder, max_num_timeout=options.requeues)
        executor.update_parameters(
            timeout_min=options.minutes, signal_delay_s=signal_seconds, **gpus
        )
        return executor
    try:
        executor = submitit.SlurmExecutor(folder, max_num_timeout=options.requeues)
    except RuntimeError as error:
        raise RunError(
            expected(
                "SLURM on this machine (sbatch)",
                last_line(error),
                "the launcher option cluster=local",
            ),
            field="cluster",
        ) from error
    named = {name: getattr(options, name) for name in ("partition", "account", "qos")}
    memory = {"mem": f"{round(options.memory_gb * 1024)}MB"} if options.memory_gb else {}
    executor.update_parameters(
        job_name="moe_lab",
        time=options.minutes,
        signal_delay_s=signal_seconds,
        cpus_per_task=options.cpus,
        array_parallelism=workers or ARRAY_RUNS,
        **gpus,
        **memory,
        **{name: value for name, value in named.items() if value},
    )
    return executor
