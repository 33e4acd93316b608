"""Mean entropy of the router's scores and margin of its choice, with intervals over documents."""

import numpy as np
import polars as pl

from moe_lab.analysis.aligned_rows import KEY, by_layer
from moe_lab.analysis.document_bootstrap import RESAMPLES, Floats, Resampling
from moe_lab.analysis.document_sums import (
    documents,
    nulls,
    ratio_interval,
    unit_sums,
)
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
