"""Groups of tokens: by a column of ``tokens`` or by one derived from it, as a stream of small
codes.

Two columns are derived where a trace does not hold them: ``position_band`` (0 for the first
position of a document, then b for positions 2^(b-1) .. 2^b - 1) and ``true_id`` (the id of the
token that follows in the document, which a language model is to predict).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import polars as pl
from polars import selectors

from moe_lab.analysis.aligned_rows import (
    KEY,
    Frames,
    Ints,
    in_document_order,
    token_keys,
)
from moe_lab.analysis.map_reduce import Sum, appended, is_mapped, reduced
from moe_lab.errors import AnalysisError, expected, require
from moe_lab.text import CLASSES
from moe_lab.trace import Trace

ROUTED = "routed"
POSITION_BAND, TRUE_ID = "position_band", "true_id"
HELD_TOKENS = 2**22
"""Tokens whose codes are held at most: 50 MB."""


@dataclass(frozen=True)
class Grouping:
    """Groups of tokens, and the code of each token's group.

    Attributes:
        name: of the column.
        values: [G] what each group is called, in order; its place is the code.
        sizes: [G] tokens of each group.
        codes: a trace, or a part of it -> a new stream of doc, pos and ``code`` (u32, null where
            the token is in no group) in the order of the token table.
        whole: codes depend on tokens of other files.
    """

    name: str
    values: pl.Series
    sizes: Ints
    codes: Callable[[Trace], Frames]
    whole: bool = False

    def __len__(self) -> int:
        return len(self.values)

    def held(self, trace: Trace) -> "Grouping":
        """The same with the codes in memory, for several layers that are read in this process;
        those of many tokens are read again for each layer.
        """
        if is_mapped() or trace.num_tokens > HELD_TOKENS:
            return self
        frames = list(self.codes(trace))
        return replace(self, codes=lambda _: iter(frames))


def grouping(trace: Trace, column: str, name: str | None = None, min_size: int = 1) -> Grouping:
    """The groups of tokens that share a value of ``column``; tokens where it is null or NaN are in
    none.

    Args:
        trace: a trace with a token table.
        column: a column of ``tokens``, or ``position_band`` or ``true_id``.
        name: what the groups are called; the column's name by default.
        min_size: smaller groups are left out.

    Raises:
        AnalysisError: there is no such column.
    """
    _need_tokens(trace)
    whole = column == TRUE_ID and column not in trace.tokens.collect_schema()
    (found,) = reduced([Sum(_sizes, (trace,), (None,), appended, (column,), whole)])
    table = _added(found).filter(pl.col("n") >= min_size).sort("value")
    return Grouping(
        name or column,
        table["value"].alias(name or column),
        table["n"].cast(pl.Int64).to_numpy(),
        partial(_codes, column=column, lookup=table.select("value").with_row_index("code")),
        whole,
    )


def _codes(trace: Trace, column: str, lookup: pl.DataFrame) -> Frames:
    for frame in _values(trace, column):
        yield frame.join(lookup, on="value", how="left", maintain_order="left").drop("value")


def _sizes(trace: Trace, column: str) -> pl.DataFrame:
    """[value, n]: tokens of each value."""
    sizes = [
        frame.drop_nulls("value").group_by("value").agg(n=pl.len().cast(pl.Int64))
        for frame in _values(trace, column)
    ]
    return _added(sizes or [pl.DataFrame(schema={"value": pl.Null, "n": pl.Int64})])


def _added(sizes: list[pl.DataFrame]) -> pl.DataFrame:
    return pl.concat(sizes).group_by("value").agg(pl.col("n").sum())


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
    total = sum(frame.height for frame in token_batches(trace))
    starts = np.arange(0, total, window)
    return Grouping(
        "window",
        pl.Series("window", starts // window, dtype=pl.UInt32),
        np.minimum(window, total - starts),
        partial(_window_codes, window=window),
        whole=True,
    )


def _window_codes(trace: Trace, window: int) -> Frames:
    frames, row = token_batches(trace), 0
    if not _sorted(token_batches(trace)):
        frames = iter([pl.concat(frames).sort(*KEY)])
    for frame in frames:
        numbers = np.arange(row, row + frame.height, dtype=np.int64) // window
        yield frame.with_columns(code=pl.Series(numbers, dtype=pl.UInt32))
        row += frame.height


def token_batches(trace: Trace, *columns: str) -> Frames:
    """doc, pos and ``columns`` of the tokens that were routed, a file at a time; a number that is
    not defined (NaN) is null.
    """
    routed = [ROUTED] if ROUTED in trace.tokens.collect_schema() else []
    for batch in trace.batches(None, list(dict.fromkeys([*KEY, *columns, *routed]))):
        found = (batch.filter(ROUTED) if routed else batch).select(*KEY, *columns)
        yield found.with_columns(selectors.float().fill_nan(None))


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
        raise no_column(column, names)


def no_column(column: str, columns: list[str]) -> AnalysisError:
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
