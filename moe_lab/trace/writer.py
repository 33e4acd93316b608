"""``TraceWriter``: routing decisions in, a folder of Parquet out, whole or marked incomplete.

Rows are buffered as compact arrays and written in parts by a second thread, so memory is bounded
whatever the length of the trace, and a model waits for the disk only where the disk is slower.
Everything goes to ``<folder>.incomplete``, which takes the target's name only after the counts were
found to add up.
"""

from __future__ import annotations

import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np
import polars as pl

from moe_lab.errors import MoELabError, TraceError, TraceStorageError, expected, require
from moe_lab.files import write_json
from moe_lab.trace.background import Background
from moe_lab.trace.checks import check_tokens
from moe_lab.trace.existing import refuse_finished
from moe_lab.trace.manifest import file_name
from moe_lab.trace.part_files import Listing, count_slots, write_part
from moe_lab.trace.publish import INCOMPLETE_SUFFIX, lock, put_in_place, unlock
from moe_lab.trace.resume import DOCUMENTS_FILE, InterruptedTrace, ranges, recover
from moe_lab.trace.rows import Rows, key_checksum, routing_frame, routing_rows
from moe_lab.trace.schema import (
    META_FILE,
    ROUTED,
    ROUTING_COLUMNS,
    ROWS_PER_PART,
    TOKEN_COLUMNS,
    TraceMeta,
)

if TYPE_CHECKING:
    from torch import Tensor

    from moe_lab.routing import Routing

BUFFER_BYTES = 2**28
META_SHARE = 0.05
"""Share of a writer's time that may go into listing, after each part, what is on disk: the list
grows with the trace.
"""


@dataclass
class _Table:
    """What was received for one layer (or for the tokens) and not yet written, with running totals
    of all that was received.

    ``rows`` and ``keys`` are of the tokens that were routed; ``received`` and ``on_disk`` count all
    rows.
    """

    name: str
    frame: Callable[[list], pl.DataFrame]
    counts: np.ndarray
    written: np.ndarray
    layer: int | None = None
    rows: int = 0
    keys: int = 0
    received: int = 0
    on_disk: int = 0
    parts: int = 0
    pending: list = field(default_factory=list)
    pending_rows: int = 0
    pending_bytes: int = 0


