"""Compute or certainty per class of tokens: the mean number of real experts each class gets, or the
mean entropy, margin or gate mass of its tokens, raw and adjusted, with intervals from documents.

A raw class mean mixes what a class is with where and how often its tokens occur. The adjusted mean
asks what the class would get if its tokens were spread over frequency bands and positions as all
tokens are (direct standardisation); read the two side by side.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from moe_lab.analysis.aligned_rows import KEY, aligned, by_layer
from moe_lab.analysis.document_bootstrap import Floats, Resampling
from moe_lab.analysis.document_sums import Documents, in_units, nulls, over
from moe_lab.analysis.map_reduce import Fold, Sum, appended, is_mapped, reduced
from moe_lab.analysis.requirements import of_tokens, of_zero_experts
from moe_lab.analysis.token_groups import HELD_TOKENS, ROUTED, no_column
from moe_lab.errors import AnalysisError, expected, require
from moe_lab.trace import Trace

BAND = "freq_band"
MAX_CELLS = 2**24
"""Cells of all units and layers that are summed at once."""
BATCHES = 8
"""Of layers, at least: while the intervals of one are computed the next one is read."""
VALUES: dict[str, type[pl.DataType]] = {
    "ffn_count": pl.Int64,
    "entropy": pl.Float64,
    "margin": pl.Float64,
    "gate_mass_ffn": pl.Float64,
}
"""Routing columns that a class can be profiled by, and what they are summed as."""


@of_tokens
@of_zero_experts
def class_profile(
    trace: Trace,
    column: str,
    value: str = "ffn_count",
    *,
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    include_first: bool = False,
) -> pl.DataFrame:
    """Mean ``ffn_count``, or another ``value``, of each class of tokens, per layer and over all.

    Args:
        trace: a trace with a token table.
        column: the token column that names the class; tokens where it is null, and tokens that were
            not routed, are left out.
        value: the routing column whose mean is taken, of ``VALUES``; entropy and gate mass say how
            certain a router of fixed k is.
        resamples, seed, level: of the percentile interval; documents are drawn, with all their
            tokens. 0 resamples leave it out.
        include_first: also use position 0 of every document, which holds the end-of-text token and
            often is an attention sink.

    Returns:
        [layer, class, n_tokens, n_docs, mean, lo, hi, adjusted, adjusted_lo, adjusted_hi,
        coverage], ``layer`` null for the mean over layers of each token (n_tokens still counts
        tokens). ``adjusted`` weights the class's means within strata of ``freq_band`` (where the
        trace has it and it is not the class itself) and log2 of the position by the share of all
        tokens in the stratum; ``coverage`` is the share of all tokens in strata where the class
        occurs at all: where it is far below 1 the adjusted mean speaks of those strata only. Ends
        of intervals are null for a class that occurs in fewer than 5 documents.

    Raises:
        AnalysisError: where the trace has no such column, or tokens without ``value``.
    """
    require(
        value in VALUES,
        f"a value among {', '.join(VALUES)}",
        repr(value),
        error=AnalysisError,
        field="value",
    )
    resampling = Resampling(resamples, seed, level) if resamples else None
    if column not in (columns := trace.tokens.collect_schema()):
        raise no_column(column, columns.names())
    reading = _Reading(column, BAND if BAND in columns and column != BAND else None, include_first)
    (found,) = reduced([Sum(_token_cells, (trace,), (None,), appended, (reading,))])
    layout = _layout(pl.concat(found, how="vertical_relaxed"))
    if not layout.classes.height:
        return pl.DataFrame(schema=_COLUMNS | {"class": layout.classes["class"].dtype})
    if not is_mapped() and trace.num_tokens <= HELD_TOKENS:
        reading = replace(reading, held=reading.places(trace, layout.cells, layout.docs))
    most = min(MAX_CELLS // layout.size, math.ceil(len(trace.meta.layers) / BATCHES))
    batches = _layer_batches(trace, max(1, most))
    arguments = value, reading, layout.cells.select(*_CELL, "cell"), layout.docs
    tables = reduced(
        Sum(
            _value_sums,
            (trace,),
            (*batch, None),
            _added((1 + len(batch), layout.docs.units, layout.cells.height)),
            (batch, *arguments),
            size=(1 + len(batch)) * layout.size,
        )
        for batch in batches
    )
    profiles, total_UM, drawn = [], np.zeros((layout.docs.units, layout.cells.height)), None
    for batch, (counts_UM, *sums) in zip(batches, tables, strict=True):
        drawn = drawn or _Drawn(layout, counts_UM)
        for layer, sums_UM in zip(batch, sums, strict=True):
            profiles.append(_profile(drawn, layer, sums_UM, resampling))
            total_UM += sums_UM
    assert drawn is not None  # a trace has a layer
    profiles.append(_profile(drawn, None, total_UM / sum(map(len, batches)), resampling))
    return pl.concat(profiles).sort("layer", "class", nulls_last=False)


@dataclass(frozen=True)
class _Reading:
    """The columns of the token table that name a token's class and band, and whether position 0 is
    read. ``held``: what ``places`` returns, where it was read before.
    """

    column: str
    band: str | None
    include_first: bool
    held: "list[_Here] | None" = None

    def batches(self, trace: Trace) -> Iterator[pl.DataFrame]:
        """[doc, pos, class, band, bucket] of the tokens that were routed, a file at a time; the
        class is null for tokens that are left out.
        """
        kept = pl.col(self.column)
        if not self.include_first:
            kept = pl.when(pl.col("pos") > 0).then(kept)
        bucket = (pl.col("pos") + 1).log(2).floor().cast(pl.UInt8)
        cell = {
            "class": kept,
            "band": pl.lit(0) if self.band is None else pl.col(self.band),
            "bucket": bucket,
        }
        bands = [] if self.band is None else [self.band]
        routed = [ROUTED] if ROUTED in trace.tokens.collect_schema() else []
        read = list(dict.fromkeys([*KEY, self.column, *bands, *routed]))
        for batch in trace.batches(None, read):
            yield batch.filter(*routed).select(*KEY, **cell)

    def places(self, trace: Trace, cells: pl.DataFrame, docs: Documents) -> "list[_Here]":
        """Of the tokens, by file."""
        if self.held is not None:
            return self.held
        return [_Here(frame, docs, len(cells)) for frame in self._codes(trace, cells)]

    def _codes(self, trace: Trace, cells: pl.DataFrame) -> Iterator[pl.DataFrame]:
        """[doc, pos, cell]; ``cell`` is null for tokens that are left out."""
        for batch in self.batches(trace):
            found = batch.join(
                cells, on=list(_CELL), how="left", nulls_equal=True, maintain_order="left"
            )
            yield found.select(*KEY, pl.col("cell").cast(pl.Int64))


_CELL = ("class", "band", "bucket")


def _token_cells(trace: Trace, reading: _Reading) -> pl.DataFrame:
    """[doc, class, band, bucket, n]: tokens of each document in each cell, a file at a time."""
    frames = [
        batch.drop_nulls("class").group_by("doc", *_CELL).agg(n=pl.len().cast(pl.Int64))
        for batch in reading.batches(trace)
    ]
    if frames:
        return pl.concat(frames)
    kind = trace.tokens.collect_schema()[reading.column]
    return pl.DataFrame(
        schema={"doc": pl.UInt32, "class": kind, "band": pl.Int32}
        | {"bucket": pl.UInt8, "n": pl.Int64}
    )


def _layer_batches(trace: Trace, most: int) -> list[tuple[int, ...]]:
    """Layers that are read together, so that the token table is read once for all of them: at most
    ``most``, whose files hold the same rows.
    """
    batches: list[tuple[int, ...]] = []
    last: list[int] = []
    for layer in by_layer(trace):
        rows = trace.manifest.of_layer(layer.layer)["rows"].to_list()
        if batches and rows == last and len(batches[-1]) < most:
            batches[-1] = (*batches[-1], layer.layer)
        else:
            batches.append((layer.layer,))
        last = rows
    return batches


def _value_sums(
    trace: Trace,
    layers: tuple[int, ...],
    value: str,
    reading: _Reading,
    cells: pl.DataFrame,
    docs: Documents,
) -> pl.DataFrame:
    """[place, 0, 1, ..] of tables [U, M], file by file: the number of tokens of each unit of
    documents in each cell, then for each layer the sum of their values.
    """
    names = [str(number) for number in range(1 + len(layers))]
    places = reading.places(trace, cells, docs)
    known = dict(enumerate(places))
    found: dict[tuple[int, int], tuple[_Here, list[Floats | None]]] = {}

    def add(number: int, file: int, here: _Here, sums: NDArray) -> None:
        _, columns = found.setdefault((file, id(here)), (here, [None] * len(names)))
        columns[number] = sums[here.at].astype(np.float64)

    for file, here in enumerate(places):
        add(0, file, here, here.counts)
    for number, layer in enumerate(layers, 1):
        routing = trace.batches(layer, [*KEY, value])
        tables = aligned(routing, lambda: (here.frame for here in places), "the token table")
        for file, (left, right) in enumerate(tables):
            if file not in known or not known[file].frame.equals(right):
                known[file] = _Here(right, docs, len(cells))
            missing = (left[value].is_null() & right["cell"].is_not_null()).sum()
            if missing:
                got = f"{missing} tokens of a file of layer {layer} without"
                want = "a value that the trace recorded in all its layers"
                raise AnalysisError(expected(f"{value} of every token", got, want), field="value")
            here, values = known[file], left[value].cast(pl.Float64).to_numpy()
            add(number, file, here, np.bincount(here.local, values[here.chosen]))
    frames = [pl.DataFrame(schema={"place": pl.Int64} | dict.fromkeys(names, pl.Float64))]
    for _, (here, columns) in sorted(found.items()):
        none = np.zeros(len(here.at))
        sums = {
            name: none if column is None else column
            for name, column in zip(names, columns, strict=True)
        }
        frames.append(pl.DataFrame({"place": here.place} | sums))
    return pl.concat(frames)


class _Here:
    """Where the tokens of a frame [doc, pos, cell] are added: the same for every layer.

    Attributes:
        chosen: [T] tokens that have a cell.
        local: of each of these, its row in a table of the units that occur here.
        counts: tokens of each row; ``at``: the rows that have any, ``place``: theirs in [U, M].
    """

    def __init__(self, frame: pl.DataFrame, docs: Documents, cells: int) -> None:
        self.frame, self.chosen = frame, frame["cell"].is_not_null().to_numpy()
        unit_T = docs.unit(frame["doc"].to_numpy()[self.chosen])
        here_U = np.flatnonzero(np.bincount(unit_T, minlength=docs.units))
        local_U = np.zeros(docs.units, dtype=np.int64)
        local_U[here_U] = np.arange(len(here_U))
        self.local = local_U[unit_T] * cells + frame["cell"].drop_nulls().to_numpy()
        self.counts = np.bincount(self.local)
        self.at = np.flatnonzero(self.counts)
        self.place = here_U[self.at // cells] * cells + self.at % cells


def _added(shape: tuple[int, int, int]) -> Fold[Floats]:
    """A fold of frames of ``_value_sums`` into their tables."""

    def fold(total: Floats | None, frame: pl.DataFrame) -> Floats:
        place, *columns = (column.to_numpy() for column in frame)
        if total is None:  # faster, and the same: sums of one place are added in their order
            tables = [np.bincount(place, column, math.prod(shape[1:])) for column in columns]
            return np.stack(tables).astype(np.float64, copy=False).reshape(shape)
        for table, column in zip(total, columns, strict=True):
            np.add.at(table.reshape(-1), place, column)
        return total

    return fold


@dataclass(frozen=True)
class _Layout:
    """Where units of documents, cells and classes lie in the arrays: the same for every layer.

    Attributes:
        docs: of the tokens that have a class.
        cells: [class, band, bucket, cell, weight, class_row], one row a cell (M): a class within a
            stratum; ``weight`` is the share of all tokens that are in the stratum.
        classes: [class, n_tokens, n_docs], one row a class (C).
    """

    docs: Documents
    cells: pl.DataFrame
    classes: pl.DataFrame

    @property
    def size(self) -> int:
        """U M."""
        return self.docs.units * self.cells.height


def _layout(found: pl.DataFrame) -> _Layout:
    strata = found.group_by("band", "bucket").agg(weight=pl.col("n").sum())
    strata = strata.with_columns(pl.col("weight") / pl.col("weight").sum())
    classes = found.group_by("class").agg(
        n_tokens=pl.col("n").sum(), n_docs=pl.col("doc").n_unique().cast(pl.Int64)
    )
    classes = classes.sort("class")
    cells = found.select(_CELL).unique().sort(_CELL).with_row_index("cell")
    cells = cells.join(strata, on=["band", "bucket"], nulls_equal=True)
    cells = cells.join(classes.select("class").with_row_index("class_row"), on="class")
    docs = in_units(found["doc"].unique().sort().to_numpy(), 4 * cells.height)
    return _Layout(docs, cells.sort("cell"), classes)


class _Drawn:
    """The number of tokens in each cell, [U, M], and what follows from it for each draw of
    documents: the same for every layer.
    """

    def __init__(self, layout: _Layout, counts_UM: Floats) -> None:
        self.layout, self._counts_UM = layout, counts_UM
        self._rows = layout.cells["class_row"].to_numpy()
        self._starts = np.flatnonzero(np.append(True, self._rows[1:] != self._rows[:-1]))
        self._n_C = self._by_class(counts_UM.sum(axis=0, keepdims=True))[0]
        self._known: tuple[Floats, _Draws] | None = None

    def means(self, weights_BU: Floats, sums_UM: Floats) -> Floats:
        """[B, 2, C]: raw and adjusted mean of each class with documents weighted; NaN where none of
        its tokens is drawn.

        The product over cells, most of the work, is taken in single precision of what each cell
        adds to its class's mean: the error is 1e-6 of the spread, whatever the mean.
        """
        if self._known is None or self._known[0] is not weights_BU:
            self._known = weights_BU, self._of_draws(weights_BU)
        draws = self._known[1]
        sums_UC = self._by_class(sums_UM)
        mean_C = sums_UC.sum(axis=0) / np.maximum(self._n_C, 1)
        more_UM = (sums_UM - self._counts_UM * mean_C[self._rows]).astype(np.float32)
        more_BC = self._by_class((draws.weights @ more_UM) * draws.cells)
        raw_BC = over(weights_BU @ sums_UC, draws.tokens)
        return np.stack([raw_BC, mean_C + over(more_BC, draws.shares)], axis=1)

    def mean(self, sums_UM: Floats) -> Floats:
        """[2, C]: of all documents, in double precision."""
        n_M, sums_M = self._counts_UM.sum(axis=0), sums_UM.sum(axis=0)
        weight_M = np.where(n_M > 0, self.layout.cells["weight"].to_numpy(), 0)
        tables = sums_M, n_M, weight_M * sums_M / np.maximum(n_M, 1), weight_M
        raw_C, n_C, adjusted_C, weight_C = self._by_class(np.stack(tables))
        return np.stack([over(raw_C, n_C), over(adjusted_C, weight_C)])

    def _of_draws(self, weights_BU: Floats) -> "_Draws":
        n_BM = weights_BU @ self._counts_UM
        weight_BM = np.where(n_BM > 0, self.layout.cells["weight"].to_numpy(), 0)
        return _Draws(
            weights_BU.astype(np.float32),
            (weight_BM / np.maximum(n_BM, 1)).astype(np.float32),
            self._by_class(n_BM),
            self._by_class(weight_BM),
        )

    def _by_class(self, values_BM: NDArray) -> NDArray:
        """[B, C]: sums over the cells of each class, which stand together."""
        return np.add.reduceat(values_BM, self._starts, axis=1)


class _Draws(NamedTuple):
    """Of each draw of documents: weights of the documents [B, U]; weight over number of tokens of
    each cell [B, M]; tokens, and weight, of each class [B, C].
    """

    weights: NDArray[np.float32]
    cells: NDArray[np.float32]
    tokens: Floats
    shares: Floats


def _profile(
    drawn: _Drawn, layer: int | None, sums_UM: Floats, resampling: Resampling | None
) -> pl.DataFrame:
    """The rows of one layer, one for each class."""
    cells, classes = drawn.layout.cells, drawn.layout.classes
    low_2C = high_2C = np.full((2, classes.height), np.nan)
    if resampling is not None:
        low_2C, high_2C = resampling.interval(
            lambda weights: drawn.means(weights, sums_UM),
            len(sums_UM),
            classes["n_docs"].to_numpy(),
        )
    values_2C = drawn.mean(sums_UM)
    weights = cells["class_row"].to_numpy(), cells["weight"].to_numpy()
    frame = classes.with_columns(
        pl.lit(layer, pl.UInt32).alias("layer"),
        mean=values_2C[0],
        lo=low_2C[0],
        hi=high_2C[0],
        adjusted=values_2C[1],
        adjusted_lo=low_2C[1],
        adjusted_hi=high_2C[1],
        coverage=np.bincount(*weights, minlength=classes.height),
    )
    return nulls(frame.select(*_COLUMNS))


_COLUMNS = (
    {"layer": pl.UInt32(), "class": pl.String(), "n_tokens": pl.Int64(), "n_docs": pl.Int64()}
    | dict.fromkeys(("mean", "lo", "hi"), pl.Float64())
    | dict.fromkeys(("adjusted", "adjusted_lo", "adjusted_hi", "coverage"), pl.Float64())
)
