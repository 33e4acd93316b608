"""Intervals from resampling documents: tokens of one document are not independent, so the document
is the unit that is drawn.

A statistic is a function of per-document sums, so one bootstrap sample is one row of integer
weights (how often each document was drawn) times the table of sums: no token is touched twice.
"""

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
BLOCK_CELLS = 2**23


def document_weights(documents: int, resamples: int, seed: int) -> Iterator[Floats]:
    """Blocks [B, documents] of draw counts, ``resamples`` rows in all; the same for the same
    arguments.
    """
    generator = np.random.default_rng(seed)
    block = max(1, BLOCK_CELLS // max(documents, 1))
    for start in range(0, resamples, block):
        yield generator.multinomial(
            documents, np.full(documents, 1 / documents), size=min(block, resamples - start)
        ).astype(np.float64)


def percentile_interval(
    statistic: Callable[[Floats], Floats], documents: int, resamples: int, seed: int, level: float
) -> tuple[Floats, Floats]:
    """Lower and upper ends [...] of the percentile interval.

    Args:
        statistic: weights [B, documents] -> values [B, ...], NaN where a sample does not define one
            (left out of the percentiles).
        documents: how many documents there are; with fewer than 2 both ends are NaN.
    """
    if documents < 2:
        shape = statistic(np.ones((1, documents))).shape[1:]
        return np.full(shape, np.nan), np.full(shape, np.nan)
    samples = np.concatenate(
        [statistic(weights) for weights in document_weights(documents, resamples, seed)]
    )
    missing = np.isnan(samples)
    undefined = missing.all(axis=0)
    samples[:, undefined] = 0
    # numpy's nanquantile goes through a Python loop over all cells.
    quantile = np.nanquantile if (missing.any(axis=0) & ~undefined).any() else np.quantile
    low, high = quantile(samples, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return np.where(undefined, np.nan, low), np.where(undefined, np.nan, high)
