"""The files of a trace as they are written: Parquet parts, the manifest, ``meta.json``."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from moe_lab.errors import TraceStorageError
from moe_lab.files import TEMPORARY_PREFIX, atomic_path, write_json
from moe_lab.trace.manifest import COLUMNS, MANIFEST, file_name, part_name, whole_digest
from moe_lab.trace.pieces import checksum
from moe_lab.trace.publish import put_in_place
from moe_lab.trace.schema import META_FILE, SCHEMA_VERSION, VERSION_KEY, ManifestMeta, TraceMeta
from moe_lab.trace.seal import digest, write_seal

FILES_PER_PART, COUNTS_PER_PART = 2**14, 2**22
"""Files, and counts of them together, that one part of the manifest lists: what a writer holds in
memory, and writes again as files are added.
"""


def write_part(path: Path, frame: pl.DataFrame) -> None:
    """Write one Parquet file of one row group; it takes its name only when it is complete."""
    with atomic_path(path) as temporary:
        frame.write_parquet(
            temporary,
            compression="zstd",
            row_group_size=max(frame.height, 1),
            metadata={VERSION_KEY: str(SCHEMA_VERSION)},
        )


def count_slots(frame: pl.DataFrame, width: int) -> np.ndarray:
    """[width] used slots of each expert in a routing table."""
    return np.bincount(frame["experts"].explode().drop_nulls().to_numpy(), minlength=width)


class Listing:
    """The manifest, ``meta.json`` and seal of a trace that is written at ``folder``.

    It begins empty, and takes the place of an older manifest there with the first ``write``. Parts
    that are full stay as they are; only the last one is written again as files are added.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = 0
        self._digests: list[str] = []
        self._last: list[tuple[Any, ...]] = []
        self._new = folder / f"{TEMPORARY_PREFIX}{MANIFEST}"
        self._place = self._new / MANIFEST
        shutil.rmtree(self._new, ignore_errors=True)

    def add(self, layer: int | None, part: int, rows: int, counts: np.ndarray | None) -> None:
        """List a file that lies in ``folder``, as it is there now.

        Args:
            layer: None for a file of ``tokens``.
            part: its number.
            rows: its rows.
            counts: [E] its slots of each expert; None for a file of ``tokens``.
        """
        found = checksum(self.folder / file_name(layer, part))
        self.add_known(layer, part, rows, found.size, found.digest, counts, found.pieces)

    def add_known(
        self,
        layer: int | None,
        part: int,
        rows: int,
        size: int,
        checksum: bytes,
        counts: np.ndarray | None,
        pieces: bytes | None = None,
    ) -> None:
        """``add`` of a file whose size in bytes, digest and pieces are known."""
        self._last.append((layer, part, rows, size, checksum, counts, pieces))
        self.files += 1
        width = 1 if counts is None else len(counts)
        if len(self._last) >= FILES_PER_PART or len(self._last) * width >= COUNTS_PER_PART:
            self._digests.append(self._write_last())
            self._last = []

    def write(self, meta: TraceMeta, complete: bool) -> ManifestMeta:
        """Write what changed: the last part, ``meta.json`` and the seal, in this order. Returns
        what ``meta.json`` says of the manifest.
        """
        digests = [*self._digests, *([self._write_last()] if self._last else [])]
        if self._place.parent == self._new:
            self._place.mkdir(parents=True, exist_ok=True)
            put_in_place(self._place, self.folder / MANIFEST)
            self._place = self.folder / MANIFEST
            shutil.rmtree(self._new, ignore_errors=True)
        mark = ManifestMeta(self.files, len(digests), whole_digest(digests))
        values = {**meta.to_dict(), "complete": complete, MANIFEST: mark.to_dict()}
        write_json(self.folder / META_FILE, values)
        write_seal(self.folder)
        return mark

    def _write_last(self) -> str:
        """Write the last part and return its digest."""
        path = self._place.parent / part_name(len(self._digests))
        columns: Mapping[str, Any] = dict(zip(COLUMNS, zip(*self._last, strict=True), strict=True))
        frame = pl.DataFrame(
            [
                _lists(values)
                if name == "counts"
                else pl.Series(name, [*values], dtype=COLUMNS[name])
                for name, values in columns.items()
            ]
        )
        try:
            write_part(path, frame)
        except (pl.exceptions.PolarsError, OSError) as error:
            raise TraceStorageError(
                f"cannot write {self.folder}: {error}; try another folder or free some space"
            ) from error
        return digest(path)


def _lists(counts: tuple[np.ndarray | None, ...]) -> pl.Series:
    """A list of counts for each file, null where it has none."""
    values = [None if item is None else pl.Series(item, dtype=pl.UInt32) for item in counts]
    return pl.Series("counts", values, dtype=COLUMNS["counts"])
