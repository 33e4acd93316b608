"""The Ray launcher: each run is one Ray task, on an existing cluster or on one that is started here
(extra ``ray``).

Ray places, packs and autoscales; a run asks for ``cpus`` and, on CUDA, for ``gpus``, which may be a
fraction. A node that dies takes only its current runs with it: they are submitted again and resume
from their checkpoints. Retries are the sweep's, so Ray's are off. Ray ends its driver's process a
while after the head is gone, so the head is watched here, and the sweep ends before that with a
line of its own.
"""

import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Any

from moe_lab.config import Config, above, at_least
from moe_lab.errors import RunError, expected
from moe_lab.runs.waits import Wait
from moe_lab.sweeps.launchers import worker
from moe_lab.sweeps.launchers.local import ONE_THREAD
from moe_lab.sweeps.launchers.options import extra, last_line, read_options
from moe_lab.sweeps.launchers.protocol import MEMORY_HINT, Ending, Job, Result
from moe_lab.sweeps.launchers.remote_run import RemoteRun, UnfitMachine, settle

CONNECT_SECONDS = 5.0
PROBE_SECONDS = 120.0
"""For a first connection, which imports ray and starts no worker."""
STARTS = 3
"""Of a cluster here, at most: Ray gives a node 30 seconds to come up, however busy the machine."""
WATCH_SECONDS = 2.0
LOST_SECONDS = 20.0
"""Without its head for so long, a cluster is lost; Ray itself ends the process after 60."""
STORE_BYTES = 100 * 2**20
"""Object store of a cluster started here: what passes through it is a configuration and a line of
text.
"""

KEEPALIVE = {
    "RAY_grpc_client_keepalive_time_ms": "65000",
    "RAY_grpc_client_keepalive_timeout_ms": "20000",
}
"""A machine that vanishes ends no connection: after so long without an answer its runs are lost.
Ray itself waits 420 s, and its servers refuse to be asked more often than once a minute.
"""


@dataclass(frozen=True)
class RayOptions(Config):
    """
    Attributes:
        address: of a running cluster, such as "auto", "head:6379" or "ray://head:10001"; empty
            takes ``RAY_ADDRESS``, else starts a cluster here.
        cpus: CPUs of one run.
        gpus: GPUs of one run on CUDA; 0.25 lets four share one.
        memory_gb: memory of one run that Ray reserves; 0 reserves none.
    """

    address: str = ""
    cpus: Annotated[float, above(0)] = 1.0
    gpus: Annotated[float, above(0)] = 1.0
    memory_gb: Annotated[float, at_least(0)] = 0.0


class RayLauncher:
    """Runs each job as a Ray task; the methods are those of ``protocol.Launcher``.

    All runs are submitted at once, or ``workers`` at a time: what waits tells Ray how far to scale.
    """

    def __init__(
        self, jobs: Sequence[Job], workers: int | None, trainer: str, options: Mapping[str, str]
    ) -> None:
        if workers is not None and workers < 1:
            raise RunError(expected("at least 1 worker", workers))
        self._options = read_options(RayOptions, options)
        self.slots = min(workers or len(jobs), len(jobs))
        self._trainer = trainer
        self._runs: dict[Any, Job] = {}
        self._ray, self._head, task = connected(self._options)
        self._task = task(_do)
        self._check_room(jobs, can_grow=bool(_address(self._options)))

    def _resources(self, device: str) -> dict[str, float]:
        """What Ray is to reserve for a run, by Ray's names."""
        wanted = {"CPU": self._options.cpus, "memory": int(self._options.memory_gb * 2**30)}
        return {name: value for name, value in wanted.items() if value} | (
            {} if device == "cpu" else {"GPU": self._options.gpus}
        )

    def _check_room(self, jobs: Sequence[Job], can_grow: bool) -> None:
        """Runs that fit on no node wait until the cluster grows one; say so, for some clusters
        never do.
        """
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        for device in sorted({job.device for job in jobs}):
            wanted = self._resources(device)
            if not any(
                all(node.get(name, 0) >= value for name, value in wanted.items()) for node in nodes
            ):
                need = ", ".join(f"{name} {value:g}" for name, value in wanted.items())
                have = "; ".join(
                    ", ".join(f"{name} {node.get(name, 0):g}" for name in wanted) for node in nodes
                )
                message = expected(
                    f"a Ray node with {need} for a run on {device}",
                    have,
                    "the launcher options cpus=, gpus=, memory_gb=",
                )
                if not can_grow:
                    raise RunError(message)
                warnings.warn(f"{message}, or wait until the cluster grows", stacklevel=2)

    def submit(self, job: Job) -> None:
        names = {"CPU": "num_cpus", "GPU": "num_gpus", "memory": "memory"}
        resources = {names[name]: value for name, value in self._resources(job.device).items()}
        self._runs[
            self._task.options(name=job.name, **resources).remote(RemoteRun.of(job, self._trainer))
        ] = job

    def poll(self, timeout: float) -> list[Ending]:
        if not self._runs:
            return []
        self._head.check()
        try:
            ready, _ = self._ray.wait(list(self._runs), num_returns=1, timeout=timeout)
            if ready:
                ready, _ = self._ray.wait(list(self._runs), num_returns=len(self._runs), timeout=0)
            return [self._ending(reference) for reference in ready]
        except (ConnectionError, self._ray.exceptions.RaySystemError) as error:
            raise RunError(lost(last_line(error))) from error

    def _ending(self, reference: Any) -> Ending:
        job, errors = self._runs.pop(reference), self._ray.exceptions
        try:
            return settle(self._ray.get(reference))
        except errors.TaskCancelledError:
            return Ending(job.run, Result.WITHDRAWN)
        except errors.OutOfMemoryError:
            return Ending(
                job.run,
                Result.DIED,
                f"the node ran out of memory ({MEMORY_HINT}, or the launcher option memory_gb=)",
            )
        except errors.WorkerCrashedError:
            return Ending(
                job.run,
                Result.DIED,
                f"its Ray worker was killed or crashed (out of memory? {MEMORY_HINT})",
            )
        except errors.RayTaskError as error:
            return Ending(job.run, Result.FAILED, last_line(error))
        except errors.RayError as error:
            return Ending(job.run, Result.DIED, f"its Ray worker died ({type(error).__name__})")

    def waits(self) -> dict[str, Wait]:
        return {}

    def withdraw(self) -> None:
        for reference in self._runs:
            self._ray.cancel(
                reference, force=False
            )  # which interrupts a task that has begun, and ``_do`` takes no interrupt

    def close(self) -> None:
        # Without a head there is nothing to stop, and each of these calls would wait for a minute.
        if self._head.answers():
            for reference in self._runs:
                with suppress(Exception):  # it may have ended by itself
                    self._ray.cancel(reference, force=True)
            self._ray.shutdown()
        self._runs.clear()


