"""Groups of tokens: by a column of ``tokens`` or by one derived from it, as a stream of small
codes.

Two columns are derived where a trace does not hold them: ``position_band`` (0 for the first
position of a document, then b for positions 2^(b-1) .. 2^b - 1) and ``true_id`` (the id of the
token that follows in the document, which a language model is to predict).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import polars as pl
from numpy.typing import NDArray

from moe_lab.analysis.aligned_rows import (
    KEY,
    MAX_CELLS,
    Frames,
    Ints,
    add_counts,
    aligned,
    by_layer,
    chunks,
    in_document_order,
    token_keys,
)
from moe_lab.errors import AnalysisError, TraceError, expected, require
from moe_lab.text import CLASSES
from moe_lab.trace import LayerMeta, Trace
from moe_lab.trace.rows import EMPTY_SLOT, expert_slots

ROUTED = "routed"
POSITION_BAND, TRUE_ID = "position_band", "true_id"


@dataclass(frozen=True)
class Grouping:
    """Groups of tokens, and the code of each token's group.

    Attributes:
        name: of the column.
        values: [G] what each group is called, in order; its place is the code.
        sizes: [G] tokens of each group.
        codes: a new stream of doc, pos and ``code`` (u32, null where the token is in no group) in
            the order of the token table.
    """

    name: str
    values: pl.Series
    sizes: Ints
    codes: Callable[[], Frames]

    def __len__(self) -> int:
        return len(self.values)


def grouping(trace: Trace, column: str, name: str | None = None, min_size: int = 1) -> Grouping:
    """The groups of tokens that share a value of ``column``; tokens where it is null are in none.

    Args:
        trace: a trace with a token table.
        column: a column of ``tokens``, or ``position_band`` or ``true_id``.
        name: what the groups are called; the column's name by default.
        min_size: smaller groups are left out.

    Raises:
        AnalysisError: there is no such column.
    """
    _need_tokens(trace)
    values = partial(_values, trace, column)
    found = pl.concat(
        [_sizes(frame) for frame in values()]
        or [pl.DataFrame(schema={"value": pl.Null, "n": pl.Int64})]
    )
    table = (
        found.group_by("value").agg(pl.col("n").sum()).filter(pl.col("n") >= min_size).sort("value")
    )
    lookup = table.select("value").with_row_index("code")

    def codes() -> Frames:
        for frame in values():
            yield frame.join(lookup, on="value", how="left", maintain_order="left").drop("value")

    return Grouping(
        name or column,
        table["value"].alias(name or column),
        table["n"].cast(pl.Int64).to_numpy(),
        codes,
    )


def _need_tokens(trace: Trace) -> None:
    require(
        not trace.num_tokens or trace.has_tokens,
        "a trace with a token table",
        "one without",
        "capturing the model again with its text",
        error=AnalysisError,
        field="tokens",
    )


def windows(trace: Trace, window: int) -> Grouping:
    """Consecutive windows of ``window`` tokens in order of (doc, pos); codes are the windows'
    numbers. Raises ``AnalysisError`` for a trace without a token table.
    """
    _need_tokens(trace)

    def codes() -> Frames:
        row = 0
        for frame in in_order():
            numbers = np.arange(row, row + frame.height, dtype=np.int64) // window
            yield frame.with_columns(code=pl.Series(numbers, dtype=pl.UInt32))
            row += frame.height

    def in_order() -> Frames:
        if _sorted(token_batches(trace)):
            return token_batches(trace)
        return iter([pl.concat(token_batches(trace)).sort(*KEY)])

    total = sum(frame.height for frame in token_batches(trace))
    starts = np.arange(0, total, window)
    return Grouping(
        "window",
        pl.Series("window", starts // window, dtype=pl.UInt32),
        np.minimum(window, total - starts),
        codes,
    )


def group_counts(trace: Trace, layer: LayerMeta, groups: Grouping) -> Iterator[tuple[int, NDArray]]:
    """Slots of each expert in each group: (first group, table [G', E]) for successive blocks of
    groups, of bounded size.

    Blocks are as many as the table needs to stay under ``MAX_CELLS`` cells; each reads the layer
    once.
    """
    block = max(1, MAX_CELLS // layer.num_choices)
    dtype = np.uint32 if trace.num_tokens < 2**32 else np.int64
    for first in range(0, max(len(groups), 1), block):
        size = min(block, len(groups) - first)
        bins = layer.num_choices + 1  # the last one takes unused slots
        table = np.zeros((size + 1) * bins, dtype=dtype)
        for frame, codes_T in coded_batches(trace, layer, groups):
            ids_TK = expert_slots(layer, frame["experts"])
            inside = (codes_T >= first) & (codes_T < first + size)
            row_T = np.where(inside, codes_T - first, size) * bins
            for part in chunks(len(ids_TK)):
                expert = np.where(ids_TK[part] == EMPTY_SLOT, layer.num_choices, ids_TK[part])
                add_counts(table, (row_T[part, None] + expert).ravel())
        yield first, table.reshape(size + 1, bins)[:-1, :-1]


def coded_batches(
    trace: Trace, layer: LayerMeta, groups: Grouping | None
) -> Iterator[tuple[pl.DataFrame, Ints]]:
    """Batches of a layer: doc, pos and experts, with the code of each token's group [T] (-1 where
    it is in none; 0 without groups).
    """
    routing = trace.batches(layer.layer, [*KEY, "experts"])
    if groups is None:
        yield from ((frame, np.zeros(frame.height, dtype=np.int64)) for frame in routing)
        return
    for frame, found in aligned(routing, groups.codes, "the token table"):
        yield frame, found["code"].cast(pl.Int64).fill_null(-1).to_numpy()


def token_batches(trace: Trace, *columns: str) -> Frames:
    """doc, pos and ``columns`` of the tokens that were routed, a file at a time."""
    routed = [ROUTED] if ROUTED in trace.tokens.collect_schema() else []
    for batch in trace.batches(None, list(dict.fromkeys([*KEY, *columns, *routed]))):
        yield (batch.filter(ROUTED) if routed else batch).select(*KEY, *columns)


def token_columns(trace: Trace) -> list[str]:
    """Columns that tokens can be grouped by, the derived ones last."""
    names = trace.tokens.collect_schema().names()
    return [*names, *(name for name in (POSITION_BAND, TRUE_ID) if name not in names)]


def _values(trace: Trace, column: str) -> Frames:
    """doc, pos, value: the column in the order of the token table."""
    names = trace.tokens.collect_schema().names()
    if column in names:
        for frame in token_batches(trace, *({column} - set(KEY))):
            yield frame.select(*KEY, value=column)
    elif column == POSITION_BAND:
        for frame in token_batches(trace):
            _, exponent = np.frexp(frame["pos"].to_numpy().astype(np.float64))
            yield frame.with_columns(value=pl.Series(exponent, dtype=pl.UInt8))
    elif column == TRUE_ID:
        yield from _following(trace)
    else:
        raise _no_column(column, names)


def _no_column(column: str, columns: list[str]) -> AnalysisError:
    """The error for a token column that a trace lacks."""
    hint = "capture(..., tokenizer=..., classes=True)" if column in CLASSES else ""
    what = f"a token column among {', '.join(columns)}"
    return AnalysisError(expected(what, repr(column), hint), field="column")


def _following(trace: Trace) -> Frames:
    """The id of the next token of each document: null for the last one and before a gap.

    Unrouted tokens count as what follows, so the token table is read whole; rows that do not stand
    in order are sorted.
    """
    routed = [ROUTED] if ROUTED in trace.tokens.collect_schema() else []
    last: pl.DataFrame | None = None
    for frame in in_document_order(trace, None, ["token_id", *routed]):
        frame = frame if last is None else pl.concat([last, frame])
        last = frame[-1:]
        yield _shifted(frame)[:-1].filter(*routed).select(*KEY, "value")
    if last is not None:
        yield _shifted(last).filter(*routed).select(*KEY, "value")


def _shifted(frame: pl.DataFrame) -> pl.DataFrame:
    follows = (pl.col("doc") == pl.col("doc").shift(-1)) & (
        pl.col("pos") + 1 == pl.col("pos").shift(-1)
    )
    return frame.with_columns(value=pl.when(follows).then(pl.col("token_id").shift(-1)))


def _sizes(frame: pl.DataFrame) -> pl.DataFrame:
    return frame.drop_nulls("value").group_by("value").agg(n=pl.len().cast(pl.Int64))


def _sorted(frames: Frames) -> bool:
    last = -1
    for frame in frames:
        if not frame.height:
            continue
        keys = token_keys(frame)
        if int(keys[0]) <= last or (keys[1:] <= keys[:-1]).any():
            return False
        last = int(keys[-1])
    return True


def token_column(trace: Trace, column: str, name: str) -> pl.LazyFrame:
    """[doc, pos, <name>]: a column of ``trace.tokens``.

    Raises ``AnalysisError`` where the trace has no such column.
    """
    columns = trace.tokens.collect_schema().names()
    if column not in columns:
        raise _no_column(column, columns)
    return trace.tokens.select(*KEY, pl.col(column).alias(name))


def collect(frame: pl.LazyFrame) -> pl.DataFrame:
    """Run a lazy query in bounded memory. Raises ``TraceError`` where a file cannot be decoded."""
    try:
        return frame.collect(engine="streaming")
    except (pl.exceptions.ComputeError, pl.exceptions.PanicException, OSError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise TraceError(
            f"expected a readable trace, got {first}; try open_trace(...).check()"
        ) from error


def counts_by(trace: Trace, groups: Grouping) -> pl.DataFrame:
    """[layer, <name of the groups>, expert, is_zero, count]: slots per expert for each group, every
    expert present in every group.
    """
    frames = []
    for layer in by_layer(trace):
        table_GE = np.concatenate([table for _, table in group_counts(trace, layer, groups)])
        experts = np.arange(layer.num_choices)
        frames.append(
            pl.DataFrame(
                {
                    "layer": pl.repeat(layer.layer, table_GE.size, dtype=pl.UInt32, eager=True),
                    groups.name: groups.values.gather(
                        np.repeat(np.arange(len(groups)), layer.num_choices)
                    ),
                    "expert": np.tile(experts.astype(np.uint16), len(groups)),
                    "is_zero": np.tile(experts >= layer.num_experts, len(groups)),
                    "count": table_GE.ravel().astype(np.int64),
                }
            )
        )
    return pl.concat(frames)
