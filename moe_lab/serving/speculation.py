"""``speculation``: from how many accepted tokens speculative decoding is faster, where decoding
waits for weights.

A step that verifies n tokens (n - 1 drafts and the token before) reads more experts than a step of
one. With C(n) the bytes of such a step it pays where it yields more tokens than C(n) / C(1), the
drafts' own cost added: accepted drafts + 1 > C(n) / C(1) + (n - 1) d.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl

from moe_lab.accounting import flops
from moe_lab.errors import AnalysisError, require
from moe_lab.serving.distinct_experts import distinct_experts
from moe_lab.serving.expert_bytes import Bytes, bytes_by_layer
from moe_lab.serving.expert_sets import expert_sets
from moe_lab.trace import Trace

WINDOWS = (2, 3, 4, 6, 8, 12, 16)


def speculation(
    trace: Trace,
    window: Sequence[int] = WINDOWS,
    *,
    config: Any = None,
    bytes_per_parameter: float = 2.0,
    expert_bytes: Bytes | None = None,
    draft_cost: float = 0.0,
    resamples: int = 200,
    seed: int = 0,
) -> pl.DataFrame:
    """The cost of verifying a window of tokens, in bytes of weights and in accepted drafts.

    Args:
        trace: as ``distinct_experts``.
        window: tokens that one step verifies.
        config: of the model; attention, shared experts and the rest are then read too. Without it
            only routed experts count, which overstates what a longer window costs.
        bytes_per_parameter, expert_bytes: as ``bytes_by_layer``.
        draft_cost: time of drafting one token over that of decoding one.

    Returns:
        [window, distinct, bytes, cost, cost_lo, cost_hi, cost_by_load, cost_by_equal_load,
        accepted_needed, accepted_lo, accepted_hi, everything, note]: ``cost`` is bytes of the step
        over bytes of a step of one token; ``accepted_needed`` is the number of accepted drafts a
        step from which on speculation pays; ``everything`` says whether ``config`` was given.

    Raises:
        AnalysisError: as ``distinct_experts``; no size of an expert.

    Example:
        >>> speculation(open_trace("traces/x"), [4, 8], config="config.json")
    """
    require(
        0 <= draft_cost < float("inf"), "a draft cost of at least 0", draft_cost, field="draft_cost"
    )
    layers = expert_sets(trace).layers
    size_L = bytes_by_layer(layers, config, bytes_per_parameter, expert_bytes)
    weight_L = size_L / size_L.sum()
    fixed = 0.0
    if config is not None:
        whole = flops(config, 1, "decode", distinct=0.0, bytes_per_parameter=bytes_per_parameter)
        fixed = float(whole.weight_bytes or 0) / size_L.sum()
    frame = distinct_experts(trace, window=[1, *window], resamples=resamples, seed=seed)
    over_layers = frame.filter(pl.col("layer").is_null())
    sums = {
        (size, name): float(np.dot(rows[name].to_numpy(), weight_L))
        for (size,), rows in frame.drop_nulls("layer").group_by("size")
        for name in ("measured", "by_load", "by_equal_load")
    }
    one = sums.get((1, "measured"), 0.0) + fixed
    require(one, "a trace in which a real expert ran", "none", error=AnalysisError)
    rows = []
    for size in sorted(set(window)):
        mean = over_layers.filter(size=size).row(0, named=True)
        cost = (sums[size, "measured"] + fixed) / one
        # Layers have nearly one size: the interval of the mean over layers, scaled.
        ends = [
            None if mean[end] is None else (cost - fixed / one) * mean[end] / mean["measured"]
            + fixed / one
            for end in ("lo", "hi")
        ]  # fmt: skip
        added = (size - 1) * draft_cost - 1
        needed = [None if value is None else max(value + added, 0.0) for value in (cost, *ends)]
        others = [(sums[size, name] + fixed) / one for name in ("by_load", "by_equal_load")]
        total = (sums[size, "measured"] + fixed) * float(size_L.sum())
        rows.append(
            [size, mean["measured"], total, cost, *ends, *others, *needed, config is not None,
             mean["note"]]
        )  # fmt: skip
    numbers = dict.fromkeys(
        ("distinct", "bytes", "cost", "cost_lo", "cost_hi", "cost_by_load", "cost_by_equal_load",
         "accepted_needed", "accepted_lo", "accepted_hi"),
        pl.Float64,
    )  # fmt: skip
    schema = {"window": pl.Int64, **numbers, "everything": pl.Boolean, "note": pl.String}
    return pl.DataFrame(rows, schema=schema, orient="row").fill_nan(None)
