"""Layers that run several times: each pass is a layer of the trace, parameters count once, work as
often as it is done.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from moe_lab.accounting import count, flops
from moe_lab.analysis import expert_load
from moe_lab.commands.count import _measure
from moe_lab.errors import ConfigError, TraceError
from moe_lab.trace import LayerMeta, TraceMeta, capture, import_trace, open_trace

RELEASE: dict[str, Any] = {
    "model_type": "inkling2_loop_text",
    **{"vocab_size": 201024, "unpadded_vocab_size": 200058, "hidden_size": 2304},
    **{"num_hidden_layers": 24, "num_attention_heads": 24, "num_key_value_heads": 8},
    **{"head_dim": 128, "swa_num_attention_heads": 24, "swa_num_key_value_heads": 8},
    **{"swa_head_dim": 128, "sliding_window_size": 1024, "d_rel": 16, "rel_extent": 1024},
    **{"conv_kernel_size": 4, "moe_intermediate_size": 1152, "n_routed_experts": 128},
    **{"num_experts_per_tok": 8, "n_layers_per_attn_res_block": 6},
    "loop_config": {"core_start": 6, "core_end": 18, "num_passes": 3, "gate_rank": 64},
}
"""Sizes of thinkingmachines/Inkling-2-Mini (Inkling2LoopTextConfig of transformers 5.24)."""
TINY = {
    **RELEASE,
    **{"vocab_size": 120, "unpadded_vocab_size": 111, "hidden_size": 48, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "head_dim": 8, "swa_num_attention_heads": 4, "rel_extent": 16},
    **{"swa_num_key_value_heads": 2, "swa_head_dim": 8, "sliding_window_size": 96, "d_rel": 4},
    **{"moe_intermediate_size": 24, "n_routed_experts": 8, "num_experts_per_tok": 2},
}
VISITS = [*range(18), *range(6, 18), *range(6, 18), *range(18, 24)]
TOKENS = 20


def tiny() -> Any:
    """Inkling-2-Mini with its 24 layers and its loop, narrow."""
    module = pytest.importorskip("transformers.models.inkling2_loop", reason="needs 5.24")
    fields = {name: value for name, value in TINY.items() if name != "model_type"}
    config = module.Inkling2LoopTextConfig(**fields, eos_token_id=1, pad_token_id=0)
    config._attn_implementation = config._experts_implementation = "eager"
    torch.manual_seed(0)
    return module.Inkling2LoopForCausalLM(config).eval()


def test_inkling_2_mini_is_26b_stored_and_3b_active() -> None:
    counted = count(RELEASE)
    assert counted.total == 26_068_156_416  # Inkling2LoopForCausalLM of transformers 5.24
    assert round(counted.active("A") / 1e9) == round(counted.active("B") / 1e9) == 3
    assert counted.assumed == (
        "layer_types: full_attention in every sixth layer, else sliding_attention (no layer_types)",
    ) or all("layer_types" in sentence for sentence in counted.assumed)


def test_work_is_done_as_often_as_a_layer_runs() -> None:
    once = count({**RELEASE, "loop_config": {**RELEASE["loop_config"], "num_passes": 1}})
    thrice = count(RELEASE)
    assert once.total == thrice.total
    assert once.active() == thrice.active()
    work = [flops(one, 4096).by_part["routed"] for one in (once, thrice)]
    assert work[1] / work[0] == 48 / 24
    read = [flops(one, 4096, "decode").weight_bytes for one in (once, thrice)]
    assert read[0] is not None
    assert read[1] is not None
    assert read[1] > 1.5 * read[0]
    frame = thrice.frame().filter(pl.col("part") == "router")
    assert frame["passes"].to_list() == [1] * 6 + [3] * 12 + [1] * 6


@pytest.mark.hf
def test_operations_agree_with_torchs_counter() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = tiny()
    assert count(model.config).total == sum(weight.numel() for weight in model.parameters())
    ids = torch.randint(0, 100, (2, 32))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids, use_cache=False)
    ours = flops(model.config, 32, "prefill").forward
    assert counter.get_total_flops() == pytest.approx(2 * 32 * ours, rel=0.01)


@pytest.mark.hf
def test_each_pass_is_captured_and_conserves_its_counts(tmp_path: Path) -> None:
    model = tiny()
    ids = torch.randint(2, 100, (2, TOKENS // 2))
    with torch.no_grad(), capture(model, tmp_path / "t", output_ratio=True):
        model(ids)
    trace = open_trace(tmp_path / "t").check()
    layers = trace.layers
    assert layers["layer"].to_list() == list(range(48))
    assert layers["model_layer"].to_list() == VISITS
    assert [VISITS[:place].count(layer) for place, layer in enumerate(VISITS)] == layers[
        "pass"
    ].to_list()
    sums = trace.counts().group_by("layer").agg(pl.col("count").sum())["count"]
    assert sums.to_list() == [2 * TOKENS] * 48
    assert trace.routing.collect()["output_ratio"].is_finite().all()
    assert any("run several times" in note for note in trace.meta.notes)
    per_pass = expert_load(trace).join(layers.select("layer", "model_layer"), on="layer")
    whole = expert_load(trace, over_passes=True)
    assert whole["layer"].unique().to_list() == list(range(24))
    added = per_pass.group_by("model_layer", "expert").agg(pl.col("count").sum())
    both = whole.join(added, left_on=["layer", "expert"], right_on=["model_layer", "expert"])
    assert both.height == 24 * 8
    assert both["count"].to_list() == both["count_right"].to_list()
    passes = expert_load(trace).filter(pl.col("layer").is_in([6, 18]))
    assert passes.filter(layer=6)["count"].to_list() != passes.filter(layer=18)["count"].to_list()
    measured = _measure(str(tmp_path / "t"), count(model.config))
    assert measured.mean == count(model.config).active()


@pytest.mark.hf
def test_generation_goes_on_in_every_pass(tmp_path: Path) -> None:
    model = tiny()
    with torch.no_grad(), capture(model, tmp_path / "t"):
        model.generate(torch.randint(2, 100, (1, 5)), max_new_tokens=4, do_sample=False)
    trace = open_trace(tmp_path / "t").check()
    rows = trace.routing.group_by("layer").agg(pl.len()).collect()
    assert rows.height == 48
    assert rows["len"].n_unique() == 1


@pytest.mark.hf
def test_a_layer_that_does_not_run_as_often_as_configured_is_refused(tmp_path: Path) -> None:
    model = tiny()
    gate = model.model.layers[7].mlp.gate
    forward, calls = gate.forward, []

    def twice(x: torch.Tensor) -> Any:
        calls.append(1)
        return gate(x) if len(calls) == 1 else forward(x)  # one call more than there are passes

    gate.forward = twice
    with (
        pytest.raises(TraceError, match=r"layers\.7\.mlp\.gate .*expected 3 runs of the layer"),
        torch.no_grad(),
        capture(model, tmp_path / "t"),
    ):
        model(torch.randint(2, 100, (1, 5)))


def test_records_of_an_engine_with_a_row_for_each_pass_are_told_apart(tmp_path: Path) -> None:
    ids = np.random.default_rng(0).random((7, 48, 8)).argsort(axis=2)[:, :, :2].astype(np.int32)
    np.savez(tmp_path / "routes.npz", routed_experts=ids, token_ids=np.arange(8))
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    trace = import_trace("vllm", tmp_path / "routes.npz", tmp_path / "t", config=tmp_path).check()
    assert trace.layers["model_layer"].to_list() == VISITS
    assert (
        trace.layer_counts(trace.meta.layers[30]).tolist()
        == np.bincount(ids[:, 30].reshape(-1), minlength=8).tolist()
    )


def test_a_pass_of_a_layer_is_there_once() -> None:
    layers = [LayerMeta(number, 4, model_layer=0) for number in (0, 1)]
    with pytest.raises(ConfigError, match="expected each pass of a layer once"):
        TraceMeta(layers=tuple(layers))
