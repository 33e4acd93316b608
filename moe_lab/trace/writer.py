"""``TraceWriter``: routing decisions in, a folder of Parquet out, whole or marked incomplete.

Rows are buffered as compact arrays and written in parts, so memory is bounded whatever the length of the trace. Everything goes to a
temporary folder beside the target, which takes the target's name only after the counts were found to add up.
"""

import ctypes
import os
import shutil
import uuid
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import polars as pl
from torch import Tensor

from moe_lab.errors import MoELabError, TraceError, expected
from moe_lab.files import TEMPORARY_PREFIX, atomic_path, write_json
from moe_lab.routing import Routing
from moe_lab.trace.convert import Rows, key_checksum, routing_frame, routing_rows
from moe_lab.trace.schema import META_FILE, ROUTING_COLUMNS, ROWS_PER_PART, SCHEMA_VERSION, TOKEN_COLUMNS, VERSION_KEY, PartMeta, TraceMeta

INCOMPLETE_SUFFIX = ".incomplete"
BUFFER_BYTES = 2**28


@dataclass
class _Table:
    """What was received for one layer (or for the tokens) and not yet written, with running totals of all that was received."""

    name: str
    frame: Callable[[list], pl.DataFrame]
    counts: np.ndarray
    written: np.ndarray
    rows: int = 0
    keys: int = 0
    parts: int = 0
    pending: list = field(default_factory=list)
    pending_rows: int = 0
    pending_bytes: int = 0


