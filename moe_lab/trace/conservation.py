"""The proof that a trace is conserved: every row is read, and each layer has the same tokens.

``check`` is ``Trace.check``. Whatever is wrong is one ``TraceError`` that names the file or layer.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np
import polars as pl

from moe_lab.errors import TraceError, expected, require
from moe_lab.trace.checks import check_rows, check_tokens
from moe_lab.trace.data_files import DataFiles
from moe_lab.trace.manifest import REWRITE, Manifest, file_name
from moe_lab.trace.rows import key_checksum
from moe_lab.trace.schema import ROUTED, TOKEN_COLUMNS, LayerMeta, TraceMeta


class Trace(Protocol):
    """What is read of an ``opened_trace.Trace``."""

    @property
    def meta(self) -> TraceMeta: ...
    @property
    def manifest(self) -> Manifest: ...
    @property
    def complete(self) -> bool: ...
    @property
    def storage(self) -> DataFiles: ...
    @property
    def has_tokens(self) -> bool: ...
    @property
    def tokens(self) -> pl.LazyFrame: ...
    def batches(
        self, layer: int | None, columns: Sequence[str], *, whole: bool = False
    ) -> Iterator[pl.DataFrame]: ...


def check(trace: Trace) -> None:
    """Raise ``TraceError`` unless ``trace`` is conserved (``Trace.check``)."""
    check_files(trace.storage.names(), trace.manifest, trace.complete)
    reference = _check_token_rows(trace) if trace.has_tokens else None
    for layer in trace.meta.layers:
        found = _check_layer(trace, layer)
        reference = reference or found
        if trace.complete and found != reference:
            got = f"{found[0]} tokens" if found[0] != reference[0] else "other (doc, pos) pairs"
            raise TraceError(
                f"layer {layer.layer}: "
                + expected(f"the same {reference[0]} tokens as the rest of the trace", got)
            )
    _check_unique_keys(trace)


def check_files(there: set[str], manifest: Manifest, complete: bool) -> None:
    """Raise ``TraceError`` unless every listed file is ``there`` and, in a complete trace, no
    other: a killed writer leaves a file that it had no time to list.
    """
    listed = manifest.names()
    if missing := sorted(listed - there):
        got = f"{len(missing)} missing, first {missing[0]}"
        raise TraceError(expected(f"{len(listed)} files", got, REWRITE))
    if complete and (unlisted := sorted(there - listed)):
        got = f"also {unlisted[0][:80]!r}"
        raise TraceError(expected("only the files that the trace lists", got, "removing it"))


def check_counts(layer: LayerMeta, manifest: Manifest, counts_FE: np.ndarray) -> None:
    """Raise ``TraceError``, naming the file, unless the counts of a layer's files, as their rows
    are, equal the listed ones.
    """
    entries = manifest.of_layer(layer.layer)
    if manifest.has_counts:
        listed_FE = manifest.file_counts(layer)
    else:
        counts_FE, listed_FE = counts_FE.sum(axis=1)[:, None], entries["slots"].to_numpy()[:, None]
    differing = np.argwhere(counts_FE != listed_FE)
    if len(differing):
        at, expert = differing[0]
        name = file_name(layer.layer, entries["part"][int(at)])
        of = int(expert) if manifest.has_counts else None
        raise counts_error(name, of, listed_FE[at, expert], counts_FE[at, expert])


def counts_error(name: str, expert: int | None, listed: object, found: object) -> TraceError:
    """The error of a file whose slots, of one expert or (None) of all, are not as listed."""
    wanted = (
        f"used slots as recorded, {listed}"
        if expert is None
        else f"the slots of each expert as listed in the manifest, {listed} of expert {expert}"
    )
    return TraceError(f"{name}: " + expected(wanted, found, REWRITE))


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


def _whole_files(trace: Trace, layer: int | None, columns: Sequence[str]) -> Iterator[pl.DataFrame]:
    """``batches``, each of as many rows as are listed."""
    entries = trace.manifest.of_layer(layer).select("part", "rows").iter_rows()
    batches = trace.batches(layer, columns, whole=True)
    for (part, rows), batch in zip(entries, batches, strict=True):
        require(
            batch.height == rows,
            f"{rows} rows as recorded",
            batch.height,
            REWRITE,
            error=TraceError,
            where=file_name(layer, part),
        )
        yield batch


def _check_token_rows(trace: Trace) -> tuple[int, int]:
    rows, keys = 0, 0
    routed = [ROUTED] if ROUTED in trace.tokens.collect_schema() else []
    for batch in _whole_files(trace, None, [*TOKEN_COLUMNS, *routed]):
        check_tokens(batch, trace.meta)
        batch = batch.filter(ROUTED) if routed else batch
        rows, keys = rows + batch.height, keys + _keys(batch)
    return rows, keys % 2**64


def _check_layer(trace: Trace, layer: LayerMeta) -> tuple[int, int]:
    rows, keys, counts = 0, 0, []
    for batch in _whole_files(trace, layer.layer, list(trace.meta.routing_schema())):
        counts.append(check_rows(layer, batch, trace.meta))
        rows, keys = rows + batch.height, keys + _keys(batch)
    check_counts(layer, trace.manifest, np.array(counts).reshape(-1, layer.num_choices))
    return rows, keys % 2**64


def _keys(batch: pl.DataFrame) -> int:
    return key_checksum(batch["doc"].to_numpy(), batch["pos"].to_numpy())


def _check_unique_keys(trace: Trace) -> None:
    """One table is enough: the others have the same multiset of keys."""
    table = None if trace.has_tokens else trace.meta.layers[0].layer
    if document_runs(trace.batches(table, ["doc", "pos"])):
        return  # rising positions in documents that do not return: no set of keys is needed
    keys = pl.concat(
        batch.select(key=pl.col("doc").cast(pl.UInt64) * 2**32 + pl.col("pos"))
        for batch in trace.batches(table, ["doc", "pos"])
    )["key"]
    repeated = len(keys) - keys.n_unique()
    require(
        not repeated,
        "each (doc, pos) once",
        f"{repeated} repeated",
        "giving each sequence its own doc or pos range",
        error=TraceError,
    )
