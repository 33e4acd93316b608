"""The manifest of a trace: one row for each of its Parquet files, in parts beside the data.

    manifest/part-00000.parquet    ``COLUMNS``: layer (null: a file of ``tokens``), number of the
                                   file, rows, bytes, BLAKE2b digest, slots of each expert, size
                                   and digest of each piece (``moe_lab.trace.pieces``)

``meta.json`` holds how many parts and files there are and one digest over the parts, so it stays
small. Opening a trace reads the parts without counts and pieces; ``Manifest.counts`` sums the
counts of a whole trace without a row of it. A file's name is made from its layer and number: no
text of a manifest becomes a path. Traces of schema 1 and 2 list their files in ``meta.json``,
without counts (``of_parts``).
"""

import hashlib
import os
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from io import BufferedReader, BytesIO
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import polars as pl

from moe_lab.errors import TraceError, expected, require
from moe_lab.files import open_regular
from moe_lab.trace.schema import (
    MAX_FILE_BYTES,
    MAX_MANIFEST_PARTS,
    MAX_PART_NUMBER,
    MAX_ROWS_PER_PART,
    META_FILE,
    PART_PATH,
    LayerMeta,
    ManifestMeta,
    PartMeta,
    TraceMeta,
)
from moe_lab.trace.seal import digest, new_digest

R = TypeVar("R")

MANIFEST = "manifest"
COLUMNS: dict[str, pl.DataType] = {
    "layer": pl.UInt32(),
    "part": pl.UInt32(),
    "rows": pl.UInt32(),
    "bytes": pl.UInt64(),
    "digest": pl.Binary(),
    "counts": pl.List(pl.UInt32()),
    "pieces": pl.Binary(),
}
"""``counts`` has one value for each expert of the layer, zero-compute ones last; null for
``tokens``. ``pieces`` is null where a file has none; manifests of earlier writers lack the column.
"""
LONG = ("counts", "pieces")
"""Columns that are read where they are needed."""
ENTRY = {name: dtype for name, dtype in COLUMNS.items() if name not in LONG}
MAX_MANIFEST_BYTES = 2**32
TOGETHER = 2**23
"""Bytes of parts that are read at once: opening thousands of small ones alone takes minutes."""
FEW_PARTS, LEAST_BYTES = 2**10, 2**14
"""So many parts may be of any size. More of them, which a writer fills, have so many bytes on
average, or more.
"""
MANIFEST_PART = re.compile(r"part-\d{5}\.parquet")
REWRITE = "writing the trace again"

_NUMBER = pl.col("part").cast(pl.String).str.zfill(5)
NAME = (
    pl.when(pl.col("layer").is_null())
    .then(pl.format("tokens/part-{}.parquet", _NUMBER))
    .otherwise(pl.format("routing/layer={}/part-{}.parquet", pl.col("layer"), _NUMBER))
)


def file_name(layer: int | None, part: int) -> str:
    """Relative path of a file; ``layer`` is None for ``tokens``."""
    table = "tokens" if layer is None else f"routing/layer={layer}"
    return f"{table}/part-{part:05d}.parquet"


def part_name(number: int) -> str:
    """Relative path of a part of the manifest."""
    return f"{MANIFEST}/part-{number:05d}.parquet"


def of_file_name(name: str) -> tuple[int | None, int]:
    """Layer and number of a file. Raises ``TraceError`` for another text."""
    match = PART_PATH.fullmatch(name)
    if match is None:
        raise TraceError(
            expected("file names such as tokens/part-00000.parquet", repr(name[:60])), field="name"
        )
    return None if match[1] is None else int(match[1]), int(match[2])


def whole_digest(digests: list[str]) -> str:
    """The digest that ``meta.json`` has of all parts, from those of each."""
    value = new_digest()
    value.update(" ".join(digests).encode())
    return value.hexdigest()


