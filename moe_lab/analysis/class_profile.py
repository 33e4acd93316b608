"""Compute or certainty per class of tokens: the mean number of real experts each class gets, or the
mean entropy, margin or gate mass of its tokens, raw and adjusted, with intervals from documents.

A raw class mean mixes what a class is with where and how often its tokens occur. The adjusted mean
asks what the class would get if its tokens were spread over frequency bands and positions as all
tokens are (direct standardisation); read the two side by side.
"""

import math
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, islice, repeat
from typing import NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from moe_lab.analysis.aligned_rows import KEY, aligned, by_layer
from moe_lab.analysis.document_bootstrap import (
    MIN_DOCUMENTS,
    Floats,
    Resampling,
    expanded_interval,
)
from moe_lab.analysis.document_sums import Documents, in_units, nulls, over
from moe_lab.analysis.map_reduce import Fold, Sum, appended, is_mapped, reduced, side_by_side
from moe_lab.analysis.requirements import of_tokens, of_zero_experts
from moe_lab.analysis.single_thread_products import Left
from moe_lab.analysis.token_groups import HELD_TOKENS, no_column, token_batches
from moe_lab.errors import AnalysisError, expected, require
from moe_lab.trace import Trace
from moe_lab.trace.opened_trace import READ_AHEAD

