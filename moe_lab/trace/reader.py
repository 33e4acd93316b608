"""``open_trace``: a folder of Parquet in, lazy frames out. The folder is not trusted.

A trace under this user's seal is read where it lies: opening reads its manifest, and the checksum
of a data file is compared when the file is first read. A trace from outside is read once by a child
process and then from a clean copy. ``Trace.check`` reads the rows and proves conservation. Whatever
is wrong is one ``TraceError`` line that names the file or layer.
"""

import atexit
import os
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from textwrap import shorten
from typing import Any, TypeVar

import numpy as np
import polars as pl

from moe_lab import __version__
from moe_lab.errors import TraceError, expected, require
from moe_lab.files import default_cache_dir
from moe_lab.html_table import html_table
from moe_lab.sandbox import call, regular_size
from moe_lab.trace.checks import check_rows, check_tokens, read_meta
from moe_lab.trace.manifest import (
    MANIFEST,
    NAME,
    REWRITE,
    Manifest,
    check_bytes,
    file_name,
    guarded,
    of_file_name,
    of_parts,
    read_manifest,
)
from moe_lab.trace.publish import INCOMPLETE_SUFFIX, put_in_place
from moe_lab.trace.rows import key_checksum
from moe_lab.trace.schema import (
    META_FILE,
    ROUTED,
    ROUTING_COLUMNS,
    SCHEMA_VERSION,
    TOKEN_COLUMNS,
    LayerMeta,
    ManifestMeta,
    TraceMeta,
)
from moe_lab.trace.seal import digest, new_digest, sealed_files

LAYER_TYPE = pl.UInt32()
READ_AHEAD = 2
"""Files that are read at once: decoding is most of the work, and more would only hold more memory.
"""

COPY_DAYS, COPY_BYTES = 30, 20 * 10**9
"""How long clean copies of traces from outside are kept, and how many bytes of them."""

R = TypeVar("R")


