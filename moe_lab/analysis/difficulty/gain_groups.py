"""The marginal gain of a further expert, by tenth of the ffn_count that the router gave."""

import numpy as np
import polars as pl

from moe_lab.analysis.document_bootstrap import percentile_interval

GROUPS = 10


def gain_groups(gains: pl.DataFrame, resamples: int = 1000, seed: int = 0) -> pl.DataFrame:
    """[ffn_count, gain, lo, hi, n_tokens] of tokens in tenths of ffn_count, with intervals from
    resampling documents.
    """
    ranked = gains.with_columns(
        group=((pl.col("ffn_count").rank("average") - 0.5) * GROUPS / pl.len())
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
        drawn = weights @ counts
        return np.divide(weights @ sums, drawn, out=np.full(drawn.shape, np.nan), where=drawn > 0)

    low, high = percentile_interval(mean, documents, resamples, seed, 0.95)
    means = (
        ranked.group_by("group")
        .agg(ffn_count=pl.col("ffn_count").mean(), n_tokens=pl.len())
        .sort("group")
    )
    return means.select("ffn_count").with_columns(
        gain=mean(np.ones((1, documents)))[0], lo=low, hi=high, n_tokens=means["n_tokens"]
    )
