"""Null models of the association: chance, and routers that do not depend on difficulty.

Two nulls: compute reshuffled inside documents, and compute shifted along its document.
They take the headline statistic, the sum of products of the two rank rows within token ids. The
shuffle moves compute among tokens of one document and stratum; over some hundred documents its null
distribution is normal, and its mean and variance are known exactly (Hoeffding 1951 for one permuted
set, added over sets), so none is drawn. The circular shift keeps every autocorrelation of compute
along the document; all shifts of a document come from one Fourier transform, and R samples are
drawn from them. Secondary to the intervals.

Three baselines, with the marginals of the router that is judged: each token takes the compute of a
token drawn from the other half of the documents: any (random), one of the same id (lookup), or one
at a similar position.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy.special import ndtr

from moe_lab.analysis.difficulty.alignment import LayerTokens, layers_of
from moe_lab.analysis.difficulty.association import (
    Pairing,
    Rows,
    compute_levels,
    difficulty_association,
    pairings,
    standard_level_ranks,
    tables,
)
from moe_lab.analysis.difficulty.within_groups import Ints, joint_code
from moe_lab.analysis.document_bootstrap import Floats
from moe_lab.config import require

DRAWS = 999


@dataclass(frozen=True, eq=False)
class Turns:
    """The offsets by which the tokens of one document are turned.

    Attributes:
        rows: its tokens.
        transform: the conjugate Fourier transform of x over them.
        offsets: [draws] from 0.
    """

    rows: slice
    transform: NDArray[np.complex128]
    offsets: Ints


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
    return tables(pairings(frame, difficulty, compute, strata), null_rows(seed, draws))[0]


def null_rows(seed: int = 0, draws: int = DRAWS) -> Rows[Any, Any]:
    """What ``difficulty_nulls`` measures."""
    require(draws >= 1, "at least 1 draw", draws)

    def row(tokens: LayerTokens, pairing: Pairing, turns: list[Turns]) -> dict[str, object]:
        names: dict[str, object] = {"layer": tokens.layer, "align": pairing.aligned.align.value}
        spent = tokens.compute[pairing.aligned.rows]
        if not len(spent) or spent.min() == spent.max():
            return names
        return names | _nulls(pairing, standard_level_ranks(compute_levels(spent)), turns)

    def table(rows: list[dict[str, object]]) -> pl.DataFrame:
        found = pl.DataFrame(rows, schema=_SCHEMA).sort("layer", maintain_order=True)
        return found.with_columns(pl.col(pl.Float64).fill_nan(None))

    return Rows(
        lambda pairing: turns(pairing.left_of_token, pairing.aligned.starts, draws, seed),
        row,
        table,
    )


def _nulls(pairing: Pairing, ranks: Floats, turns: list[Turns]) -> dict[str, object]:
    x, y = pairing.left_of_token, pairing.by_token.residual(ranks)
    scale = float(np.sqrt((x @ x) * (y @ y)))
    if scale <= 1e-9 * len(x):
        return {}
    seen = float(x @ y)
    mean, variance = shuffle_moments(x, y, pairing.cells)
    shifted = shifted_sums(y, turns)
    far = np.abs(shifted - shifted.mean()) >= abs(seen - shifted.mean())
    sd = float(np.sqrt(variance))
    return {
        "rho_token": seen / scale,
        "shuffle_mean": mean / scale,
        "shuffle_sd": sd / scale,
        "p_shuffle": 2 * float(ndtr(-abs(seen - mean) / sd)) if sd > 0 else 1.0,
        "shift_mean": float(shifted.mean()) / scale,
        "shift_sd": float(shifted.std()) / scale,
        "p_shift": (1 + int(far.sum())) / (len(shifted) + 1),
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


def turns(x: Floats, starts: np.ndarray, draws: int, seed: int) -> list[Turns]:
    """For each document a draw of offsets, which all layers share."""
    generator = np.random.default_rng(seed)
    return [
        Turns(
            slice(start, stop),
            np.conj(np.fft.rfft(x[start:stop])),
            generator.integers(0, stop - start, draws),
        )
        for start, stop in pairwise(np.append(starts, len(x)).tolist())
    ]


def shifted_sums(y: Floats, turns: Sequence[Turns]) -> Floats:
    """[draws] ``sum x y`` with the y of each document turned by an offset drawn for it."""
    total = np.zeros(len(turns[0].offsets))
    for one in turns:
        own = y[one.rows]
        total += np.fft.irfft(one.transform * np.fft.rfft(own), len(own))[one.offsets]
    return total


class Baseline(StrEnum):
    RANDOM = "random"
    LOOKUP = "token lookup"
    POSITION = "position only"


def baseline_router(
    frame: pl.DataFrame | pl.LazyFrame,
    kind: Baseline | str,
    *,
    compute: str = "ffn_count",
    seed: int = 0,
) -> pl.DataFrame:
    """[layer, doc, pos, <compute>]: what the baseline spends on each token; a layer's tokens all
    come from the same draw.
    """
    blank = frame.lazy().with_columns(pl.lit(0.0).alias("__no_difficulty"))
    parts = []
    for number, tokens in enumerate(layers_of(blank, "__no_difficulty", compute, None, 0)):
        key = {
            Baseline.RANDOM: np.zeros(len(tokens.doc), dtype=np.int64),
            Baseline.LOOKUP: tokens.token_id,
            Baseline.POSITION: np.frexp(tokens.pos.astype(np.float64))[1].astype(np.int64),
        }[Baseline(kind)]
        spent = drawn_from_other_half(tokens.compute, tokens.doc, key, seed + number)
        keys = {
            "layer": np.full(len(spent), tokens.layer),
            "doc": tokens.doc,
            "pos": tokens.pos,
            "token_id": tokens.token_id,
        }
        parts.append(pl.DataFrame(keys | {compute: spent}))
    return pl.concat(parts)


def baseline_association(
    frame: pl.DataFrame | pl.LazyFrame,
    difficulty: str,
    seed: int = 0,
    *,
    compute: str = "ffn_count",
    resamples: int = 1000,
) -> pl.DataFrame:
    """``difficulty_association`` of the three baselines: [router, ...its columns].

    ``frame`` as there, with integer ``doc`` and ``token_id``.
    """
    lazy = frame.lazy()
    if "layer" not in lazy.collect_schema():
        lazy = lazy.with_columns(layer=pl.lit(0))
    hard = lazy.select("layer", "doc", "pos", pl.col(difficulty).alias("__difficulty")).collect()
    keys = ["layer", "doc", "pos"]
    tables = []
    for kind in Baseline:
        routed = baseline_router(lazy, kind, compute=compute, seed=seed)
        joined = routed.join(hard.cast(dict.fromkeys(keys, pl.Int64)), on=keys)
        table = difficulty_association(
            joined, "__difficulty", seed, compute=compute, resamples=resamples
        )
        tables.append(table.select(pl.lit(kind.value).alias("router"), pl.all()))
    return pl.concat(tables)


def drawn_from_other_half(values: Floats, doc: Ints, key: Ints, seed: int) -> Floats:
    """[n] value of a random token with the same key in the other half of the documents; of any
    token there where the key is not.
    """
    generator = np.random.default_rng(seed)
    documents = joint_code([doc])
    half = (generator.permutation(int(documents.max(initial=0)) + 1) % 2)[documents]
    drawn = np.empty(len(values))
    for side in (0, 1):
        own, other = np.flatnonzero(half == side), np.flatnonzero(half != side)
        if not len(other):
            other = own
        by_key = other[np.argsort(key[other], kind="stable")]
        ordered = key[by_key]
        first, last = (np.searchsorted(ordered, key[own], edge) for edge in ("left", "right"))
        unknown = first == last
        first[unknown], last[unknown] = 0, len(by_key)
        drawn[own] = values[
            by_key[first + (generator.random(len(own)) * (last - first)).astype(np.int64)]
        ]
    return drawn


_SCHEMA: dict[str, Any] = {"layer": pl.Int64(), "align": pl.String()}
_SCHEMA |= dict.fromkeys(
    ("rho_token", "shuffle_mean", "shuffle_sd", "p_shuffle", "shift_mean", "shift_sd", "p_shift"),
    pl.Float64(),
)
