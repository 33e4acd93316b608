"""The Ray launcher: each run is one Ray task, on an existing cluster or on one that is started here (extra ``ray``).

Ray places, packs and autoscales; a run asks for ``cpus`` and, on CUDA, for ``gpus``, which may be a fraction. A node that dies takes only
its current runs with it: they are submitted again and resume from their checkpoints. Retries are the sweep's, so Ray's are off.
"""

import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from moe_lab.config import Config, require
from moe_lab.errors import RunError, expected
from moe_lab.sweeps.launchers import Ending, Job, Result
from moe_lab.sweeps.local import ONE_THREAD
from moe_lab.sweeps.remote import Errand, extra, last_line, read_options

CONNECT_SECONDS = 5.0


@dataclass(frozen=True)
class RayOptions(Config):
    """
    Attributes:
        address: of a running cluster, such as "auto" or "ray://head:10001"; empty takes ``RAY_ADDRESS``, else starts a cluster here.
        cpus: CPUs of one run.
        gpus: GPUs of one run on CUDA; 0.25 lets four share one.
        memory_gb: memory of one run that Ray reserves; 0 reserves none.
    """

    address: str = ""
    cpus: float = 1.0
    gpus: float = 1.0
    memory_gb: float = 0.0

    def __post_init__(self) -> None:
        require(self.cpus > 0, "cpus above 0", self.cpus)
        require(self.gpus > 0, "gpus above 0", self.gpus)
        require(self.memory_gb >= 0, "memory_gb of at least 0", self.memory_gb)


class RayLauncher:
    """See ``launchers.Launcher``. All runs are submitted at once, or ``workers`` at a time: what waits tells Ray how far to scale."""

    def __init__(self, jobs: Sequence[Job], workers: int | None, trainer: str, options: Mapping[str, str]) -> None:
        if workers is not None and workers < 1:
            raise RunError(expected("at least 1 worker", workers))
        self._options = read_options(RayOptions, options)
        self.slots = min(workers or len(jobs), len(jobs))
        self._trainer = trainer
        self._runs: dict[Any, Job] = {}
        self._ray = _connect(self._options.address)
        self._task = self._ray.remote(max_retries=0, runtime_env={"env_vars": dict(ONE_THREAD)})(_do)
        self._check_room(jobs)

    def _check_room(self, jobs: Sequence[Job]) -> None:
        """A CUDA run on a cluster without GPUs would wait for ever, unless the cluster can grow; say so at once."""
        have = self._ray.cluster_resources()
        if any(job.device != "cpu" for job in jobs) and not have.get("GPU"):
            raise RunError(expected("a Ray cluster with GPUs", f"one with {have.get('CPU', 0):g} CPUs and none", "--device cpu"))

    def submit(self, job: Job) -> None:
        resources: dict[str, Any] = {"num_cpus": self._options.cpus, "name": job.name}
        if job.device != "cpu":
            resources["num_gpus"] = self._options.gpus
        if self._options.memory_gb:
            resources["memory"] = int(self._options.memory_gb * 2**30)
        self._runs[self._task.options(**resources).remote(Errand.of(job, self._trainer))] = job

    def poll(self, timeout: float) -> list[Ending]:
        if not self._runs:
            return []
        try:
            ready, _ = self._ray.wait(list(self._runs), num_returns=1, timeout=timeout)
            if ready:
                ready, _ = self._ray.wait(list(self._runs), num_returns=len(self._runs), timeout=0)
            return [self._ending(reference) for reference in ready]
        except (ConnectionError, self._ray.exceptions.RaySystemError) as error:
            raise RunError(f"lost the Ray cluster ({last_line(error)}); run the same command again to continue") from error

    def _ending(self, reference: Any) -> Ending:
        job, errors = self._runs.pop(reference), self._ray.exceptions
        try:
            return self._ray.get(reference)
        except errors.OutOfMemoryError:
            return Ending(job.run, Result.DIED, "the node ran out of memory; try the launcher option memory_gb=")
        except (errors.WorkerCrashedError, errors.NodeDiedError, errors.ObjectLostError, errors.LocalRayletDiedError) as error:
            return Ending(job.run, Result.DIED, f"its Ray worker died ({type(error).__name__})")
        except errors.RayError as error:
            return Ending(job.run, Result.FAILED, last_line(error))

    def close(self) -> None:
        for reference in self._runs:
            with suppress(Exception):  # the cluster may be gone; there is nothing left to stop then
                self._ray.cancel(reference, force=True)
        self._runs.clear()
        self._ray.shutdown()


def _do(errand: Errand) -> Ending:
    return errand()


def _connect(address: str) -> Any:
    ray = extra("ray", "ray")
    _check_reachable(address)
    try:
        ray.init(address=address or None, log_to_driver=False, ignore_reinit_error=True, logging_level="ERROR")
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        raise RunError(expected(f"a Ray cluster at {address or 'this machine'}", last_line(error), "ray status")) from error
    return ray


def _check_reachable(address: str) -> None:
    """Ray itself tries for minutes, and then ends the process."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise RunError(expected(f"a Ray cluster at {address}", last_line(error), "ray status")) from error
