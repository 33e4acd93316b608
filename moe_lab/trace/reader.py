"""``open_trace``: a folder of Parquet in, lazy frames out. The folder is not trusted.

Files under this user's seal are read where they lie; a trace from outside is read once by a child
process and then from a clean copy. ``Trace.check`` reads the rows and proves conservation. Whatever
is wrong is one ``TraceError`` line that names the file or layer.
"""

import atexit
import os
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import TypeVar

import numpy as np
import polars as pl

from moe_lab import __version__
from moe_lab.errors import TraceError, expected, require
from moe_lab.files import default_cache_dir
from moe_lab.html_table import html_table
from moe_lab.sandbox import call, regular_size
from moe_lab.trace.checks import check_rows, check_tokens, read_meta
from moe_lab.trace.publish import INCOMPLETE_SUFFIX, put_in_place
from moe_lab.trace.rows import key_checksum
from moe_lab.trace.schema import (
    META_FILE,
    ROUTED,
    ROUTING_COLUMNS,
    SCHEMA_VERSION,
    TOKEN_COLUMNS,
    LayerMeta,
    PartMeta,
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
        parts: the Parquet files by relative path.
        complete: False only for a trace opened with ``allow_incomplete=True`` that was interrupted.
        data: where the files lie, if that is a clean copy of a trace from outside.
    """

    folder: Path
    meta: TraceMeta
    parts: dict[str, PartMeta]
    complete: bool = True
    data: Path | None = None

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
        return sum(self.parts[name].rows for name in self._names(self._prefix(self.meta.layers[0])))

    @property
    def has_tokens(self) -> bool:
        """Whether there is a table of tokens."""
        return any(name.startswith("tokens/") for name in self.parts)

    def files(self) -> pl.DataFrame:
        """[name, layer u32, rows u32]: the Parquet files in the order in which ``batches`` reads
        them; ``layer`` is null for the files of ``tokens``.
        """
        names = sorted(self.parts)
        layers = pl.Series(names, dtype=pl.String).str.extract(r"layer=(\d+)/")
        rows = pl.Series([self.parts[name].rows for name in names], dtype=pl.UInt32)
        return pl.DataFrame({"name": names, "layer": layers.cast(LAYER_TYPE), "rows": rows})

    def batches(
        self, layer: int | None, columns: Sequence[str], ahead: int = READ_AHEAD
    ) -> Iterator[pl.DataFrame]:
        """The rows of one layer (None: of ``tokens``), one file at a time: at most
        ``schema.MAX_ROWS_PER_PART`` rows each.

        The next ``ahead`` files are read while the caller works on the last one; 0 is for a caller
        that reads many layers side by side.
        """
        names = self._names("tokens/" if layer is None else f"routing/layer={layer}/")

        def read(name: str) -> pl.DataFrame:
            path = (self.data or self.folder) / name
            return _guard(
                name, lambda: pl.read_parquet(path, columns=list(columns), hive_partitioning=False)
            )

        return _read_ahead([partial(read, name) for name in names], ahead)

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
            slots += check_rows(layer, batch, self.meta)
            rows, keys = (
                rows + batch.height,
                keys + key_checksum(batch["doc"].to_numpy(), batch["pos"].to_numpy()),
            )
        recorded = sum(self.parts[name].slots for name in self._names(self._prefix(layer)))
        require(
            slots == recorded,
            f"{recorded} used slots as recorded",
            f"counts that sum to {slots}",
            error=TraceError,
            where=f"layer {layer.layer}",
        )
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

    def _names(self, prefix: str) -> list[str]:
        return sorted(name for name in self.parts if name.startswith(prefix))

    def _paths(self, prefix: str) -> list[Path]:
        return [(self.data or self.folder) / name for name in self._names(prefix)]

    @staticmethod
    def _prefix(layer: LayerMeta) -> str:
        return f"routing/layer={layer.layer}/"


def open_trace(folder: Path | str, *, allow_incomplete: bool = False, verify: bool = True) -> Trace:
    """Open the trace at ``folder``.

    A trace under this user's seal is read where it lies. Any other is checked row by row and copied
    by a child process with limits (``moe_lab.trace.foreign``), once: the copy stays in the cache
    folder.

    Args:
        folder: a trace folder.
        allow_incomplete: also open what is left of an interrupted trace.
        verify: compare every sealed file with its digest (reads each file once). False is for a
            trace that this process has just written.

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
    """Relative paths of the Parquet files of a trace."""
    tables = (folder / "tokens", folder / "routing")
    paths = (path for table in tables for path in table.rglob("*.parquet"))
    return {path.relative_to(folder).as_posix() for path in paths}


def _sealed(folder: Path, verify: bool) -> Trace | None:
    """The trace at ``folder``, or None where a file is not as this user's moe_lab wrote it."""
    digests = sealed_files(folder)
    if digests is None:
        return None
    meta, parts, complete = read_meta(folder / META_FILE)
    on_disk = files_on_disk(folder)
    if set(parts) - on_disk or (complete and on_disk - set(parts)) or set(parts) - set(digests):
        return None
    if verify and _digests(folder, parts) != {name: digests[name] for name in parts}:
        return None
    known = {name: part.replace(digest=digests[name]) for name, part in parts.items()}
    return Trace(folder, meta, known, complete)


def _cleaned(folder: Path, verify: bool) -> Trace:
    """The clean copy of a trace from outside, with ``folder`` as its name."""
    names = sorted(files_on_disk(folder) | {META_FILE})
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
        trace = _sealed(copy, verify=False) or Trace(copy, *read_meta(copy / META_FILE))
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


def _guard(name: str, read: Callable[[], R]) -> R:
    """Run a polars read; damage that polars meets (it may even panic) becomes one line."""
    try:
        return read()
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError, ValueError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise TraceError(
            f"{name}: expected readable Parquet, got {first}; try writing the trace again"
        ) from error
