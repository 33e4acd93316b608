"""A trace on an object store, read in place: the manifest at opening, ranges of the data files when
an analysis asks. The client is that of the run store (``moe_lab.runs.bucket``).

The store is not trusted. A range is a piece of a file (``moe_lab.trace.pieces``), and no byte is
decoded that was not compared with the digest of its piece, or of the whole file where the manifest
lists no pieces. An object that was replaced is therefore an error and never a wrong number.
"""

import io
import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import polars as pl

from moe_lab.errors import TraceError, expected, require
from moe_lab.runs.bucket import READ_AT_ONCE, Bucket
from moe_lab.trace.checks import MAX_META_BYTES
from moe_lab.trace.data_files import TABLES, Entry, rows_of_file, schema_of_file
from moe_lab.trace.kept_pieces import KeptPieces
from moe_lab.trace.manifest import (
    MANIFEST,
    MANIFEST_PART,
    REWRITE,
    check_bytes,
    check_content,
    check_sizes,
)
from moe_lab.trace.pieces import Piece, unpacked
from moe_lab.trace.publish import put_in_place
from moe_lab.trace.schema import META_FILE
from moe_lab.trace.seal import MAX_SEAL_BYTES, SEAL_FILE, new_digest

SMALL_BYTES = 2**16
"""Parts of a manifest up to this size are fetched many at once."""
OTHER = "another (it was damaged or replaced)"


@dataclass(frozen=True)
class RemoteFiles:
    """The data files of a trace at an fsspec URL.

    Attributes:
        url: of the trace.
        kept: pieces that were fetched before and are not fetched again.
        orders: the columns of the last file that was read, by table, in their order.
    """

    url: str
    kept: KeptPieces | None = None
    orders: dict[str, list[str]] = field(default_factory=dict, repr=False, compare=False)

    needs = ("pieces",)

    def __reduce__(self) -> tuple[Any, ...]:
        return RemoteFiles, (self.url, self.kept)

    @cached_property
    def bucket(self) -> Bucket:
        """The store's client of this process."""
        return Bucket(self.url)

    def path(self, name: str, entry: Entry) -> None:
        return None

    def names(self) -> set[str]:
        found = (name for table in TABLES for name in self.bucket.names(table))
        return {name for name in found if name.endswith(".parquet")}

    def read(
        self, name: str, entry: Entry, columns: Sequence[str] | None, whole: bool = False
    ) -> pl.DataFrame:
        pieces = unpacked(entry["pieces"] or b"")
        if whole or (pieces and columns is None):
            content = self._whole(name, entry)
        elif pieces and columns is not None:
            content = self._with_columns(name, entry, pieces, columns)
        else:
            content = self._kept_whole(name, entry)
        return rows_of_file(name, io.BytesIO(content), columns)

    def schema(self, name: str, entry: Entry) -> pl.Schema:
        """The columns of a file, from its last piece."""
        pieces = unpacked(entry["pieces"] or b"")
        content = (
            self._sparse(name, entry, pieces[-1:]) if pieces else self._kept_whole(name, entry)
        )
        return schema_of_file(name, io.BytesIO(content))

    def fetch(self, name: str, entry: Entry, target: Path) -> None:
        """Copy a file to ``target``, compared with its size and checksum. Raises as ``read``."""
        self._check_size(name, entry)
        try:
            self.bucket.download(name, target)
        except FileNotFoundError as error:
            raise _missing(name) from error
        check_bytes(target, name, entry)

    def _kept_whole(self, name: str, entry: Entry) -> bytes:
        """A file without pieces."""
        if self.kept is None:
            return self._whole(name, entry)
        piece = Piece(0, entry["bytes"], entry["digest"])
        with self.kept.alone(f"{self.url}/{name}"):
            content = self.kept.read(piece)
            if content is None:
                content = self._whole(name, entry)
                self.kept.keep(piece, content)
        return content

    def _whole(self, name: str, entry: Entry) -> bytes:
        self._check_size(name, entry)
        content = self.bucket.read(name, entry["bytes"])
        if content is None:
            raise _missing(name)
        check_content(io.BytesIO(content), len(content), name, entry)
        return content

    def _check_size(self, name: str, entry: Entry) -> None:
        """Before memory or disk is taken: an object may have any size."""
        size = self.bucket.size(name)
        if size is None:
            raise _missing(name)
        wanted = f"{entry['bytes']} bytes as written"
        require(
            size == entry["bytes"],
            wanted,
            f"{size} bytes (damaged)",
            REWRITE,
            error=TraceError,
            where=name,
        )

    def _with_columns(
        self, name: str, entry: Entry, pieces: list[Piece], columns: Sequence[str]
    ) -> bytearray:
        """A file in which only the pieces of ``columns`` and the footer are there.

        Files of one table have their columns in one order. It is not known before the first of them
        is read, whose footer is then fetched on its own.
        """
        table = name.partition("/")[0]
        order = self.orders.get(table)
        if order is None or len(order) + 1 != len(pieces):
            order = self.orders[table] = self.schema(name, entry).names()
        while True:
            wanted = [
                piece for column, piece in zip(order, pieces, strict=False) if column in columns
            ]
            content = self._sparse(name, entry, [*wanted, pieces[-1]])
            found = schema_of_file(name, io.BytesIO(content)).names()
            if found == order:
                return content
            order = self.orders[table] = found

    def _sparse(self, name: str, entry: Entry, pieces: Sequence[Piece]) -> bytearray:
        """A file of the listed size in which only some pieces are there; the rest is zero."""
        content = bytearray(entry["bytes"])  # pages that nobody touches take no memory
        missing = self._copy_kept(content, pieces)
        if missing and self.kept is not None:
            with self.kept.alone(f"{self.url}/{name}"):
                self._fetch(name, content, self._copy_kept(content, missing))
        elif missing:
            self._fetch(name, content, missing)
        return content

    def _copy_kept(self, content: bytearray, pieces: Sequence[Piece]) -> Sequence[Piece]:
        """Put the kept pieces of a file into ``content``; returns the others."""
        if self.kept is None:
            return pieces
        missing = []
        for piece in pieces:
            known = self.kept.read(piece)
            if known is None:
                missing.append(piece)
            else:
                content[piece.start : piece.end] = known
        return missing

    def _fetch(self, name: str, content: bytearray, pieces: Sequence[Piece]) -> None:
        """Put pieces of a file into ``content``, compared; neighbours are one range."""
        spans: list[list[Piece]] = []
        for piece in pieces:
            if spans and spans[-1][-1].end == piece.start:
                spans[-1].append(piece)
            else:
                spans.append([piece])
        try:
            places = [(span[0].start, span[-1].end) for span in spans]
            parts = self.bucket.ranges(name, places) if places else []
        except FileNotFoundError as error:
            raise _missing(name) from error
        for span, part in zip(spans, parts, strict=True):
            first = span[0].start
            for piece in span:
                found = part[piece.start - first : piece.end - first]
                wanted = f"bytes {piece.start} to {piece.end} as written"
                require(piece.fits(found), wanted, OTHER, REWRITE, error=TraceError, where=name)
                if self.kept is not None:
                    self.kept.keep(piece, found)
            content[first : first + len(part)] = part