def _do(remote_run: RemoteRun) -> Ending | UnfitMachine:
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # for good: an interrupt between the run's end and the task's would lose its ending
    signal.signal(signal.SIGTERM, _leave)
    return remote_run()


def _leave(*_: object) -> None:
    """Ray ends a worker like this when its driver is gone or its node is drained: the run did
    nothing wrong and is to be resumed.
    """
    worker.preempted.set()
    sys.exit(1)


def lost(cause: str) -> str:
    """The message for a cluster that is gone."""
    return f"lost the Ray cluster ({cause}); run the same command again to continue"


class Head:
    """Whether the cluster's head still takes connections."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._looked = self._seen = time.monotonic()

    def answers(self) -> bool:
        return _refusal(self._address, WATCH_SECONDS) is None

    def check(self) -> None:
        """Raises ``RunError`` once the head has been silent for too long."""
        now = time.monotonic()
        if now - self._looked < WATCH_SECONDS:
            return
        self._looked = now
        if self.answers():
            self._seen = now
        elif now - self._seen >= LOST_SECONDS:
            raise RunError(
                lost(f"no answer from its head at {self._address} for {now - self._seen:.0f} s")
            )


def connected(options: RayOptions) -> tuple[Any, Head, Callable[[Callable[..., Any]], Any]]:
    """Ray on a cluster that runs or is started here, its head, and what makes a function a task
    that has one thread and this process's settings, and that Ray does not repeat.
    """
    address = _address(options)
    ray = _connect(address)
    head = Head(address if "://" in address else ray.get_runtime_context().gcs_address)
    variables = {name: os.environ[name] for name in os.environ if name.startswith("MOE_LAB_")}
    environment = {"env_vars": ONE_THREAD | variables}
    return ray, head, ray.remote(max_retries=0, runtime_env=environment)


def _address(options: RayOptions) -> str:
    return options.address or os.environ.get("RAY_ADDRESS", "")


def _connect(address: str) -> Any:
    for name, value in KEEPALIVE.items():  # read when ray is imported
        os.environ.setdefault(name, value)
    ray = extra("ray", "ray")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a cluster started here tells nobody
    new = {} if address else {"include_dashboard": False, "object_store_memory": STORE_BYTES}
    if address:
        _check_reachable(address)
    for left in range(0 if address else STARTS - 1, -1, -1):
        try:
            ray.init(
                address=address or "local",
                log_to_driver=False,
                ignore_reinit_error=True,
                logging_level="ERROR",
                **new,
            )
            break
        except Exception as error:  # also of a node that does not come up: Exception itself
            if not left:
                place = address or "this machine"
                raise RunError(_no_cluster(place, last_line(error))) from error
    return ray


def _no_cluster(place: str, got: str) -> str:
    return expected(
        f"a Ray cluster at {place}",
        got,
        "one shared environment" if "mismatch" in got else "ray status",
    )


def _check_reachable(address: str) -> None:
    """Connect from a process of its own first: where no cluster answers, Ray tries for minutes and
    then ends the process.
    """
    cause = _refusal(address, CONNECT_SECONDS)
    if cause is not None:
        raise RunError(_no_cluster(address, cause))
    command = [sys.executable, "-c", _PROBE, address]
    try:
        probe = subprocess.run(
            command, capture_output=True, text=True, timeout=PROBE_SECONDS, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        raise RunError(_no_cluster(address, f"no answer within {PROBE_SECONDS:.0f} s")) from None
    if probe.returncode:
        raise RunError(_no_cluster(address, last_line(probe.stdout or probe.stderr)))


_PROBE = """
import sys, ray
try:
    ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
except Exception as error:
    print(*str(error).split())
    sys.exit(1)
"""


def _refusal(address: str, seconds: float) -> str | None:
    """Why nobody can connect to ``host:port``; None where one can, or where the address names no
    port.
    """
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not host or not port.isdigit():
        return None
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=seconds).close()
    except OSError as error:
        return last_line(error)
    return None
