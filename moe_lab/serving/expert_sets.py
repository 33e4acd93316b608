"""``expert_sets``: which different experts each step of a document asks for in each layer, in the
order of evaluation: what caches, placements and decode costs are computed from.

A step is what a model evaluates at once: the consecutive prompt tokens of a document are one, a
decoded token is one. A trace of texts that were not generated (phase "eval" or "train") is read as
if each token had been decoded. Zero-compute experts hold no weights and are left out.

Memory is that of one Parquet file per layer, whatever the length of the trace.
Shape letters: T tokens, L layers, K slots, S sets (one for each document, step and layer), R
experts of all sets.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import polars as pl
from numpy.typing import NDArray

from moe_lab.analysis.aligned_rows import KEY, aligned, by_layer, token_keys
from moe_lab.analysis.map_reduce import Fold, Sum, reduced
from moe_lab.analysis.token_groups import token_batches
from moe_lab.errors import AnalysisError, TraceError, expected, require
from moe_lab.trace import LayerMeta, Trace
from moe_lab.trace.conservation import document_runs
from moe_lab.trace.rows import EMPTY_SLOT, expert_slots

BLOCK_SLOTS = 2**20
"""Slots [tokens, layers, K] that are turned into sets at a time."""
PHASE = "phase"
PREFILL = "prefill"

A = TypeVar("A")
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class SetBlock:
    """Consecutive sets, in order of document, step and layer.

    Attributes:
        doc: [S] document number.
        pos: [S] position of the step's last token.
        decode: [S] whether the step is a decoded token.
        tokens: [S] tokens of the step.
        place: [S] the layer's place in ``ExpertSets.layers``.
        starts: [S + 1] where each set begins in ``experts``.
        experts: [R] u16 ids of real experts, each once in its set: a token's in slot order, those
            of a prompt in the order of their last use.
    """

    doc: NDArray[np.uint32]
    pos: NDArray[np.uint32]
    decode: NDArray[np.bool_]
    tokens: Ints
    place: Ints
    starts: Ints
    experts: NDArray[np.uint16]

    def part(self, start: int, end: int) -> "SetBlock":
        """Sets ``start`` .. ``end - 1``."""
        chosen, starts = slice(start, end), self.starts[start : end + 1]
        return SetBlock(
            self.doc[chosen],
            self.pos[chosen],
            self.decode[chosen],
            self.tokens[chosen],
            self.place[chosen],
            starts - starts[0],
            self.experts[starts[0] : starts[-1]],
        )


@dataclass(frozen=True)
class ExpertSets:
    """The expert sets of a trace.

    Attributes:
        trace: that they were read from.
        layers: in order of depth.
        in_order: whether the rows of each document stand together; None: not looked yet.
    """

    trace: Trace
    layers: tuple[LayerMeta, ...]
    in_order: bool | None = None

    @property
    def first_item(self) -> Ints:
        """[L + 1] number of the first expert of each layer when the experts of all layers are
        numbered consecutively.
        """
        return np.cumsum([0, *(layer.num_experts for layer in self.layers)])

    def blocks(self) -> Iterator[SetBlock]:
        """All sets, in blocks of bounded size; each call reads the trace again."""
        prompt = _Prompt(self.layers)
        for key_T, decode_T, ids_TLK in self.tokens():
            cuts = np.flatnonzero(np.append(True, decode_T[1:] != decode_T[:-1]))
            for start, end in zip(cuts, np.append(cuts[1:], len(key_T)), strict=True):
                part = slice(start, end)
                if decode_T[start]:
                    yield from prompt.finish()
                    yield self._decoded(key_T[part], ids_TLK[part])
                else:
                    yield from prompt.add(key_T[part], ids_TLK[part])
        yield from prompt.finish()

    def tokens(self) -> Iterator[tuple[NDArray[np.uint64], NDArray[np.bool_], NDArray[np.uint16]]]:
        """(keys [T] as ``token_keys``, decoded or not [T], expert ids [T, L, K]) in document
        order; ids of zero-compute experts and unused slots are ``EMPTY_SLOT``.
        """
        slots = max(layer.top_k for layer in self.layers)
        rows = max(1, BLOCK_SLOTS // (slots * len(self.layers)))
        ordered = self.ordered
        phases = self._phases(ordered)
        readers = [_Rows(self.trace, layer, ordered) for layer in self.layers]
        while (first := readers[0].take(rows)) is not None:
            key_T, _ = first
            ids_TLK = np.full((len(key_T), len(readers), slots), EMPTY_SLOT, np.uint16)
            for place, reader in enumerate(readers):
                layer = self.layers[place]
                found = first if place == 0 else reader.take(len(key_T))
                if found is None or not np.array_equal(found[0], key_T):
                    what = f"the tokens of layer {layer.layer} in the order of the first layer"
                    raise TraceError(expected(what, "others", "open_trace(...).check()"))
                ids_TK = found[1]
                ids_TLK[:, place, : layer.top_k] = np.where(
                    ids_TK < layer.num_experts, ids_TK, EMPTY_SLOT
                )
            yield key_T, phases(len(key_T)), ids_TLK

    def summed(
        self, partial: Callable[..., pl.DataFrame], fold: Fold[A], arguments: tuple[Any, ...] = ()
    ) -> A:
        """The result of a sum over the sets, in tasks of whole documents (``map_reduce.Sum``)."""
        has_tokens = (None,) if self.trace.has_tokens else ()
        tables = *(layer.layer for layer in self.layers), *has_tokens
        whole = Sum(partial, (self.trace,), tables, fold, arguments, cuts=lambda: self._starts)
        (result,) = reduced([whole])
        return result

    @cached_property
    def ordered(self) -> bool:
        """Whether the rows of each document stand together."""
        if self.in_order is not None:
            return self.in_order
        return document_runs(self.trace.batches(self.layers[0].layer, KEY))

    @cached_property
    def _starts(self) -> Ints | None:
        return _document_starts(self.trace, self.layers[0].layer) if self.ordered else None

    def _phases(self, ordered: bool) -> Callable[[int], NDArray[np.bool_]]:
        """A function that says of the next T tokens whether they were decoded."""
        whole = self.trace.meta.phase != PREFILL
        # A text that was passed through a model whole is marked prefill, and was not a prompt.
        generated = self.trace.meta.phase == "generate"
        if not generated or PHASE not in self.trace.tokens.collect_schema().names():
            return lambda count: np.full(count, whole)
        layer = self.layers[0]
        frames = (
            found.select((pl.col(PHASE) != PREFILL).fill_null(whole).alias(PHASE))
            for _, found in aligned(
                _frames(self.trace, layer, ordered, []),
                lambda: token_batches(self.trace, PHASE),
                "the token table",
            )
        )
        held = np.zeros(0, bool)

        def take(count: int) -> NDArray[np.bool_]:
            nonlocal held
            while len(held) < count:
                held = np.concatenate([held, next(frames)[PHASE].to_numpy()])
            taken, held = held[:count], held[count:]
            return taken

        return take

    def _decoded(self, key_T: NDArray[np.uint64], ids_TLK: NDArray[np.uint16]) -> SetBlock:
        used_TLK = ids_TLK != EMPTY_SLOT
        tokens, layers = used_TLK.shape[:2]
        key_S = np.repeat(key_T, layers)
        return SetBlock(
            *_doc_pos(key_S),
            np.ones(tokens * layers, bool),
            np.ones(tokens * layers, np.int64),
            np.tile(np.arange(layers), tokens),
            np.append(0, np.cumsum(used_TLK.sum(axis=2).ravel())),
            ids_TLK[used_TLK],
        )


def expert_sets(trace: Trace) -> ExpertSets:
    """The distinct experts of each (document, step, layer) of a trace.

    Args:
        trace: of one model; its rows may stand in any order (they are sorted in memory where the
            documents are not each together).

    Raises:
        AnalysisError: rows made up from counts, which have no order, or an import that writes
            zero-compute experts as expert 0.

    Example:
        >>> for block in expert_sets(open_trace("traces/x")).blocks():
        ...     sizes = np.diff(block.starts)  # distinct experts of each (doc, step, layer)
    """
    require_tokens(trace, "expert sets")
    return ExpertSets(trace, tuple(by_layer(trace)))


def _document_starts(trace: Trace, layer: int) -> Ints:
    """The row at which each document begins."""
    starts, row, last = [np.zeros(0, np.int64)], 0, None
    for frame in trace.batches(layer, ["doc"]):
        doc_T = frame["doc"].to_numpy()
        begins = np.append(True, doc_T[1:] != doc_T[:-1])[: len(doc_T)]
        if len(doc_T):
            begins[0] = doc_T[0] != last
            last = doc_T[-1]
        starts.append(row + np.flatnonzero(begins))
        row += len(doc_T)
    return np.concatenate(starts)


def require_tokens(trace: Trace, what: str) -> None:
    """Raise ``AnalysisError`` where the trace has no order of tokens or aliases experts."""
    require(
        trace.meta.per_token,
        f"a trace of tokens for {what}",
        "one made up from counts, which have no order of tokens",
        "moe-lab place",
        error=AnalysisError,
        field="per_token",
    )
    require_real_experts(trace, what)


def require_real_experts(trace: Trace, what: str) -> None:
    """Raise ``AnalysisError`` where zero-compute experts were recorded as real ones."""
    require(
        trace.meta.zero_experts_known,
        f"a trace that records zero-compute experts for {what}",
        f"an import ({trace.meta.created_from}) that writes them as expert 0",
        "capture()",
        error=AnalysisError,
        field="zero_experts_known",
    )


class _Rows:
    """Keys and expert ids of a layer, any number of rows at a time, one file held."""

    def __init__(self, trace: Trace, layer: LayerMeta, ordered: bool) -> None:
        self._layer = layer
        self._frames = _frames(trace, layer, ordered, ["experts"])
        self._key = np.zeros(0, np.uint64)
        self._ids = np.zeros((0, layer.top_k), np.uint16)

    def take(self, rows: int) -> tuple[NDArray[np.uint64], NDArray[np.uint16]] | None:
        """Up to ``rows`` rows; None where none is left."""
        while len(self._key) < rows and (frame := next(self._frames, None)) is not None:
            self._key = np.concatenate([self._key, token_keys(frame)])
            self._ids = np.concatenate([self._ids, expert_slots(self._layer, frame["experts"])])
        if not len(self._key):
            return None
        taken = self._key[:rows], self._ids[:rows]
        self._key, self._ids = self._key[rows:], self._ids[rows:]
        return taken


def _frames(
    trace: Trace, layer: LayerMeta, ordered: bool, columns: list[str]
) -> Iterator[pl.DataFrame]:
    batches = trace.batches(layer.layer, [*KEY, *columns], ahead=0)
    return batches if ordered else iter([pl.concat(batches).sort(*KEY)])


class _Prompt:
    """The prompt tokens of one document that were read so far, of one step."""

    def __init__(self, layers: tuple[LayerMeta, ...]) -> None:
        self._layers = layers
        self._last = np.full((len(layers), max(layer.num_experts for layer in layers)), -1)
        self._key: int | None = None
        self._uses = self._tokens = 0

    def add(self, key_T: NDArray[np.uint64], ids_TLK: NDArray[np.uint16]) -> Iterator[SetBlock]:
        """Take tokens; gives the steps of the documents that ended."""
        doc_T = key_T >> np.uint64(32)
        cuts = np.flatnonzero(np.append(True, doc_T[1:] != doc_T[:-1]))
        for start, end in zip(cuts, np.append(cuts[1:], len(doc_T)), strict=True):
            if self._key is not None and self._key >> 32 != int(doc_T[start]):
                yield from self.finish()
            ids_LN = ids_TLK[start:end].transpose(1, 0, 2).reshape(len(self._layers), -1)
            for place, ids_N in enumerate(ids_LN):
                used_N = np.flatnonzero(ids_N != EMPTY_SLOT)
                # Of equal indices numpy keeps the last value: the last use.
                self._last[place, ids_N[used_N]] = self._uses + used_N
            self._uses += ids_LN.shape[1]
            self._tokens += int(end - start)
            self._key = int(key_T[end - 1])

    def finish(self) -> Iterator[SetBlock]:
        """The step of the tokens taken, if any."""
        if self._key is None:
            return
        sets = [
            np.flatnonzero(last_E >= 0)[np.argsort(last_E[last_E >= 0])] for last_E in self._last
        ]
        layers = len(self._layers)
        yield SetBlock(
            *_doc_pos(np.full(layers, self._key, np.uint64)),
            np.zeros(layers, bool),
            np.full(layers, self._tokens),
            np.arange(layers),
            np.cumsum([0, *map(len, sets)]),
            np.concatenate(sets).astype(np.uint16),
        )
        self._last[:], self._key, self._uses, self._tokens = -1, None, 0, 0


def _doc_pos(key: NDArray[np.uint64]) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    return (key >> np.uint64(32)).astype(np.uint32), (key & np.uint64(2**32 - 1)).astype(np.uint32)
