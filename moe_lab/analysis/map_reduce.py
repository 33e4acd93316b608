"""Map and reduce over the files of a trace: partial frames of groups of files, reduced in the order
of the files.

A measure that sums over tokens is a ``partial(*parts, *arguments) -> frame`` and a ``fold(result so
far or None, frame) -> result``. A part is the trace with some of its files. Without ``mapped`` all
files are one part, read here; with it, groups of files are read by processes of this machine or by
tasks of a cluster, on the same code. Frames are folded in the order of the files, whichever
process computed them, and sums of floats are kept file by file until then: results are equal to
the bit for any number of workers and any groups.

Finished partial frames are kept in a folder until ``mapped`` ends without an error, under a name
that holds the digests of the files read, the function and its arguments: after a kill the same
command continues with them.
"""

import hashlib
import pickle
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import polars as pl
from numpy.typing import NDArray

from moe_lab import __version__
from moe_lab.analysis.aligned_rows import MAX_CELLS, UnalignedTablesError
from moe_lab.config import require
from moe_lab.errors import StorageError
from moe_lab.files import atomic_path, cannot_write, default_cache_dir
from moe_lab.progress import tell
from moe_lab.trace import Trace
from moe_lab.trace.data_files import DataFiles
from moe_lab.trace.manifest import Manifest
from moe_lab.worker_processes import WorkerProcesses

A = TypeVar("A")
B = TypeVar("B")
Fold = Callable[[A | None, pl.DataFrame], A]
"""(The result so far, None before the first frame; a frame) -> the result."""
GROUP_ROWS = 2**20
"""Rows that one task reads, at least, of all its tables together; of whole files."""
MOST_GROUPS = 256
"""Groups of a table, at most: tasks grow with the trace."""
KEPT_DAYS = 30
MARKS = pl.col("layer", "part", "rows", "bytes", "^(digest|crc32|slots)$")
"""What a manifest holds of a file; the counts are left out."""
_storages: dict[DataFiles, DataFiles] = {}
"""Those of this worker, which know what files it has compared."""


@dataclass(frozen=True)
class Sum(Generic[A]):
    """A sum over the rows of tables that are read side by side.

    Attributes:
        partial: a function of a module: (a ``Part`` for each trace, ``arguments``) -> frame.
        traces: one of them, or two of the same tokens.
        layers: whose routing is read; None is the token table. These tables are read side by side:
            their rows stand in one order. Files of the first one are never cut.
        fold: takes the partial frames in the order of the files.
        arguments: what else ``partial`` is called with.
        whole: it needs all rows at once; the sum is one task.
        cuts: gives the rows of the tables at which tasks may begin, in place of the files of the
            first one, or None where all rows are needed at once. It is called inside ``mapped``.
        size: cells of the result, where it may be large.
    """

    partial: Callable[..., pl.DataFrame]
    traces: tuple[Trace, ...]
    layers: tuple[int | None, ...]
    fold: Fold[A]
    arguments: tuple[Any, ...] = ()
    whole: bool = False
    cuts: Callable[[], NDArray[np.int64] | None] | None = None
    size: int = 0


@dataclass(frozen=True)
class Part(Trace):
    """A trace with some of its files, read without threads.

    Attributes:
        rows: of each table that is read, by layer: leading rows to leave out, and rows to read.
    """

    rows: dict[int | None, tuple[int, int]] = field(default_factory=dict)

    def batches(
        self, layer: int | None, columns: Sequence[str], ahead: int = 0, whole: bool = False
    ) -> Iterator[pl.DataFrame]:
        """The rows of one table, one file at a time."""
        skip, left = self.rows[layer]
        for frame in super().batches(layer, columns, min(ahead, 0), whole):
            cut = frame.slice(skip, left) if skip or frame.height > left else frame
            skip, left = 0, left - cut.height
            yield cut


@dataclass(frozen=True)
class Task:
    """One partial frame to compute.

    Attributes:
        name: digest of the function, its arguments and the files that it reads.
    """

    partial: Callable[..., pl.DataFrame]
    parts: tuple[Trace, ...]
    arguments: tuple[Any, ...]
    name: str

    def __call__(self) -> pl.DataFrame:
        parts = [
            replace(part, storage=_storages.setdefault(part.storage, part.storage))
            for part in self.parts
        ]
        return self.partial(*parts, *self.arguments)


