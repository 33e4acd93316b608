"""The interface of every launcher: it takes jobs, and returns how each ended.

A launcher owns processes, a cluster's jobs, or whatever else runs ``worker.execute`` somewhere; it
knows nothing of plans, order or retries (``sweeps.running``). Everything that must outlive it lies
in the run store, so one launcher continues what another began.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

from moe_lab.runs.failures import FailureKind
from moe_lab.runs.waits import Wait


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
    """The end of a submitted run, with one line of reason unless it finished."""

    run: str
    result: Result
    reason: str = ""
    kind: FailureKind = FailureKind.RUN


class Launcher(Protocol):
    """Runs jobs somewhere. Not thread-safe: one driver calls it."""

    @property
    def slots(self) -> int:
        """The number of runs that may be submitted and not yet ended."""
        ...

    def submit(self, job: Job) -> None:
        """Start a run and return at once."""
        ...

    def poll(self, timeout: float) -> list[Ending]:
        """The endings since the last call; waits at most ``timeout`` seconds for the first."""
        ...

    def waits(self) -> Mapping[str, Wait]:
        """Runs that were submitted and have not begun, for a reason that may never go away."""
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
