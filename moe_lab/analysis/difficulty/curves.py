"""The shape of the dependence: mean compute by tenth of difficulty, raw and within token ids, and
conditional mutual information.

A rank correlation sees a slope; a router that spends least on the very hardest tokens has a curve
that bends, which these show.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl

from moe_lab.analysis.difficulty.alignment import LayerTokens
from moe_lab.analysis.difficulty.association import (
    MAX_LEVELS,
    Pairing,
    Rows,
    compute_levels,
    pairings,
    tables,
)
from moe_lab.analysis.difficulty.within_groups import Ints, joint_code
from moe_lab.analysis.document_bootstrap import Floats, Resampling
from moe_lab.analysis.document_sums import over
from moe_lab.config import require

BINS = 10
RARE_BELOW = 30


def difficulty_curves(
    frame: pl.DataFrame | pl.LazyFrame,
    difficulty: str,
    seed: int = 0,
    *,
    compute: str = "ffn_count",
    resamples: int = 1000,
) -> pl.DataFrame:
    """Mean compute by tenth of difficulty, with 95 % intervals from resampling documents.

    Returns:
        [layer, align, decile, n_tokens, mean, lo, hi, within, within_lo, within_hi]: ``mean`` over
        the tokens of a tenth of difficulty; ``within`` over those of a tenth of how hard the token
        is for its id (rank residual), of compute less its mean over the id plus the mean over all.
        Deciles count from 0, the easiest; tied difficulties share one. Static layers have no rows.
    """
    return tables(pairings(frame, difficulty, compute), curve_rows(seed, resamples))[0]


def curve_rows(seed: int = 0, resamples: int = 1000) -> Rows[Any, Any]:
    """What ``difficulty_curves`` measures."""
    require(resamples >= 1, "at least 1 resample", resamples)

    def binned(tokens: LayerTokens, pairing: Pairing, bins: list[Ints]) -> pl.DataFrame:
        spent = tokens.compute[pairing.aligned.rows]
        if not len(spent) or spent.min() == spent.max():
            return pl.DataFrame(schema=schema)
        raw, hard = bins
        within = pairing.by_token.residual(spent) + spent.mean()
        columns = _binned(raw, spent, pairing, "mean", ("lo", "hi"), resamples, seed)
        columns |= _binned(
            hard, within, pairing, "within", ("within_lo", "within_hi"), resamples, seed
        )
        decile = np.arange(BINS)
        counts = np.bincount(raw, minlength=BINS)
        one = pl.DataFrame({"decile": decile, "n_tokens": counts, **columns}).filter(
            pl.Series(counts > 0)
        )
        names = (
            pl.lit(tokens.layer, pl.Int64).alias("layer"),
            pl.lit(pairing.aligned.align.value).alias("align"),
        )
        return one.select(*names, pl.all())

    schema = {
        "layer": pl.Int64,
        "align": pl.String,
        "decile": pl.Int64,
        "n_tokens": pl.Int64,
    } | dict.fromkeys(_CURVES, pl.Float64)

    def table(frames: list[pl.DataFrame]) -> pl.DataFrame:
        found = pl.concat([pl.DataFrame(schema=schema), *frames])
        return found.sort("layer", maintain_order=True).with_columns(
            pl.col(pl.Float64).fill_nan(None)
        )

    return Rows(
        lambda pairing: [one.quantile_bins(BINS) for one in (pairing.order, pairing.order_left)],
        binned,
        table,
    )


_CURVES = ("mean", "lo", "hi", "within", "within_lo", "within_hi")


def _binned(
    bins: Ints,
    values: Floats,
    pairing: Pairing,
    name: str,
    ends: tuple[str, str],
    resamples: int,
    seed: int,
) -> dict[str, Floats]:
    documents = pairing.aligned.num_documents
    code = pairing.aligned.doc * BINS + bins
    counts, sums = (
        np.bincount(code, weights=w, minlength=documents * BINS).reshape(documents, BINS)
        for w in (None, values)
    )
    total = np.maximum(counts.sum(axis=0), 1)
    low, high = Resampling(resamples, seed).interval(
        lambda weights: over(weights @ sums, weights @ counts), documents
    )
    return {name: sums.sum(axis=0) / total, ends[0]: low, ends[1]: high}


def gain_groups(gains: pl.DataFrame, resamples: int = 1000, seed: int = 0) -> pl.DataFrame:
    """[ffn_count, gain, lo, hi, n_tokens] of tokens in tenths of ffn_count, with intervals from
    resampling documents.
    """
    ranked = gains.with_columns(
        group=((pl.col("ffn_count").rank("average") - 0.5) * BINS / pl.len())
        .floor()
        .cast(pl.Int64),
        row=pl.col("doc").rank("dense") - 1,
    )
    documents, groups = int(ranked["row"].max()) + 1, sorted(ranked["group"].unique())  # type: ignore[arg-type]
    cell = ranked.group_by("row", "group").agg(
        n=pl.len(), total=pl.col("marginal_gain").cast(pl.Float64).sum()
    )
    counts, sums = (np.zeros((documents, len(groups))) for _ in range(2))
    where = cell["row"].to_numpy(), np.searchsorted(groups, cell["group"].to_numpy())
    counts[where], sums[where] = cell["n"].to_numpy(), cell["total"].to_numpy()

    def mean(weights):  # type: ignore[no-untyped-def]
        return over(weights @ sums, weights @ counts)

    low, high = Resampling(resamples, seed).interval(mean, documents)
    means = (
        ranked.group_by("group")
        .agg(ffn_count=pl.col("ffn_count").mean(), n_tokens=pl.len())
        .sort("group")
    )
    return means.select("ffn_count").with_columns(
        gain=mean(np.ones((1, documents)))[0], lo=low, hi=high, n_tokens=means["n_tokens"]
    )


def difficulty_information(
    frame: pl.DataFrame | pl.LazyFrame,
    difficulty: str,
    seed: int = 0,
    *,
    compute: str = "ffn_count",
    shuffles: int = 5,
    strata: Sequence[str] | None = None,
) -> pl.DataFrame:
    """Mutual information of compute and difficulty given the token id, in nats per token, with the
    bias of finite samples taken out.

    Ids seen fewer than 30 times are pooled within their stratum. Entropies carry Miller's and
    Madow's correction (Miller 1955); what is left of the bias is the mean of the same number over
    shuffles of difficulty within each id. (Shuffles ignore that tokens of a document go together,
    so they give no p value.)

    Returns:
        [layer, align, information, null_mean, null_max, excess]: ``excess = information -
            null_mean``, near 0 where nothing is known.
        Null in static layers and where compute takes more than ``MAX_LEVELS`` values.
    """
    rows = information_rows(seed, shuffles)
    return tables(pairings(frame, difficulty, compute, strata), rows)[0]


def information_rows(seed: int = 0, shuffles: int = 5) -> Rows[Any, Any]:
    """What ``difficulty_information`` measures."""
    require(shuffles >= 1, "at least 1 shuffle", shuffles)

    def row(
        tokens: LayerTokens, pairing: Pairing, conditioned: tuple[Ints, list[Ints]]
    ) -> dict[str, object]:
        names: dict[str, object] = {"layer": tokens.layer, "align": pairing.aligned.align.value}
        spent = tokens.compute[pairing.aligned.rows]
        levels = compute_levels(spent) if len(spent) else np.zeros(0, dtype=np.int64)
        if not 0 < levels.max(initial=0) < MAX_LEVELS:
            return names
        group, deciles = conditioned
        found, *null = (conditional_information(group, decile, levels) for decile in deciles)
        return names | {
            "information": found,
            "null_mean": float(np.mean(null)),
            "null_max": max(null),
            "excess": found - float(np.mean(null)),
        }

    def table(rows: list[dict[str, object]]) -> pl.DataFrame:
        floats = dict.fromkeys(("information", "null_mean", "null_max", "excess"), pl.Float64)
        schema = {"layer": pl.Int64, "align": pl.String} | floats
        return pl.DataFrame(rows, schema=schema).sort("layer", maintain_order=True)

    return Rows(lambda pairing: _conditioned(pairing, shuffles, seed), row, table)


def _conditioned(pairing: Pairing, shuffles: int, seed: int) -> tuple[Ints, list[Ints]]:
    """The groups to condition on, the deciles of difficulty, and shuffles of them within groups."""
    ids = pairing.aligned.token_ids[-1]
    rare = np.bincount(ids)[ids] < RARE_BELOW
    group = joint_code(
        [np.where(rare, int(ids.max(initial=0)) + 1 + joint_code([pairing.aligned.strata]), ids)]
    )
    short = (
        group.astype(np.uint16) if group.max(initial=0) < 2**16 else group
    )  # numpy sorts 16-bit numbers in linear time
    decile = pairing.order.quantile_bins(BINS)
    generator = np.random.default_rng(seed)
    by_group = np.argsort(short, kind="stable")
    shuffled = []
    for _ in range(shuffles):
        drawn = generator.permutation(len(group))
        moved = np.empty_like(decile)
        moved[by_group] = decile[drawn[np.argsort(short[drawn], kind="stable")]]
        shuffled.append(moved)
    return group, [decile, *shuffled]


def conditional_information(group: Ints, x: Ints, y: Ints) -> float:
    """``I(x; y | group)`` in nats from counts, with the Miller-Madow correction in each group."""
    width, depth = int(x.max()) + 1, int(y.max()) + 1
    size = int(group.max()) + 1
    table = np.bincount((group * width + x) * depth + y, minlength=size * width * depth).reshape(
        size, width, depth
    )
    joint, by_x, by_y, alone = table, table.sum(axis=2), table.sum(axis=1), table.sum(axis=(1, 2))
    plug_in = (
        _entropy_sum(by_x, alone)
        + _entropy_sum(by_y, alone)
        - _entropy_sum(joint.reshape(size, -1), alone)
    )
    kinds = [np.count_nonzero(counts.reshape(size, -1), axis=1) for counts in (by_x, by_y, joint)]
    correction = ((kinds[0] + kinds[1] - kinds[2] - 1)[alone > 0] / 2).sum()
    return float((plug_in + correction) / len(x))


def _entropy_sum(counts: Ints, totals: Ints) -> float:
    """Sum over groups of n times the entropy in nats."""
    filled = counts[counts > 0].astype(np.float64)
    whole = totals[totals > 0].astype(np.float64)
    return float((whole * np.log(whole)).sum() - (filled * np.log(filled)).sum())