BAND = "freq_band"
MAX_CELLS = 2**24
"""Cells of all units and layers that are summed at once."""
BATCHES = 8
"""Of layers and groups of files that are read one after another, at least: while the intervals of
one are computed the next one is read.
"""
EXACT_SINGLE = 2**24
"""Whole numbers up to this are exact in single precision."""
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
        column: the token column that names the class; tokens where it is null or NaN, and tokens
            that were not routed, are left out.
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
    if held := not is_mapped() and trace.num_tokens <= HELD_TOKENS:
        files = side_by_side(reading.counted_file, reading.batches(trace))
        reading = replace(reading, held=list(files))
    (found,) = reduced([Sum(_token_cells, (trace,), (None,), appended, (reading,))])
    layout = _layout(pl.concat(found, how="vertical_relaxed"))
    if not layout.classes.height:
        return pl.DataFrame(schema=_COLUMNS | {"class": layout.classes["class"].dtype})
    cells = layout.cells.select(*_CELL, "cell")
    groups = len(trace.manifest.of_layer(None)) if is_mapped() else 1
    most = min(MAX_CELLS // layout.size, len(trace.meta.layers) // math.ceil(BATCHES / groups))
    batches = _layer_batches(trace, max(1, most))
    with ThreadPoolExecutor(1) as pool:
        if resampling is not None:  # drawn before they are needed
            pool.submit(resampling.blocks, layout.docs.units)
        if held:
            places = list(reading.here(trace, cells, layout.docs))
            reading = replace(reading, held=None, places=places)
        tables = reduced(
            Sum(
                _value_sums,
                (trace,),
                (*batch, None),
                _added((counts + len(batch), layout.docs.units, layout.cells.height)),
                (batch, value, reading, cells, layout.docs, counts),
                size=(counts + len(batch)) * layout.size,
            )
            for batch, counts in zip(batches, chain([True], repeat(False)), strict=False)
        )
        counts_UM, *first = next(tables)
    means = _Means(layout, counts_UM, resampling)
    profiles = side_by_side(means.of_layer, chain(first, chain.from_iterable(tables)))
    return means.frame(chain.from_iterable(batches), profiles)


@dataclass(frozen=True)
class _Reading:
    """The columns of the token table that name a token's class and band, and whether position 0 is
    read.

    Attributes:
        held: what ``cells`` yields, and ``places``: what ``here`` returns, where this process has
            it already.
    """

    column: str
    band: str | None
    include_first: bool
    held: "list[_FileCells] | None" = None
    places: "list[_Here] | None" = None

    def cells(self, trace: Trace) -> "Iterable[_FileCells]":
        """Of the tokens that were routed, a file at a time."""
        return map(self.file, self.batches(trace)) if self.held is None else self.held

    def batches(self, trace: Trace) -> Iterator[pl.DataFrame]:
        """The tokens that were routed, a file at a time."""
        columns = {self.column, self.band} - {*KEY, None}
        return token_batches(trace, *sorted(filter(None, columns)))

    def file(self, frame: pl.DataFrame) -> "_FileCells":
        """Of a frame of ``batches``."""
        _, exponent = np.frexp(frame["pos"].to_numpy() + 1.0)
        kept = pl.col("class").is_not_null()
        tokens = frame.select(
            pl.col(self.column).alias("class"),
            (pl.lit(0) if self.band is None else pl.col(self.band)).alias("band"),
            pl.Series("bucket", exponent - 1, dtype=pl.UInt8),
            pl.int_range(pl.len(), dtype=pl.UInt32).alias("token"),
        ).filter(kept if self.include_first else kept & (pl.col("bucket") > 0))
        groups = tokens.group_by(_CELL).agg("token")
        return _FileCells(
            frame.select(*KEY),
            groups.select(_CELL),
            groups["token"].list.len().to_numpy().astype(np.int64),
            groups["token"].explode(empty_as_null=False).to_numpy(),
        )

    def counted_file(self, frame: pl.DataFrame) -> "_FileCells":
        """The same, with its cells counted already."""
        file = self.file(frame)
        assert file.by_class is not None
        return file

    def here(self, trace: Trace, cells: pl.DataFrame, docs: Documents) -> "Iterable[_Here]":
        """Of the tokens that were routed, by file."""
        if self.places is not None:
            return self.places
        return (_Here(file.with_cell(cells), docs, len(cells)) for file in self.cells(trace))


_CELL = ("class", "band", "bucket")


@dataclass(frozen=True)
class _FileCells:
    """The tokens of a file by cell; those that have no class are in none.

    Attributes:
        frame: [doc, pos] of all tokens.
        keys: [class, band, bucket] of the cells (G) that occur.
        sizes: [G] tokens of each.
        tokens: rows of these tokens in ``frame``, cell after cell.
    """

    frame: pl.DataFrame
    keys: pl.DataFrame
    sizes: NDArray[np.int64]
    tokens: NDArray[np.uint32]

    def with_cell(self, cells: pl.DataFrame) -> pl.DataFrame:
        """[doc, pos, cell]; ``cell`` is -1 for tokens that are in none."""
        number = self.keys.join(
            cells, on=list(_CELL), how="left", nulls_equal=True, maintain_order="left"
        )["cell"]
        cell_T = np.full(len(self.frame), -1, dtype=np.int64)
        cell_T[self.tokens] = np.repeat(number.to_numpy(), self.sizes)
        return self.frame.with_columns(cell=cell_T)

    @cached_property
    def by_class(self) -> pl.DataFrame:
        """[class, doc, band, bucket, n], one row a class: lists of its documents, and of its cells
        with the tokens of each.
        """
        doc = self.frame["doc"].to_numpy()[self.tokens]
        begins = np.append(0, np.cumsum(self.sizes))[:-1]
        first = np.ones(len(doc), dtype=bool)  # of successive tokens of one cell and document
        first[1:] = doc[1:] != doc[:-1]
        first[begins] = True
        cells = self.keys.with_columns(n=self.sizes)
        classes = cells.group_by("class").agg("band", "bucket", "n").with_row_index("row")
        rows = self.keys.join(classes.select("row", "class"), on="class", maintain_order="left")
        row = np.repeat(rows["row"].to_numpy(), np.add.reduceat(first, begins, dtype=np.int64))
        docs = pl.DataFrame({"row": row, "doc": doc[first]}).unique().group_by("row").agg("doc")
        return classes.join(docs, on="row").drop("row")


def _token_cells(trace: Trace, reading: _Reading) -> pl.DataFrame:
    """``_FileCells.by_class`` of each file."""
    frames = [file.by_class for file in reading.cells(trace)]
    if frames:
        return pl.concat(frames)
    kind = trace.tokens.collect_schema()[reading.column]
    lists = {"doc": pl.UInt32, "band": pl.Int32, "bucket": pl.UInt8, "n": pl.Int64}
    return pl.DataFrame(schema={"class": kind} | {name: pl.List(of) for name, of in lists.items()})


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
    counts: bool,
) -> pl.DataFrame:
    """[place, 0, 1, ..] of tables [U, M], file by file: the number of tokens of each unit of
    documents in each cell, if ``counts``, then for each layer the sum of their values.
    """
    names = [str(number) for number in range(counts + len(layers))]
    places, *streams = _shared(reading.here(trace, cells, docs), 1 + len(layers))
    ahead = min(READ_AHEAD, 4 // len(layers))

    def table(layer: int, stream: Iterator[_Here]) -> Iterator[tuple[pl.DataFrame, pl.DataFrame]]:
        calls = chain([stream], (reading.here(trace, cells, docs) for _ in repeat(None)))
        routing = trace.batches(layer, [*KEY, value], ahead)
        return aligned(routing, lambda: (one.frame for one in next(calls)), "the token table")

    frames = [pl.DataFrame(schema={"place": pl.UInt32} | dict.fromkeys(names, pl.Float64))]

    def add(here: _Here, sums: dict[str, NDArray]) -> None:
        none = np.zeros(len(here.at))
        columns = {name: sums[name][here.at] if name in sums else none for name in names}
        frames.append(
            pl.DataFrame({"place": here.place} | columns, schema_overrides=frames[0].schema)
        )

    for pairs in zip(*map(table, layers, streams), strict=True):
        here = next(places, None)
        sums = {names[0]: here.counts} if counts and here is not None else {}
        for name, layer, (left, right) in zip(names[counts:], layers, pairs, strict=True):
            if here is None or not here.is_of(right):
                if here is not None:
                    add(here, sums)
                here, sums = _Here(right, docs, len(cells)), {}
            missing = left[value].null_count() and left[value].is_null().to_numpy()[here.chosen]
            if np.any(missing):
                got = f"{np.sum(missing)} tokens of a file of layer {layer} without"
                want = "a value that the trace recorded in all its layers"
                raise AnalysisError(expected(f"{value} of every token", got, want), field="value")
            sums[name] = np.bincount(here.local, left[value].to_numpy()[here.chosen])
        if here is not None:
            add(here, sums)
    for here in places if counts else ():  # of files that the routing has not
        add(here, {names[0]: here.counts})
    return pl.concat(frames)


def _shared(items: "Iterable[_Here]", times: int) -> "list[Iterator[_Here]]":
    """Iterators over the same items, which hold only what one of them has not taken yet:
    ``itertools.tee`` holds up to 57.
    """
    queues: list[deque[_Here]] = [deque() for _ in range(times)]
    coming = iter(items)

    def take(queue: deque[_Here]) -> Iterator[_Here]:
        while True:
            if not queue:
                for item in islice(coming, 1):
                    for one in queues:
                        one.append(item)
            if not queue:
                return
            yield queue.popleft()

    return [take(queue) for queue in queues]


class _Here:
    """Where the tokens of a frame [doc, pos, cell] are added: the same for every layer.

    Attributes:
        chosen: tokens that have a cell: an index, or all of them as a slice.
        local: of each of these, its row in a table of the units that occur here.
        counts: tokens of each row; ``at``: the rows that have any, ``place``: theirs in [U, M].
    """

    def __init__(self, frame: pl.DataFrame, docs: Documents, cells: int) -> None:
        cell_T = frame["cell"].to_numpy()
        self.frame = frame
        self.chosen = slice(None) if (cell_T >= 0).all() else np.flatnonzero(cell_T >= 0)
        unit_T = docs.unit(frame["doc"].to_numpy()[self.chosen])
        here_U = np.flatnonzero(np.bincount(unit_T, minlength=docs.units))
        local_U = np.zeros(docs.units, dtype=np.int64)
        local_U[here_U] = np.arange(len(here_U))
        self.local = local_U[unit_T] * cells + cell_T[self.chosen]
        self.counts = np.bincount(self.local)
        self.at = np.flatnonzero(self.counts)
        place = here_U[self.at // cells] * cells + self.at % cells
        self.place = place.astype(np.uint32)

    def is_of(self, frame: pl.DataFrame) -> bool:
        """Whether the frame is the same."""
        return self.frame is frame or self.frame.equals(frame)


def _added(shape: tuple[int, int, int]) -> Fold[Floats]:
    """A fold of frames of ``_value_sums`` into their tables."""

    def fold(total: Floats | None, frame: pl.DataFrame) -> Floats:
        place, *columns = (column.to_numpy() for column in frame)
        if total is None:  # faster, and the same: sums of one place are added in their order
            total = np.zeros(shape)
            for table, column in zip(total, columns, strict=True):
                table.reshape(-1)[:] = np.bincount(place, column, math.prod(shape[1:]))
            return total
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
    """``found``: of ``_FileCells.by_class``."""
    cells = found.select(*_CELL, "n").explode("band", "bucket", "n")
    cells = cells.group_by(_CELL).agg(pl.col("n").sum())
    strata = cells.group_by("band", "bucket").agg(weight=pl.col("n").sum())
    strata = strata.with_columns(pl.col("weight") / pl.col("weight").sum())
    of_docs = found.select("class", "doc").explode("doc").unique()
    classes = cells.group_by("class").agg(n_tokens=pl.col("n").sum())
    n_docs = of_docs.group_by("class").agg(n_docs=pl.len().cast(pl.Int64))
    classes = classes.join(n_docs, on="class").sort("class")
    cells = cells.select(_CELL).sort(_CELL).with_row_index("cell")
    cells = cells.join(strata, on=["band", "bucket"], nulls_equal=True)
    cells = cells.join(classes.select("class").with_row_index("class_row"), on="class")
    docs = in_units(of_docs["doc"].unique().sort().to_numpy(), 4 * cells.height)
    return _Layout(docs, cells.sort("cell"), classes)


class _Profile(NamedTuple):
    """Of one layer, or of the mean over the layers.

    Attributes:
        values: [6, C] mean, lo, hi, adjusted, adjusted_lo, adjusted_hi of each class.
        sums: [M] totals of the values in each cell.
        samples: [B, 2, C] raw and adjusted mean of each draw of documents, NaN where it has no
            token of the class.
    """

    values: Floats
    sums: Floats
    samples: Floats | None


class _Means:
    """Raw and adjusted mean of each class, with intervals from draws of documents.

    What follows from the number of tokens in each cell, ``counts_UM``, is the same for every layer,
    and so are the draws: what a draw gives for the mean over layers of each token is the mean over
    layers of what it gives.
    """

    def __init__(self, layout: _Layout, counts_UM: Floats, resampling: Resampling | None) -> None:
        self._layout, self._counts_UM, self._n_M = layout, counts_UM, counts_UM.sum(axis=0)
        self._weight_M = layout.cells["weight"].to_numpy()
        self._rows = layout.cells["class_row"].to_numpy()
        self._starts = np.flatnonzero(np.append(True, self._rows[1:] != self._rows[:-1]))
        self._n_C = self._by_class(self._n_M[None])[0]
        self._resampling = resampling if layout.docs.units >= MIN_DOCUMENTS else None
        self._draws: list[_Draws] = []
        if self._resampling is not None and self._resampling.is_one_block(layout.docs.units):
            self._draws = [*self._blocks()]

    def of_layer(self, sums_UM: Floats) -> _Profile:
        """From the sums of the values of one layer.

        The product over cells, most of the work, is taken in single precision of what each cell
        adds to its class's mean: the error is 1e-6 of the spread, whatever the mean.
        """
        sums_M, sums_UC = sums_UM.sum(axis=0), self._by_class(sums_UM)
        mean_C = self._by_class(sums_M[None])[0] / np.maximum(self._n_C, 1)
        more_UM = (sums_UM - self._counts_UM * mean_C[self._rows]).astype(np.float32)
        samples = []
        for draws in self._draws or self._blocks():
            raw_BC = over(draws.documents.times(sums_UC), draws.tokens)
            parts = draws.singles.rows_times(more_UM)
            more = [self._by_class(part * draws.cells[rows]) for rows, part in parts]
            adjusted_BC = mean_C + over(np.concatenate(more), draws.shares)
            samples.append(np.stack([raw_BC, adjusted_BC], axis=1))
        return self._profile(sums_M, np.concatenate(samples) if samples else None)

    def frame(self, layers: Iterable[int], profiles: Iterable[_Profile]) -> pl.DataFrame:
        """The rows of these layers and of the mean over them."""
        sums_M, samples_B2C, rows = np.zeros(1), np.zeros(1), []
        for layer, profile in zip(layers, profiles, strict=True):
            rows.append((layer, profile.values))
            sums_M = sums_M + profile.sums
            if profile.samples is not None:
                samples_B2C = samples_B2C + profile.samples
        samples = None if self._resampling is None else samples_B2C / len(rows)
        rows.append((None, self._profile(sums_M / len(rows), samples).values))
        classes, coverage_C = self._layout.classes, self._by_class(self._weight_M[None])[0]
        frames = [
            classes.with_columns(
                pl.lit(layer, pl.UInt32).alias("layer"),
                pl.Series("coverage", coverage_C),
                *map(pl.Series, _VALUES, values),
            )
            for layer, values in rows
        ]
        return nulls(pl.concat(frames).select(*_COLUMNS).sort("layer", "class", nulls_last=False))

    def _profile(self, sums_M: Floats, samples_B2C: Floats | None) -> _Profile:
        classes = self._layout.classes
        low_2C = high_2C = np.full((2, classes.height), np.nan)
        if samples_B2C is not None and self._resampling is not None:
            level, n_docs = self._resampling.level, classes["n_docs"].to_numpy()
            low_2C, high_2C = expanded_interval(samples_B2C, level, n_docs)
        weight_M = np.where(self._n_M > 0, self._weight_M, 0)
        tables = sums_M, self._n_M, weight_M * sums_M / np.maximum(self._n_M, 1), weight_M
        raw_C, n_C, adjusted_C, weight_C = self._by_class(np.stack(tables))
        mean_2C = over(np.stack([raw_C, adjusted_C]), np.stack([n_C, weight_C]))
        values_6C = np.stack([mean_2C, low_2C, high_2C], axis=1).reshape(6, -1)
        return _Profile(values_6C, sums_M, samples_B2C)

    def _by_class(self, values_BM: NDArray) -> Floats:
        """[B, C]: sums over the cells of each class, which stand together."""
        return np.add.reduceat(values_BM, self._starts, axis=1)

    def _blocks(self) -> "Iterator[_Draws]":
        if self._resampling is None:
            return
        for weights_BU in self._resampling.blocks(self._layout.docs.units):
            documents, singles = Left(weights_BU, np.float64), Left(weights_BU, np.float32)
            most = self._counts_UM.max() * len(self._counts_UM)  # tokens of a cell that are drawn
            exact = singles if most <= EXACT_SINGLE else documents
            cells, tokens, shares = [], [], []
            for _, n_RM in exact.rows_times(self._counts_UM):
                weight_RM = np.where(n_RM > 0, self._weight_M, 0)
                cells.append((weight_RM / np.maximum(n_RM, 1)).astype(np.float32))
                tokens.append(self._by_class(n_RM.astype(np.float64)))
                shares.append(self._by_class(weight_RM))
            yield _Draws(
                documents,
                singles,
                np.concatenate(cells),
                np.concatenate(tokens),
                np.concatenate(shares),
            )


class _Draws(NamedTuple):
    """Of draws of documents: how often each document was drawn, in double and in single precision;
    weight over number of tokens of each cell [B, M]; tokens, and weight, of each class [B, C].
    """

    documents: Left
    singles: Left
    cells: NDArray[np.float32]
    tokens: Floats
    shares: Floats


_VALUES = ("mean", "lo", "hi", "adjusted", "adjusted_lo", "adjusted_hi")
_COLUMNS = (
    {"layer": pl.UInt32(), "class": pl.String(), "n_tokens": pl.Int64(), "n_docs": pl.Int64()}
    | dict.fromkeys(("mean", "lo", "hi"), pl.Float64())
    | dict.fromkeys(("adjusted", "adjusted_lo", "adjusted_hi", "coverage"), pl.Float64())
)
