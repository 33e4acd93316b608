"""A trace from outside, on this side of the wall: a child process with limits checks each of its
files when it is first read and writes a clean copy, which is what this process reads.

    clean-traces/<digest>/                       in the cache folder; named by what was opened
        meta.json, manifest/                     checked and written again at opening
        routing/layer=3/part-00000.parquet       each file, once it was read
        routing/layer=3/part-00000.parquet.json  its digest under this user's key, written last

What the child does is in ``foreign.py``.
"""

import atexit
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from moe_lab.errors import TraceError
from moe_lab.files import default_cache_dir
from moe_lab.sandbox import call, regular_size
from moe_lab.trace.data_files import Entry, FolderFiles, rows_of_file, schema_of_file
from moe_lab.trace.manifest import check_bytes, file_name
from moe_lab.trace.remote_files import RemoteFiles
from moe_lab.trace.schema import TraceMeta
from moe_lab.trace.seal import digest, seal, unsealed

COPY_DAYS, COPY_BYTES = 30, 20 * 10**9
"""How long clean copies of traces from outside are kept, and how many bytes of them."""
_one_at_a_time = threading.RLock()


@dataclass(frozen=True)
class CleanCopies:
    """The data files of a trace from outside.

    Attributes:
        source: where they lie; it is not trusted.
        copy: the folder of clean copies.
        meta: of the trace.
        first_tokens: the entry of the first token file, whose columns the others must have.
        verified: names of the copies that were compared with their checksum.
    """

    source: FolderFiles | RemoteFiles
    copy: Path
    meta: TraceMeta = field(compare=False)
    first_tokens: dict[str, Any] | None = field(default=None, compare=False)
    verified: set[str] = field(default_factory=set, repr=False, compare=False)

    needs = ("counts",)

    def __reduce__(self) -> tuple[Any, ...]:
        return CleanCopies, (self.source, self.copy, self.meta, self.first_tokens)

    def names(self) -> set[str]:
        return self.source.names()

    def read(
        self, name: str, entry: Entry, columns: Sequence[str] | None, whole: bool = False
    ) -> pl.DataFrame:
        return rows_of_file(name, self.path(name, entry), columns)

    def schema(self, name: str, entry: Entry) -> pl.Schema:
        return schema_of_file(name, self.path(name, entry))

    def path(self, name: str, entry: Entry) -> Path:
        path = self.copy / name
        if name not in self.verified:
            with _one_at_a_time:  # two threads may need the first token file
                if not self._is_whole(path, name):
                    self._take(name, entry)
                self.verified.add(name)
        return path

    def compare_source(self, name: str, entry: Entry) -> None:
        """Raise ``TraceError`` unless the file outside is still as listed."""
        if isinstance(self.source, FolderFiles):
            check_bytes(self.source.folder / name, name, entry)

    def _is_whole(self, path: Path, name: str) -> bool:
        """Whether there is a clean copy that is as it was written."""
        marked = unsealed(mark_of(path))
        try:
            return marked == {self._marked(name): digest(path)}
        except OSError:
            return False

    def _marked(self, name: str) -> str:
        return f"{self.copy.name}/{name}"

    def _take(self, name: str, entry: Entry) -> None:
        """Have the child check a file and write its clean copy."""
        first = None
        if entry["layer"] is None and self.first_tokens is not None:
            first_name = file_name(None, self.first_tokens["part"])
            if first_name != name:
                first = self.path(first_name, self.first_tokens)
        target = self.copy / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.copy, ignore_cleanup_errors=True) as temporary:
            if isinstance(self.source, RemoteFiles):
                source = Path(temporary) / "fetched"
                self.source.fetch(name, entry, source)
            else:
                source = self.source.folder / name
            size = regular_size(source, TraceError)
            listed = {**entry, "digest": entry["digest"] and entry["digest"].hex()}
            call(
                "moe_lab.trace.foreign:clean_file",
                (str(source), str(target), name, listed, self.meta.to_dict(), first and str(first)),
                TraceError,
                name,
                size=size,
            )
        seal(mark_of(target), {self._marked(name): digest(target)})


def mark_of(path: Path) -> Path:
    """The file that says what a clean copy was when it was written."""
    return path.with_name(path.name + ".json")


def place_of_copies() -> Path:
    """The folder of clean copies: in the cache, or, where that takes no file, a temporary one that
    lasts as long as this process.
    """
    folder = default_cache_dir() / "clean-traces"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        folder = Path(tempfile.mkdtemp(prefix="moe_lab-traces-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def prune(place: Path) -> None:
    """Remove the copies that were not opened for ``COPY_DAYS``, and the oldest ones while all take
    more than ``COPY_BYTES``; none that was opened within a day, which may be in use.
    """
    now, total = time.time(), 0
    with suppress(OSError):
        ages = {path: (now - path.stat().st_mtime) / 86400 for path in place.iterdir()}
        for path in sorted(ages, key=lambda path: ages[path]):
            total += sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
            if ages[path] > COPY_DAYS or (total > COPY_BYTES and ages[path] > 1):
                shutil.rmtree(path, ignore_errors=True)