class TraceWriter:
    """Writes one trace: ``with TraceWriter(folder, meta) as writer: ...``.

    When the block ends without an error, conservation is checked and the trace appears at
    ``folder``. However else it ends, by an error, a full disk or
    a killed process, what was written stays readable at ``<folder>.incomplete`` and is never taken
    for whole.

    Args:
        folder: the trace's path.
        meta: provenance and layers; each layer must receive the same tokens.
        rows_per_part: rows of one Parquet file.
        buffer_bytes: bytes held in memory over all layers, half of them waiting for the disk.
        resume: go on with what lies at ``<folder>.incomplete``, if anything: ``finished`` then
            holds the documents that are done, which must not be written again. Without it, an older
            incomplete trace is removed.
        overwrite: replace a finished trace at ``folder``, once the new one is whole.

    Raises:
        TraceExistsError: on entry, a finished trace at ``folder`` without ``overwrite``.
        TraceError: on entry, where ``folder`` holds something else than a trace, or where another
            process writes it; on leaving, where counts do not add up.
    """

    def __init__(
        self,
        folder: Path | str,
        meta: TraceMeta,
        *,
        rows_per_part: int = ROWS_PER_PART,
        buffer_bytes: int = BUFFER_BYTES,
        resume: bool = False,
        overwrite: bool = False,
    ) -> None:
        self.folder = Path(folder).absolute()
        self.meta = meta
        self.rows_per_part, self.buffer_bytes = rows_per_part, buffer_bytes
        self.resume, self.overwrite = resume, overwrite
        self.finished: set[int] = set()
        self._lock: int | None = None
        self._listing = Listing(self._work)
        self._marks: deque[tuple[list[int], dict[str, int]]] = deque()
        self._meta_written, self._meta_cost = 0.0, 0.0
        self._token_schema: pl.Schema | None = None
        self._background = Background(buffer_bytes // 2)
        nothing = np.zeros(0, dtype=np.int64)
        self._tokens = _Table("tokens", pl.concat, nothing, nothing)
        self._layers = {
            layer.layer: _Table(
                f"routing/layer={layer.layer}",
                _frame_of_rows,
                np.zeros(layer.num_choices, dtype=np.int64),
                np.zeros(layer.num_choices, dtype=np.int64),
                layer.layer,
            )
            for layer in meta.layers
        }

    def __enter__(self) -> Self:
        require(
            not self.folder.exists()
            or (
                self.folder.is_dir() and (_is_trace(self.folder) or not any(self.folder.iterdir()))
            ),
            f"a new folder or an older trace at {self.folder}",
            "something else",
            "another path",
            error=TraceError,
        )
        if not self.overwrite:
            refuse_finished(self.folder, self.meta.to_dict())
        try:
            self._work.mkdir(parents=True, exist_ok=True)
            self._lock = lock(self._work)
        except OSError as error:
            raise TraceStorageError(
                f"cannot write {self.folder}: {error.strerror or error}; try another folder"
            ) from error
        try:
            if self.resume and _is_trace(self._work):
                self._take_over(recover(self._work, self.meta))
            else:
                for path in self._work.iterdir():
                    if path.is_dir():
                        shutil.rmtree(path)
                    elif self._lock is None or not path.name.endswith(".lock"):
                        path.unlink()
            self._write_meta(complete=False)
        except BaseException:
            self._unlock()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._background.forked:  # the trace is the parent's
            return
        if kind is not None:
            self._leave_incomplete()
            return
        try:
            self._flush_all(even_empty=True)
            self._background.drain()
            self._background.stop()
            self._check_conservation()
            (self._work / DOCUMENTS_FILE).unlink(missing_ok=True)
            self._write_meta(complete=True)
            self._unlock()
            put_in_place(self._work, self.folder)
        except BaseException:
            self._leave_incomplete()
            raise

    def write_tokens(self, frame: pl.DataFrame) -> None:
        """Append rows of ``tokens``: doc, pos, token_id, optionally loss (nats, null where none),
        and any further flat columns.

        Raises ``TraceError`` for missing, nested or changing columns, null or out-of-range ids, and
        losses that are not finite.
        """
        frame = self._token_frame(frame)
        routed = frame.filter(ROUTED) if ROUTED in frame.columns else frame
        self._tokens.rows += routed.height
        keys = key_checksum(routed["doc"].to_numpy(), routed["pos"].to_numpy())
        self._buffer(self._tokens, frame, frame.height, int(frame.estimated_size()), keys)

    def write_routing(
        self, layer: int, doc: np.ndarray | Tensor, pos: np.ndarray | Tensor, routing: Routing
    ) -> None:
        """Append one layer's decisions for T tokens.

        Args:
            layer: index of a layer in ``meta.layers``.
            doc, pos: [T] integers.
            routing: the layer's decisions; tokens that are not ``valid`` are left out.
        """
        layer_meta = self.meta.layer(layer)
        if layer_meta is None:
            raise TraceError(
                expected(
                    f"a layer among {[item.layer for item in self.meta.layers]}",
                    layer,
                    "naming it in TraceMeta.layers",
                ),
                field="layer",
            )
        self.write_rows(
            layer, routing_rows(layer_meta, doc, pos, routing), routing.counts().cpu().numpy()
        )

    def write_rows(self, layer: int, rows: Rows, counts: np.ndarray) -> None:
        """Append what ``rows.slot_rows`` made of one layer's tokens.

        Args:
            layer: index of a layer in ``meta.layers``.
            rows: the compact arrays.
            counts: [E] slots of each expert, counted before the conversion: what is on disk must
                sum to the same.
        """
        table = self._layers[layer]
        table.counts += counts
        table.rows += len(rows["doc"])
        self._buffer(
            table,
            rows,
            len(rows["doc"]),
            sum(array.nbytes for array in rows.values()),
            key_checksum(rows["doc"], rows["pos"]),
        )

    def finish_documents(self, documents: Iterable[int]) -> None:
        """Declare that all rows of these documents were written; an interrupted trace can then
        resume after them.
        """
        self._marks.append(
            (list(documents), {table.name: table.received for table in self._all_tables()})
        )

    @property
    def _work(self) -> Path:
        return self.folder.parent / (self.folder.name + INCOMPLETE_SUFFIX)

    def _all_tables(self) -> list[_Table]:
        return [self._tokens, *self._layers.values()]

    def _take_over(self, interrupted: InterruptedTrace) -> None:
        self.finished, self._token_schema = interrupted.documents, interrupted.token_schema
        self._listing = interrupted.listing
        for table in self._all_tables():
            if (totals := interrupted.tables.get(table.name)) is not None:
                table.rows, table.keys, table.parts = totals.rows, totals.keys, totals.next_part
                if len(totals.counts):
                    table.counts += totals.counts
                    table.written += totals.counts

    def _token_frame(self, frame: pl.DataFrame) -> pl.DataFrame:
        others = [name for name in frame.columns if name not in TOKEN_COLUMNS]
        missing = [name for name in ("doc", "pos", "token_id") if name not in frame.columns]
        clashing = [name for name in others if name in ROUTING_COLUMNS or name == "layer"]
        nested = [
            name
            for name in others
            if frame.schema[name].is_nested() or frame.schema[name] in (pl.Object, pl.Null)
        ]
        require(
            not missing,
            "token columns doc, pos and token_id",
            f"no {', '.join(missing)}",
            error=TraceError,
            field="columns",
        )
        require(
            not clashing and not nested,
            "further token columns of plain types that are not named as routing columns are",
            ", ".join(f"{name} {frame.schema[name]}" for name in [*clashing, *nested]),
            error=TraceError,
            field="columns",
        )
        if "loss" not in frame.columns:
            frame = frame.with_columns(loss=pl.lit(None, dtype=pl.Float32))
        try:
            frame = frame.select(
                *(pl.col(name).cast(dtype) for name, dtype in TOKEN_COLUMNS.items()), pl.col(others)
            )
        except pl.exceptions.PolarsError as error:
            raise TraceError(
                "expected doc, pos and token_id as integers from 0 to 4294967295 and loss as a "
                "number, got others"
            ) from error
        frame = frame.with_columns(pl.col(pl.Categorical, pl.Enum).cast(pl.String))
        if self._token_schema is None:
            self._token_schema = frame.schema
        require(
            frame.schema == self._token_schema,
            f"token columns as in the first call, {_columns(self._token_schema)}",
            _columns(frame.schema),
            error=TraceError,
            field="columns",
        )
        check_tokens(frame, self.meta)
        return frame

    def _buffer(
        self, table: _Table, item: pl.DataFrame | Rows, rows: int, size: int, keys: int
    ) -> None:
        table.pending.append(item)
        table.keys = (table.keys + keys) % 2**64
        table.received += rows
        table.pending_rows += rows
        table.pending_bytes += size
        if table.pending_rows >= self.rows_per_part:
            self._flush(table)
        tables = self._all_tables()
        while sum(table.pending_bytes for table in tables) > self.buffer_bytes // 2:
            self._flush(max(tables, key=lambda table: table.pending_bytes))

    def _flush_all(self, even_empty: bool = False) -> None:
        for number, table in self._layers.items():
            if even_empty and table.received == 0 and table.parts == 0:
                layer = self.meta.layer(number)
                assert layer is not None
                table.pending.append(self._empty_rows(layer.top_k))
            self._flush(table)
        self._flush(self._tokens)

    def _empty_rows(self, slots: int) -> Rows:
        absent = self.meta.not_recorded()
        names = [name for name in self.meta.routing_schema() if name not in absent]
        return {
            name: np.zeros((0, slots) if name in ("experts", "weights") else 0) for name in names
        }

    def _flush(self, table: _Table) -> None:
        """Hand what is pending to the background, to be written in parts of at most
        ``rows_per_part`` rows.
        """
        if table.pending:
            pending, size = table.pending, table.pending_bytes
            table.pending, table.pending_rows, table.pending_bytes = [], 0, 0
            self._background.submit(lambda: self._write_pending(table, pending), size)

    def _write_pending(self, table: _Table, pending: list) -> None:
        frame = table.frame(pending)
        for start in range(0, max(frame.height, 1), self.rows_per_part):
            self._write_part(table, frame.slice(start, self.rows_per_part))
        self._note_finished()
        if time.monotonic() - self._meta_written > self._meta_cost / META_SHARE:
            self._write_meta(complete=False)

    def _write_part(self, table: _Table, frame: pl.DataFrame) -> None:
        try:
            write_part(self._work / file_name(table.layer, table.parts), frame)
        except (pl.exceptions.PolarsError, MoELabError, OSError) as error:
            raise TraceStorageError(
                f"cannot write {self.folder}: {error}; try another folder or free some space"
            ) from error
        counts = None
        if table.layer is not None:
            counts = count_slots(frame, len(table.written))
            table.written += counts
        self._listing.add(table.layer, table.parts, frame.height, counts)
        table.parts += 1
        table.on_disk += frame.height

    def _note_finished(self) -> None:
        """Documents whose rows are on disk in every table."""
        on_disk = {table.name: table.on_disk for table in self._all_tables()}
        while self._marks and all(
            on_disk[name] >= rows for name, rows in self._marks[0][1].items()
        ):
            self.finished.update(self._marks.popleft()[0])

    def _check_conservation(self) -> None:
        reference = self._tokens if self._tokens.rows else next(iter(self._layers.values()))
        for number, table in self._layers.items():
            if not np.array_equal(table.counts, table.written):
                off = int(np.flatnonzero(table.counts != table.written)[0])
                raise TraceError(
                    f"layer {number}: "
                    + expected(
                        f"{table.counts.sum()} slots on disk as routed",
                        f"{table.written.sum()} (first difference at expert {off})",
                    )
                )
            require(
                table.rows == reference.rows,
                f"{reference.rows} tokens as in {reference.name}",
                table.rows,
                error=TraceError,
                where=f"layer {number}",
                field="tokens",
            )
            if table.keys != reference.keys:
                raise TraceError(
                    f"layer {number}: expected the same (doc, pos) pairs as in {reference.name}, "
                    "got others",
                    field="pos",
                )

    def _write_meta(self, complete: bool) -> None:
        start = time.monotonic()
        finished = set(self.finished)
        self._listing.write(self.meta, complete)
        if finished and not complete:  # after the files that hold them were listed
            write_json(self._work / DOCUMENTS_FILE, {"documents": ranges(finished)})
        self._meta_written = time.monotonic()
        self._meta_cost = self._meta_written - start

    def _leave_incomplete(self) -> None:
        """Keep what can be kept; the error that brought us here is the one to report, so a second
        one is not raised.
        """
        try:
            self._background.drain()
        except BaseException:
            self._marks.clear()  # rows are missing: later ones must not stand for them
        self._background.stop()
        self._background.forget_error()
        with suppress(MoELabError, OSError):
            self._flush_all()
            self._background.drain()
        self._background.stop()
        with suppress(MoELabError, OSError):
            self._write_meta(complete=False)
        self._unlock()

    def _unlock(self) -> None:
        unlock(self._work, self._lock)
        self._lock = None


def _frame_of_rows(pending: list[Rows]) -> pl.DataFrame:
    return routing_frame(
        {name: np.concatenate([rows[name] for rows in pending]) for name in pending[0]}
    )


def _columns(schema: pl.Schema) -> str:
    return ", ".join(f"{name} {dtype}" for name, dtype in schema.items())


def _is_trace(folder: Path) -> bool:
    return (folder / META_FILE).is_file()
