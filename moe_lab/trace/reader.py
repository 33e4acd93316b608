"""``open_trace``: a folder of Parquet in, lazy frames out. The folder is not trusted.

Opening reads ``meta.json``, compares every listed file's size, checksum, schema and row count, and
refuses files that are not listed. ``Trace.check`` reads the rows and proves conservation. Whatever
is wrong is one ``TraceError`` line that names the file or layer.
"""

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import polars as pl

from moe_lab.errors import ConfigError, TraceError, expected
from moe_lab.trace.parquet_guard import check_parquet
from moe_lab.trace.parts import check_tokens, file_checksum
from moe_lab.trace.publish import INCOMPLETE_SUFFIX
from moe_lab.trace.rows import EMPTY_SLOT, expert_slots, key_checksum
from moe_lab.trace.schema import (
    MAX_ROWS_PER_PART,
    META_FILE,
    OUTPUT_RATIO,
    PART_PATH,
    ROUTED,
    ROUTING_COLUMNS,
    SCHEMA_VERSION,
    TOKEN_COLUMNS,
    VERSION_KEY,
    LayerMeta,
    PartMeta,
    TraceMeta,
)

MAX_META_BYTES = 2**26
LAYER_TYPE = pl.UInt32()
READ_AHEAD = 2
"""Files that are read at once: decoding is most of the work, and more would only hold more memory.
"""

R = TypeVar("R")