@dataclass(frozen=True)
class Trace:
    """An opened trace.

    Attributes:
        folder: the folder that was opened, which names the trace.
        meta: provenance and layers.
        manifest: its files, with rows, checksums and counts per expert.
        complete: False only for a trace opened with ``allow_incomplete=True`` that was interrupted.
        data: where the files lie, if that is a clean copy of a trace from outside.
        verified: the files whose checksum this object has compared; None: none is to be compared.
    """

    folder: Path
    meta: TraceMeta
    manifest: Manifest
    complete: bool = True
    data: Path | None = None
    verified: set[str] | None = field(default_factory=set, repr=False, compare=False)

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
    def tokens(self) -> pl.LazyFrame:
        """One row per token: doc, pos, token_id, loss and further columns.

        No rows where the trace has no token table. Making the frame compares the checksums of the
        files that it scans.
        """
        paths = self._paths([None])
        return (
            pl.scan_parquet(paths, glob=False, hive_partitioning=False)
            if paths
            else pl.LazyFrame(schema=TOKEN_COLUMNS)
        )

    @property
    def routing(self) -> pl.LazyFrame:
        """One row per layer and token: layer u32, then ``schema.ROUTING_COLUMNS`` (and
        ``output_ratio`` where it was recorded).

        Making the frame compares the checksums of all routing files; ``batches`` reads the files of
        one layer alone.
        """
        paths = self._paths(sorted(layer.layer for layer in self.meta.layers))
        if not paths:
            return pl.LazyFrame(schema={"layer": LAYER_TYPE, **ROUTING_COLUMNS})
        scan = pl.scan_parquet(
            paths, glob=False, hive_partitioning=True, hive_schema={"layer": LAYER_TYPE}
        )
        return scan.select("layer", *self.meta.routing_schema())

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

        Raises ``TraceError`` where the file is missing or is not as it was written.
        """
        layer, part = of_file_name(name)
        entry = self.manifest.entries.filter(
            pl.col("layer").eq_missing(layer), pl.col("part") == part
        )
        require(not entry.is_empty(), "a file of the trace", name, error=TraceError, field="name")
        return self._verified(name, entry.row(0, named=True))

    def read(self, name: str, columns: Sequence[str] | None = None) -> pl.DataFrame:
        """The rows of one file of ``files``: at most ``schema.MAX_ROWS_PER_PART``.

        Raises ``TraceError`` as ``path``.
        """
        return _rows(name, self.path(name), columns)

    def batches(
        self, layer: int | None, columns: Sequence[str], ahead: int = READ_AHEAD
    ) -> Iterator[pl.DataFrame]:
        """The rows of one layer (None: of ``tokens``), one file at a time: at most
        ``schema.MAX_ROWS_PER_PART`` rows each.

        The next ``ahead`` files are read while the caller works on the last one; 0 is for a caller
        that reads many layers side by side.
        """

        def read(entry: dict[str, Any]) -> pl.DataFrame:
            name = file_name(layer, entry["part"])
            return _rows(name, self._verified(name, entry), columns)

        entries = self.manifest.of_layer(layer).iter_rows(named=True)
        return _read_ahead([partial(read, entry) for entry in entries], ahead)

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
        check_files(self.data or self.folder, self.manifest, self.complete)
        reference: tuple[int, int] | None = None
        if self.has_tokens:
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

    def _whole_files(self, layer: int | None, columns: Sequence[str]) -> Iterator[pl.DataFrame]:
        """``batches``, each of as many rows as are listed."""
        entries = self.manifest.of_layer(layer).select("part", "rows").iter_rows()
        for (part, rows), batch in zip(entries, self.batches(layer, columns), strict=True):
            require(
                batch.height == rows,
                f"{rows} rows as recorded",
                batch.height,
                REWRITE,
                error=TraceError,
                where=file_name(layer, part),
            )
            yield batch

    def _check_token_rows(self) -> tuple[int, int]:
        rows, keys = 0, 0
        routed = [ROUTED] if ROUTED in self.tokens.collect_schema() else []
        for batch in self._whole_files(None, [*TOKEN_COLUMNS, *routed]):
            check_tokens(batch, self.meta)
            batch = batch.filter(ROUTED) if routed else batch
            rows, keys = (
                rows + batch.height,
                keys + key_checksum(batch["doc"].to_numpy(), batch["pos"].to_numpy()),
            )
        return rows, keys % 2**64

    def _check_layer(self, layer: LayerMeta) -> tuple[int, int]:
        rows, keys, counts = 0, 0, []
        for batch in self._whole_files(layer.layer, list(self.meta.routing_schema())):
            counts.append(check_rows(layer, batch, self.meta))
            rows, keys = (
                rows + batch.height,
                keys + key_checksum(batch["doc"].to_numpy(), batch["pos"].to_numpy()),
            )
        check_counts(layer, self.manifest, np.array(counts).reshape(-1, layer.num_choices))
        return rows, keys % 2**64

    def _check_unique_keys(self) -> None:
        """One table is enough: the others have the same multiset of keys."""
        first = self.meta.layers[0].layer
        if document_runs(self.batches(None if self.has_tokens else first, ["doc", "pos"])):
            return  # rising positions in documents that do not return: no set of keys is needed
        frame = self.tokens if self.has_tokens else self.routing.filter(pl.col("layer") == first)
        keys = frame.select(key=pl.col("doc").cast(pl.UInt64) * 2**32 + pl.col("pos"))
        rows, unique = (
            keys.select(pl.len(), pl.col("key").n_unique().alias("unique"))
            .collect(engine="streaming")
            .row(0)
        )
        require(
            rows == unique,
            "each (doc, pos) once",
            f"{rows - unique} repeated",
            "giving each sequence its own doc or pos range",
            error=TraceError,
        )

    def _paths(self, layers: Sequence[int | None]) -> list[Path]:
        """The files of some layers (None: of ``tokens``), verified, several at once."""
        with ThreadPoolExecutor(READ_AHEAD) as pool:
            waiting = [
                pool.submit(self._verified, file_name(layer, entry["part"]), entry)
                for layer in layers
                for entry in self.manifest.of_layer(layer).iter_rows(named=True)
            ]
            return [path.result() for path in waiting]

    def _verified(self, name: str, entry: Mapping[str, Any]) -> Path:
        """The path of a file; the first call compares its size and checksum."""
        path = (self.data or self.folder) / name
        if self.verified is not None and name not in self.verified:
            check_bytes(path, name, entry)
            self.verified.add(name)
        return path


def open_trace(folder: Path | str, *, allow_incomplete: bool = False, verify: bool = True) -> Trace:
    """Open the trace at ``folder``.

    A trace under this user's seal is read where it lies, and opening it reads its manifest alone:
    ``Trace.check`` reads all of it. Any other is checked row by row and copied
    by a child process with limits (``moe_lab.trace.foreign``), once: the copy stays in the cache
    folder.

    Args:
        folder: a trace folder.
        allow_incomplete: also open what is left of an interrupted trace.
        verify: compare each file with its checksum when it is first read. False is for a trace that
            this process has just written.

    Raises:
        TraceError: no trace there, or one that is incomplete, damaged or of another version.
    """
    folder = Path(folder).absolute()
    if not (folder / META_FILE).is_file():
        interrupted = folder.parent / (folder.name + INCOMPLETE_SUFFIX)
        hint = (
            f"{interrupted} with allow_incomplete=True"
            if (interrupted / META_FILE).is_file()
            else "the folder that holds meta.json"
        )
        got = "a folder without meta.json" if folder.is_dir() else "nothing"
        raise TraceError(expected(f"a trace at {folder}", got, hint), field="path")
    trace = _sealed(folder, verify) or _cleaned(folder, verify)
    require(
        trace.complete or allow_incomplete,
        f"a complete trace at {folder}",
        "one whose writing was interrupted",
        "allow_incomplete=True to look at it",
        error=TraceError,
        field="complete",
    )
    return trace


def files_on_disk(folder: Path) -> set[str]:
    """Relative paths of the Parquet data files of a trace."""
    return set(_parquet_below(folder, "tokens", "routing"))


def _parquet_below(folder: Path, *tables: str) -> list[str]:
    paths = (path for table in tables for path in (folder / table).rglob("*.parquet"))
    return sorted(path.relative_to(folder).as_posix() for path in paths)


def check_files(folder: Path, manifest: Manifest, complete: bool) -> None:
    """Raise ``TraceError`` unless every listed file is in ``folder`` and, in a complete trace, no
    other: a killed writer leaves a file that it had no time to list.
    """
    listed, on_disk = manifest.names(), files_on_disk(folder)
    if missing := sorted(listed - on_disk):
        got = f"{len(missing)} missing, first {missing[0]}"
        raise TraceError(expected(f"{len(listed)} files", got, REWRITE))
    if complete and (unlisted := sorted(on_disk - listed)):
        got = f"also {unlisted[0][:80]!r}"
        raise TraceError(expected("only the files that the trace lists", got, "removing it"))


def check_counts(layer: LayerMeta, manifest: Manifest, counts_FE: np.ndarray) -> None:
    """Raise ``TraceError``, naming the file, unless the counts of a layer's files, as their rows
    are, equal the listed ones.
    """
    entries = manifest.of_layer(layer.layer)
    if manifest.has_counts:
        listed_FE = manifest.file_counts(layer)
        wanted = "the slots of each expert as listed in the manifest"
    else:
        counts_FE, listed_FE = counts_FE.sum(axis=1)[:, None], entries["slots"].to_numpy()[:, None]
        wanted = "used slots as recorded"
    differing = np.argwhere(counts_FE != listed_FE)
    if len(differing):
        at, expert = differing[0]
        of = f" of expert {expert}" if manifest.has_counts else ""
        raise TraceError(
            f"{file_name(layer.layer, entries['part'][int(at)])}: "
            + expected(f"{wanted}, {listed_FE[at, expert]}{of}", counts_FE[at, expert], REWRITE)
        )


def _sealed(folder: Path, verify: bool) -> Trace | None:
    """The trace at ``folder``, or None where ``meta.json`` is not as this user's moe_lab wrote it.

    Raises ``TraceError`` where the manifest is not the one that it names.
    """
    digests = sealed_files(folder)
    return None if digests is None else _listed(folder, verify, digests)


def _listed(folder: Path, verify: bool, digests: Mapping[str, str] | None = None) -> Trace | None:
    """The trace at ``folder``, which is trusted: opened from its manifest, or with the digests of
    its seal. None where those are incomplete.
    """
    header = read_meta(folder / META_FILE)
    if isinstance(header.listed, ManifestMeta):
        try:
            manifest = read_manifest(folder, header.listed, strict=True)
        except TraceError:
            if header.complete:
                raise
            return None  # its writer was killed between the manifest and meta.json
    elif digests is None or set(header.listed) - set(digests):
        return None
    else:
        manifest = of_parts(header.listed, digests)
    return Trace(folder, header.meta, manifest, header.complete, verified=set() if verify else None)


def _cleaned(folder: Path, verify: bool) -> Trace:
    """The clean copy of a trace from outside, with ``folder`` as its name."""
    names = [*_parquet_below(folder, MANIFEST, "routing", "tokens"), META_FILE]
    sizes = [regular_size(folder / name, TraceError) for name in names]
    key = new_digest()
    key.update(f"{__version__} {SCHEMA_VERSION} ".encode())  # other versions check by other rules
    for name, value in sorted(_digests(folder, names).items()):
        key.update(f"{name} {value} ".encode())
    place = _place_of_copies()
    copy = place / key.hexdigest()
    trace = _sealed(copy, verify)
    if trace is None:
        parquet = [size for name, size in zip(names, sizes, strict=True) if name != META_FILE]
        with tempfile.TemporaryDirectory(dir=place, ignore_cleanup_errors=True) as temporary:
            written = Path(temporary) / "trace"
            call(
                "moe_lab.trace.foreign:clean_copy",
                (str(folder), str(written)),
                TraceError,
                str(folder),
                size=sum(parquet),
                largest=max(parquet, default=0),
            )
            put_in_place(written, copy)
        _prune(place)
        trace = _listed(copy, verify=False)
        assert trace is not None  # a copy has a manifest
    with suppress(OSError):
        os.utime(copy)  # when it was opened last
    return replace(trace, folder=folder, data=copy)


def _digests(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Digest of each file, several at once."""
    names = list(names)
    with ThreadPoolExecutor(READ_AHEAD) as pool:
        try:
            return dict(
                zip(names, pool.map(lambda name: digest(folder / name), names), strict=True)
            )
        except OSError as error:
            raise TraceError(f"cannot read {folder}: {error.strerror or error}") from error


def _prune(place: Path) -> None:
    """Remove the copies that nobody opened for ``COPY_DAYS``, and the oldest ones while all take
    more than ``COPY_BYTES``; none that was opened within a day, which may be in use.
    """
    now, total = time.time(), 0
    with suppress(OSError):
        ages = {path: (now - path.stat().st_mtime) / 86400 for path in place.iterdir()}
        for path in sorted(ages, key=lambda path: ages[path]):
            total += sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
            if ages[path] > COPY_DAYS or (total > COPY_BYTES and ages[path] > 1):
                shutil.rmtree(path, ignore_errors=True)


def _place_of_copies() -> Path:
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


def _rows(name: str, path: Path, columns: Sequence[str] | None) -> pl.DataFrame:
    wanted = None if columns is None else [*columns]
    return guarded(
        name,
        lambda: pl.read_parquet(path, columns=wanted, glob=False, hive_partitioning=False),
    )
