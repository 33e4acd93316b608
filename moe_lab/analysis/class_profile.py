"""Compute or certainty per class of tokens: the mean number of real experts each class gets, or the
mean entropy, margin or gate mass of its tokens, raw and adjusted, with intervals from documents.

A raw class mean mixes what a class is with where and how often its tokens occur. The adjusted mean
asks what the class would get if its tokens were spread over frequency bands and positions as all
tokens are (direct standardisation); read the two side by side.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import polars as pl
from scipy.sparse import csr_array

from moe_lab.analysis.document_bootstrap import Floats, Resampling
from moe_lab.analysis.document_sums import nulls
from moe_lab.analysis.requirements import of_tokens, of_zero_experts
from moe_lab.analysis.token_groups import KEY, collect, token_column
from moe_lab.errors import AnalysisError, require
from moe_lab.trace import Trace

BAND = "freq_band"
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
        column: the token column that names the class; tokens where it is null are left out.
        value: the routing column whose mean is taken, of ``VALUES``; entropy and gate mass say how
            certain a router of fixed k is.
        resamples, seed, level: of the percentile interval; documents are drawn, with all their
            tokens.
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
    resampling = Resampling(resamples, seed, level)
    tokens = token_column(trace, column, "class").drop_nulls("class")
    if BAND in trace.tokens.collect_schema() and column != BAND:
        tokens = tokens.join(token_column(trace, BAND, "band"), on=list(KEY))
    else:
        tokens = tokens.with_columns(band=pl.lit(0))
    if not include_first:
        tokens = tokens.filter(pl.col("pos") > 0)
    tokens = tokens.with_columns(bucket=(pl.col("pos") + 1).log(2).floor())
    profiles = [cells.profile(layer, resampling) for layer, cells in _cells(trace, tokens, value)]
    nothing = pl.DataFrame(schema=_COLUMNS | {"class": tokens.collect_schema()["class"]})
    return pl.concat([nothing, *profiles]).sort("layer", "class", nulls_last=False)


@dataclass(frozen=True)
class _Cells:
    """Sums over the tokens of one document (D) in one cell (M): a cell is a class within a stratum.

    Attributes:
        table: [class, n_tokens, n_docs], one row a class (C).
        class_of: [M] row of ``table``.
        weight: [M] share of all tokens that are in the cell's stratum.
        documents: D.
        counts, sums: [D, M] number of tokens and sum of their values.
    """

    documents: int
    table: pl.DataFrame
    class_of: np.ndarray
    weight: Floats
    counts: csr_array
    sums: csr_array

    def profile(self, layer: int | None, resampling: Resampling) -> pl.DataFrame:
        """The rows of one layer, one for each class."""
        values_2C = self.means(np.ones((1, self.documents)))[0]
        low_2C, high_2C = resampling.interval(
            self.means, self.documents, self.table["n_docs"].to_numpy()
        )
        frame = self.table.with_columns(
            pl.lit(layer, pl.UInt32).alias("layer"),
            mean=values_2C[0],
            lo=low_2C[0],
            hi=high_2C[0],
            adjusted=values_2C[1],
            adjusted_lo=low_2C[1],
            adjusted_hi=high_2C[1],
            coverage=np.bincount(self.class_of, self.weight, minlength=self.table.height),
        )
        return nulls(frame.select(*_COLUMNS))

    def means(self, weights_BD: Floats) -> Floats:
        """[B, 2, C]: raw and adjusted mean of each class with documents weighted; NaN where none of
        its tokens is drawn.
        """
        n_BM, sums_BM = (weights_BD @ self.counts, weights_BD @ self.sums)
        drawn = n_BM > 0
        mean_BM = np.divide(sums_BM, n_BM, out=np.zeros_like(sums_BM), where=drawn)
        weight_BM = np.where(drawn, self.weight, 0)
        raw = self._by_class(sums_BM), self._by_class(n_BM)
        adjusted = self._by_class(weight_BM * mean_BM), self._by_class(weight_BM)
        pairs = [
            np.divide(top, bottom, out=np.full_like(top, np.nan), where=bottom > 0)
            for top, bottom in (raw, adjusted)
        ]
        return np.stack(pairs, axis=1)

    def _by_class(self, values_BM: Floats) -> Floats:
        cells = len(self.class_of)
        return values_BM @ csr_array(
            (np.ones(cells), (np.arange(cells), self.class_of)), shape=(cells, self.table.height)
        )


def _cells(trace: Trace, tokens: pl.LazyFrame, value: str) -> Iterator[tuple[int | None, _Cells]]:
    """The cells of each layer, then those of the mean over layers (layer None)."""
    layout = _layout(tokens)
    total: _Cells | None = None
    layers = sorted(layer.layer for layer in trace.meta.layers)
    for layer in layers:
        rows = trace.routing.filter(pl.col("layer") == layer).select(*KEY, value)
        found = collect(
            rows.join(tokens, on=list(KEY))
            .group_by("doc", *_CELL)
            .agg(
                sum=pl.col(value).cast(VALUES[value]).sum(),
                n=pl.len(),
                missing=pl.col(value).null_count(),
            )
        )
        if not found.height:
            return
        require(
            not found["missing"].sum(),
            f"{value} of every token",
            f"{found['missing'].sum()} tokens of layer {layer} without",
            "a value that the trace recorded in all its layers",
            error=AnalysisError,
            field="value",
        )
        cells = layout.place(found)
        total = cells if total is None else replace(total, sums=total.sums + cells.sums)
        yield layer, cells
    if total is not None:
        yield None, replace(total, sums=total.sums / len(layers))


@dataclass(frozen=True)
class _Layout:
    """Where documents, cells and classes lie in the arrays: the same for every layer."""

    documents: pl.DataFrame
    cells: pl.DataFrame
    classes: pl.DataFrame

    def place(self, found: pl.DataFrame) -> _Cells:
        placed = found.join(self.documents, on="doc").join(
            self.cells, on=list(_CELL), nulls_equal=True
        )
        where = placed["row"].to_numpy(), placed["column"].to_numpy()
        shape = (self.documents.height, self.cells.height)
        counts, sums = (
            csr_array((placed[name].to_numpy().astype(np.float64), where), shape=shape)
            for name in ("n", "sum")
        )
        return _Cells(
            self.documents.height,
            self.classes,
            self.cells["class_row"].to_numpy(),
            self.cells["weight"].to_numpy(),
            counts,
            sums,
        )


_CELL = ("class", "band", "bucket")


def _layout(tokens: pl.LazyFrame) -> _Layout:
    found = collect(tokens.group_by("doc", *_CELL).agg(n=pl.len()))
    strata = (
        found.group_by("band", "bucket")
        .agg(weight=pl.col("n").sum())
        .with_columns(pl.col("weight") / pl.col("weight").sum())
    )
    classes = found.group_by("class").agg(
        n_tokens=pl.col("n").sum().cast(pl.Int64), n_docs=pl.col("doc").n_unique().cast(pl.Int64)
    )
    classes = classes.sort("class")
    cells = (
        found.select(_CELL)
        .unique()
        .sort(_CELL)
        .with_row_index("column")
        .join(strata, on=["band", "bucket"], nulls_equal=True)
    )
    cells = cells.join(classes.select("class").with_row_index("class_row"), on="class").sort(
        "column"
    )
    return _Layout(found.select("doc").unique().sort("doc").with_row_index("row"), cells, classes)


_COLUMNS = (
    {"layer": pl.UInt32(), "class": pl.String(), "n_tokens": pl.Int64(), "n_docs": pl.Int64()}
    | dict.fromkeys(("mean", "lo", "hi"), pl.Float64())
    | dict.fromkeys(("adjusted", "adjusted_lo", "adjusted_hi", "coverage"), pl.Float64())
)
