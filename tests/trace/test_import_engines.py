"""Records of vLLM, SGLang, TensorRT-LLM and Megatron-LM as traces: nothing believed that was not
recorded.
"""

import base64
import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from refusals import refused

from moe_lab.errors import TraceError
from moe_lab.trace import import_trace

LAYERS, SLOTS, EXPERTS = 3, 2, 8


def routes(tokens, seed=0, layers=LAYERS, slots=SLOTS, experts=EXPERTS):
    rng = np.random.default_rng(seed)
    return np.argsort(rng.random((tokens, layers, experts)), axis=2)[..., :slots].astype(np.int32)


def experts_of(trace, layer, doc):
    rows = (
        trace.routing.filter((pl.col("layer") == layer) & (pl.col("doc") == doc))
        .sort("pos")
        .collect()
    )
    return rows["experts"].to_list()


@pytest.mark.parametrize("kind", ["vllm", "trtllm"])
def test_arrays_of_requests_become_documents_and_the_last_token_stays_without_a_route(
    tmp_path, kind
):
    first, second = routes(9, 1), routes(4, 2)
    arrays = {
        "routed_experts_0": first,
        "token_ids_0": np.arange(10),
        "routed_experts_1": second,
        "token_ids_1": np.arange(5),
    }
    np.savez(tmp_path / "dump.npz", **arrays)
    trace = import_trace(
        kind, tmp_path / "dump.npz", tmp_path / "t", num_experts=EXPERTS, layers=[1, 2, 5]
    ).check()
    assert [layer.layer for layer in trace.meta.layers] == [1, 2, 5]
    assert experts_of(trace, 5, 0) == first[:, 2].tolist()
    assert experts_of(trace, 1, 1) == second[:, 0].tolist()
    assert trace.num_tokens == 13
    tokens = trace.tokens.collect()
    assert tokens.filter(~pl.col("routed")).select("doc", "pos").rows() == [(0, 9), (1, 4)]
    assert tokens["token_id"].to_list() == [*range(10), *range(5)]
    assert not trace.meta.has_weights
    assert not trace.meta.has_scores
    rows = trace.routing.collect()
    assert rows["weights"].null_count() == rows["entropy"].null_count() == rows.height


def test_one_array_without_token_ids_is_one_document(tmp_path):
    np.save(tmp_path / "one.npy", routes(6))
    trace = import_trace("vllm", tmp_path / "one.npy", tmp_path / "t", num_experts=EXPERTS).check()
    assert trace.num_tokens == 6
    assert trace.tokens.collect().height == 0


def test_the_expert_axis_is_never_guessed_from_the_ids(tmp_path):
    np.save(tmp_path / "one.npy", routes(6))
    with refused("num_experts", TraceError):
        import_trace("vllm", tmp_path / "one.npy", tmp_path / "t")
    trace = import_trace("vllm", tmp_path / "one.npy", tmp_path / "t", num_experts=20)
    assert trace.counts()["expert"].max() == 19


