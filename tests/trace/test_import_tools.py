"""Published tables and traces: taken whole, or refused for what is wrong with them."""

import json

import numpy as np
import polars as pl
import pytest
from refusals import refused

from moe_lab.errors import TraceError
from moe_lab.trace import import_trace


@pytest.mark.data
@pytest.mark.parametrize(
    ("model", "experts", "slots", "total"),
    [("mixtral-8x7b-v0.1", 8, 2, 417_792), ("olmoe-1b-7b-0924", 64, 8, 1_671_168)],
)
def test_published_counts_of_olmoe_and_mixtral_conserve(
    data_dir, tmp_path, model, experts, slots, total
):
    source = data_dir / "traces" / "olmoe" / "expert_counts.json"
    values = json.loads(source.read_text())[model]
    short = {
        kind: {domain: values[kind][domain] for domain in ("github", "book")} for kind in values
    }
    (tmp_path / "counts.json").write_text(json.dumps({model: short, "other": {}}))
    trace = import_trace("counts", tmp_path / "counts.json", tmp_path / "t", model=model)
    assert {(layer.num_experts, layer.top_k) for layer in trace.meta.layers} == {(experts, slots)}
    assert trace.num_tokens == 2 * total // slots
    domain = trace.tokens.filter(pl.col("domain") == "github").select("doc", "pos").collect()
    rows = trace.routing.filter(
        (pl.col("layer") == 7) & pl.col("doc").is_in(domain["doc"].unique().implode())
    ).collect()
    got = np.bincount(rows["experts"].explode().to_numpy(), minlength=experts)
    assert got.tolist() == values["expert_counts"]["github"]["layer_7"]
    assert not trace.meta.per_token
    assert "made up" in trace.meta.notes[0]


@pytest.mark.data
def test_counts_that_were_summed_in_bf16_are_refused(data_dir, tmp_path):
    source = data_dir / "traces" / "qwen3_mgsm" / "qwen3_30b_a3b_mgsm_counts.npz"
    with refused("counts", TraceError):
        import_trace("counts", source, tmp_path / "t", top_k=8)
    assert not (tmp_path / "t").exists()


@pytest.mark.data
def test_the_switch_trace_is_taken_whole_with_its_provenance(data_dir, tmp_path):
    folder = data_dir / "traces" / "switch_base8"
    trace = import_trace("stratamoe", folder, tmp_path / "t").check()
    values = json.loads((folder / "router-trace.v2.json").read_text())
    rows = trace.routing.sort("layer", "doc", "pos").collect()
    selections = np.array(values["selections"])
    assert rows["experts"].explode().to_list() == selections[:, :, 0].T.ravel().tolist()
    assert (trace.num_tokens, len(trace.meta.layers), trace.meta.layers[0].num_experts) == (
        215,
        6,
        8,
    )
    assert (
        trace.meta.model
        == values["source"]["model"]["id"] + "@" + values["source"]["model"]["revision"]
    )
    assert trace.meta.corpus_hash == values["source"]["workload"]["sha256"]
    assert (
        trace.meta.versions["source transformersVersion"]
        == values["source"]["software"]["transformersVersion"]
    )
    assert trace.meta.seed == 2339
    spans = json.loads((folder / "capture-metadata.json").read_text())["prompt_spans"]
    assert rows["doc"].n_unique() == len(spans) > 1


def atlas(**changes):
    activations = [
        {
            "layer": layer,
            "token_idx": token,
            "expert_idx": (token + slot) % 4,
            "gate_weight": 0.7 - 0.4 * slot,
        }
        for layer in (0, 2)
        for token in range(3)
        for slot in (1, 0)
    ]
    trace = {
        "model_id": "a/b",
        "num_layers": 3,
        "num_experts": 4,
        "top_k": 2,
        "token_ids": [5, 6, 7],
        "activations": activations,
    }
    return trace | changes


def test_moe_atlas_keeps_weights_and_orders_slots_by_them(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(atlas()))
    trace = import_trace("moe-atlas", tmp_path / "a.json", tmp_path / "t").check()
    assert [layer.layer for layer in trace.meta.layers] == [0, 2]
    rows = trace.routing.filter(pl.col("layer") == 2).sort("pos").collect()
    assert rows["experts"].to_list() == [[0, 1], [1, 2], [2, 3]]
    assert rows["weights"].to_list()[0] == pytest.approx([0.7, 0.3], abs=1e-3)
    assert trace.tokens.collect()["token_id"].to_list() == [5, 6, 7]
    assert trace.meta.model == "a/b"


def test_a_moe_atlas_trace_that_was_cut_is_refused(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(atlas(activations=atlas()["activations"][:-1])))
    with refused("activations", TraceError):
        import_trace("moe-atlas", tmp_path / "a.json", tmp_path / "t")
    broken = [{**item, "gate_weight": float("nan")} for item in atlas()["activations"]]
    (tmp_path / "a.json").write_text(json.dumps(atlas(activations=broken)))
    with pytest.raises(TraceError, match="expected finite gate weights"):
        import_trace("moe-atlas", tmp_path / "a.json", tmp_path / "t")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ([[3, -1, 2, 0]], "expected counts of at least 0, got -1"),
        (
            [[3, 1, 2, 2], [2, 2, 2, 1]],
            r"expected the same sum of 2 x tokens in every layer, got 7..8 in 2 layers",
        ),
        (
            [[5, 1, 1, 1]],
            r"expected at most one slot of each token on an expert \(4 tokens\), got 5",
        ),
        ([[1.5, 0.5]], "expected integers of .* got float64"),
        ([[1, 2], [3]], "expected rows of one length"),
    ],
)
def test_counts_that_no_tokens_can_have_are_refused(tmp_path, table, message):
    (tmp_path / "c.json").write_text(json.dumps(table))
    with pytest.raises(TraceError, match=message):
        import_trace("counts", tmp_path / "c.json", tmp_path / "t", top_k=2)


def test_counts_without_k_or_without_a_model_say_what_to_give(tmp_path):
    (tmp_path / "c.json").write_text(json.dumps([[2, 2, 2, 2]]))
    with refused("top_k", TraceError):
        import_trace("counts", tmp_path / "c.json", tmp_path / "t")
    (tmp_path / "c.json").write_text(
        json.dumps({"a": {"expert_counts": {}}, "b": {"expert_counts": {}}})
    )
    with refused("model", TraceError):
        import_trace("counts", tmp_path / "c.json", tmp_path / "t", top_k=2)
