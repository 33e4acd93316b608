"""Small traces from plain arrays, for the analyses to read."""

import numpy as np
import polars as pl
import pytest
import torch

from moe_lab.routing import Routing
from moe_lab.trace import LayerMeta, TraceMeta, TraceWriter, open_trace


@pytest.fixture
def make_trace(tmp_path):
    """``make(indices, num_experts, num_zero=0, top_k=None, weights=None, scores=None,
    **token_columns)``.

    indices [T, K] or {layer: [T, K]}, -1 where unused; weights [T, K] and scores [T, E] of every
    layer, all alike by default.
    """
    made = iter(range(1000))

    def make(
        indices,
        num_experts,
        num_zero=0,
        top_k=None,
        rows_per_part=2**18,
        weights=None,
        scores=None,
        **columns,
    ):
        layers = {
            layer: np.asarray(ids)
            for layer, ids in (indices if isinstance(indices, dict) else {0: indices}).items()
        }
        first = next(iter(layers.values()))
        tokens = pl.DataFrame(
            {"doc": np.zeros(len(first), int), "pos": np.arange(len(first)), "token_id": 0}
            | columns
        ).cast({"doc": pl.UInt32, "pos": pl.UInt32})
        meta = TraceMeta(
            layers=tuple(
                LayerMeta(layer, num_experts, num_zero, top_k or ids.shape[1])
                for layer, ids in layers.items()
            )
        )
        folder = tmp_path / f"trace{next(made)}"
        with TraceWriter(folder, meta, rows_per_part=rows_per_part) as writer:
            writer.write_tokens(tokens)
            for layer, ids in layers.items():
                gates = (
                    torch.ones(ids.shape)
                    if weights is None
                    else torch.as_tensor(weights, dtype=torch.float32)
                )
                even = torch.ones(len(ids), num_experts + num_zero)
                logits = even if scores is None else torch.as_tensor(scores, dtype=torch.float32)
                routing = Routing(torch.tensor(ids), gates, logits, logits, num_experts, num_zero)
                writer.write_routing(
                    layer, tokens["doc"].to_numpy(), tokens["pos"].to_numpy(), routing
                )
        return open_trace(folder)

    return make


@pytest.fixture
def draw():
    """``draw(seed, tokens, choices, k, shares=None)``: [tokens, k] distinct ids, likelier where
    ``shares`` is larger.
    """

    def draw(seed, tokens, choices, k, shares=None):
        generator = np.random.default_rng(seed)
        keys = generator.gumbel(size=(tokens, choices)) + np.log(
            np.ones(choices) if shares is None else np.asarray(shares)
        )
        return np.argsort(-keys, axis=1)[:, :k]

    return draw
