"""Active parameters token by token: from counts by hand, and from a trace through the command."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from refusals import refused

from moe_lab.accounting import active_distribution, count, find_model
from moe_lab.cli import main
from moe_lab.model import DecoderConfig, MoEConfig
from moe_lab.routing import RouterConfig, Routing
from moe_lab.trace import LayerMeta, TraceMeta, TraceWriter

ROUTER = RouterConfig(kind="longcat", num_experts=6, top_k=3, num_zero_experts=3)
MODEL = DecoderConfig(
    d_model=32,
    num_heads=4,
    num_layers=3,
    num_dense_layers=1,
    moe=MoEConfig(32, 16, ROUTER),
    d_dense=64,
)
EXPERT = 3 * 32 * 16
FFN_COUNTS = {1: [0, 1, 2, 3], 2: [3, 3, 1, 0]}


def test_each_token_has_its_own_active_parameters() -> None:
    counted = count(MODEL)
    measured = active_distribution(counted, FFN_COUNTS)
    expected = [counted.active_min + EXPERT * experts for experts in (3, 4, 3, 3)]
    assert (measured.lowest, measured.highest) == (min(expected), max(expected))
    assert measured.mean == pytest.approx(np.mean(expected))
    assert measured.sd == pytest.approx(np.std(expected))
    assert measured.quantiles[0.5] == expected[0]
    assert measured.mean_ffn_count == {1: 1.5, 2: 1.75}
    assert measured.nominal == (counted.active_min, counted.active_mean, counted.active_max)


def test_a_fixed_count_measures_the_nominal_number() -> None:
    entry = find_model("Mixtral-8x7B")
    assert entry is not None
    counted = count(entry["config"])
    for convention in ("A", "B", "C"):
        measured = active_distribution(
            counted, {layer: [2, 2, 2] for layer in range(32)}, convention
        )
        assert (measured.mean, measured.sd) == (counted.active(convention), 0)


def test_layers_go_by_number_or_by_order() -> None:
    by_order = {layer + 10: values for layer, values in FFN_COUNTS.items()}
    assert (
        active_distribution(count(MODEL), by_order).mean
        == active_distribution(count(MODEL), FFN_COUNTS).mean
    )


@pytest.mark.parametrize(
    ("ffn_counts", "field"),
    [
        ({1: [1, 2]}, "ffn_counts"),
        ({1: [1], 5: [1]}, "ffn_counts"),
        ({1: [1, 2], 2: [1]}, "ffn_counts"),
        ({1: [], 2: []}, "ffn_counts"),
        ({1: [1, 7], 2: [1, 1]}, "ffn_counts"),
        ({1: [1, -1], 2: [1, 1]}, "ffn_counts"),
    ],
)
def test_counts_that_do_not_fit_the_model_are_refused(
    ffn_counts: dict[int, list[int]], field: str
) -> None:
    with refused(field):
        active_distribution(count(MODEL), ffn_counts)


def routing(ffn_counts: list[int]) -> Routing:
    """Tokens with the given numbers of real experts; the other slots go to zero-computation
    experts.
    """
    slots = [[*range(real), *range(6, 9 - real)] for real in ffn_counts]
    indices, shape = torch.tensor(slots), (len(slots), 9)
    return Routing(
        indices, torch.ones(len(slots), 3), torch.zeros(shape), torch.full(shape, 1 / 9), 6, 3
    )


@pytest.fixture
def traced(tmp_path: Path) -> tuple[Path, Path]:
    """(config.json, trace folder) of the model above."""
    meta = TraceMeta(layers=tuple(LayerMeta(layer, 6, 3, 3) for layer in FFN_COUNTS))
    # two documents, written out of order: the command must line the layers up again
    doc, pos = np.array([1, 0, 0, 1]), np.array([0, 0, 1, 1])
    with TraceWriter(tmp_path / "trace", meta) as writer:
        writer.write_tokens(pl.DataFrame({"doc": doc, "pos": pos, "token_id": [1, 2, 3, 4]}))
        for layer, counts in FFN_COUNTS.items():
            writer.write_routing(layer, doc, pos, routing(counts))
    (tmp_path / "config.json").write_text(json.dumps(MODEL.to_dict()))
    return tmp_path / "config.json", tmp_path / "trace"


def test_the_command_measures_a_trace(
    traced: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    config, trace = traced
    assert main(["count", str(config), "--trace", str(trace), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)["measured"]
    assert found == json.loads(json.dumps(active_distribution(count(MODEL), FFN_COUNTS).to_dict()))
    assert main(["count", str(config), "--trace", str(trace)]) == 0
    text = capsys.readouterr().out
    assert "measured over 4 tokens (convention B)" in text
    assert "standard deviation" in text


def test_a_trace_of_another_model_is_refused(
    traced: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["count", "Mixtral-8x7B", "--trace", str(traced[1])]) == 2
    assert (
        "expected ffn_counts for MoE layers 0 to 31 (32 layers), got 1, 2"
        in capsys.readouterr().err
    )
