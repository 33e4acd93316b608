"""Stores of the runs of a sweep, a folder or an object store, with one interface."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

from moe_lab.runs.bucket import folder_of
from moe_lab.runs.failures import Failure
from moe_lab.runs.folder_store import RunStore
from moe_lab.runs.layout import RunState
from moe_lab.runs.object_store import ObjectStore
from moe_lab.runs.plan import PlannedSweep
from moe_lab.runs.record import Progress, RunRecord
from moe_lab.runs.waits import Waits


class Store(Protocol):
    """The runs of one sweep. Any process on any machine that sees the store sees the same states.

    Attributes:
        folder: the place as the user wrote it: a path, or a URL.
        is_folder: workers write into the store itself. False: they train in a scratch folder of
            their machine and copy from there (``sweeps.launchers.mirror``).
    """

    folder: Any
    is_folder: bool

    def path(self, run: str) -> Path:
        """The folder that a worker claims for ``run`` and writes its log into."""
        ...

    def plan(self) -> dict[str, Any]:
        """The checked plan (``plan.check_plan``). Raises ``RunError``."""
        ...

    def add(self, sweep: PlannedSweep) -> None:
        """Record ``sweep`` in the plan beside what is there. Runs of one hash are shared."""
        ...

    def state(self, run: str) -> RunState: ...
    def states(self, runs: Iterable[str]) -> dict[str, RunState]: ...
    def progress(self, run: str) -> Progress: ...
    def failure(self, run: str) -> Failure: ...

    def read(self, run: str, name: str) -> bytes | None:
        """The bytes of a file of ``run``; None if there is no such file."""
        ...

    def records(self, runs: Sequence[str]) -> Iterator[RunRecord]: ...
    def record_failure(self, run: str, failure: Failure) -> None:
        """Record the failure of a run whose worker died, unless another worker has taken it up."""
        ...

    def waits(self) -> Waits:
        """The runs that a driver last saw waiting in a cluster's queue."""
        ...

    def record_waits(self, waits: Waits) -> None: ...

    def set_checkpoint_aside(self, run: str) -> None:
        """Move the damaged checkpoint of ``run`` away, so that the run begins again."""
        ...

    def tidy(self, finished: Iterable[str]) -> None:
        """Remove checkpoints of finished runs, which a killed process can leave."""
        ...

    def check_writable(self) -> None:
        """Raise ``RunError`` if a file of 64 KiB cannot be written to the store."""
        ...

    def readable(self) -> AbstractContextManager[Path]:
        """A folder with what a report reads: the store's own, or a temporary copy."""
        ...


def open_store(place: Path | str) -> Store:
    """The store of a folder, or of an fsspec URL (``s3://bucket/sweep``); ``file://`` is a folder.

    Raises ``RunError`` for a URL that cannot be opened.
    """
    folder = folder_of(place)
    return ObjectStore(str(place)) if folder is None else RunStore(folder)


@contextmanager
def readable(place: Path | str) -> Iterator[Path]:
    """The folder ``place``, or a temporary copy of what a report needs of the store at that URL."""
    with open_store(place).readable() as folder:
        yield folder