@dataclass(frozen=True)
class Manifest:
    """The files of a trace.

    Attributes:
        entries: [layer, part, rows, bytes, digest], one row per file; traces of schema 1 and 2 also
            have ``slots`` (their number in the file) and ``crc32``, and no digest without a seal.
        parts: the Parquet files of the manifest; none for traces of schema 1 and 2.
    """

    entries: pl.DataFrame
    parts: tuple[Path, ...] = ()

    @property
    def has_counts(self) -> bool:
        """Whether counts per expert are listed."""
        return "slots" not in self.entries.columns

    def of_layer(self, layer: int | None) -> pl.DataFrame:
        """``entries`` of one layer (None: of ``tokens``), in the order of their numbers."""
        return self.entries.filter(pl.col("layer").eq_missing(layer)).sort("part")

    def rows(self, layer: int | None) -> int:
        """Rows of one layer (None: of ``tokens``)."""
        wanted = self.entries.filter(pl.col("layer").eq_missing(layer))
        return int(wanted["rows"].cast(pl.UInt64).sum())

    def names(self) -> set[str]:
        """Relative path of every file."""
        return set(self.entries.select(NAME.alias("name"))["name"])

    def counts(self, layers: tuple[LayerMeta, ...]) -> dict[int, np.ndarray]:
        """[E] int64 slots of each expert by layer, over all files: the listed counts are summed."""
        totals = {layer.layer: np.zeros(layer.num_choices, np.int64) for layer in layers}
        for where, frame in self._counts(pl.col("layer").is_not_null()):
            for group, counts_FE in _by_experts(where, frame, layers):
                order = np.argsort(group["layer"].to_numpy(), kind="stable")
                numbers, starts = np.unique(group["layer"].to_numpy()[order], return_index=True)
                sums = np.add.reduceat(counts_FE[order], starts, axis=0, dtype=np.int64)
                for number, sums_E in zip(numbers.tolist(), sums, strict=True):
                    totals[number] += sums_E
        return totals

    def file_counts(self, layer: LayerMeta) -> np.ndarray:
        """[F, E] u32 listed slots of each expert in each file of a layer, as ``of_layer`` orders
        them.
        """
        frames = [
            (frame["part"].to_numpy(), _matrix(where, frame["counts"], layer.num_choices))
            for where, frame in self._counts(pl.col("layer") == layer.layer)
        ]
        empty = (np.zeros(0, np.uint32), np.zeros((0, layer.num_choices), np.uint32))
        parts, counts = zip(*(frames or [empty]), strict=True)
        return np.concatenate(counts)[np.argsort(np.concatenate(parts), kind="stable")]

    def with_long(self, entries: pl.DataFrame, names: Sequence[str]) -> pl.DataFrame:
        """``entries``, some rows of the attribute, with those columns of ``LONG``; null where the
        manifest does not list them.
        """
        names = [name for name in names if name not in entries.columns]
        if not names:
            return entries
        layers = entries["layer"].unique().implode()
        wanted = pl.col("layer").is_in(layers, nulls_equal=True)
        empty = pl.DataFrame(schema={name: COLUMNS[name] for name in ("layer", "part", *names)})
        found = _read(self.parts, ["layer", "part", *names], wanted)
        long = pl.concat([empty, *(frame for _, frame in found)])
        return entries.join(
            long, on=["layer", "part"], how="left", nulls_equal=True, maintain_order="left"
        )

    def _counts(self, wanted: pl.Expr) -> Iterator[tuple[str, pl.DataFrame]]:
        return _read(self.parts, ["layer", "part", "counts"], wanted)

    def check(self, meta: TraceMeta, complete: bool) -> None:
        """Raise ``TraceError`` unless each entry is possible: numbers in range, each file once,
        and files for the layers of ``meta`` alone (for each of them, if ``complete``).
        """
        entries = self.entries
        limits = {
            "part": MAX_PART_NUMBER,
            "rows": MAX_ROWS_PER_PART,
            "bytes": MAX_FILE_BYTES,
        }
        for name, most in limits.items():
            column = entries[name]
            highest = column.max()
            if column.null_count() or (isinstance(highest, int) and highest > most):
                raise TraceError(f"{MANIFEST}: " + expected(f"{name} from 0 to {most}", highest))
        repeated = entries.filter(entries.select("layer", "part").is_duplicated())
        require(
            repeated.is_empty(),
            "each file once",
            "" if repeated.is_empty() else f"{repeated.select(NAME).item(0, 0)} twice",
            error=TraceError,
            where=MANIFEST,
        )
        check_layers(meta, set(entries["layer"].drop_nulls()), complete, MANIFEST)


