"""What chance would show: compute reshuffled inside documents, and compute shifted along its
document.

Both ask for the headline statistic, the sum of products of the two rank rows within token ids. The
shuffle moves compute among tokens of one document and stratum; over some hundred documents its null
distribution is normal, and its mean and variance are known exactly (Hoeffding 1951 for one permuted
set, added over sets), so none is drawn. The circular shift keeps every autocorrelation of compute
along the document; all shifts of a document come from one Fourier transform, and R samples are
drawn from them. Secondary to the intervals.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl
from scipy.special import ndtr

from moe_lab.analysis.difficulty.association import (
    Pairing,
    compute_levels,
    pairings,
    standard_level_ranks,
)
from moe_lab.analysis.difficulty.within_groups import Ints, joint_code
from moe_lab.analysis.document_bootstrap import Floats
from moe_lab.config import require

DRAWS = 999


def difficulty_nulls(
    frame: pl.DataFrame | pl.LazyFrame,
    difficulty: str,
    seed: int = 0,
    *,
    compute: str = "ffn_count",
    draws: int = DRAWS,
    strata: Sequence[str] | None = None,
) -> pl.DataFrame:
    """Two-sided p values of the correlation within token ids under two nulls.

    Args:
        frame, difficulty, seed, compute, strata: as ``difficulty_association``.
        draws: R, samples of the circular shift; p is ``(1 + number at least as far from the null's
            mean) / (R + 1)``.

    Returns:
        [layer, align, rho_token, shuffle_mean, shuffle_sd, p_shuffle, shift_mean, shift_sd,
        p_shift], all on the scale of ``rho_token``; null in a static layer.
    """
    require(draws >= 1, "at least 1 draw", draws)
    rows = []
    for tokens, pairing in pairings(frame, difficulty, compute, strata):
        row: dict[str, object] = {"layer": tokens.layer, "align": pairing.aligned.align.value}
        spent = tokens.compute[pairing.aligned.rows]
        if len(spent) and spent.min() < spent.max():
            row |= _nulls(pairing, standard_level_ranks(compute_levels(spent)), draws, seed)
        rows.append(row)
    return pl.DataFrame(rows, schema=_SCHEMA).with_columns(pl.col(pl.Float64).fill_nan(None))


def _nulls(pairing: Pairing, ranks: Floats, draws: int, seed: int) -> dict[str, object]:
    x, y = pairing.left["token"], pairing.by_token.residual(ranks)
    scale = float(np.sqrt((x @ x) * (y @ y)))
    if scale <= 1e-9 * len(x):
        return {}
    seen = float(x @ y)
    cells = joint_code([pairing.aligned.doc, joint_code([pairing.aligned.strata])])
    mean, variance = shuffle_moments(x, y, cells)
    shifted = shifted_sums(x, y, pairing.aligned.starts, draws, seed)
    far = np.abs(shifted - shifted.mean()) >= abs(seen - shifted.mean())
    sd = float(np.sqrt(variance))
    return {
        "rho_token": seen / scale,
        "shuffle_mean": mean / scale,
        "shuffle_sd": sd / scale,
        "p_shuffle": 2 * float(ndtr(-abs(seen - mean) / sd)) if sd > 0 else 1.0,
        "shift_mean": float(shifted.mean()) / scale,
        "shift_sd": float(shifted.std()) / scale,
        "p_shift": (1 + int(far.sum())) / (draws + 1),
    }


def shuffle_moments(x: Floats, y: Floats, cells: Ints) -> tuple[float, float]:
    """Mean and variance of ``sum x y`` when y is permuted at random within each cell."""
    count, x_sum, y_sum, xx, yy = (
        np.bincount(cells, weights=values) for values in (np.ones(len(x)), x, y, x * x, y * y)
    )
    filled = count > 0
    count, x_sum, y_sum, xx, yy = (row[filled] for row in (count, x_sum, y_sum, xx, yy))
    spread = (xx - x_sum**2 / count) * (yy - y_sum**2 / count)
    return float((x_sum * y_sum / count).sum()), float((spread / np.maximum(count - 1, 1)).sum())


def shifted_sums(x: Floats, y: Floats, starts: np.ndarray, draws: int, seed: int) -> Floats:
    """[draws] ``sum x y`` with the y of each document turned by an offset drawn for it."""
    generator = np.random.default_rng(seed)
    total = np.zeros(draws)
    for start, stop in zip(starts, np.append(starts[1:], len(x)), strict=True):
        length = int(stop - start)
        turned = np.fft.irfft(
            np.conj(np.fft.rfft(x[start:stop])) * np.fft.rfft(y[start:stop]), length
        )
        total += turned[generator.integers(0, length, draws)]
    return total


_SCHEMA: dict[str, Any] = {"layer": pl.Int64(), "align": pl.String()}
_SCHEMA |= dict.fromkeys(
    ("rho_token", "shuffle_mean", "shuffle_sd", "p_shuffle", "shift_mean", "shift_sd", "p_shift"),
    pl.Float64(),
)
