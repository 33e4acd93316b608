"""Means over tokens with intervals over documents, from sums by document.

The document is the unit, since tokens of one document are not independent. What an expert is worth
lies in few documents, so that these means are skewed and a bootstrap of percentiles is too narrow
(``experiments/ablation/planted.md``). The interval here leaves out one document at a time
(jackknife of a ratio), takes Student's t, and moves the end on the side of the long tail out by the
first term for skewness (Johnson 1978; Hall 1992, section 3.10).

The degrees of freedom are those of the variance: n - 1 where documents move the mean alike, with
Kish's effective number n of documents for their weights, and fewer where some move it more than
others (Satterthwaite 1946, with the kurtosis of the moves: twice the squared variance over the
variance of the variance). One is taken off, since a sample of few documents does not show the
longest tail. The rule was chosen among eleven on 20 draws of ``experiments/ablation/planted.py``.
"""

from collections.abc import Sequence

import numpy as np
import polars as pl
from scipy.special import ndtri, stdtrit

from moe_lab.analysis.document_bootstrap import MIN_DOCUMENTS, Floats
from moe_lab.config import require as require_setting
from moe_lab.errors import AnalysisError, require


def ratios(
    above: Floats, below: Floats, level: float = 0.95, touched: Floats | None = None
) -> tuple[Floats, Floats, Floats]:
    """[M] sums of ``above`` over those of ``below``, both [documents, M], and the ends of their
    intervals.

    Args:
        touched: [documents, M] above 0 where a document could have moved the mean; all that have
            something below by default.

    NaN where nothing is below; ends are NaN where fewer than five documents could move the mean.
    """
    require_setting(0 < level < 1, "a level between 0 and 1", level, field="level")
    with np.errstate(divide="ignore", invalid="ignore"):
        total_M, documents_M = below.sum(axis=0), (below > 0).sum(axis=0)
        mean_M, share_DM = above.sum(axis=0) / total_M, below / total_M
        # mean less the mean without the document
        moves_DM = (above - mean_M * below) / (total_M * (1 - share_DM))
        squares_M = (moves_DM**2).sum(axis=0)
        error_M = np.sqrt(squares_M * (documents_M - 1) / documents_M)
        skew_M = np.nan_to_num((moves_DM**3).sum(axis=0) / squares_M**1.5)
        free_M = 1 / (share_DM**2).sum(axis=0) - 1
        kurtosis_M = (free_M + 1) * (moves_DM**4).sum(axis=0) / squares_M**2
        free_M = np.fmin(free_M, 2 * free_M / np.maximum(kurtosis_M - 1, 1e-9)) - 1
    reach_M = stdtrit(np.fmax(free_M, 1), (1 + level) / 2)
    longer_M = skew_M * (1 + 2 * ndtri((1 + level) / 2) ** 2) / 6
    moving_DM = (below > 0) if touched is None else (below > 0) & (touched > 0)
    few_M = moving_DM.sum(axis=0) < MIN_DOCUMENTS
    low_M = mean_M - error_M * (reach_M + np.maximum(-longer_M, 0))
    high_M = mean_M + error_M * (reach_M + np.maximum(longer_M, 0))
    return mean_M, np.where(few_M, np.nan, low_M), np.where(few_M, np.nan, high_M)


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