def fetch_listing(files: RemoteFiles, place: Path) -> Path:
    """A folder in ``place`` with ``meta.json``, the seal and the manifest of a trace, as they are
    on the object store now; they are fetched again where they changed.

    Raises:
        TraceError: no trace there, or one whose listing is too large.
        StorageError, RunError: the store does not answer, refuses, or cannot be opened.
    """
    bucket = files.bucket
    sizes = {
        name: size
        for name, size in bucket.sizes(MANIFEST).items()
        if MANIFEST_PART.fullmatch(name.removeprefix(f"{MANIFEST}/"))
    }
    check_sizes([*sizes.values()], files.url)
    for name, most in ((META_FILE, MAX_META_BYTES), (SEAL_FILE, MAX_SEAL_BYTES)):
        size = bucket.size(name)
        if size is not None:
            sizes[name] = size
            require(size <= most, f"{name} of at most {most} bytes", size, error=TraceError)
    if META_FILE not in sizes:
        what, hint = f"a trace at {files.url}", f"the URL of the folder that holds {META_FILE}"
        raise TraceError(expected(what, f"no {META_FILE}", hint), field="path")
    small = bucket.read_many(name for name in (META_FILE, SEAL_FILE) if name in sizes)
    key = new_digest()
    key.update(b" ".join([files.url.encode(), *(small[name] for name in sorted(small))]))
    folder = place / key.hexdigest()
    if sizes == {name: size for name in sizes if (size := _size(folder / name)) is not None}:
        with suppress(OSError):
            os.utime(folder)  # when it was opened last
        return folder
    with tempfile.TemporaryDirectory(dir=place, ignore_cleanup_errors=True) as temporary:
        written = Path(temporary) / "listing"
        (written / MANIFEST).mkdir(parents=True)
        for name, content in small.items():
            (written / name).write_bytes(content)
        _fetch_parts(bucket, {name: sizes[name] for name in sizes if name not in small}, written)
        put_in_place(written, folder)
    return folder


def _fetch_parts(bucket: Bucket, sizes: Mapping[str, int], folder: Path) -> None:
    """Copy objects of these sizes below ``folder``, small ones in few calls."""
    small = [name for name in sizes if sizes[name] <= SMALL_BYTES]
    for first in range(0, len(small), READ_AT_ONCE):
        for name, content in bucket.read_many(small[first : first + READ_AT_ONCE]).items():
            if len(content) == sizes[name]:  # else it came short, and is read again
                (folder / name).write_bytes(content)
    for name in sizes:
        try:
            if not (folder / name).exists():
                bucket.download(name, folder / name)
        except FileNotFoundError as error:
            raise _missing(name) from error


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _missing(name: str) -> TraceError:
    return TraceError(f"{name}: " + expected("the file that the trace lists", "none", REWRITE))