@dataclass(frozen=True)
class Trace:
    """An opened trace.

    Attributes:
        folder: where it lies.
        meta: provenance and layers.
        parts: the Parquet files by relative path.
        complete: False only for a trace opened with ``allow_incomplete=True`` that was interrupted.
    """

    folder: Path
    meta: TraceMeta
    parts: dict[str, PartMeta]
    complete: bool = True

    @property
    def tokens(self) -> pl.LazyFrame:
        """One row per token: doc, pos, token_id, loss and further columns.

        No rows where the trace has no token table.
        """
        paths = self._paths("tokens/")
        return (
            pl.scan_parquet(paths, glob=False, hive_partitioning=False)
            if paths
            else pl.LazyFrame(schema=TOKEN_COLUMNS)
        )

    @property
    def routing(self) -> pl.LazyFrame:
        """One row per layer and token: layer u32, then ``schema.ROUTING_COLUMNS`` (and
        ``output_ratio`` where it was recorded).
        """
        paths = self._paths("routing/")
        if not paths:
            return pl.LazyFrame(schema={"layer": LAYER_TYPE, **ROUTING_COLUMNS})
        scan = pl.scan_parquet(
            paths, glob=False, hive_partitioning=True, hive_schema={"layer": LAYER_TYPE}
        )
        return scan.select("layer", *self.meta.routing_schema())

    @property
    def num_tokens(self) -> int:
        """Tokens of each layer (rows of the first one)."""
        return sum(self.parts[name].rows for name in self._names(self._prefix(self.meta.layers[0])))

    def batches(self, layer: int | None, columns: Sequence[str]) -> Iterator[pl.DataFrame]:
        """The rows of one layer (None: of ``tokens``), one file at a time: at most
        ``schema.MAX_ROWS_PER_PART`` rows each.

        The next file is read while the caller works on the last one.
        """
        names = self._names("tokens/" if layer is None else f"routing/layer={layer}/")

        def read(name: str) -> pl.DataFrame:
            path = self.folder / name
            return _guard(
                name, lambda: pl.read_parquet(path, columns=list(columns), hive_partitioning=False)
            )

        return _read_ahead([partial(read, name) for name in names])

    def layer_counts(self, layer: LayerMeta) -> np.ndarray:
        """[E] int64 slots run by each expert of a layer, zero-compute ones last; E is the
        configured number.
        """
        counts = np.zeros(layer.num_choices, dtype=np.int64)
        for batch in self.batches(layer.layer, ["experts"]):
            counts += _bincount(layer, batch["experts"].explode().drop_nulls().to_numpy())
        return counts

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
        ``ffn_count`` and ``zero_count`` as the ids say, the sum of counts equal to the slots
        recorded when it was written; and every layer has the same tokens.
        """
        reference: tuple[int, int] | None = None
        if self._names("tokens/"):
            reference = self._check_token_rows()
        for layer in self.meta.layers:
            found = self._check_layer(layer)
            reference = reference or found
            if self.complete and found != reference:
                got = f"{found[0]} tokens" if found[0] != reference[0] else "other (doc, pos) pairs"
                raise TraceError(
                    f"layer {layer.layer}: "
                    + expected(f"the same {reference[0]} tokens as the rest of the trace", got)
                )
        self._check_unique_keys()
        return self

    def _check_token_rows(self) -> tuple[int, int]:
        rows, keys = 0, 0
        routed = [ROUTED] if ROUTED in self.tokens.collect_schema() else []
        for batch in self.batches(None, [*TOKEN_COLUMNS, *routed]):
            check_tokens(batch, self.meta)
            batch = batch.filter(ROUTED) if routed else batch
            rows, keys = (
                rows + batch.height,
                keys + key_checksum(batch["doc"].to_numpy(), batch["pos"].to_numpy()),
            )
        return rows, keys % 2**64

    def _check_layer(self, layer: LayerMeta) -> tuple[int, int]:
        rows, keys, slots = 0, 0, 0
        for batch in self.batches(layer.layer, list(self.meta.routing_schema())):
            slots += _check_rows(layer, batch, self.meta)
            rows, keys = (
                rows + batch.height,
                keys + key_checksum(batch["doc"].to_numpy(), batch["pos"].to_numpy()),
            )
        recorded = sum(self.parts[name].slots for name in self._names(self._prefix(layer)))
        if slots != recorded:
            raise TraceError(
                f"layer {layer.layer}: "
                + expected(f"{recorded} used slots as recorded", f"counts that sum to {slots}")
            )
        return rows, keys % 2**64

    def _check_unique_keys(self) -> None:
        """One table is enough: the others have the same multiset of keys."""
        first = self.meta.layers[0].layer
        if document_runs(self.batches(None if self._names("tokens/") else first, ["doc", "pos"])):
            return  # rising positions in documents that do not return: told in bounded memory
        frame = (
            self.tokens if self._names("tokens/") else self.routing.filter(pl.col("layer") == first)
        )
        keys = frame.select(key=pl.col("doc").cast(pl.UInt64) * 2**32 + pl.col("pos"))
        rows, unique = (
            keys.select(pl.len(), pl.col("key").n_unique().alias("unique"))
            .collect(engine="streaming")
            .row(0)
        )
        if rows != unique:
            raise TraceError(
                expected(
                    "each (doc, pos) once",
                    f"{rows - unique} repeated",
                    "giving each sequence its own doc or pos range",
                )
            )

    def _names(self, prefix: str) -> list[str]:
        return sorted(name for name in self.parts if name.startswith(prefix))

    def _paths(self, prefix: str) -> list[Path]:
        return [self.folder / name for name in self._names(prefix)]

    @staticmethod
    def _prefix(layer: LayerMeta) -> str:
        return f"routing/layer={layer.layer}/"


def open_trace(folder: Path | str, *, allow_incomplete: bool = False, verify: bool = True) -> Trace:
    """Open the trace at ``folder``.

    Args:
        folder: a trace folder.
        allow_incomplete: also open the rest of an interrupted trace.
        verify: compare every file's checksum (reads each file once), so that damage is found before
            Parquet is decoded. False still compares sizes, schemas and row counts; it is for a
            trace that this process has just written.

    Raises:
        TraceError: no trace there, or one that is incomplete, damaged or of another version.
    """
    folder = Path(folder).absolute()
    if not (folder / META_FILE).is_file():
        rest = folder.parent / (folder.name + INCOMPLETE_SUFFIX)
        hint = (
            f"{rest} with allow_incomplete=True"
            if (rest / META_FILE).is_file()
            else "the folder that holds meta.json"
        )
        raise TraceError(
            expected(
                f"a trace at {folder}",
                "a folder without meta.json" if folder.is_dir() else "nothing",
                hint,
            )
        )
    meta, parts, complete = _read_meta(folder / META_FILE)
    if not complete and not allow_incomplete:
        raise TraceError(
            expected(
                f"a complete trace at {folder}",
                "one whose writing was interrupted",
                "allow_incomplete=True to look at it",
            )
        )
    traced = {
        int(match.group(1))
        for name in parts
        if (match := PART_PATH.fullmatch(name)) and match.group(1)
    }
    named = {layer.layer for layer in meta.layers}
    if traced - named or (complete and named - traced):
        raise TraceError(
            f"{META_FILE}: "
            + expected(f"files for layers {sorted(named)}", f"files for {sorted(traced)}")
        )
    _check_files(folder, parts, meta, verify, complete)
    return Trace(folder, meta, parts, complete)


def document_runs(frames: Iterable[pl.DataFrame]) -> bool:
    """Whether each document's rows stand together and its positions rise, from doc and pos."""
    seen: list[np.ndarray] = []
    last_doc, last_pos = -1, -1
    for frame in frames:
        if not frame.height:
            continue
        doc, pos = (
            frame["doc"].to_numpy().astype(np.int64),
            frame["pos"].to_numpy().astype(np.int64),
        )
        same = doc == np.concatenate([[last_doc], doc[:-1]])
        if (same & (pos <= np.concatenate([[last_pos], pos[:-1]]))).any():
            return False
        seen.append(doc[~same].astype(np.uint32))
        last_doc, last_pos = int(doc[-1]), int(pos[-1])
    begun = np.concatenate(seen) if seen else np.zeros(0, np.uint32)
    return len(np.unique(begun)) == len(begun)


