"""Where the data files of a trace lie, and what of them was compared with the manifest.

``FolderFiles`` reads them where they lie; ``remote_files.RemoteFiles`` fetches ranges of an object
store; ``clean_copies.CleanCopies`` checks and copies each file of a trace from outside when it is
first read. An object travels to workers, which compare on their own: it takes no state along.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import polars as pl

from moe_lab.trace.manifest import check_bytes, guarded

Entry = Mapping[str, Any]
"""A row of ``Manifest.entries``, with the columns that ``DataFiles.needs`` names."""
TABLES = ("tokens", "routing")


class DataFiles(Protocol):
    """The data files of one trace. Two objects are equal where they read the same files."""

    @property
    def needs(self) -> tuple[str, ...]:
        """Columns of ``manifest.LONG`` that an entry must have."""
        ...

    def read(
        self, name: str, entry: Entry, columns: Sequence[str] | None, whole: bool = False
    ) -> pl.DataFrame:
        """The rows of one file; nothing is decoded that was not compared with its checksum.

        Args:
            name: its relative path.
            entry: what the manifest lists of it.
            columns: what to read, None: all.
            whole: compare all of the file, whatever is read.

        Raises:
            TraceError: the file is missing, or is not as it was written.
            StorageError: an object store does not answer.
        """
        ...

    def path(self, name: str, entry: Entry) -> Path | None:
        """Where the file lies on this machine, compared; None: not here. Raises as ``read``."""
        ...

    def schema(self, name: str, entry: Entry) -> pl.Schema:
        """The columns of a file. Raises as ``read``."""
        ...

    def names(self) -> set[str]:
        """Relative paths of the Parquet files that are there."""
        ...


@dataclass(frozen=True)
class FolderFiles:
    """Files that are read where they lie.

    Attributes:
        folder: of the trace.
        verify: compare each file with its checksum when it is first read.
        verified: the names of those that were compared.
    """

    folder: Path
    verify: bool = True
    verified: set[str] = field(default_factory=set, repr=False, compare=False)

    needs = ()

    def __reduce__(self) -> tuple[Any, ...]:
        return FolderFiles, (self.folder, self.verify)

    def path(self, name: str, entry: Entry) -> Path:
        path = self.folder / name
        if self.verify and name not in self.verified:
            check_bytes(path, name, entry)
            self.verified.add(name)
        return path

    def read(
        self, name: str, entry: Entry, columns: Sequence[str] | None, whole: bool = False
    ) -> pl.DataFrame:
        return rows_of_file(name, self.path(name, entry), columns)

    def schema(self, name: str, entry: Entry) -> pl.Schema:
        return schema_of_file(name, self.path(name, entry))

    def names(self) -> set[str]:
        return files_on_disk(self.folder)


def files_on_disk(folder: Path) -> set[str]:
    """Relative paths of the Parquet data files of a trace."""
    return set(parquet_below(folder, *TABLES))


def parquet_below(folder: Path, *tables: str) -> list[str]:
    """Relative paths of the Parquet files in some folders of ``folder``, in order."""
    paths = (path for table in tables for path in (folder / table).rglob("*.parquet"))
    return sorted(path.relative_to(folder).as_posix() for path in paths)


def rows_of_file(
    name: str, source: Path | io.BytesIO, columns: Sequence[str] | None
) -> pl.DataFrame:
    """The rows of a Parquet file that is trusted; damage is a ``TraceError`` that names it."""
    wanted = None if columns is None else [*columns]
    return guarded(
        name,
        lambda: pl.read_parquet(source, columns=wanted, glob=False, hive_partitioning=False),
    )


def schema_of_file(name: str, source: Path | io.BytesIO) -> pl.Schema:
    """The columns of a Parquet file, as ``rows_of_file`` reads it."""
    return guarded(name, lambda: pl.Schema(pl.read_parquet_schema(source)))
