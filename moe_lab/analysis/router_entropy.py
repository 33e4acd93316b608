"""Mean entropy of the router's scores and margin of its choice, with intervals over documents."""

import numpy as np
import polars as pl

from moe_lab.analysis.aligned_rows import KEY, by_layer
from moe_lab.analysis.document_bootstrap import RESAMPLES, Floats, Resampling
from moe_lab.analysis.document_sums import (
    Documents,
    documents,
    nulls,
    ratio_interval,
    unit_sums,
    unit_table,
)
from moe_lab.analysis.map_reduce import Sum, reduced
from moe_lab.analysis.requirements import of_tokens
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
        recorded no scores, ends of intervals also with fewer than 5 documents.
    """
    docs, resampling = documents(trace, 4), Resampling(resamples, seed, level)
    layers, rows = by_layer(trace), []
    tables = reduced(
        Sum(_sums, (trace,), (layer.layer,), unit_table(docs, 5), (layer, docs)) for layer in layers
    )
    for layer, sums_U5 in zip(layers, tables, strict=True):
        sums_U4 = sums_U5[:, 1:]
        (entropy,), (low,), (high,) = ratio_interval(sums_U4[:, :2], resampling)
        (margin,), (margin_low,), (margin_high,) = ratio_interval(sums_U4[:, 2:], resampling)
        rows.append(
            {"layer": layer.layer, "n_tokens": int(sums_U5[:, 0].sum()), "n_docs": len(docs.docs)}
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


def _sums(trace: Trace, layer: LayerMeta, docs: Documents) -> pl.DataFrame:
    """Rows, then for entropy and margin how many were recorded and their sum."""
    batches = (
        (
            batch["doc"].to_numpy(),
            np.stack(
                [
                    np.ones(batch.height),
                    *_known(layer, batch["entropy"]),
                    *_known(layer, batch["margin"]),
                ],
                axis=1,
            ),
        )
        for batch in trace.batches(layer.layer, [*KEY, "entropy", "margin"])
    )
    return unit_sums(docs, batches, 5)


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


_TYPES = {"layer": pl.UInt32, "n_tokens": pl.Int64, "n_docs": pl.Int64, "n_margin": pl.Int64}
