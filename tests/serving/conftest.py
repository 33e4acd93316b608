"""Small traces from plain arrays, with phases and sizes of experts, for the serving tests."""

import numpy as np
import polars as pl
import pytest

from moe_lab.trace import LayerMeta, TraceMeta, TraceWriter, import_trace, open_trace
from moe_lab.trace.rows import slot_rows


@pytest.fixture
def write_trace(tmp_path):
    """``write(ids [T, L, K], doc=[T], num_experts=E, decode=[T] or None, ...)`` -> Trace."""
    made = iter(range(1000))

    def write(
        ids,
        doc=None,
        num_experts=8,
        *,
        decode=None,
        num_zero=0,
        expert_bytes=1,
        weights=None,
        columns=None,
        rows_per_part=2**18,
        order=None,
        **meta,
    ):
        ids = np.asarray(ids)
        tokens, layers, slots = ids.shape
        doc = np.zeros(tokens, np.uint32) if doc is None else np.asarray(doc, np.uint32)
        pos = np.array([int((doc[:row] == doc[row]).sum()) for row in range(tokens)], np.uint32)
        sizes = np.broadcast_to(expert_bytes, layers).tolist()
        about = TraceMeta(
            layers=tuple(
                LayerMeta(layer, num_experts, num_zero, slots, expert_bytes=sizes[layer])
                for layer in range(layers)
            ),
            has_weights=weights is not None,
            has_scores=False,
            phase="eval" if decode is None else "generate",
            **meta,
        )
        order = np.arange(tokens) if order is None else np.asarray(order)
        phase = {} if decode is None else {"phase": np.where(decode, "decode", "prefill")[order]}
        folder = tmp_path / f"trace{next(made)}"
        with TraceWriter(folder, about, rows_per_part=rows_per_part) as writer:
            writer.write_tokens(
                pl.DataFrame(
                    {
                        "doc": doc[order],
                        "pos": pos[order],
                        "token_id": 0,
                        **phase,
                        **(columns or {}),
                    }
                )
            )
            for layer in about.layers:
                chosen = ids[order, layer.layer]
                gates = None if weights is None else np.float32(weights)[order, layer.layer]
                rows = slot_rows(layer, doc[order], pos[order], chosen, gates, None, None)
                counts = np.bincount(chosen[chosen >= 0], minlength=layer.num_choices)
                writer.write_rows(layer.layer, rows, counts)
        return open_trace(folder)

    return write


@pytest.fixture
def random_ids():
    """``make(tokens, layers, slots, experts, seed)`` -> ids [T, L, K], experts of a skewed load."""

    def make(tokens, layers, slots, experts, seed=0, skew=1.0):
        generator = np.random.default_rng(seed)
        worth = skew * generator.normal(size=(1, layers, experts))
        noise = generator.gumbel(size=(tokens, layers, experts))
        return np.argsort(-(worth + noise), axis=2)[:, :, :slots]

    return make


@pytest.fixture(scope="session")
def engine_traces(data_dir, tmp_path_factory):
    """The two published traces of an engine with streamed experts, imported."""
    folder = tmp_path_factory.mktemp("engine")
    names = ("qwen3_30b_a3b", "gemma4_26b_a4b")
    source = data_dir / "serving"
    if not source.is_dir():
        pytest.skip(f"needs the published data: no folder {source}")
    return {
        name: import_trace("route-trace", source / f"{name}.route.csv.gz", folder / name)
        for name in names
    }
