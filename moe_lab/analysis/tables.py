"""From a trace to the small tables that analyses start from: sums over tokens, grouped by layer and
by a column of ``tokens``.

Everything here streams: what is held in memory is a few files at a time, and the result.
"""

import numpy as np
import polars as pl

from moe_lab.analysis.aligned_rows import KEY, by_layer
from moe_lab.analysis.token_groups import Grouping, group_counts
from moe_lab.errors import AnalysisError, TraceError, expected
from moe_lab.trace import Trace

__all__ = ["KEY", "collect", "counts_by", "expert_axis", "token_column"]


def token_column(trace: Trace, column: str, name: str) -> pl.LazyFrame:
    """[doc, pos, <name>]: a column of ``trace.tokens``.

    Raises ``AnalysisError`` where the trace has no such column.
    """
    columns = trace.tokens.collect_schema().names()
    if column not in columns:
        raise AnalysisError(expected(f"a token column among {', '.join(columns)}", repr(column)))
    return trace.tokens.select(*KEY, pl.col(column).alias(name))


def collect(frame: pl.LazyFrame) -> pl.DataFrame:
    """Run a lazy query in bounded memory. Raises ``TraceError`` where a file cannot be decoded."""
    try:
        return frame.collect(engine="streaming")
    except (pl.exceptions.ComputeError, pl.exceptions.PanicException, OSError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise TraceError(
            f"expected a readable trace, got {first}; try open_trace(...).check()"
        ) from error


def expert_axis(trace: Trace) -> pl.DataFrame:
    """[layer, expert, is_zero]: every configured expert of every layer."""
    return pl.concat(
        pl.DataFrame({"expert": np.arange(layer.num_choices, dtype=np.uint16)}).select(
            pl.lit(layer.layer, pl.UInt32).alias("layer"),
            "expert",
            is_zero=pl.col("expert") >= layer.num_experts,
        )
        for layer in sorted(trace.meta.layers, key=lambda layer: layer.layer)
    )


def counts_by(trace: Trace, groups: Grouping) -> pl.DataFrame:
    """[layer, <name of the groups>, expert, is_zero, count]: slots per expert for each group, every
    expert present in every group.
    """
    frames = []
    for layer in by_layer(trace):
        table_GE = np.concatenate([table for _, table in group_counts(trace, layer, groups)])
        experts = np.arange(layer.num_choices)
        frames.append(
            pl.DataFrame(
                {
                    "layer": pl.repeat(layer.layer, table_GE.size, dtype=pl.UInt32, eager=True),
                    groups.name: groups.values.gather(
                        np.repeat(np.arange(len(groups)), layer.num_choices)
                    ),
                    "expert": np.tile(experts.astype(np.uint16), len(groups)),
                    "is_zero": np.tile(experts >= layer.num_experts, len(groups)),
                    "count": table_GE.ravel().astype(np.int64),
                }
            )
        )
    return pl.concat(frames)
