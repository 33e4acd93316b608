"""The SLURM launcher: runs as job arrays through submitit (extra ``slurm``).

Runs that are submitted together become one array. A run that is preempted or reaches its time limit is put back in the queue by submitit
and resumes from its checkpoint. ``cluster=local`` runs the same jobs as processes of this machine, without SLURM.
"""

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from moe_lab.config import Config, require
from moe_lab.errors import RunError, expected
from moe_lab.sweeps.launchers import Ending, Job, Result
from moe_lab.sweeps.local import available_cores
from moe_lab.sweeps.remote import Errand, extra, last_line, read_options

LOGS = "slurm"
"""Folder of the sweep in which submitit keeps scripts and logs."""
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class SlurmOptions(Config):
    """
    Attributes:
        cluster: "slurm", or "local" for processes of this machine.
        minutes: time limit of one run; it resumes after it.
        cpus, gpus, memory_gb: of one run; gpus on CUDA only, memory_gb 0 leaves the cluster's default.
        partition, account, qos: as sbatch takes them; empty leaves the cluster's default.
        requeues: how often a run may come back after preemption or its time limit.
    """

    cluster: str = "slurm"
    minutes: int = 240
    cpus: int = 1
    gpus: int = 1
    memory_gb: float = 0.0
    partition: str = ""
    account: str = ""
    qos: str = ""
    requeues: int = 20

    def __post_init__(self) -> None:
        require(self.cluster in ("slurm", "local"), "cluster=slurm or cluster=local", self.cluster)
        for name in ("minutes", "cpus", "gpus"):
            require(getattr(self, name) >= 1, f"{name} of at least 1", getattr(self, name))
        require(self.memory_gb >= 0, "memory_gb of at least 0", self.memory_gb)
        require(self.requeues >= 0, "requeues of at least 0", self.requeues)


class Requeued(Errand):
    """An errand that submitit puts back in the queue when SLURM takes its node away."""

    def checkpoint(self) -> Any:
        return extra("submitit.helpers", "slurm").DelayedSubmission(self)


class SlurmLauncher:
    """See ``launchers.Launcher``. ``workers`` limits how many runs of an array run at once."""

    def __init__(self, jobs: Sequence[Job], workers: int | None, trainer: str, options: Mapping[str, str]) -> None:
        if workers is not None and workers < 1:
            raise RunError(expected("at least 1 worker", workers))
        self._options = read_options(SlurmOptions, options)
        # Without SLURM nothing else limits how many processes start.
        self.slots = len(jobs) if self._options.cluster == "slurm" else min(workers or available_cores(), len(jobs))
        self._trainer = trainer
        self._executor = _executor(self._options, jobs, workers)
        self._waiting: list[Job] = []
        self._active: dict[str, Any] = {}

    def submit(self, job: Job) -> None:
        self._waiting.append(job)

    def poll(self, timeout: float) -> list[Ending]:
        self._flush()
        deadline = time.monotonic() + timeout
        while True:
            ended = [run for run, job in self._active.items() if job.done()]
            if ended or not self._active or time.monotonic() >= deadline:
                return [self._ending(run, self._active.pop(run)) for run in ended]
            time.sleep(POLL_SECONDS)

    def _flush(self) -> None:
        """What was submitted since the last look, as one array."""
        if not self._waiting:
            return
        errands = [Requeued.of(job, self._trainer) for job in self._waiting]
        try:
            with self._executor.batch():
                submitted = [self._executor.submit(errand) for errand in errands]
        except (RuntimeError, OSError) as error:
            raise RunError(expected("sbatch to accept the runs", last_line(error), "the launcher options partition=, account=")) from error
        self._active |= {job.run: one for job, one in zip(self._waiting, submitted, strict=True)}
        self._waiting.clear()

    def _ending(self, run: str, job: Any) -> Ending:
        errors = extra("submitit.core.utils", "slurm")
        try:
            return job.result()
        except errors.FailedJobError as error:
            return Ending(run, Result.FAILED, last_line(error))
        except errors.UncompletedJobError:  # killed from outside: no result was written
            return Ending(run, Result.DIED, f"its job {job.job_id} ended as {job.state}")

    def close(self) -> None:
        for job in self._active.values():
            with suppress(Exception):  # it may have ended by itself
                job.cancel()
        self._active.clear()


def _executor(options: SlurmOptions, jobs: Sequence[Job], workers: int | None) -> Any:
    submitit = extra("submitit", "slurm")
    folder = jobs[0].folder.absolute().parent / LOGS
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster=options.cluster, slurm_max_num_timeout=options.requeues)
    except RuntimeError as error:
        raise RunError(expected("SLURM on this machine (sbatch)", last_line(error), "the launcher option cluster=local")) from error
    parameters: dict[str, Any] = {"timeout_min": options.minutes, "cpus_per_task": options.cpus, "name": "moe_lab"}
    if options.memory_gb:
        parameters["mem_gb"] = options.memory_gb
    if any(job.device != "cpu" for job in jobs):
        parameters["gpus_per_node"] = options.gpus
    if options.cluster == "slurm":
        named = {name: getattr(options, name) for name in ("partition", "account", "qos")}
        parameters |= {f"slurm_{name}": value for name, value in named.items() if value and name != "account"}
        parameters["slurm_additional_parameters"] = {"account": options.account} if options.account else {}
        parameters["slurm_array_parallelism"] = workers or len(jobs)
    executor.update_parameters(**parameters)
    return executor
