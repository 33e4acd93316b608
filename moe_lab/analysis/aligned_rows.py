"""A trace as a stream of small aligned arrays: slots of one layer, beside a column of the tokens or
the slots of another layer.

Rows of ``tokens`` and of every layer come in one order in the traces that this package writes, so
two tables are read side by side and their keys compared; only where the order differs is one of
them held in memory and looked up. Memory is then that of a few files, whatever the length of the
trace.

Shape letters: T rows of a batch, K slots, G groups, E experts of a layer (zero-compute ones last).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from moe_lab.errors import AnalysisError, TraceError, expected, require
from moe_lab.trace import LayerMeta, Trace
from moe_lab.trace.conservation import document_runs
from moe_lab.trace.rows import EMPTY_SLOT, expert_slots

KEY = ("doc", "pos")
MAX_CELLS = 2**26
"""Largest table of counts that is held at once; more groups are counted in several passes."""
SMALL_TABLE = 2**17
"""A table of counts that fits the processor's cache is faster counted whole, a larger one cell by
cell.
"""
CHUNK_ROWS = 2**15

Frames = Iterator[pl.DataFrame]
Ints = NDArray[np.int64]
Ids = NDArray[np.uint16]


@dataclass(frozen=True)
class Slots:
    """One batch of a layer's rows.

    Attributes:
        frame: doc, pos and whatever else was asked for.
        ids: [T, K] u16 expert ids, ``EMPTY_SLOT`` where a slot was not used.
    """

    frame: pl.DataFrame
    ids: Ids


class UnalignedTablesError(TraceError):
    """A key of one table is not among the rows of another that were read beside it."""


def slots(trace: Trace, layer: LayerMeta, columns: Sequence[str] = ()) -> Iterator[Slots]:
    """The rows of a layer with their expert ids, a file at a time; ``columns`` of the routing table
    are read along.
    """
    for batch in trace.batches(layer.layer, list(dict.fromkeys([*KEY, "experts", *columns]))):
        yield Slots(batch, expert_slots(layer, batch["experts"]))


def first_choices(layer: LayerMeta, batch: Slots) -> Ids:
    """[T] the expert with the largest weight (the first such slot), ``EMPTY_SLOT`` where no slot
    was used; needs column ``weights``.
    """
    used_TK = batch.ids != EMPTY_SLOT
    weights = batch.frame["weights"]
    if weights.null_count() == len(
        weights
    ):  # a source without weights lists its slots in order of rank
        return batch.ids[:, 0]
    flat = weights.explode(empty_as_null=False).cast(pl.Float32).to_numpy()
    if len(flat) != used_TK.sum() or not np.isfinite(flat).all():
        raise TraceError(
            f"layer {layer.layer}: expected one finite weight for each expert id, "
            "got others; try open_trace(...).check()"
        )
    weights_TK = np.full(batch.ids.shape, -np.inf, dtype=np.float32)
    weights_TK[used_TK] = flat
    return np.take_along_axis(batch.ids, weights_TK.argmax(axis=1)[:, None], axis=1)[:, 0]


class Cursor:
    """Rows of consecutive frames, any number at a time."""

    def __init__(self, frames: Frames) -> None:
        self._frames, self._rest = frames, None

    def take(self, rows: int) -> pl.DataFrame | None:
        """The next ``rows`` rows; None where fewer are left."""
        parts, missing = [], rows
        while True:
            if self._rest is not None and not parts and self._rest.height == rows:
                whole, self._rest = self._rest, None
                return whole
            if self._rest is not None:
                parts.append(self._rest[:missing])
                self._rest = self._rest[missing:] if self._rest.height > missing else None
                missing = rows - sum(part.height for part in parts)
            if missing == 0 and parts:
                return pl.concat(parts)
            self._rest = next(self._frames, None)
            if self._rest is None:
                return None


def aligned(
    left: Frames, right: Callable[[], Frames], what: str
) -> Iterator[tuple[pl.DataFrame, pl.DataFrame]]:
    """Each frame of ``left`` with the rows of ``right`` of the same (doc, pos), in the same order.

    Args:
        left, right: frames with doc and pos; ``right`` is called again where the orders differ, and
            then held in memory.
        what: names ``right`` in the error.

    Raises:
        UnalignedTablesError: a key of ``left`` is not in ``right``.
    """
    cursor, table = Cursor(right()), None
    for frame in left:
        if table is None:
            other = cursor.take(frame.height)
            if other is not None and all(
                np.array_equal(frame[name].to_numpy(), other[name].to_numpy()) for name in KEY
            ):
                yield frame, other
                continue
            table = _Lookup(pl.concat(right()), what)
        yield frame, table.rows(frame)


class _Lookup:
    def __init__(self, frame: pl.DataFrame, what: str) -> None:
        keys = token_keys(frame)
        order = np.argsort(keys, kind="stable")
        self._keys, self._frame, self._what = keys[order], frame[order], what

    def rows(self, frame: pl.DataFrame) -> pl.DataFrame:
        keys = token_keys(frame)
        places = np.minimum(np.searchsorted(self._keys, keys), max(len(self._keys) - 1, 0))
        require(
            not len(keys) or (len(self._keys) and np.array_equal(self._keys[places], keys)),
            f"every routed (doc, pos) in {self._what}",
            "others",
            "open_trace(...).check()",
            error=UnalignedTablesError,
            field="tokens",
        )
        return self._frame[places]


def token_keys(frame: pl.DataFrame) -> NDArray[np.uint64]:
    """[T] doc and pos in one number that orders as they do."""
    return frame["doc"].to_numpy().astype(np.uint64) << np.uint64(32) | frame[
        "pos"
    ].to_numpy().astype(np.uint64)


def in_document_order(trace: Trace, layer: int | None, columns: Sequence[str]) -> Frames:
    """The rows of a layer (None: of the tokens) so that each document's rows stand together in
    order of position.

    Rows that were written in another order (the steps of a batched decode) are sorted in memory.
    """
    if document_runs(trace.batches(layer, KEY)):
        yield from trace.batches(layer, list(dict.fromkeys([*KEY, *columns])))
        return
    whole = pl.concat(trace.batches(layer, list(dict.fromkeys([*KEY, *columns])))).sort(*KEY)
    yield from whole.iter_slices(2**18)


def by_layer(trace: Trace) -> list[LayerMeta]:
    """The traced layers, in order of depth."""
    return sorted(trace.meta.layers, key=lambda layer: layer.layer)


def chosen_layers(trace: Trace, layers: Sequence[int] | None) -> list[LayerMeta]:
    """The asked layers in order of depth, all by default.

    Raises ``AnalysisError`` for one that was not traced.
    """
    known = [layer.layer for layer in by_layer(trace)]
    if layers is not None and (missing := sorted(set(layers) - set(known))):
        raise AnalysisError(expected(f"layers among {known}", missing), field="layers")
    return [layer for layer in by_layer(trace) if layers is None or layer.layer in layers]


def add_counts(table: NDArray, cells: Ints) -> None:
    """``table[cell] += 1`` for every cell, repeated ones counted again."""
    if table.size <= SMALL_TABLE:
        table += np.bincount(cells, minlength=table.size).astype(table.dtype)
    else:
        np.add.at(table, cells, table.dtype.type(1))


def chunks(rows: int) -> Iterator[slice]:
    """Slices of rows small enough for the intermediate arrays to stay in the processor's cache."""
    return (slice(start, start + CHUNK_ROWS) for start in range(0, rows, CHUNK_ROWS))


def shared(first_TK: Ids, second_TL: Ids) -> NDArray[np.int64]:
    """[T] experts in both lists; unused slots match nothing.

    Each list names an expert at most once.
    """
    total = np.zeros(len(first_TK), dtype=np.int64)
    for column in first_TK.T:
        total += ((second_TL == column[:, None]) & (column != EMPTY_SLOT)[:, None]).any(axis=1)
    return total


def used(ids_TK: Ids) -> NDArray[np.int64]:
    """[T] slots used."""
    return (ids_TK != EMPTY_SLOT).sum(axis=1)
