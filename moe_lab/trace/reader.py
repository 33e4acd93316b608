"""``open_trace``: a folder or URL of Parquet in, a ``Trace`` out. Neither is trusted.

A trace under this user's seal is read where it lies: opening reads its manifest, and the checksum
of a data file is compared when the file is first read (``data_files``, ``remote_files``). Of a
trace from outside, a child process checks the manifest at opening, and each file when it is first
read (``clean_copies``). Whatever is wrong is one line that names the file or layer.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from moe_lab import __version__
from moe_lab.errors import TraceError, expected, require
from moe_lab.runs.bucket import folder_of
from moe_lab.runs.owners import temporary_folder
from moe_lab.sandbox import call, regular_size
from moe_lab.trace.checks import Header, read_meta
from moe_lab.trace.clean_copies import CleanCopies, place_of_copies, prune
from moe_lab.trace.data_files import DataFiles, FolderFiles, parquet_below
from moe_lab.trace.kept_pieces import KEPT_BYTES, KeptPieces
from moe_lab.trace.manifest import (
    MANIFEST,
    Manifest,
    check_layers,
    check_sizes,
    file_name,
    of_parts,
    read_manifest,
)
from moe_lab.trace.opened_trace import Trace
from moe_lab.trace.publish import INCOMPLETE_SUFFIX, put_in_place, put_where_none_is
from moe_lab.trace.remote_files import RemoteFiles, fetch_listing
from moe_lab.trace.schema import META_FILE, SCHEMA_VERSION, ManifestMeta
from moe_lab.trace.seal import digest, new_digest, seal, sealed_files, unsealed, write_seal

CHECKED_AT_OPENING = 2**28
"""Bytes of data: a trace from outside in a folder of at most so many is checked whole when it is
opened, a larger one, or one on an object store, file by file.
"""
CHECKED = "checked.json"
T = TypeVar("T")


def open_trace(folder: Path | str, *, allow_incomplete: bool = False, verify: bool = True) -> Trace:
    """Open the trace at ``folder``.

    A trace under this user's seal is read where it lies, and opening it reads its manifest alone:
    ``Trace.check`` reads all of it. Any other is checked, and copied file by file when it is first
    read, by a child process with limits (``moe_lab.trace.foreign``): the copies stay in the cache
    folder.

    Args:
        folder: a trace folder, or its URL on an object store (``s3://bucket/traces/x``; extra
            ``store``). Of one on an object store, an analysis fetches the columns that it reads.
        allow_incomplete: also open what is left of an interrupted trace.
        verify: compare each file with its checksum when it is first read. False is for a trace that
            this process has just written in a folder.

    Raises:
        TraceError: no trace there, or one that is incomplete, damaged or of another version.
        StorageError: an object store does not answer or refuses.
        RunError: a URL that cannot be opened, or a package that it needs is missing.
    """
    place = folder_of(folder)
    if place is None:
        storage, copies = RemoteFiles(str(folder).rstrip("/")), place_of_copies()
        name, listing = storage.url, fetch_listing(storage, copies)
        prune(copies)
    else:
        name = listing = place.absolute()
        storage = FolderFiles(listing, verify)
        _require_trace(listing)
    trace = _sealed(name, listing, storage) or _cleaned(name, listing, storage, allow_incomplete)
    require(
        trace.complete or allow_incomplete,
        f"a complete trace at {name}",
        "one whose writing was interrupted",
        "allow_incomplete=True to look at it",
        error=TraceError,
        field="complete",
    )
    return trace


@contextmanager
def fetched_once(sources: Sequence[T], most: int = KEPT_BYTES) -> Iterator[list[T]]:
    """The same sources; what is fetched of traces on an object store among them is kept until this
    ends, in a private temporary folder, and not fetched again.

    Args:
        sources: traces, and other things, which stay as they are.
        most: bytes that are kept, at most; no more than half of what is free in that folder.
    """
    with ExitStack() as stack:
        found: list[Any] = [*sources]
        fetched = [at for at, source in enumerate(found) if _fetches(source)]
        if fetched:
            place = stack.enter_context(temporary_folder("pieces"))
            kept = KeptPieces(place, min(most, shutil.disk_usage(place).free // 2))
            for at in fetched:
                found[at] = replace(found[at], storage=replace(found[at].storage, kept=kept))
        yield found


def _fetches(source: object) -> bool:
    storage = source.storage if isinstance(source, Trace) else None
    return isinstance(storage, RemoteFiles) and storage.kept is None


def is_trace(place: Path | str) -> bool:
    """Whether a trace is at a folder or URL. Raises ``StorageError`` and ``RunError`` as
    ``open_trace``.
    """
    folder = folder_of(place)
    if folder is None:
        return RemoteFiles(str(place)).bucket.size(META_FILE) is not None
    return (folder / META_FILE).is_file()


def _require_trace(folder: Path) -> None:
    if (folder / META_FILE).is_file():
        return
    interrupted = folder.parent / (folder.name + INCOMPLETE_SUFFIX)
    hint = (
        f"{interrupted} with allow_incomplete=True"
        if (interrupted / META_FILE).is_file()
        else "a folder that moe-lab trace wrote"
    )
    got = "a folder without meta.json" if folder.is_dir() else "nothing"
    raise TraceError(expected(f"a trace at {folder}", got, hint), field="path")


def _sealed(name: Path | str, listing: Path, storage: DataFiles) -> Trace | None:
    """The trace whose ``meta.json`` and manifest lie in ``listing``, or None where they are not as
    this user's moe_lab wrote them.

    Raises ``TraceError`` where the manifest is not the one that ``meta.json`` names.
    """
    digests = sealed_files(listing)
    if digests is None:
        return None
    header = read_meta(listing / META_FILE)
    if not isinstance(header.listed, ManifestMeta) and set(header.listed) - set(digests):
        return None
    try:
        manifest = _manifest(listing, header, digests)
        listed = set(manifest.entries["layer"].drop_nulls())
        check_layers(header.meta, listed, header.complete, MANIFEST)
    except TraceError:
        if header.complete:
            raise
        return None  # its writer was killed between the manifest and meta.json
    return Trace(name, header.meta, manifest, header.complete, storage)


def _manifest(listing: Path, header: Header, digests: Mapping[str, str] | None) -> Manifest:
    if isinstance(header.listed, ManifestMeta):
        return read_manifest(listing, header.listed, strict=True)
    return of_parts(header.listed, digests)


def _cleaned(
    name: Path | str, listing: Path, source: FolderFiles | RemoteFiles, allow_incomplete: bool
) -> Trace:
    """A trace from outside, read from clean copies."""
    place = place_of_copies()
    parts = parquet_below(listing, MANIFEST)
    sizes = [regular_size(listing / one, TraceError) for one in parts]
    check_sizes(sizes, name)
    copy = place / _key(name, listing, parts)
    if sealed_files(copy) is None:
        with tempfile.TemporaryDirectory(dir=place, ignore_cleanup_errors=True) as temporary:
            written = Path(temporary) / "trace"
            call(
                "moe_lab.trace.foreign:clean_listing",
                (str(listing), str(written)),
                TraceError,
                str(name),
                size=sum(sizes),
                largest=max(sizes, default=0),
            )
            write_seal(written)
            # Another process may have made it meanwhile, and reads data files from it by now.
            if not put_where_none_is(written, copy) and sealed_files(copy) is None:
                put_in_place(written, copy)
        prune(place)
    with suppress(OSError):
        os.utime(copy)  # when it was opened last
    header = read_meta(copy / META_FILE)
    manifest = _manifest(copy, header, None)
    tokens = manifest.of_layer(None)
    first = None if tokens.is_empty() else tokens.row(0, named=True)
    if first is not None:
        first = manifest.with_long(tokens[:1], CleanCopies.needs).row(0, named=True)
    copies = CleanCopies(source, copy, header.meta, first)
    trace = Trace(name, header.meta, manifest, header.complete, copies)
    data = int(manifest.entries["bytes"].sum())
    wanted = header.complete or allow_incomplete
    if wanted and isinstance(source, FolderFiles) and data <= CHECKED_AT_OPENING:
        _check_whole(trace, copies)
    return trace


def _key(name: Path | str, listing: Path, parts: Sequence[str]) -> str:
    """The name of the clean copies of a trace: other versions check by other rules."""
    key = new_digest()
    key.update(f"{__version__} {SCHEMA_VERSION} {name} ".encode(errors="surrogateescape"))
    regular_size(listing / META_FILE, TraceError)
    for one in [*parts, META_FILE]:
        try:
            key.update(f"{one} {digest(listing / one)} ".encode())
        except OSError as error:
            raise TraceError(f"cannot read {listing}: {error.strerror or error}") from error
    return key.hexdigest()


def _check_whole(trace: Trace, copies: CleanCopies) -> None:
    """``Trace.check`` when it is first opened, and that no file has changed since."""
    mark, found = copies.copy / CHECKED, {f"{copies.copy.name}/{CHECKED}": ""}
    if unsealed(mark) != found:
        trace.check()
        seal(mark, found)
        return
    for entry in trace.manifest.entries.iter_rows(named=True):
        copies.compare_source(file_name(entry["layer"], entry["part"]), entry)
