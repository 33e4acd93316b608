"""The load of experts: per expert, per layer, per class of tokens, and over windows of the token
stream.

Real and zero-compute experts are never mixed: means, CV, maximum, entropy and dead experts are
those of the real ones. A zero-compute expert's count is given in the same unit (a real expert's
fair share), so that the two can be compared, and ``share`` is of all slots.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from moe_lab import measures
from moe_lab.analysis.aligned_rows import by_layer
from moe_lab.analysis.document_bootstrap import RESAMPLES, Resampling
from moe_lab.analysis.document_sums import documents, nulls
from moe_lab.analysis.slot_counts import (
    counts_by,
    counts_of,
    group_counts,
    layer_counts,
    unit_counts,
)
from moe_lab.analysis.token_groups import grouping, windows
from moe_lab.config import require
from moe_lab.trace import LayerMeta, Trace


def expert_load(trace: Trace, by: str | None = None, *, over_passes: bool = False) -> pl.DataFrame:
    """Slots of every expert of every layer; dead experts are rows of zeros.

    A layer that runs several times is a layer of the trace in each pass: load is per pass.

    Args:
        trace: an opened trace.
        by: a column of ``trace.tokens`` to count apart (a class, a domain, ``doc``), or
            ``position_band``: 0 for the first position of each document, b for positions 2^(b-1) ..
            2^b - 1. Tokens where it is null are left out.
        over_passes: add up the passes of each layer of the model; ``layer`` is then its number in
            the model.

    Returns:
        [layer, (by,) expert, is_zero, count, share, load]: ``count`` slots; ``share`` of all slots
            of the layer (and group), real and
        zero-compute together; ``load`` is the count over the mean count of the layer's (and
        group's) **real** experts, for both kinds: 1 is a real expert's fair share. ``load`` is null
        where no real expert ran, ``share`` where no slot was used.
    """
    table = counts_of(trace) if by is None else counts_by(trace, grouping(trace, by))
    group = ["layer"] if by is None else ["layer", by]
    if over_passes:
        table = (
            table.join(trace.layers.select("layer", "model_layer"), on="layer")
            .group_by(pl.col("model_layer").alias("layer"), *group[1:], "expert", "is_zero")
            .agg(pl.col("count").sum())
            .sort("layer", *group[1:], "expert")
        )
    fair = pl.col("count").filter(~pl.col("is_zero")).mean().over(group)
    total = pl.col("count").sum().over(group)
    return table.with_columns(
        share=pl.when(total > 0).then(pl.col("count") / total),
        load=pl.when(fair > 0).then(pl.col("count") / fair),
    )


def load_summary(trace: Trace, by: str | None = None) -> pl.DataFrame:
    """One row of load statistics per layer (and value of ``by``, as in ``expert_load``).

    Returns:
        [layer, (by,) slots, zero_share, load_cv, max_violation, max_over_mean, balancedness, gini,
        entropy, effective_experts, dead]: ``slots`` used, ``zero_share`` of them by zero-compute
        experts; the rest over the real experts, dead ones included, as defined in
        ``moe_lab.measures`` (``entropy`` in nats). Null where no real expert ran.
    """
    groups = None if by is None else grouping(trace, by)
    layers = by_layer(trace)
    if groups is None:
        counts = zip(layers, layer_counts(trace, layers), strict=True)
        return pl.concat(_summary(layer, {}, counts_E[None]) for layer, counts_E in counts)
    return pl.concat(
        _summary(layer, {groups.name: groups.values[first : first + len(table_GE)]}, table_GE)
        for layer, first, table_GE in group_counts(trace, layers, groups)
    )


def load_interval(
    trace: Trace, *, resamples: int = RESAMPLES, seed: int = 0, level: float = 0.95
) -> pl.DataFrame:
    """Load CV of each layer with its interval over documents, beside that of sampling alone.

    Returns:
        [layer, n_docs, load_cv, lo, hi, even]: ``lo``, ``hi`` from resampling documents (null with
        fewer than 5); finite samples push the resampled values up as they push ``load_cv``, so the
        interval is the reflected one, ``2 load_cv - q``, cut at 0. ``even`` is what a router
        without any preference shows in as many tokens: ``sqrt((1 - p) / (T p))`` with p the mean
        share of tokens that a real expert runs on.
    """
    docs = documents(trace, max(layer.num_choices for layer in trace.meta.layers))
    resampling = Resampling(resamples, seed, level)
    layers, rows = by_layer(trace), []
    for layer, counts_UGE in zip(layers, unit_counts(trace, layers, docs), strict=True):
        counts_UE = counts_UGE[:, 0, : layer.num_experts].astype(np.float64)
        value = float(measures.load_cv(counts_UE.sum(axis=0)))
        low, high = resampling.interval(
            lambda weights, counts=counts_UE: measures.load_cv(weights @ counts), docs.units
        )
        share = counts_UE.sum() / max(trace.num_tokens * layer.num_experts, 1)
        rows.append(
            {
                "layer": layer.layer,
                "n_docs": len(docs.docs),
                "load_cv": value,
                "lo": max(2 * value - float(high), 0.0) if np.isfinite(high) else None,
                "hi": 2 * value - float(low) if np.isfinite(low) else None,
                "even": float(np.sqrt((1 - share) / (trace.num_tokens * share))) if share else None,
            }
        )
    schema = {"layer": pl.UInt32, "n_docs": pl.Int64}
    return nulls(
        pl.DataFrame(
            rows, schema=schema | dict.fromkeys(("load_cv", "lo", "hi", "even"), pl.Float64)
        )
    )


def load_over_windows(
    trace: Trace, window: int = 8192, *, column: str | None = None, averages: Sequence[int] = ()
) -> pl.DataFrame:
    """Load statistics of consecutive windows of tokens: what a step or a serving batch of that size
    would see.

    Args:
        trace: a trace with a token table; one without raises ``AnalysisError``.
        window: tokens in a window, in order of (doc, pos); the last one may be shorter.
        column: a token column that names the windows instead, such as the training or serving step;
            in order of its values.
        averages: also give the mean balancedness of the last N windows for each N here; serving
            engines quote 10, 100 and 1000 steps.

    Returns:
        [layer, window, tokens, balancedness, load_cv, max_violation, (balancedness_N)]:
        ``balancedness`` is mean / max over the real experts; ``balancedness_N`` averages the
        windows there are while fewer than N have passed.
    """
    require(window >= 1, "a window of at least 1 token", window)
    require(
        all(number >= 1 for number in averages), "averages over at least 1 window", list(averages)
    )
    groups = windows(trace, window) if column is None else grouping(trace, column, "window")
    frames = []
    for layer, first, table_GE in group_counts(trace, by_layer(trace), groups):
        places = slice(first, first + len(table_GE))
        names = {"window": groups.values[places], "tokens": groups.sizes[places]}
        frames.append(_summary(layer, names, table_GE))
    table = pl.concat(frames).select(
        "layer", "window", "tokens", "balancedness", "load_cv", "max_violation"
    )
    means = {
        f"balancedness_{n}": pl.col("balancedness").rolling_mean(n, min_samples=1).over("layer")
        for n in averages
    }
    return table.with_columns(**means)


def _summary(layer: LayerMeta, names: dict[str, Any], table_GE: NDArray[Any]) -> pl.DataFrame:
    """One row of statistics for each row of counts."""
    counts_GE = table_GE.astype(np.int64)
    real_GE, slots_G = counts_GE[:, : layer.num_experts], counts_GE.sum(axis=1)
    zero_share = np.divide(
        slots_G - real_GE.sum(axis=1), slots_G, out=np.full(len(slots_G), np.nan), where=slots_G > 0
    )
    columns = {"slots": slots_G, "zero_share": zero_share} | {
        name: function(real_GE) for name, function in _STATISTICS.items()
    }
    frame = pl.DataFrame({**names, **columns, "dead": measures.dead_experts(real_GE)}).with_columns(
        pl.col(pl.Float64).fill_nan(None)
    )
    return frame.select(pl.lit(layer.layer, pl.UInt32).alias("layer"), pl.all())


_STATISTICS = {
    "load_cv": measures.load_cv,
    "max_violation": measures.max_violation,
    "max_over_mean": measures.max_over_mean,
    "balancedness": measures.balancedness,
    "gini": measures.gini,
    "entropy": measures.load_entropy,
    "effective_experts": measures.effective_experts,
}