def read_manifest(folder: Path, mark: ManifestMeta, strict: bool) -> Manifest:
    """The files that the manifest in ``folder`` lists, without reading their counts.

    Args:
        folder: of the trace.
        mark: what ``meta.json`` says of the manifest.
        strict: refuse parts that are others than ``mark`` says. False is for an interrupted trace,
            whose writer may have listed more.

    Raises:
        TraceError: a part that cannot be read or, if ``strict``, is another.
    """
    paths = [folder / part_name(number) for number in range(mark.parts)]
    if not strict:
        on_disk = (folder / MANIFEST).iterdir() if (folder / MANIFEST).is_dir() else ()
        paths = sorted(path for path in on_disk if MANIFEST_PART.fullmatch(path.name))
    else:
        found = whole_digest([_guarded(path, partial(digest, path)) for path in paths])
        require(
            found == mark.digest,
            f"the {mark.parts} parts that were written",
            "others (damaged)",
            REWRITE,
            error=TraceError,
            where=MANIFEST,
        )
    found = (frame for _, frame in _read(paths, [*ENTRY]))
    entries = pl.concat([pl.DataFrame(schema=ENTRY), *found])
    require(
        not strict or entries.height == mark.files,
        f"{mark.files} files as {META_FILE} says",
        entries.height,
        REWRITE,
        error=TraceError,
        where=MANIFEST,
    )
    require(
        (entries["digest"].bin.size() == new_digest().digest_size).all(ignore_nulls=False),
        "a digest of 32 bytes for each file",
        "others",
        REWRITE,
        error=TraceError,
        where=MANIFEST,
    )
    return Manifest(entries, tuple(paths))


def check_sizes(sizes: Sequence[int], where: object) -> None:
    """Raise ``TraceError`` for parts, by their bytes, that are too many, or too many small ones:
    before they are fetched or read.
    """
    total = sum(sizes)
    many = len(sizes) > MAX_MANIFEST_PARTS or total > MAX_MANIFEST_BYTES
    require(
        not many and (len(sizes) <= FEW_PARTS or total >= len(sizes) * LEAST_BYTES),
        f"a manifest of at most {MAX_MANIFEST_PARTS} parts and {MAX_MANIFEST_BYTES} bytes, and of "
        f"{LEAST_BYTES} bytes a part where it has more than {FEW_PARTS}",
        f"{len(sizes)} parts of {total} bytes in {where}",
        error=TraceError,
        field="manifest",
    )


def clean_parts(manifest: Manifest, meta: TraceMeta) -> Iterator[tuple[str, pl.DataFrame]]:
    """Relative path and rows of each part of a manifest, small ones together and numbered anew,
    without pieces.

    Raises:
        TraceError: counts that are not one for each expert of their layer, or do not fit the rows.
    """
    columns = [name for name in COLUMNS if name != "pieces"]
    top_k = {layer.layer: layer.top_k for layer in meta.layers}
    for number, (where, rows) in enumerate(_read(manifest.parts, columns)):
        routing = rows.filter(pl.col("layer").is_not_null())
        for group, counts_FE in _by_experts(where, routing, meta.layers):
            most_F = group["rows"] * group["layer"].replace_strict(top_k, return_dtype=pl.Int64)
            more = group["layer"].filter(counts_FE.sum(axis=1, dtype=np.int64) > most_F.to_numpy())
            if not more.is_empty():
                wanted = f"at most {top_k[more[0]]} slots for each row of layer {more[0]}"
                raise TraceError(f"{MANIFEST}: " + expected(wanted, "more"))
        yield part_name(number), rows.with_columns(pieces=pl.lit(None, COLUMNS["pieces"]))


def of_parts(parts: Mapping[str, PartMeta], digests: Mapping[str, str] | None) -> Manifest:
    """The files of a trace of schema 1 or 2, from its ``meta.json`` and the digests of its seal."""
    rows = [
        (
            *of_file_name(name),
            part.rows,
            part.bytes,
            None if digests is None else bytes.fromhex(digests[name]),
            part.slots,
            part.crc32,
        )
        for name, part in parts.items()
    ]
    schema = ENTRY | {"slots": pl.UInt32(), "crc32": pl.UInt32()}
    return Manifest(pl.DataFrame(rows, schema=schema, orient="row"))


def check_bytes(path: Path, name: str, entry: Mapping[str, Any]) -> None:
    """Raise ``TraceError`` unless a file has the size and the checksum that are listed.

    Args:
        path: where it lies.
        name: its name in the message.
        entry: a row of ``Manifest.entries``.
    """
    try:
        with open_regular(path) as file:
            check_content(file, os.fstat(file.fileno()).st_size, name, entry)
    except OSError as error:
        raise TraceError(f"{name}: {error.strerror or error}; try {REWRITE}") from error


def check_content(
    file: BufferedReader | BytesIO, size: int, name: str, entry: Mapping[str, Any]
) -> None:
    """``check_bytes`` of a file that is open and has ``size`` bytes."""
    if size == entry["bytes"] and (
        hashlib.file_digest(file, new_digest).digest() == entry["digest"]
        if entry["digest"] is not None
        else _crc32(file) == entry["crc32"]
    ):
        return
    got = f"{size} bytes" if size != entry["bytes"] else "another checksum"
    wanted = f"{entry['bytes']} bytes as written"
    raise TraceError(f"{name}: " + expected(wanted, f"{got} (damaged)", REWRITE))


