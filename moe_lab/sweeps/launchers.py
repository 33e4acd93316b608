"""What a launcher is, and the table of them: submit a run's configuration, learn how it ended.

A launcher owns processes, a cluster's jobs, or whatever else runs ``worker.execute`` somewhere; it
knows nothing of plans, order or retries (``running.py`` does). Everything that must outlive it lies
in the run store, so one launcher continues what another began.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

from moe_lab.errors import RunError, expected


@dataclass(frozen=True)
class Job:
    """One run to be done: its hash, a readable name, its folder, its configuration as plain values,
    its cost (FLOPs), its device, the memory that it is expected to need there (bytes; 0: unknown),
    and whether workers on other machines must see the folder's parent.
    """

    run: str
    name: str
    folder: Path
    config: dict[str, Any] = field(repr=False)
    cost: float = 1.0
    device: str = "cpu"
    memory_bytes: int = 0
    shared: bool = True


class Result(StrEnum):
    FINISHED = "finished"
    FAILED = "failed"
    BUSY = "busy"  # another living process is training this run
    DIED = "died"  # the process was killed or crashed; the run can be resumed
    WITHDRAWN = "withdrawn"  # taken back before it began


@dataclass(frozen=True)
class Ending:
    """How a submitted run ended, with one line of reason unless it finished."""

    run: str
    result: Result
    reason: str = ""


class Launcher(Protocol):
    """Runs jobs somewhere. Not thread-safe: one driver calls it."""

    @property
    def slots(self) -> int:
        """How many runs may be submitted and not yet ended."""
        ...

    def submit(self, job: Job) -> None:
        """Start a run and return at once."""
        ...

    def poll(self, timeout: float) -> list[Ending]:
        """The endings since the last call; waits at most ``timeout`` seconds for the first."""
        ...

    def withdraw(self) -> None:
        """Take back every run that was submitted and has not begun: each ends as ``WITHDRAWN`` at a
        later poll. One that has begun goes on.

        Called at most once, and nothing is submitted after it.
        """
        ...

    def close(self) -> None:
        """Stop whatever still runs and leave no process behind."""
        ...


MEMORY_HINT = "try fewer workers or a smaller batch"

TRAIN = "moe_lab.sweeps.launchers:train_run"
"""The default trainer, as the importable ``module:function(config values, run folder)`` that a
worker calls.
"""


def train_run(values: dict[str, Any], folder: Path) -> None:
    """Train, or resume, the run that ``values`` describe, on one thread: the same numbers however
    many workers there are.
    """
    import torch

    from moe_lab.training import RunConfig, keep_freed_memory, train

    torch.set_num_threads(1)
    keep_freed_memory()
    train(RunConfig.from_dict(values), folder)


def _local(
    jobs: Sequence[Job], workers: int | None, trainer: str, options: Mapping[str, str]
) -> Launcher:
    from moe_lab.sweeps.local import LocalLauncher

    return LocalLauncher(jobs, workers, trainer, options)


def _ray(
    jobs: Sequence[Job], workers: int | None, trainer: str, options: Mapping[str, str]
) -> Launcher:
    from moe_lab.sweeps.ray_cluster import RayLauncher

    return RayLauncher(jobs, workers, trainer, options)


def _slurm(
    jobs: Sequence[Job], workers: int | None, trainer: str, options: Mapping[str, str]
) -> Launcher:
    from moe_lab.sweeps.slurm import SlurmLauncher

    return SlurmLauncher(jobs, workers, trainer, options)


Builder = Callable[[Sequence[Job], int | None, str, Mapping[str, str]], Launcher]

LAUNCHERS: dict[str, Builder] = {"local": _local, "ray": _ray, "slurm": _slurm}
"""Name -> ``(jobs to come, workers or None for as many as fit, trainer, options as texts) ->
Launcher``.
"""


def build_launcher(
    name: str,
    jobs: Sequence[Job],
    workers: int | None,
    trainer: str,
    options: Mapping[str, str] | None = None,
) -> Launcher:
    if name not in LAUNCHERS:
        raise RunError(expected(f"a launcher ({', '.join(LAUNCHERS)})", repr(name)))
    return LAUNCHERS[name](jobs, workers, trainer, options or {})
