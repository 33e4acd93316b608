"""How decided the router was, and how much of its choice was no compute at all: per layer, with
intervals from resampling documents.
"""

from typing import Any

import numpy as np
import polars as pl

from moe_lab.analysis.bootstrap import Floats
from moe_lab.analysis.documents import (
    RESAMPLES,
    Documents,
    Resampling,
    documents,
    nulls,
    over,
    ratio_interval,
    unit_sums,
)
from moe_lab.analysis.recorded import of_tokens, of_zero_experts
from moe_lab.analysis.streams import KEY, by_layer
from moe_lab.errors import TraceError, expected
from moe_lab.trace import LayerMeta, Trace


@of_tokens
def router_entropy(
    trace: Trace, *, resamples: int = RESAMPLES, seed: int = 0, level: float = 0.95
) -> pl.DataFrame:
    """Mean entropy of the router's scores and mean margin of its choice, per layer.

    Returns:
        [layer, n_tokens, n_docs, entropy, entropy_lo, entropy_hi, entropy_max, margin, margin_lo,
        margin_hi, n_margin]: ``entropy`` in nats, at most ``entropy_max = log E`` over real and
        zero-compute experts; ``margin`` is the score of the last expert chosen less that of the
        first one not chosen, over the ``n_margin`` tokens that have one. Null where the trace
        recorded no scores, ends of intervals also with fewer than 2 documents.
    """
    docs, resampling = documents(trace, 4), Resampling(resamples, seed, level)
    rows = []
    for layer in by_layer(trace):
        sums_U4 = np.zeros((docs.units, 4))
        rows_in_layer = 0
        for batch in trace.batches(layer.layer, [*KEY, "entropy", "margin"]):
            parts = [item for name in ("entropy", "margin") for item in _known(layer, batch[name])]
            sums_U4 += unit_sums(docs, batch["doc"].to_numpy(), np.stack(parts, axis=1))
            rows_in_layer += batch.height
        (entropy,), (low,), (high,) = ratio_interval(sums_U4[:, :2], resampling)
        (margin,), (margin_low,), (margin_high,) = ratio_interval(sums_U4[:, 2:], resampling)
        rows.append(
            {"layer": layer.layer, "n_tokens": rows_in_layer, "n_docs": len(docs.docs)}
            | {
                "entropy": entropy,
                "entropy_lo": low,
                "entropy_hi": high,
                "entropy_max": float(np.log(layer.num_choices)),
            }
            | {
                "margin": margin,
                "margin_lo": margin_low,
                "margin_hi": margin_high,
                "n_margin": int(sums_U4[:, 2].sum()),
            }
        )
    return nulls(pl.DataFrame(rows, schema_overrides=_TYPES))


@of_tokens
@of_zero_experts
def zero_compute(
    trace: Trace, *, resamples: int = RESAMPLES, seed: int = 0, level: float = 0.95
) -> pl.DataFrame:
    """How many slots go to zero-compute experts, and whether tokens are polarised between no real
    expert and all K.

    Returns:
        [layer, n_tokens, n_docs, zero_ratio, lo, hi, compute_intensity, at_zero, at_full,
        polarisation, polarisation_lo, polarisation_hi, binomial]: ``zero_ratio`` of the used slots
        went to zero-compute experts; ``compute_intensity`` is mean ffn_count / K; ``at_zero`` and
        ``at_full`` are the shares of tokens with no real expert and with K of them,
        ``polarisation`` their sum (arXiv 2601.15370, section 6), and ``binomial`` what K
        independent slots of the same mean would give: ``(1-p)^K + p^K``. Slots of one token are
        distinct experts, so a router that ignores the token lies somewhat below it. Layers without
        zero-compute experts are left out.
    """
    docs, resampling = documents(trace, 5), Resampling(resamples, seed, level)
    rows = [
        _zero_row(trace, layer, docs, resampling)
        for layer in by_layer(trace)
        if layer.num_zero_experts
    ]
    return nulls(pl.DataFrame(rows, schema=_ZERO_SCHEMA))


def _known(layer: LayerMeta, column: pl.Series) -> tuple[Floats, Floats]:
    """Whether each value was recorded, and the value (0 where not)."""
    if not column.drop_nulls().is_finite().all():
        got = expected(
            f"a finite {column.name} of each token", "NaN or infinity", "open_trace(...).check()"
        )
        raise TraceError(f"layer {layer.layer}: {got}")
    return column.is_not_null().to_numpy().astype(np.float64), column.fill_null(
        0
    ).to_numpy().astype(np.float64)


def _zero_row(
    trace: Trace, layer: LayerMeta, docs: Documents, resampling: Resampling
) -> dict[str, Any]:
    sums_U6 = np.zeros((docs.units, 6))
    for batch in trace.batches(layer.layer, [*KEY, "ffn_count", "zero_count"]):
        ffn, zero = (
            batch[name].to_numpy().astype(np.int64) for name in ("ffn_count", "zero_count")
        )
        columns = np.stack(
            [np.ones_like(ffn), ffn, ffn == 0, ffn == layer.top_k, ffn + zero, zero], axis=1
        )
        sums_U6 += unit_sums(docs, batch["doc"].to_numpy(), columns)
    (ratio,), (low,), (high,) = ratio_interval(sums_U6[:, 4:], resampling)
    tokens, ffn, at_zero, at_full = sums_U6[:, :4].sum(axis=0)
    ends = np.stack([sums_U6[:, 0], sums_U6[:, 2] + sums_U6[:, 3]], axis=1)
    (polar,), (polar_low,), (polar_high,) = ratio_interval(ends, resampling)
    intensity = float(over(np.array(ffn), np.array(tokens * layer.top_k)))
    return (
        {
            "layer": layer.layer,
            "n_tokens": int(tokens),
            "n_docs": len(docs.docs),
            "zero_ratio": ratio,
            "lo": low,
            "hi": high,
        }
        | {
            "compute_intensity": intensity,
            "at_zero": float(over(np.array(at_zero), np.array(tokens))),
        }
        | {"at_full": float(over(np.array(at_full), np.array(tokens)))}
        | {"polarisation": polar, "polarisation_lo": polar_low, "polarisation_hi": polar_high}
        | {
            "binomial": (1 - intensity) ** layer.top_k + intensity**layer.top_k
            if tokens
            else np.nan
        }
    )


_TYPES = {"layer": pl.UInt32, "n_tokens": pl.Int64, "n_docs": pl.Int64, "n_margin": pl.Int64}
_ZERO_SCHEMA = {"layer": pl.UInt32, "n_tokens": pl.Int64, "n_docs": pl.Int64} | dict.fromkeys(
    (
        "zero_ratio",
        "lo",
        "hi",
        "compute_intensity",
        "at_zero",
        "at_full",
        "polarisation",
        "polarisation_lo",
        "polarisation_hi",
        "binomial",
    ),
    pl.Float64,
)