def _crc32(file: BufferedReader | BytesIO) -> int:
    value = 0
    while block := file.read(2**20):
        value = zlib.crc32(block, value)
    return value


def check_layers(meta: TraceMeta, traced: set[int], complete: bool, where: str) -> None:
    """Raise ``TraceError`` where a layer of ``meta`` has no file, or another has one."""
    named = {layer.layer for layer in meta.layers}
    require(
        not (traced - named) and (not complete or not (named - traced)),
        f"files for layers {sorted(named)[:20]}",
        f"files for {sorted(traced)[:20]}",
        error=TraceError,
        where=where,
    )


def _read(
    paths: Sequence[Path], columns: list[str], wanted: pl.Expr | None = None
) -> Iterator[tuple[str, pl.DataFrame]]:
    """Some rows of parts, small parts together, and what a message calls them."""
    for group in _groups(paths):
        together = None
        if len(group) > 1:
            with suppress(TraceError):  # then each is read on its own, and the message names one
                together = _read_together(group, columns, wanted)
        if together is not None:
            yield MANIFEST, together
            continue
        for path in group:
            yield f"{MANIFEST}/{path.name}", _read_together([path], columns, wanted)


def _groups(paths: Sequence[Path]) -> Iterator[list[Path]]:
    """Successive parts that have at most ``TOGETHER`` bytes, or one larger part."""
    group, total = [], 0
    for path in paths:
        size = _guarded(path, path.stat).st_size
        if group and total + size > TOGETHER:
            yield group
            group, total = [], 0
        group.append(path)
        total += size
    if group:
        yield group


def _read_together(paths: list[Path], columns: list[str], wanted: pl.Expr | None) -> pl.DataFrame:
    def read() -> pl.DataFrame:
        # glob=False: "[" and "*" in a folder's name are no pattern
        scan = pl.scan_parquet(paths, glob=False, hive_partitioning=False, use_statistics=False)
        found = scan.collect_schema()  # of the first part; polars refuses others beside it
        if found == {name: dtype for name, dtype in COLUMNS.items() if name != "pieces"}:
            scan = scan.with_columns(pieces=pl.lit(None, COLUMNS["pieces"]))
        elif found != COLUMNS:
            others = [
                f"{name} {found.get(name, 'missing')}"
                for name in {**COLUMNS, **found}
                if found.get(name) != COLUMNS.get(name)
            ]
            raise ValueError(expected("the documented columns", ", ".join(others)[:60]))
        rows = scan.select(columns)
        return (rows if wanted is None else rows.filter(wanted)).collect()

    return _guarded(paths[0], read)


def _by_experts(
    where: str, rows: pl.DataFrame, layers: Sequence[LayerMeta]
) -> Iterator[tuple[pl.DataFrame, np.ndarray]]:
    """Rows of files of routing in groups of one number of experts, with [F, E] listed counts of
    each group: thousands of layers have few such numbers.
    """
    experts = {layer.layer: layer.num_choices for layer in layers}
    numbers, place_F = np.unique(rows["layer"].to_numpy(), return_inverse=True)
    experts_F = np.array([experts[number] for number in numbers.tolist()], np.int64)[place_F]
    for number in np.unique(experts_F).tolist():
        group = rows.filter(experts_F == number)
        yield group, _matrix(where, group["counts"], number)


def _matrix(where: str, counts: pl.Series, experts: int) -> np.ndarray:
    """[F, experts] listed counts."""
    require(
        (counts.list.len() == experts).all(ignore_nulls=False),
        f"{experts} counts for each file of a layer of so many experts",
        "others",
        REWRITE,
        error=TraceError,
        where=where,
    )
    return counts.explode().to_numpy().reshape(-1, experts)


def _guarded(path: Path, read: Callable[[], R]) -> R:
    return guarded(f"{MANIFEST}/{path.name}", read)


def guarded(name: str, read: Callable[[], R]) -> R:
    """Run a polars read; damage that polars meets (it may even panic) becomes one line."""
    try:
        return read()
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError, ValueError) as error:
        text = str(getattr(error, "strerror", None) or error)
        first = (text.splitlines() or [type(error).__name__])[0][:120]
        raise TraceError(f"{name}: " + expected("readable Parquet", first, REWRITE)) from error
