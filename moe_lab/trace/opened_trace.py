"""``Trace``: an opened trace, as lazy frames, batches of rows, and counts."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from textwrap import shorten
from typing import TypeVar

import numpy as np
import polars as pl
from polars.io.plugins import register_io_source

from moe_lab.errors import TraceError, expected, require
from moe_lab.html_table import html_table
from moe_lab.trace import conservation
from moe_lab.trace.data_files import DataFiles, Entry
from moe_lab.trace.manifest import NAME, Manifest, file_name, of_file_name
from moe_lab.trace.schema import TOKEN_COLUMNS, LayerMeta, TraceMeta

LAYER_TYPE = pl.UInt32()
READ_AHEAD = 2
"""Files that are read at once: decoding is most of the work, and more would only hold more memory.
"""

R = TypeVar("R")


@dataclass(frozen=True)
class Trace:
    """An opened trace.

    Attributes:
        folder: the folder or the URL that was opened, which names the trace.
        meta: provenance and layers.
        manifest: its files, with rows, checksums and counts per expert.
        complete: False only for a trace opened with ``allow_incomplete=True`` that was interrupted.
        storage: where its data files lie, and how they are read.
    """

    folder: Path | str
    meta: TraceMeta
    manifest: Manifest
    complete: bool
    storage: DataFiles

    def __repr__(self) -> str:
        layers = self.meta.layers
        sizes = {(layer.top_k, layer.num_experts, layer.num_zero_experts) for layer in layers}
        each = ", ".join(
            f"{top_k} slots over {experts} experts" + (f" + {zero} zero-compute" if zero else "")
            for top_k, experts, zero in sorted(sizes)[:3]
        )
        return (
            f"Trace({str(self.folder)!r}, {shorten(self.meta.model, 60)!r}: "
            f"{self.num_tokens:,} tokens, {len(layers)} MoE layers, {each}"
            f"{'' if self.complete else ', interrupted'})"
        )

    def _repr_html_(self) -> str:
        """The layers."""
        names = ("layer", "slots", "experts", "zero-compute experts", "module")
        rows = [
            (one.layer, one.top_k, one.num_experts, one.num_zero_experts, one.module)
            for one in self.meta.layers
        ]
        return html_table(names, rows, repr(self), "\n".join(self.meta.notes))

    @property
    def name(self) -> str:
        """The last part of ``folder``."""
        return str(self.folder).rstrip("/").rpartition("/")[2]

    @property
    def tokens(self) -> pl.LazyFrame:
        """One row per token: doc, pos, token_id, loss and further columns.

        No rows where the trace has no token table. Making the frame compares the checksums of the
        files that it scans; on an object store it fetches the names of the columns, and collecting
        it the pieces that it reads.
        """
        if not self.has_tokens:
            return pl.LazyFrame(schema=TOKEN_COLUMNS)
        paths = self._paths([None])
        if paths is not None:
            return pl.scan_parquet(paths, glob=False, hive_partitioning=False)
        entry = self._entries(None).row(0, named=True)
        return self._fetched(None, self.storage.schema(file_name(None, entry["part"]), entry))

    @property
    def routing(self) -> pl.LazyFrame:
        """One row per layer and token: layer u32, then ``schema.ROUTING_COLUMNS`` (and
        ``output_ratio`` where it was recorded).

        Making the frame compares the checksums of all routing files; ``batches`` reads the files of
        one layer alone. On an object store, collecting the frame fetches the pieces that it reads.
        """
        layers = sorted(layer.layer for layer in self.meta.layers)
        schema = pl.Schema({"layer": LAYER_TYPE, **self.meta.routing_schema()})
        paths = self._paths(layers)
        if paths is None:
            return pl.concat([self._fetched(layer, schema) for layer in layers])
        if not paths:
            return pl.LazyFrame(schema=schema)
        scan = pl.scan_parquet(
            paths, glob=False, hive_partitioning=True, hive_schema={"layer": LAYER_TYPE}
        )
        return scan.select(schema.names())

    @property
    def layers(self) -> pl.DataFrame:
        """[layer, model_layer, pass, module, num_experts, num_zero_experts, top_k]: the traced
        layers in order. ``model_layer`` is the layer in the model, the same as ``layer`` but in
        models that run some layers several times: there each pass is a layer of the trace.
        """
        columns = ("layer", "in_model", "pass_number", "module", "num_experts", "num_zero_experts")
        rows = sorted(self.meta.layers, key=lambda layer: layer.layer)
        frame = pl.DataFrame(
            {name: [getattr(layer, name) for layer in rows] for name in (*columns, "top_k")}
        ).rename({"in_model": "model_layer", "pass_number": "pass"})
        return frame.with_columns(pl.col("layer", "model_layer", "pass").cast(LAYER_TYPE))

    @property
    def num_tokens(self) -> int:
        """Tokens of each layer (rows of the first one)."""
        return self.manifest.rows(self.meta.layers[0].layer)

    @property
    def has_tokens(self) -> bool:
        """Whether there is a table of tokens."""
        return not self.manifest.of_layer(None).is_empty()

    def files(self) -> pl.DataFrame:
        """[name, layer u32, rows u32]: the Parquet files in the order in which ``batches`` reads
        them; ``layer`` is null for the files of ``tokens``. ``path`` and ``read`` take the names.
        """
        entries = self.manifest.entries.sort("layer", "part")
        return entries.select(NAME.alias("name"), "layer", "rows")

    def path(self, name: str) -> Path:
        """Where a file of ``files`` lies; its checksum was compared, now or earlier by this object.

        Raises ``TraceError`` where the file is missing, is not as it was written, or lies on an
        object store.
        """
        path = self.storage.path(name, self._entry(name))
        if path is None:
            got = f"one of {self.folder}"
            hint = "trace.read(name)"
            raise TraceError(expected("a file of this machine", got, hint), field="name")
        return path

    def read(self, name: str, columns: Sequence[str] | None = None) -> pl.DataFrame:
        """The rows of one file of ``files``: at most ``schema.MAX_ROWS_PER_PART``.

        Raises ``TraceError`` where the file is missing or is not as it was written, and
        ``StorageError`` where an object store does not answer.
        """
        return self.storage.read(name, self._entry(name), columns)

    def _entry(self, name: str) -> Entry:
        layer, part = of_file_name(name)
        entry = self._entries(layer).filter(pl.col("part") == part)
        require(not entry.is_empty(), "a file of the trace", name, error=TraceError, field="name")
        return entry.row(0, named=True)

    def _entries(self, layer: int | None) -> pl.DataFrame:
        """Of one layer (None: of ``tokens``), what the manifest lists and ``storage`` needs."""
        return self.manifest.with_long(self.manifest.of_layer(layer), self.storage.needs)

    def batches(
        self,
        layer: int | None,
        columns: Sequence[str],
        ahead: int = READ_AHEAD,
        whole: bool = False,
    ) -> Iterator[pl.DataFrame]:
        """The rows of one layer (None: of ``tokens``), one file at a time: at most
        ``schema.MAX_ROWS_PER_PART`` rows each.

        The next ``ahead`` files are read while the caller works on the last one; 0 is for a caller
        that reads many layers side by side. ``whole`` also compares what is not read.
        """
        reads = [
            partial(self.storage.read, file_name(layer, entry["part"]), entry, columns, whole)
            for entry in self._entries(layer).iter_rows(named=True)
        ]
        return _read_ahead(reads, ahead)

    def layer_counts(self, layer: LayerMeta) -> np.ndarray:
        """[E] int64 slots run by each expert of a layer, zero-compute ones last; E is the
        configured number. They come from the manifest (``check`` proves that the rows agree), in
        traces of schema 1 and 2 from the rows.
        """
        if self.manifest.has_counts:
            return self._listed_counts[layer.layer].copy()
        counts = np.zeros(layer.num_choices, dtype=np.int64)
        for batch in self.batches(layer.layer, ["experts"]):
            counts += _bincount(layer, batch["experts"].explode().drop_nulls().to_numpy())
        return counts

    @cached_property
    def _listed_counts(self) -> dict[int, np.ndarray]:
        return self.manifest.counts(self.meta.layers)

    def counts(self) -> pl.DataFrame:
        """[layer u32, expert u16, is_zero bool, count i64], every expert of every layer present,
        also those that never ran.
        """
        frames = [
            pl.DataFrame(
                {
                    "layer": pl.repeat(
                        layer.layer, layer.num_choices, dtype=LAYER_TYPE, eager=True
                    ),
                    "expert": np.arange(layer.num_choices, dtype=np.uint16),
                    "is_zero": np.arange(layer.num_choices) >= layer.num_experts,
                    "count": self.layer_counts(layer),
                }
            )
            for layer in sorted(self.meta.layers, key=lambda layer: layer.layer)
        ]
        return pl.concat(frames)

    def check(self) -> "Trace":
        """Read every row and raise ``TraceError``, naming the layer, unless the trace is conserved.

        Per layer: ids in range and not repeated in a token, as many weights as ids and all finite,
        ``ffn_count`` and ``zero_count`` as the ids say, the rows and counts of each file equal to
        those that the manifest lists; and every layer has the same tokens. No file is missing and,
        in a complete trace, none is unlisted.
        """
        conservation.check(self)
        return self

    def _paths(self, layers: Sequence[int | None]) -> list[Path] | None:
        """The files of some layers (None: of ``tokens``), compared, several at once; None where
        they are not on this machine.
        """
        entries = [
            (file_name(layer, entry["part"]), entry)
            for layer in layers
            for entry in self._entries(layer).iter_rows(named=True)
        ]
        if entries and self.storage.path(*entries[0]) is None:
            return None
        with ThreadPoolExecutor(READ_AHEAD) as pool:
            waiting = [pool.submit(self.storage.path, *entry) for entry in entries]
            return [path for one in waiting if (path := one.result()) is not None]

    def _fetched(self, layer: int | None, schema: pl.Schema) -> pl.LazyFrame:
        """The rows of one table of an object store, with ``layer`` where the schema has it."""

        def rows(
            columns: list[str] | None, predicate: pl.Expr | None, most: int | None, _: int | None
        ) -> Iterator[pl.DataFrame]:
            wanted = schema.names() if columns is None else columns
            number = pl.lit(layer, LAYER_TYPE).alias("layer")
            if predicate is not None and any(
                set(condition.meta.root_names()) == {"layer"}
                and pl.select(number).filter(condition).is_empty()
                for condition in _conditions(predicate)
            ):
                return
            read = [name for name in wanted if name != "layer" or layer is None]
            for batch in self.batches(layer, read or [schema.names()[-1]]):
                frame = (batch if layer is None else batch.with_columns(number)).select(wanted)
                frame = frame if predicate is None else frame.filter(predicate)
                yield frame if most is None else frame.head(most)

        return register_io_source(rows, schema=schema, is_pure=True)


def _conditions(predicate: pl.Expr) -> list[pl.Expr]:
    """The conditions that a row must all fulfil."""
    operands = predicate.meta.pop()
    if len(operands) == 2:
        for first, second in (operands, operands[::-1]):
            if (first & second).meta.eq(predicate):
                return [*_conditions(first), *_conditions(second)]
    return [predicate]


def _bincount(layer: LayerMeta, ids: np.ndarray) -> np.ndarray:
    counts = np.bincount(ids, minlength=layer.num_choices)
    if len(counts) > layer.num_choices:
        raise TraceError(
            f"layer {layer.layer}: "
            + expected(f"expert ids between 0 and {layer.num_choices - 1}", int(ids.max()))
        )
    return counts


def _read_ahead(reads: Sequence[Callable[[], R]], ahead: int) -> Iterator[R]:
    """What each call returns, in order; up to ``ahead`` calls are under way in threads."""
    if not ahead:
        yield from (read() for read in reads)
        return
    with ThreadPoolExecutor(ahead) as pool:
        waiting = deque(pool.submit(read) for read in reads[:ahead])
        for read in reads[ahead:]:
            result = waiting.popleft().result()
            waiting.append(pool.submit(read))
            yield result
        while waiting:
            yield waiting.popleft().result()