def _read_meta(path: Path) -> tuple[TraceMeta, dict[str, PartMeta], bool]:
    try:
        if path.stat().st_size > MAX_META_BYTES:
            raise TraceError(
                expected(f"{META_FILE} of at most {MAX_META_BYTES} bytes", path.stat().st_size)
            )
        values: Any = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise TraceError(
            f"expected {path} to be JSON, got {type(error).__name__}; try writing the trace again"
        ) from error
    if not isinstance(values, dict):
        raise TraceError(f"expected {path} to hold an object, got {type(values).__name__}")
    version = values.get("schema_version")
    if version != SCHEMA_VERSION:
        raise TraceError(
            expected(
                f"trace schema version {SCHEMA_VERSION}",
                repr(version)[:40],
                "another version of moe_lab",
            )
        )
    complete, parts = values.pop("complete", None), values.pop("parts", None)
    layers = values.get("layers")
    if (
        not isinstance(complete, bool)
        or not _table_of(parts, dict)
        or not isinstance(layers, list)
        or not _all_dicts(layers)
    ):
        raise TraceError(f"expected {path} to hold complete, parts and layers, got others")
    try:
        meta = TraceMeta.from_dict(values)
        return meta, {name: PartMeta.from_dict(part) for name, part in parts.items()}, complete
    except ConfigError as error:
        raise TraceError(f"{META_FILE}: {error}") from error


def _check_files(
    folder: Path, parts: dict[str, PartMeta], meta: TraceMeta, verify: bool, complete: bool
) -> None:
    for name in parts:
        if not PART_PATH.fullmatch(name):
            raise TraceError(
                f"{META_FILE}: "
                + expected("part names such as tokens/part-00000.parquet", repr(name[:60]))
            )
    found = {
        path.relative_to(folder).as_posix()
        for table in ("tokens", "routing")
        for path in (folder / table).rglob("*.parquet")
    }
    if missing := sorted(set(parts) - found):
        raise TraceError(
            expected(
                f"{len(parts)} files",
                f"{len(missing)} missing, first {missing[0]}",
                "writing the trace again",
            )
        )
    # A killed writer leaves a file that it had no time to list.
    if complete and (unlisted := sorted(found - set(parts))):
        raise TraceError(
            expected(
                "only the files listed in meta.json", f"also {unlisted[0][:80]!r}", "removing it"
            )
        )
    token_schema: pl.Schema | None = None
    for name, part in sorted(parts.items()):
        schema = _check_file(folder / name, name, part, meta, verify)
        if name.startswith("tokens/"):
            token_schema = token_schema or schema
            if schema != token_schema:
                raise TraceError(
                    f"{name}: expected the columns of the first token file, got others"
                )


def _check_file(path: Path, name: str, part: PartMeta, meta: TraceMeta, verify: bool) -> pl.Schema:
    try:
        if not path.is_file():
            raise TraceError(f"{name}: expected a file, got something else")
        size, crc32 = file_checksum(path) if verify else (path.stat().st_size, part.crc32)
    except OSError as error:
        raise TraceError(f"{name}: {error.strerror or error}") from error
    if size != part.bytes or crc32 != part.crc32:
        got = f"{size} bytes" if size != part.bytes else "another checksum"
        raise TraceError(
            f"{name}: "
            + expected(
                f"{part.bytes} bytes as written", f"{got} (damaged)", "writing the trace again"
            )
        )
    match = PART_PATH.fullmatch(name)
    layer = meta.layer(int(match.group(1))) if match and match.group(1) else None
    rows = check_parquet(
        path, name, max_rows=MAX_ROWS_PER_PART, max_values_per_row=layer.top_k if layer else 1
    )
    if rows != part.rows:
        raise TraceError(
            f"{name}: " + expected(f"{part.rows} rows as recorded", rows, "writing the trace again")
        )
    schema = pl.Schema(_guard(name, lambda: pl.read_parquet_schema(path)))
    tokens = name.startswith("tokens/")
    wanted = TOKEN_COLUMNS if tokens else meta.routing_schema()
    extra = not tokens and len(schema) != len(wanted)
    if (
        {column: schema.get(column) for column in wanted} != wanted
        or extra
        or schema.get(ROUTED, pl.Boolean) != pl.Boolean
    ):
        raise TraceError(
            f"{name}: "
            + expected(
                f"columns {', '.join(wanted)} of the documented types", ", ".join(schema)[:200]
            )
        )
    version = _guard(name, lambda: pl.read_parquet_metadata(path)).get(VERSION_KEY)
    if version != str(SCHEMA_VERSION):
        raise TraceError(
            f"{name}: "
            + expected(
                f"trace schema version {SCHEMA_VERSION}",
                repr(version)[:40],
                "another version of moe_lab",
            )
        )
    return schema