class Workers(Protocol):
    """Computes tasks somewhere."""

    @property
    def ahead(self) -> int:
        """Tasks that are submitted before the result of the first is taken."""
        ...

    def submit(self, task: Task) -> Any:
        """Begin a task; returns what ``result`` takes."""
        ...

    def result(self, submitted: Any) -> pl.DataFrame:
        """Wait for a frame. A worker that is killed costs one warning, and its task is computed
        again. Raises what the task raised, or ``RunError`` where workers die again and again.
        """
        ...

    def close(self) -> None:
        """End everything that still runs."""
        ...


@dataclass(frozen=True)
class _Mapping:
    workers: Workers
    kept: Path
    rows: int
    used: set[Path] = field(default_factory=set)


_mapping: ContextVar[_Mapping | None] = ContextVar("mapping", default=None)


@contextmanager
def mapped(
    workers: int | Workers = 1, *, cache: Path | str | None = None, rows: int = GROUP_ROWS
) -> Iterator[None]:
    """Analyses inside read their traces in groups of files, by ``workers``.

    Args:
        workers: processes of this machine, of one thread each, or the tasks of a cluster
            (``moe_lab.sweeps.launchers.ray_tasks.RayTasks``).
        cache: folder for partial frames, ``partial-frames`` in the cache folder by default. They
            are removed when the block ends without an error.
        rows: that one task reads, at least, of the tables that it reads side by side. The result
            does not depend on it.

    Raises:
        ConfigError: fewer than 1 worker or row.
        RunError: a worker died again and again.
        StorageError: ``cache`` takes no file.

    Example:
        >>> with mapped(workers=2):
        ...     load = expert_load(open_trace("traces/x"))
    """
    require(rows >= 1, "at least 1 row", rows, field="rows")
    kept = default_cache_dir() / "partial-frames" if cache is None else Path(cache)
    _forget_old(kept)
    with ExitStack() as stack:
        if isinstance(workers, int):
            require(workers >= 1, "at least 1 worker", workers, field="workers")
            workers = WorkerProcesses(workers)
        stack.callback(workers.close)
        mapping = _Mapping(workers, kept, rows)
        stack.callback(_mapping.reset, _mapping.set(mapping))
        yield
        for path in mapping.used:
            path.unlink(missing_ok=True)


def is_mapped() -> bool:
    """Whether this is inside ``mapped``."""
    return _mapping.get() is not None


def reduced(sums: Iterable[Sum[A]]) -> Iterator[A]:
    """The result of each sum, in order: its partial frames folded in the order of the files."""
    mapping = _mapping.get()
    if mapping is None:
        yield from side_by_side(_computed_here, sums, lambda one: one.size)
        return
    jobs = [(one, _tasks(one, mapping.rows)) for one in sums]
    total = sum(len(tasks) for _, tasks in jobs)
    frames = _computed(mapping, [task for _, tasks in jobs for task in tasks])
    done = 0
    for one, tasks in jobs:
        result, unaligned = None, False
        for _ in tasks:
            frame = next(frames)
            unaligned |= frame is None
            result = None if frame is None or unaligned else one.fold(result, frame)
            done += 1
            tell("reading the trace", done, total)
        if unaligned:  # keys of one table lie in files of another group
            (frame,) = _computed(mapping, _tasks(replace(one, whole=True), mapping.rows))
            assert frame is not None
            result = one.fold(None, frame)
        yield result  # type: ignore[misc]


def side_by_side(
    compute: Callable[[B], A], items: Iterable[B], size: Callable[[B], int] = lambda _: 0
) -> Iterator[A]:
    """What is computed of each item, in order: two are computed in threads while one is used, so
    that a table is read while another is counted. Together their sizes are at most ``MAX_CELLS``,
    or it is one of them alone.
    """
    with ThreadPoolExecutor(2) as pool:
        begun: deque[tuple[int, Future[A]]] = deque()
        try:
            for item in items:
                while len(begun) > 2 or (
                    begun and sum(held for held, _ in begun) + size(item) > MAX_CELLS
                ):
                    yield begun.popleft()[1].result()
                begun.append((size(item), pool.submit(compute, item)))
            while begun:
                yield begun.popleft()[1].result()
        finally:
            for _, submitted in begun:
                submitted.cancel()


def _computed_here(one: Sum[A]) -> A:
    return one.fold(None, one.partial(*one.traces, *one.arguments))


def appended(frames: list[pl.DataFrame] | None, frame: pl.DataFrame) -> list[pl.DataFrame]:
    """A fold that keeps the frames in order."""
    return [*(frames or []), frame]


def cells(table: NDArray) -> pl.DataFrame:
    """[cell, count]: the cells of a table of counts that are not 0."""
    flat = table.reshape(-1)
    cell = np.flatnonzero(flat)
    return pl.DataFrame({"cell": cell.astype(np.uint32), "count": flat[cell]})


