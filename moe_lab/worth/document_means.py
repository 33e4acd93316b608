"""Means over tokens with intervals from resampling documents, from sums by document."""

from collections.abc import Sequence

import numpy as np
import polars as pl

from moe_lab.analysis.document_bootstrap import Floats, Resampling
from moe_lab.errors import AnalysisError, require

COLUMNS = 4096
"""Means that are resampled at a time."""


def ratios(above: Floats, below: Floats, resampling: Resampling) -> tuple[Floats, Floats, Floats]:
    """[M] sums of ``above`` over those of ``below``, both [documents, M], and the ends of their
    intervals.

    NaN where nothing is below; ends are NaN where fewer than five documents have something below.
    """
    parts = [
        _ratios(above[:, start : start + COLUMNS], below[:, start : start + COLUMNS], resampling)
        for start in range(0, above.shape[1], COLUMNS)
    ]
    mean, low, high = (np.concatenate(part) for part in zip(*parts, strict=True))
    return mean, low, high


def _ratios(above: Floats, below: Floats, resampling: Resampling) -> tuple[Floats, Floats, Floats]:
    def statistic(weights: Floats) -> Floats:
        total = weights @ below
        return np.divide(weights @ above, total, out=np.full(total.shape, np.nan), where=total > 0)

    low, high = resampling.interval(statistic, len(above), (below > 0).sum(axis=0))
    return statistic(np.ones((1, len(above))))[0], low, high


def tables(
    frame: pl.DataFrame, keys: Sequence[str], names: Sequence[str]
) -> tuple[pl.DataFrame, dict[str, Floats]]:
    """The distinct keys [M] of a frame in order, and [documents, M] of each column named; 0 where a
    document has no row.

    Raises:
        AnalysisError: no row, or two rows of one key and document.
    """
    require(frame.height, "at least one row", "none", error=AnalysisError, field="losses")
    distinct = frame.select(keys).unique().sort(keys)
    numbers = frame.select("doc").unique().sort("doc")
    placed = frame.join(
        distinct.with_row_index("column"), on=keys, nulls_equal=True, maintain_order="left"
    ).join(numbers.with_row_index("row"), on="doc", maintain_order="left")
    where = placed["row"].to_numpy(), placed["column"].to_numpy()
    require(
        placed.select("row", "column").is_unique().all(),
        "one row for each document and measurement",
        "several",
        error=AnalysisError,
        field="losses",
    )
    found = {}
    for name in names:
        found[name] = np.zeros((numbers.height, distinct.height))
        found[name][where] = placed[name].to_numpy()
    return distinct, found