def _check_rows(layer: LayerMeta, batch: pl.DataFrame, meta: TraceMeta) -> int:
    """Check one batch of a layer's rows; returns its used slots."""
    where = f"layer {layer.layer}: "
    absent = [
        "margin",
        *([] if meta.has_weights else ["weights", "gate_mass_ffn"]),
        *([] if meta.has_scores else ["entropy"]),
    ]
    if batch.select(pl.sum_horizontal(pl.exclude(absent).null_count())).item():
        raise TraceError(where + "expected no nulls, got nulls")
    if not batch.select(
        pl.all_horizontal(pl.col(name).is_null().all() for name in absent[1:])
        if absent[1:]
        else pl.lit(True)
    ).item():
        raise TraceError(
            where
            + f"expected only nulls in {', '.join(absent[1:])} as {META_FILE} says, got values"
        )
    ids_TK = expert_slots(layer, batch["experts"])
    used_TK = ids_TK != EMPTY_SLOT
    used_T = used_TK.sum(axis=1)
    weights = batch["weights"].explode().drop_nulls()
    if meta.has_weights and (
        not np.array_equal(batch["weights"].list.len().to_numpy(), used_T)
        or len(weights) != used_T.sum()
    ):
        raise TraceError(where + "expected one weight for each expert id, got other numbers")
    floats = [
        batch[name].drop_nulls()
        for name in ("entropy", "gate_mass_ffn", OUTPUT_RATIO)
        if name in batch.columns
    ]
    if not weights.is_finite().all() or not all(column.is_finite().all() for column in floats):
        raise TraceError(where + "expected finite gate weights and entropies, got NaN or infinity")
    ordered = np.sort(ids_TK, axis=1)
    if ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != EMPTY_SLOT)).any():
        raise TraceError(
            where + "expected each token to name an expert at most once, got a repeated id"
        )
    ffn_count = (ids_TK < layer.num_experts).sum(axis=1)
    if not np.array_equal(ffn_count, batch["ffn_count"].to_numpy()):
        raise TraceError(
            where + "expected ffn_count to be the number of real expert ids, got others"
        )
    if not np.array_equal(used_T - ffn_count, batch["zero_count"].to_numpy()):
        raise TraceError(
            where + "expected zero_count to be the number of zero-compute expert ids, got others"
        )
    return int(used_T.sum())


def _bincount(layer: LayerMeta, ids: np.ndarray) -> np.ndarray:
    counts = np.bincount(ids, minlength=layer.num_choices)
    if len(counts) > layer.num_choices:
        raise TraceError(
            f"layer {layer.layer}: "
            + expected(f"expert ids between 0 and {layer.num_choices - 1}", int(ids.max()))
        )
    return counts


def _read_ahead(reads: Sequence[Callable[[], R]]) -> Iterator[R]:
    """What each call returns, in order; up to ``READ_AHEAD`` calls are under way in threads."""
    with ThreadPoolExecutor(READ_AHEAD) as pool:
        waiting = deque(pool.submit(read) for read in reads[:READ_AHEAD])
        for read in reads[READ_AHEAD:]:
            result = waiting.popleft().result()
            waiting.append(pool.submit(read))
            yield result
        while waiting:
            yield waiting.popleft().result()


def _guard(name: str, read: Callable[[], R]) -> R:
    """Run a polars read; damage that polars meets (it may even panic) becomes one line."""
    try:
        return read()
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError, ValueError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise TraceError(
            f"{name}: expected readable Parquet, got {first}; try writing the trace again"
        ) from error


def _table_of(value: Any, kind: type) -> bool:
    return isinstance(value, dict) and all(isinstance(item, kind) for item in value.values())


def _all_dicts(values: list[Any]) -> bool:
    return all(isinstance(value, dict) for value in values)
