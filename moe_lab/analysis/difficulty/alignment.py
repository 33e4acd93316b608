"""From a frame of tokens to rows of numbers: one layer at a time, under one alignment at a time,
with what was left out counted.

``align="input"`` sets the compute at a position against the difficulty of the token that stands
there; ``align="target"`` against that of the next token, which the model predicts there. Shallow
layers may follow the first and deep ones the second.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np
import polars as pl
from numpy.typing import NDArray

from moe_lab.analysis.difficulty.within_groups import joint_code
from moe_lab.analysis.document_bootstrap import Floats
from moe_lab.errors import AnalysisError, expected, require
from moe_lab.text.token_classes import equal_mass_bands

Ints = NDArray[np.int64]

KEYS = ("doc", "pos", "token_id")
LEXER = "lexer"
STRATA = (LEXER, "freq_band", "subword", "copy")
"""Class columns that make up strata, where a frame has them."""
PLACES = {
    "place in the line": ("boundary", "after_newline"),
    "place in the word": ("subword", "word_start"),
}
"""Name -> the class column and the class of a token with which a line or a word begins: where a
frame has the column, the tokens since then are known.
"""
HALVES = ("_half_a", "_half_b")
"""Endings of the columns of two measurements of a difficulty with independent errors, from which
its reliability comes where a frame has them.
"""
MIN_DOCUMENT_TOKENS = 64
NUM_BANDS = 20
LARGEST_CODE = 2**22


class Align(StrEnum):
    INPUT = "input"
    TARGET = "target"


@dataclass(frozen=True, eq=False)
class LayerTokens:
    """The tokens of one layer in order of document and position.

    Attributes:
        doc, pos, token_id: [T]; ``doc`` and ``token_id`` as codes from 0.
        compute, difficulty: [T]; difficulty is NaN for tokens without one.
        strata: [T] one code for each combination of the class columns, or None where the frame has
            none.
        lexer: [T] codes of the column ``lexer`` alone, or None.
        halves: two [T] measurements of the difficulty with independent errors, or None.
        places: name in ``PLACES`` -> [T] tokens since the line or the word began, where the frame
            has the column.
        all_documents: documents of the layer, short ones included.
    """

    layer: int
    doc: Ints
    pos: Ints
    token_id: Ints
    compute: Floats
    difficulty: Floats
    strata: Ints | None
    lexer: Ints | None
    halves: tuple[Floats, Floats] | None
    places: dict[str, Ints]
    all_documents: int

    def same_tokens(self, other: "LayerTokens") -> bool:
        """Whether only compute differs, so that what depends on the rest can be used again."""
        own, theirs = self._columns(), other._columns()
        same = own.keys() == theirs.keys() and all(
            np.array_equal(column, theirs[name]) for name, column in own.items()
        )
        return same and np.array_equal(self.difficulty, other.difficulty, equal_nan=True)

    def _columns(self) -> dict[str, Ints]:
        names = ("doc", "pos", "token_id", "strata", "lexer")
        columns = {name: getattr(self, name) for name in names} | self.places
        return {name: column for name, column in columns.items() if column is not None}


@dataclass(frozen=True, eq=False)
class Aligned:
    """The pairs of compute and difficulty of one layer and alignment, documents one after another.

    Attributes:
        rows: [n] places of the compute in ``LayerTokens``.
        judged: [n] places of the token whose difficulty it is.
        doc: [n] document as a code from 0 without gaps; ``starts``: [D] where each begins.
        difficulty: [n] finite.
        token_ids: ids that a lookup could go by: [n] the token's own, and for ``target`` also the
            one to be predicted.
        strata: [n] codes of class columns (of the token whose difficulty it is); frequency band x
            position where the frame has none.
        lexer: [n] class of that token, where the frame has the column.
        num_missing: pairs left out because difficulty was missing.
    """

    align: Align
    rows: Ints
    judged: Ints
    doc: Ints
    starts: Ints
    difficulty: Floats
    token_ids: tuple[Ints, ...]
    strata: Ints
    lexer: Ints | None
    num_missing: int

    @property
    def num_documents(self) -> int:
        return len(self.starts)


def layers_of(
    frame: pl.DataFrame | pl.LazyFrame,
    difficulty: str,
    compute: str,
    strata: Sequence[str] | None,
    min_document_tokens: int,
) -> Iterator[LayerTokens]:
    """The layers of a frame in order.

    Raises ``AnalysisError`` where columns are missing or a (doc, pos) comes twice in a layer.
    """
    lazy = frame.lazy()
    schema = lazy.collect_schema()
    needed = [*KEYS, compute, difficulty]
    missing = [name for name in needed if name not in schema]
    require(
        not missing,
        f"a frame with columns {', '.join(['layer', *needed])}",
        f"none named {', '.join(missing)}",
        error=AnalysisError,
        field=missing[0] if missing else "",
    )
    numbers = [
        name
        for name in (compute, difficulty)
        if not (schema[name].is_numeric() or schema[name] == pl.Null)
    ]
    if numbers:
        raise AnalysisError(
            expected("numbers", f"{schema[numbers[0]]} in column {numbers[0]!r}"), field=numbers[0]
        )
    classes = [name for name in STRATA if name in schema] if strata is None else list(strata)
    unknown = [name for name in classes if name not in schema]
    require(
        not unknown,
        f"strata among {', '.join(schema.names())}",
        ", ".join(unknown),
        error=AnalysisError,
    )
    if "layer" not in schema:
        lazy = lazy.with_columns(layer=pl.lit(0, pl.UInt32))
    layers = lazy.select(pl.col("layer").unique().sort()).collect()["layer"].drop_nulls().to_list()
    marks = [column for column, _ in PLACES.values() if column in schema]
    halves = [difficulty + end for end in HALVES if difficulty + end in schema]
    wanted = dict.fromkeys([*needed, *classes, *marks, *halves])
    shared = [name for name in wanted if name != compute or name in (difficulty, *classes)]
    last: tuple[LayerTokens, Ints | None, pl.Series] | None = None
    for layer in layers:
        rows = lazy.filter(pl.col("layer") == layer).select(*wanted).collect(engine="streaming")
        # Where nothing but compute differs (64-bit hashes of all rows agree), hand on the very same
        # arrays, so that later stages see it at once.
        if last is not None and last[1] is not None and _whole(rows[compute]):
            places = last[1]
            if rows.select(shared).hash_rows().equals(last[2]):
                spent = rows[compute].cast(pl.Float64).to_numpy()[places]
                del rows
                yield replace(last[0], layer=layer, compute=spent)
                continue
        found, places = _layer_tokens(
            layer, rows, difficulty, compute, classes, min_document_tokens
        )
        if last is not None and last[0].same_tokens(found):
            found = replace(last[0], layer=layer, compute=found.compute)
        last = found, places if _whole(rows[compute]) else None, rows.select(shared).hash_rows()
        del rows
        yield found


def _whole(column: pl.Series) -> bool:
    """Whether every value is a finite number."""
    return not column.null_count() and bool(column.cast(pl.Float64).is_finite().all())


def _layer_tokens(
    layer: int,
    rows: pl.DataFrame,
    difficulty: str,
    compute: str,
    classes: list[str],
    min_document_tokens: int,
) -> tuple[LayerTokens, Ints]:
    """The tokens of a layer, and [T] which of ``rows`` each is."""
    keys = [*KEYS, compute]
    stands = np.arange(rows.height)
    if sum(rows[name].null_count() for name in keys):
        known = rows.select(pl.all_horizontal(pl.col(keys).is_not_null())).to_series()
        rows, stands = rows.filter(known), stands[known.to_numpy()]
    doc, token_id = (_codes(rows[name]) for name in ("doc", "token_id"))
    pos = rows["pos"].to_numpy().astype(np.int64)
    order = _order(layer, doc, pos)
    strata = (
        joint_code([_codes(rows[name]) for name in classes]) if classes and rows.height else None
    )
    lexer = _codes(rows[LEXER]) if LEXER in rows.columns else None
    values = [
        rows[name].cast(pl.Float64).fill_null(float("nan")).to_numpy()
        for name in (compute, difficulty)
    ]
    begins = [
        (rows[column] == value).fill_null(False).to_numpy() if column in rows.columns else None
        for column, value in PLACES.values()
    ]
    names = [difficulty + end for end in HALVES]
    halves = [
        rows[name].cast(pl.Float64).fill_null(float("nan")).to_numpy()
        if set(names) <= set(rows.columns)
        else None
        for name in names
    ]
    columns = [stands, doc, pos, token_id, *values, strata, lexer, *halves, *begins]
    documents = len(np.unique(doc))
    keep = _long_enough(doc, min_document_tokens) & (np.isfinite(values[0]))
    if order is not None:
        keep = keep[order]
        columns = [None if column is None else column[order] for column in columns]
    if not keep.all():
        columns = [None if column is None else column[keep] for column in columns]
    stands, *arrays, first, second = columns[: -len(PLACES)]
    begins = columns[-len(PLACES) :]
    both = None if first is None or second is None else (first, second)
    tokens = LayerTokens(layer, *arrays, both, {}, documents)  # type: ignore[arg-type]
    since_begun = {
        name: since(begin, tokens.doc)
        for name, begin in zip(PLACES, begins, strict=True)
        if begin is not None
    }
    return replace(tokens, places=since_begun), stands  # type: ignore[return-value]


def since(begins: NDArray[np.bool_], doc: Ints) -> Ints:
    """[T] tokens since the last one that begins something, or since the document began."""
    begins = begins | np.append(True, doc[1:] != doc[:-1])[: len(doc)]
    place = np.arange(len(begins))
    return place - np.maximum.accumulate(np.where(begins, place, 0))


def _codes(column: pl.Series) -> Ints:
    """A column as small integers from 0: the numbers themselves where they are small, else their
    places in sorted order.
    """
    if column.dtype.is_integer():
        values = column.to_numpy().astype(np.int64)
        if not len(values) or (values.min() >= 0 and values.max() < LARGEST_CODE):
            return values
        return np.unique(values, return_inverse=True)[1]
    if isinstance(column.dtype, pl.Enum | pl.Categorical):
        return column.to_physical().cast(pl.Int64).fill_null(-1).to_numpy() + 1
    return column.rank("dense").fill_null(0).cast(pl.Int64).to_numpy()


def _order(layer: int, doc: Ints, pos: Ints) -> Ints | None:
    """What sorts by document and position; None where the rows are sorted."""
    if len(doc) < 2:
        return None
    later = (doc[1:] > doc[:-1]) | ((doc[1:] == doc[:-1]) & (pos[1:] > pos[:-1]))
    if later.all():
        return None
    order = np.lexsort((pos, doc))
    doc, pos = doc[order], pos[order]
    require(
        not ((doc[1:] == doc[:-1]) & (pos[1:] == pos[:-1])).any(),
        "each (doc, pos) once",
        "repeated ones",
        "one phase at a time, and a doc for each sequence",
        error=AnalysisError,
        where=f"layer {layer}",
        field="pos",
    )
    return order


def _long_enough(doc: Ints, least: int) -> NDArray[np.bool_]:
    """Tokens of documents with at least ``least`` tokens; all tokens where that would leave out
    more than half of them.
    """
    long = (np.bincount(doc) >= least)[doc] if len(doc) else np.zeros(0, dtype=bool)
    return long if long.mean() >= 0.5 or not len(long) else np.ones(len(doc), dtype=bool)


def align(tokens: LayerTokens, how: Align, include_first: bool = False) -> Aligned:
    """Pair compute with difficulty.

    Position 0 (an attention sink) is left out, as are pairs without a difficulty.
    """
    rows = np.flatnonzero((tokens.pos > 0) | include_first)
    judged = rows
    if how is Align.TARGET:
        rows = rows[rows + 1 < len(tokens.doc)]
        follows = (tokens.doc[rows + 1] == tokens.doc[rows]) & (
            tokens.pos[rows + 1] == tokens.pos[rows] + 1
        )
        rows = rows[follows]
        judged = rows + 1
    known = np.isfinite(tokens.difficulty[judged])
    missing = int((~known).sum())
    rows, judged = rows[known], judged[known]
    changes = np.flatnonzero(np.diff(tokens.doc[rows])) + 1
    starts = np.append(0, changes) if len(rows) else changes
    doc = np.repeat(np.arange(len(starts)), np.diff(np.append(starts, len(rows))))
    own, target = tokens.token_id[rows], tokens.token_id[judged]
    token_ids = (own,) if how is Align.INPUT else (own, target)
    strata = (
        tokens.strata[judged]
        if tokens.strata is not None
        else _plain_strata(target, tokens.pos[rows])
    )
    lexer = None if tokens.lexer is None else tokens.lexer[judged]
    return Aligned(
        how, rows, judged, doc, starts, tokens.difficulty[judged], token_ids, strata, lexer, missing
    )


def _plain_strata(token_id: Ints, pos: Ints) -> Ints:
    """Frequency band x log2 of the position, for frames without class columns."""
    return frequency_bands(token_id) * 64 + np.frexp(pos.astype(np.float64))[1]


def frequency_bands(token_id: Ints, bands: int = NUM_BANDS) -> Ints:
    """[n] frequency band of each token, by the counts of these tokens (``equal_mass_bands``)."""
    return equal_mass_bands(np.bincount(token_id), bands)[token_id]
