"""From a trace to the frame that the analyses of difficulty take: routing joined with tokens,
difficulties and notions of compute.
"""

import numpy as np
import polars as pl

from moe_lab.analysis.difficulty.alignment import STRATA
from moe_lab.errors import AnalysisError, expected
from moe_lab.text import ngram_surprisal
from moe_lab.trace import LayerMeta, Trace

NGRAM = "ngram_loss"
SWIGLU_MATRICES = 3


def difficulty_frame(
    trace: Trace, *, difficulty: pl.DataFrame | pl.LazyFrame | None = None, seed: int = 0
) -> pl.LazyFrame:
    """[layer, doc, pos, token_id, ffn_count, gate_mass_ffn, <class columns>, <difficulty columns>]
    of a trace with a token table.

    Args:
        difficulty: [doc, pos, <columns>] to join; by default ``ngram_loss``, the trigram surprisal
            of each token under n-grams counted in the other half of the trace's documents. (Own
            loss is no difficulty: compute lowers it.)

    Raises:
        AnalysisError: the trace has no token table.
    """
    schema = trace.tokens.collect_schema()
    if "token_id" not in schema or trace.tokens.select(pl.len()).collect().item() == 0:
        raise AnalysisError(
            expected(
                "a trace with a token table",
                f"none in {trace.folder}",
                "tracing again with token ids",
            )
        )
    classes = [name for name in STRATA if name in schema]
    tokens = trace.tokens.select("doc", "pos", "token_id", *classes)
    added = (trace_surprisal(trace, seed) if difficulty is None else difficulty).lazy()
    added = added.with_columns(pl.col("doc", "pos").cast(pl.UInt32))
    routing = trace.routing.select("layer", "doc", "pos", "ffn_count", "gate_mass_ffn")
    return routing.join(tokens.join(added, on=["doc", "pos"], how="left"), on=["doc", "pos"])


def trace_surprisal(trace: Trace, seed: int = 0, folds: int = 2) -> pl.DataFrame:
    """[doc, pos, ngram_loss] from the tokens of the trace alone; null where no token stands before.
    A document is whole in its fold, and runs of positions with a gap between are scored apart.
    """
    rows = trace.tokens.select("doc", "pos", "token_id").collect().sort("doc", "pos")
    doc, pos, ids = (rows[name].to_numpy().astype(np.int64) for name in ("doc", "pos", "token_id"))
    breaks = np.flatnonzero((doc[1:] != doc[:-1]) | (pos[1:] != pos[:-1] + 1)) + 1
    starts = np.append(0, breaks)
    vocabulary = trace.meta.vocab_size or int(ids.max(initial=0)) + 1
    found = ngram_surprisal(np.split(ids, breaks), vocabulary, folds, seed, groups=doc[starts])
    column = pl.Series(NGRAM, np.concatenate(found).astype(np.float32))
    return rows.select("doc", "pos").with_columns(column.fill_nan(None))


def compute_columns(
    routing: pl.LazyFrame | pl.DataFrame,
    layer: LayerMeta,
    *,
    d_model: int,
    d_expert: int,
    n_bytes: str | None = None,
    matrices: int = SWIGLU_MATRICES,
) -> pl.LazyFrame:
    """Notions of compute beside ``ffn_count``, for one layer's rows.

    Args:
        routing: rows with ``ffn_count``.
        matrices: of an expert; 3 for SwiGLU.
        n_bytes: column of the token's bytes, which adds ``ffn_count_per_byte`` and
            ``flops_per_byte``.

    Adds ``compute_intensity`` (ffn_count / K), ``flops`` (forward FLOPs of the routed experts, ``2
    ffn_count matrices d_model d_expert``) and ``active_params`` (``ffn_count matrices d_model
    d_expert``).
    """
    size = matrices * d_model * d_expert
    count = pl.col("ffn_count").cast(pl.Float64)
    frame = routing.lazy().with_columns(
        compute_intensity=count / layer.top_k, flops=2 * count * size, active_params=count * size
    )
    if n_bytes is None:
        return frame
    width = pl.col(n_bytes).cast(pl.Float64)
    per_byte = {"ffn_count_per_byte": count / width, "flops_per_byte": pl.col("flops") / width}
    return frame.with_columns(
        **{name: pl.when(width > 0).then(value) for name, value in per_byte.items()}
    )