def counted(
    shape: tuple[int, ...], dtype: type[np.integer] = np.int64
) -> Callable[[NDArray | None, pl.DataFrame], NDArray]:
    """A fold that adds up frames of ``cells`` in a table."""

    def fold(total: NDArray | None, frame: pl.DataFrame) -> NDArray:
        table = np.zeros(shape, dtype) if total is None else total
        table.reshape(-1)[frame["cell"].to_numpy()] += frame["count"].to_numpy().astype(dtype)
        return table

    return fold


def _tasks(one: Sum, rows: int) -> list[Task]:
    """The tasks of a sum: groups of successive files of its first table, with the same rows of the
    others.
    """
    tables = [
        trace.manifest.of_layer(layer).select(MARKS) for trace in one.traces for layer in one.layers
    ]
    ends = [np.append(0, table["rows"].cast(pl.Int64).cum_sum().to_numpy()) for table in tables]
    total, cuts = ends[0][-1], [0]
    if not one.whole and all(end[-1] == total for end in ends):
        begins = ends[0] if one.cuts is None else one.cuts()
        for end in () if begins is None else begins:
            if end - cuts[-1] >= max(rows // len(tables), total // MOST_GROUPS):
                cuts.append(int(end))
    cuts = [*cuts[: max(1, len(cuts) - 1)], None]
    called = f"{__version__} {one.partial.__module__}.{one.partial.__qualname__} ".encode()
    called += pickle.dumps(one.arguments, protocol=5)
    tasks = []
    for start, end in pairwise(cuts):
        name, parts = hashlib.blake2b(called, digest_size=20), []
        left = iter(zip(tables, ends, strict=True))
        for trace in one.traces:
            spans, chosen = {}, []
            for layer, (table, ends_F) in zip(one.layers, left, strict=False):
                first = int(np.searchsorted(ends_F, start, side="right")) - 1
                first = max(0, min(first, len(table) - 1))  # a table without rows has its columns
                last = len(table) if end is None else int(np.searchsorted(ends_F, end))
                stop = int(ends_F[-1]) if end is None else end
                spans[layer] = start - int(ends_F[first]), stop - start
                chosen.append(table[first:last])
            files = pl.concat(chosen).unique(maintain_order=True)
            parts.append(_part(trace, files, spans))
            name.update(f"{trace.meta.hash()} {spans} {files.rows()}".encode())
        tasks.append(Task(one.partial, tuple(parts), one.arguments, name.hexdigest()))
    return tasks


def _part(trace: Trace, files: pl.DataFrame, spans: dict[int | None, tuple[int, int]]) -> Part:
    manifest = Manifest(trace.manifest.with_long(files, trace.storage.needs))
    return Part(trace.folder, trace.meta, manifest, trace.complete, trace.storage, spans)


def _computed(mapping: _Mapping, tasks: Sequence[Task]) -> Iterator[pl.DataFrame | None]:
    """The frame of each task in order; None for one whose tables are not aligned."""
    waiting: deque[tuple[Path, pl.DataFrame | None, Any]] = deque()
    coming, writing = iter(tasks), None
    with ThreadPoolExecutor(1) as pool:  # a frame is written while it is folded
        while True:
            for task in coming:
                path = mapping.kept / f"{task.name}.arrow"
                frame = _kept(path)
                submitted = mapping.workers.submit(task) if frame is None else None
                waiting.append((path, frame, submitted))
                if len(waiting) >= mapping.workers.ahead:
                    break
            if not waiting:
                break
            path, frame, submitted = waiting.popleft()
            mapping.used.add(path)
            if frame is None:
                try:
                    frame = mapping.workers.result(submitted)
                except UnalignedTablesError:
                    yield None
                    continue
                if writing is not None:
                    writing.result()
                writing = pool.submit(_keep, path, frame)
            yield frame
        if writing is not None:
            writing.result()


def _keep(path: Path, frame: pl.DataFrame) -> None:
    with atomic_path(path) as temporary:
        frame.write_ipc(temporary)  # compressing sums of floats takes longer than writing them


def _kept(path: Path) -> pl.DataFrame | None:
    """A finished partial frame; None if it is missing or damaged. Another process that
    reads the same trace may remove it at any time.
    """
    try:
        return pl.read_ipc(path.read_bytes())
    except (OSError, pl.exceptions.PolarsError, pl.exceptions.PanicException):
        return None


def _forget_old(kept: Path) -> None:
    """Remove what a command left that was killed and not run again for ``KEPT_DAYS``."""
    try:
        kept.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(cannot_write(kept, error)) from error
    for path in kept.glob("*.arrow"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > KEPT_DAYS * 86400:
                path.unlink()