class TraceWriter:
    """Writes one trace: ``with TraceWriter(folder, meta) as writer: ...``.

    When the block ends without an error, conservation is checked and the trace appears at ``folder`` (an older trace there is
    replaced). When it ends with one, what was written stays readable at ``<folder>.incomplete`` and is never taken for whole.

    Args:
        folder: the trace's path.
        meta: provenance and layers; each layer must receive the same tokens.
        rows_per_part: rows of one Parquet file.
        buffer_bytes: bytes held in memory over all layers before the fullest is written.

    Raises:
        TraceError: on entry, where ``folder`` holds something else than a trace; on leaving, where counts do not add up.
    """

    def __init__(
        self, folder: Path | str, meta: TraceMeta, *, rows_per_part: int = ROWS_PER_PART, buffer_bytes: int = BUFFER_BYTES
    ) -> None:
        self.folder = Path(folder).absolute()
        self.meta = meta
        self.rows_per_part, self.buffer_bytes = rows_per_part, buffer_bytes
        self._temporary = self.folder.parent / f"{TEMPORARY_PREFIX}{uuid.uuid4().hex[:8]}-{self.folder.name}"
        self._parts: dict[str, PartMeta] = {}
        self._token_schema: pl.Schema | None = None
        nothing = np.zeros(0, dtype=np.int64)
        self._tokens = _Table("tokens", pl.concat, nothing, nothing)
        self._layers = {
            layer.layer: _Table(
                f"routing/layer={layer.layer}",
                _frame_of_rows,
                np.zeros(layer.num_choices, dtype=np.int64),
                np.zeros(layer.num_choices, dtype=np.int64),
            )
            for layer in meta.layers
        }

    def __enter__(self) -> Self:
        if self.folder.exists() and not (self.folder.is_dir() and (_is_trace(self.folder) or not any(self.folder.iterdir()))):
            raise TraceError(expected(f"a new folder or an older trace at {self.folder}", "something else", "another path"))
        try:
            self._temporary.mkdir(parents=True)
        except OSError as error:
            raise TraceError(f"cannot write {self.folder}: {error.strerror or error}; try another folder") from error
        self._write_meta(complete=False)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if kind is not None:
            self._leave_incomplete()
            return
        try:
            self._flush_all(even_empty=True)
            self._check_conservation()
            self._write_meta(complete=True)
            _put_in_place(self._temporary, self.folder)
        except BaseException:
            self._leave_incomplete()
            raise
        shutil.rmtree(self._incomplete, ignore_errors=True)

    def write_tokens(self, frame: pl.DataFrame) -> None:
        """Append rows of ``tokens``: doc, pos, token_id, optionally loss (nats, null where none), and any further flat columns.

        Raises ``TraceError`` for missing, nested or changing columns, null or out-of-range ids, and losses that are not finite.
        """
        frame = self._token_frame(frame)
        keys = key_checksum(frame["doc"].to_numpy(), frame["pos"].to_numpy())
        self._buffer(self._tokens, frame, frame.height, int(frame.estimated_size()), keys)

    def write_routing(self, layer: int, doc: np.ndarray | Tensor, pos: np.ndarray | Tensor, routing: Routing) -> None:
        """Append one layer's decisions for T tokens.

        Args:
            layer: index of a layer in ``meta.layers``.
            doc, pos: [T] integers.
            routing: the layer's decisions; tokens that are not ``valid`` are left out.
        """
        layer_meta = self.meta.layer(layer)
        if layer_meta is None:
            raise TraceError(expected(f"a layer among {[item.layer for item in self.meta.layers]}", layer, "naming it in TraceMeta.layers"))
        rows = routing_rows(layer_meta, doc, pos, routing)
        table = self._layers[layer]
        table.counts += routing.counts().cpu().numpy()
        self._buffer(table, rows, len(rows["doc"]), sum(array.nbytes for array in rows.values()), key_checksum(rows["doc"], rows["pos"]))

    @property
    def _incomplete(self) -> Path:
        return self.folder.parent / (self.folder.name + INCOMPLETE_SUFFIX)

    def _token_frame(self, frame: pl.DataFrame) -> pl.DataFrame:
        others = [name for name in frame.columns if name not in TOKEN_COLUMNS]
        missing = [name for name in ("doc", "pos", "token_id") if name not in frame.columns]
        clashing = [name for name in others if name in ROUTING_COLUMNS or name == "layer"]
        nested = [name for name in others if frame.schema[name].is_nested() or frame.schema[name] in (pl.Object, pl.Null)]
        if missing:
            raise TraceError(expected("token columns doc, pos and token_id", f"no {', '.join(missing)}"))
        if clashing or nested:
            wanted = "further token columns of plain types that are not named as routing columns are"
            raise TraceError(expected(wanted, ", ".join(f"{name} {frame.schema[name]}" for name in [*clashing, *nested])))
        if "loss" not in frame.columns:
            frame = frame.with_columns(loss=pl.lit(None, dtype=pl.Float32))
        try:
            frame = frame.select(*(pl.col(name).cast(dtype) for name, dtype in TOKEN_COLUMNS.items()), pl.col(others))
        except pl.exceptions.PolarsError as error:
            raise TraceError("expected doc, pos and token_id as integers from 0 to 4294967295 and loss as a number, got others") from error
        frame = frame.with_columns(pl.col(pl.Categorical, pl.Enum).cast(pl.String))
        if self._token_schema is None:
            self._token_schema = frame.schema
        if frame.schema != self._token_schema:
            raise TraceError(expected(f"token columns as in the first call, {_columns(self._token_schema)}", _columns(frame.schema)))
        check_tokens(frame, self.meta)
        return frame

    def _buffer(self, table: _Table, item: pl.DataFrame | Rows, rows: int, size: int, keys: int) -> None:
        table.pending.append(item)
        table.rows += rows
        table.keys = (table.keys + keys) % 2**64
        table.pending_rows += rows
        table.pending_bytes += size
        if table.pending_rows >= self.rows_per_part:
            self._flush(table)
        tables = [self._tokens, *self._layers.values()]
        while sum(table.pending_bytes for table in tables) > self.buffer_bytes:
            self._flush(max(tables, key=lambda table: table.pending_bytes))

    def _flush_all(self, even_empty: bool = False) -> None:
        for number, table in self._layers.items():
            if even_empty and table.rows == 0:
                layer = self.meta.layer(number)
                assert layer is not None
                table.pending.append(
                    {name: np.zeros((0, layer.top_k) if name in ("experts", "weights") else 0) for name in ROUTING_COLUMNS}
                )
            self._flush(table)
        self._flush(self._tokens)

    def _flush(self, table: _Table) -> None:
        """Write what is pending, in parts of at most ``rows_per_part`` rows."""
        if not table.pending:
            return
        frame = table.frame(table.pending)
        for start in range(0, max(frame.height, 1), self.rows_per_part):
            self._write_part(table, frame.slice(start, self.rows_per_part))
        table.pending, table.pending_rows, table.pending_bytes = [], 0, 0
        self._write_meta(complete=False)

    def _write_part(self, table: _Table, frame: pl.DataFrame) -> None:
        name = f"{table.name}/part-{table.parts:05d}.parquet"
        try:
            with atomic_path(self._temporary / name) as path:
                frame.write_parquet(
                    path, compression="zstd", row_group_size=max(frame.height, 1), metadata={VERSION_KEY: str(SCHEMA_VERSION)}
                )
        except (pl.exceptions.PolarsError, MoELabError) as error:
            raise TraceError(f"cannot write {self.folder}: {error}; try another folder or free some space") from error
        slots = 0
        if "experts" in frame.columns:
            ids = frame["experts"].explode().drop_nulls().to_numpy()
            slots = len(ids)
            table.written += np.bincount(ids, minlength=len(table.written))
        size, crc32 = file_checksum(self._temporary / name)
        self._parts[name] = PartMeta(rows=frame.height, slots=slots, bytes=size, crc32=crc32)
        table.parts += 1

    def _check_conservation(self) -> None:
        reference = self._tokens if self._tokens.rows else next(iter(self._layers.values()))
        for number, table in self._layers.items():
            if not np.array_equal(table.counts, table.written):
                off = int(np.flatnonzero(table.counts != table.written)[0])
                raise TraceError(
                    f"layer {number}: "
                    + expected(f"{table.counts.sum()} slots on disk as routed", f"{table.written.sum()} (first difference at expert {off})")
                )
            if table.rows != reference.rows:
                raise TraceError(f"layer {number}: " + expected(f"{reference.rows} tokens as in {reference.name}", table.rows))
            if table.keys != reference.keys:
                raise TraceError(f"layer {number}: expected the same (doc, pos) pairs as in {reference.name}, got others")

    def _write_meta(self, complete: bool) -> None:
        parts = {name: part.to_dict() for name, part in self._parts.items()}
        write_json(self._temporary / META_FILE, {**self.meta.to_dict(), "complete": complete, "parts": parts})

    def _leave_incomplete(self) -> None:
        """Keep what can be kept; the error that brought us here is the one to report, so a second one is not raised."""
        with suppress(MoELabError, OSError):
            self._flush_all()
        with suppress(MoELabError, OSError):
            self._write_meta(complete=False)
        with suppress(OSError):
            shutil.rmtree(self._incomplete, ignore_errors=True)
            os.replace(self._temporary, self._incomplete)


