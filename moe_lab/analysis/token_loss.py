"""The mean loss of a trace's tokens, with its interval over documents."""

import polars as pl

from moe_lab.analysis.aligned_rows import KEY
from moe_lab.analysis.document_bootstrap import RESAMPLES, Resampling
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
from moe_lab.trace import Trace


@of_tokens
def token_loss(
    trace: Trace, *, resamples: int = RESAMPLES, seed: int = 0, level: float = 0.95
) -> pl.DataFrame:
    """Mean loss of the tokens whose loss the trace has.

    Returns:
        [n_tokens, n_docs, n_loss, loss, lo, hi], one row: tokens and documents of the trace, tokens
        with a loss, their mean in nats per token with the interval from resampling documents (null
        with fewer than 5). ``loss`` is null where no token has one.

    Example:
        >>> token_loss(open_trace("runs/demo/3f2a/trace"))  # doctest: +SKIP
    """
    docs = documents(trace, 2)
    (sums_U2,) = reduced([Sum(_sums, (trace,), (None,), unit_table(docs, 2), (docs,))])
    (loss,), (low,), (high,) = ratio_interval(sums_U2, Resampling(resamples, seed, level))
    row = {
        "n_tokens": trace.num_tokens,
        "n_docs": len(docs.docs),
        "n_loss": int(sums_U2[:, 0].sum()),
    }
    return nulls(pl.DataFrame([row | {"loss": float(loss), "lo": float(low), "hi": float(high)}]))


def _sums(trace: Trace, docs: Documents) -> pl.DataFrame:
    """Tokens with a loss, and the sum of their losses."""
    known = (batch.drop_nulls("loss") for batch in trace.batches(None, [*KEY, "loss"]))
    batches = (
        (one["doc"].to_numpy(), one.select(pl.lit(1.0), pl.col("loss").cast(pl.Float64)).to_numpy())
        for one in known
    )
    return unit_sums(docs, batches, 2)