def test_a_configuration_tells_experts_and_picks_the_sparse_layers_out_of_all(tmp_path):
    config = {
        "model_type": "deepseek_v3", "hidden_size": 8, "intermediate_size": 8,
        "moe_intermediate_size": 4, "num_hidden_layers": 4,
        "num_attention_heads": 1, "num_key_value_heads": 1, "vocab_size": 16,
        "n_routed_experts": EXPERTS, "num_experts_per_tok": SLOTS,
        "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0, "q_lora_rank": None, "kv_lora_rank": 4,
        "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    array = routes(5, layers=4)
    np.save(tmp_path / "one.npy", array)
    trace = import_trace("vllm", tmp_path / "one.npy", tmp_path / "t", config=tmp_path).check()
    assert [layer.layer for layer in trace.meta.layers] == [1, 2, 3]
    assert experts_of(trace, 3, 0) == array[:, 3].tolist()
    np.save(tmp_path / "two.npy", routes(5, layers=2))
    with pytest.raises(
        TraceError, match="expected routes of 3 MoE layers or of all 4 layers, got 2"
    ):
        import_trace("vllm", tmp_path / "two.npy", tmp_path / "t2", config=config)


def test_aliased_zero_experts_are_told_and_not_believed(tmp_path):
    """vLLM writes a zero-compute expert as expert 0: three of them and the real one look like four
    slots on expert 0.
    """
    array = np.array([[[0, 3, 0]], [[5, 0, 0]], [[1, 2, 3]]], np.int32)
    np.save(tmp_path / "one.npy", array)
    with pytest.raises(
        TraceError,
        match="layer 0: expected each token to name an expert at most once, got a repeated id",
    ):
        import_trace("vllm", tmp_path / "one.npy", tmp_path / "t", num_experts=EXPERTS)
    trace = import_trace(
        "vllm", tmp_path / "one.npy", tmp_path / "t", num_experts=EXPERTS, num_zero_experts=4
    ).check()
    assert not trace.meta.zero_experts_known
    assert "zero-compute experts as expert 0" in trace.meta.notes[0]
    assert experts_of(trace, 0, 0) == [[0, 3], [5, 0], [1, 2, 3]]
    counts = trace.counts().filter("is_zero")
    assert counts.height == 4
    assert counts["count"].sum() == 0


def test_sglang_responses_are_decoded_and_cover_all_but_the_last_token(tmp_path):
    array = routes(6)
    encoded = base64.b64encode(array.astype("<i4").tobytes()).decode()
    record = {
        "prompt_token_ids": [7, 8, 9],
        "output_ids": [1, 2, 3, 4],
        "meta_info": {"routed_experts": encoded},
    }
    (tmp_path / "r.jsonl").write_text(json.dumps(record) + "\n\n" + json.dumps(record) + "\n")
    trace = import_trace(
        "sglang", tmp_path / "r.jsonl", tmp_path / "t", num_experts=EXPERTS, top_k=SLOTS
    ).check()
    assert trace.num_tokens == 12
    assert experts_of(trace, 2, 1) == array[:, 2].tolist()
    tokens = trace.tokens.collect()
    assert tokens["token_id"].to_list() == [7, 8, 9, 1, 2, 3, 4] * 2
    assert tokens.filter(~pl.col("routed"))["pos"].to_list() == [6, 6]


def test_damaged_base64_and_routes_that_do_not_divide_are_refused(tmp_path):
    record = {"prompt_token_ids": [1, 2], "output_ids": [3], "meta_info": {"routed_experts": "!!!"}}
    (tmp_path / "r.json").write_text(json.dumps(record))
    with refused("dtype", TraceError):
        import_trace("sglang", tmp_path / "r.json", tmp_path / "t", num_experts=8, top_k=2)
    record["meta_info"] = {
        "routed_experts": base64.b64encode(np.zeros(7, "<i4").tobytes()).decode()
    }
    (tmp_path / "r.json").write_text(json.dumps(record))
    with pytest.raises(TraceError, match=r"expected routes \[tokens, layers, 2\], got 7 numbers"):
        import_trace("sglang", tmp_path / "r.json", tmp_path / "t", num_experts=8, top_k=2)


def test_the_recorder_of_sglang_gives_counts_and_says_that_its_rows_are_made_up(tmp_path):
    counts = torch.tensor([[[4, 2, 2, 0], [1, 3, 1, 3]], [[0, 0, 2, 2], [1, 1, 1, 1]]])
    torch.save({"rank": 0, "logical_count": counts}, tmp_path / "expert_distribution.pt")
    trace = import_trace(
        "sglang", tmp_path / "expert_distribution.pt", tmp_path / "t", top_k=2
    ).check()
    assert trace.counts()["count"].to_list() == counts.sum(dim=0).flatten().tolist()
    assert not trace.meta.per_token


class Evil:
    def __reduce__(self):
        return (print, ("executed",))


def test_a_pickle_is_not_executed(tmp_path, capsys):
    torch.save({"logical_count": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(TraceError, match=r"expected tensors alone in evil.pt"):
        import_trace("sglang", tmp_path / "evil.pt", tmp_path / "t", top_k=2)
    np.save(tmp_path / "evil.npy", np.array([Evil()], dtype=object), allow_pickle=True)
    with pytest.raises(
        TraceError, match=r"expected plain numbers in evil.npy, got pickled objects"
    ):
        import_trace("vllm", tmp_path / "evil.npy", tmp_path / "t", num_experts=8)
    assert "executed" not in capsys.readouterr().out


def test_a_header_that_promises_more_than_the_file_holds_is_refused_before_allocation(tmp_path):
    path = tmp_path / "huge.npy"
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": "<i4", "fortran_order": False, "shape": (10**9, 1000, 8)}
        )
    with pytest.raises(
        TraceError,
        match=r"expected 32000000000000 bytes of data in huge.npy as its header says, got a "
        r"file of \d+",
    ):
        import_trace("vllm", path, tmp_path / "t", num_experts=8)


def megatron(folder: Path, rank: int, steps: dict[int, dict[int, np.ndarray]]) -> None:
    folder.mkdir(exist_ok=True)
    with open(folder / f"router_trace_rank{rank}.jsonl", "w") as file:
        for step, layers in steps.items():
            for layer, ids in layers.items():
                record = {
                    "step": step,
                    "stage": "pre_dispatch",
                    "block": "decoder",
                    "layer": layer,
                    "rank": rank,
                }
                file.write(
                    json.dumps(
                        record
                        | {
                            "num_tokens": len(ids),
                            "topk": ids.shape[1],
                            "top_indices": ids.tolist(),
                        }
                    )
                    + "\n"
                )


def test_a_name_of_thousands_of_digits_is_a_name(tmp_path):
    np.savez(tmp_path / "dump.npz", **{f"routed_experts_{'9' * 5000}": routes(5)})  # type: ignore
    assert import_trace("vllm", tmp_path / "dump.npz", tmp_path / "t", num_experts=EXPERTS)


def test_megatron_ranks_of_other_tokens_are_merged_and_equal_ones_counted_once(tmp_path):
    arrays = [routes(5, seed, layers=2) for seed in range(4)]
    for rank, (first, second) in enumerate(
        [(0, 1), (0, 1), (2, 3)]
    ):  # ranks 0 and 1 share tokens (tensor parallel)
        megatron(
            tmp_path / "m",
            rank,
            {
                step: {3: arrays[n][:, 0], 7: arrays[n][:, 1]}
                for step, n in enumerate((first, second))
            },
        )
    trace = import_trace("megatron", tmp_path / "m", tmp_path / "t", num_experts=EXPERTS).check()
    assert [layer.layer for layer in trace.meta.layers] == [3, 7]
    assert trace.num_tokens == 20
    want = np.bincount(np.concatenate([array[:, 1] for array in arrays]).ravel(), minlength=EXPERTS)
    assert trace.layer_counts(trace.meta.layers[1]).tolist() == want.tolist()


def test_megatron_pipeline_stages_are_joined_to_one_model(tmp_path):
    array = routes(5, layers=2)
    megatron(tmp_path / "m", 0, {0: {0: array[:, 0]}})
    megatron(tmp_path / "m", 1, {0: {1: array[:, 1]}})
    trace = import_trace("megatron", tmp_path / "m", tmp_path / "t", num_experts=EXPERTS).check()
    assert experts_of(trace, 1, 0) == array[:, 1].tolist()
    megatron(tmp_path / "m", 1, {0: {1: array[:3, 1]}})
    with refused("layers", TraceError):
        import_trace("megatron", tmp_path / "m", tmp_path / "t", num_experts=EXPERTS)


def test_a_record_that_lost_tokens_is_refused(tmp_path):
    megatron(tmp_path / "m", 0, {0: {0: routes(5)[:, 0]}})
    path = tmp_path / "m" / "router_trace_rank0.jsonl"
    path.write_text(path.read_text().replace('"num_tokens": 5', '"num_tokens": 6'))
    with refused("top_indices", TraceError):
        import_trace("megatron", path, tmp_path / "t", num_experts=EXPERTS)
    path.write_text("{broken\n")
    with pytest.raises(
        TraceError,
        match=r"router_trace_rank0.jsonl, line 1",
    ):
        import_trace("megatron", path, tmp_path / "t", num_experts=EXPERTS)


def test_ids_out_of_range_name_the_layer(tmp_path):
    np.save(tmp_path / "one.npy", routes(6) + 5)
    with pytest.raises(
        TraceError, match=r"layer 0: expected expert ids between -1 and 7, got 5\.\.12"
    ):
        import_trace("trtllm", tmp_path / "one.npy", tmp_path / "t", num_experts=EXPERTS)
    with refused("kind", TraceError):
        import_trace("hf", tmp_path / "one.npy", tmp_path / "t")