def check_tokens(frame: pl.DataFrame, meta: TraceMeta) -> None:
    """Raise ``TraceError`` for null keys, token ids outside the vocabulary, or losses that are NaN or infinite."""
    if frame.select(pl.sum_horizontal(pl.col("doc", "pos", "token_id").null_count())).item():
        raise TraceError("expected doc, pos and token_id without nulls, got nulls")
    highest = frame["token_id"].max()
    if meta.vocab_size is not None and isinstance(highest, int) and highest >= meta.vocab_size:
        raise TraceError(expected(f"token ids below vocab_size {meta.vocab_size}", highest))
    if not frame["loss"].is_finite().all():
        raise TraceError("expected finite losses, got NaN or infinity; try null where a token has no loss")


def file_checksum(path: Path) -> tuple[int, int]:
    """Size in bytes and CRC-32 of a file, read in blocks."""
    size, crc = 0, 0
    with open(path, "rb") as file:
        while block := file.read(2**20):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return size, crc


def _frame_of_rows(pending: list[Rows]) -> pl.DataFrame:
    return routing_frame({name: np.concatenate([rows[name] for rows in pending]) for name in pending[0]})


def _columns(schema: pl.Schema) -> str:
    return ", ".join(f"{name} {dtype}" for name, dtype in schema.items())


def _is_trace(folder: Path) -> bool:
    return (folder / META_FILE).is_file()


def _put_in_place(new: Path, target: Path) -> None:
    """Give ``new`` the name ``target``. An older folder there is swapped out in one step where the system can, and removed after."""
    try:
        if not target.exists():
            os.rename(new, target)
            return
        if _exchange(new, target):
            shutil.rmtree(new, ignore_errors=True)
            return
        aside = new.with_name(new.name + "-old")
        os.rename(target, aside)
        try:
            os.rename(new, target)
        except OSError:
            os.rename(aside, target)
            raise
        shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        raise TraceError(f"cannot write {target}: {error.strerror or error}; try another folder") from error


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names atomically with Linux's renameat2(RENAME_EXCHANGE); False where that does not exist."""
    at_fdcwd, rename_exchange = -100, 2
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    return renameat2(at_fdcwd, os.fsencode(first), at_fdcwd, os.fsencode(second), rename_exchange) == 0
