"""Distinct experts of batches and windows, what they cost, and the fitted roofline."""

import json

import numpy as np
import polars as pl
import pytest

from moe_lab.accounting import flops
from moe_lab.errors import AnalysisError, ConfigError
from moe_lab.serving import distinct_experts, fit_roofline, speculation


def mean_row(frame, kind, size):
    return frame.filter(pl.col("layer").is_null(), kind=kind, size=size).row(0, named=True)


@pytest.mark.parametrize("name", ["qwen3_30b_a3b", "gemma4_26b_a4b"])
def test_windows_of_the_published_traces_are_the_known_ones(engine_traces, data_dir, name):
    known = json.loads((data_dir / "serving" / "known_answers.json").read_text())[name]["distinct"]
    frame = distinct_experts(engine_traces[name], window=[int(size) for size in known])
    for size, numbers in known.items():
        row = mean_row(frame, "window", int(size))
        assert round(row["measured"], 2) == numbers["measured_consecutive"]
        assert round(row["by_load"], 2) == numbers["load_formula"]
        assert round(row["by_equal_load"], 2) == numbers["equal_load_formula"]
        assert row["lo"] is None
        assert "fewer than 5 documents" in row["note"]


def test_the_lag_1_overlap_follows_from_windows_of_two(engine_traces, data_dir):
    """|A or B| = 2 k - |A and B|: over all pairs in a row it is the known overlap."""
    known = json.loads((data_dir / "serving" / "known_answers.json").read_text())
    from moe_lab.serving import prefetch

    for name, trace in engine_traces.items():
        frame = prefetch(trace, predictors=["last_token"])
        found = frame.filter(pl.col("layer").is_null(), target="next_token")["found"].item()
        assert round(found, 4) == known[name]["lag1_overlap"]


def test_windows_are_those_of_a_plain_loop(write_trace, random_ids):
    ids, doc = random_ids(70, 2, 2, 7, seed=4), np.repeat(np.arange(7), 10)
    frame = distinct_experts(write_trace(ids, doc, 7), batch=[1], window=[3], resamples=50)
    for layer in range(2):
        counts = [
            len(np.unique(ids[start : start + 3, layer]))
            for document in range(7)
            for start in range(document * 10, document * 10 + 9, 3)
        ]
        row = frame.filter(layer=layer, kind="window").row(0, named=True)
        assert row["measured"] == pytest.approx(np.mean(counts))
        assert row["n"] == 21
        assert row["lo"] <= row["measured"] <= row["hi"]
    assert mean_row(frame, "batch", 1)["measured"] == 2


def test_windows_count_the_documents_that_have_one(write_trace, random_ids):
    """Seven documents, of which four are long enough: too few for an interval, and it says so."""
    ids, doc = random_ids(50, 2, 2, 7, seed=4), np.repeat(np.arange(7), [10, 10, 10, 10, 4, 3, 3])
    row = mean_row(distinct_experts(write_trace(ids, doc, 7), window=[5]), "window", 5)
    assert (row["n"], row["n_docs"], row["lo"]) == (8, 4, None)
    assert row["note"] == "No interval: fewer than 5 documents."


def test_independent_tokens_follow_the_load_formula(write_trace, random_ids):
    ids, doc = random_ids(2000, 1, 2, 10, seed=7), np.repeat(np.arange(40), 50)
    frame = distinct_experts(write_trace(ids, doc, 10), batch=[8], window=[8], resamples=50)
    for kind in ("batch", "window"):
        row = mean_row(frame, kind, 8)
        assert row["measured"] == pytest.approx(row["by_load"], rel=0.04)
        assert row["by_load"] < row["by_equal_load"]
        assert row["lo"] < row["hi"]


def test_prompts_are_not_counted_and_short_documents_are_told(write_trace, random_ids):
    ids, doc = random_ids(20, 1, 2, 6), np.repeat([0, 1], 10)
    decode = np.tile(np.arange(10) >= 6, 2)
    frame = distinct_experts(write_trace(ids, doc, 6, decode=decode), batch=[3], window=[4, 5])
    assert mean_row(frame, "window", 4)["n"] == 2
    long = mean_row(frame, "window", 5)
    assert (long["measured"], long["note"]) == (None, "No document has 5 decoded tokens.")
    assert mean_row(frame, "batch", 3)["note"] == "A batch of 3 needs 3 documents."
    with pytest.raises(AnalysisError, match="decoded tokens"):
        distinct_experts(write_trace(ids, doc, 6, decode=np.zeros(20, bool)))
    with pytest.raises(AnalysisError):
        distinct_experts(write_trace(ids, doc, 6, per_token=False))


CONFIG = {
    "model_type": "qwen3_moe", "hidden_size": 16, "intermediate_size": 32, "vocab_size": 20,
    "moe_intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8,
    "num_experts": 8, "num_experts_per_tok": 2, "num_hidden_layers": 2, "decoder_sparse_step": 1,
}  # fmt: skip


def test_accounting_takes_the_measured_number_and_says_its_assumption_without():
    measured = flops(CONFIG, 10, "decode", batch=4, distinct={0: 3.0, 1: 5.0})
    assumed = flops(CONFIG, 10, "decode", batch=4)
    assert measured.distinct_experts == 4
    assert not any("choose" in text for text in measured.assumed)
    assert any("choose all experts equally often" in text for text in assumed.assumed)
    loaded = flops(CONFIG, 10, "decode", batch=4, load=[1.0] * 8)
    assert any("on their own by the load" in text for text in loaded.assumed)
    expert = 3 * 16 * 8 * 2
    none = flops(CONFIG, 10, "decode", batch=4, distinct=0.0)
    assert measured.weight_bytes - none.weight_bytes == 8 * expert  # type: ignore
    for wrong in (9.0, {0: 3.0}, -1.0):
        with pytest.raises(ConfigError, match="distinct experts"):
            flops(CONFIG, 10, "decode", distinct=wrong)


def test_speculation_pays_from_the_cost_of_the_window_on(write_trace):
    """Each document repeats one token: a window reads what a token reads."""
    doc = np.repeat(np.arange(6), 16)
    ids = np.stack([doc % 8, (doc + 1) % 8], 1)[:, None, :].repeat(2, 1)
    frame = speculation(write_trace(ids, doc, 8), [4, 8], draft_cost=0.1)
    assert frame["cost"].to_list() == [1, 1]
    assert frame["accepted_needed"].to_list() == pytest.approx([0.3, 0.7])
    apart = np.stack([np.arange(96) % 8, (np.arange(96) + 4) % 8], 1)[:, None, :].repeat(2, 1)
    frame = speculation(write_trace(apart, doc, 8), [4])
    assert frame["cost"][0] == 4
    assert frame["accepted_needed"][0] == 3
    with_rest = speculation(write_trace(apart, doc, 8), [4], config=CONFIG)
    assert 1 < with_rest["cost"][0] < 4
    assert with_rest["everything"][0]
    row = frame.row(0, named=True)
    assert row["cost_lo"] <= row["cost"] <= row["cost_hi"]


def test_the_roofline_recovers_planted_constants_and_tells_its_error(data_dir):
    generator = np.random.default_rng(0)
    rows = []
    for hidden, inter, slots, experts in [(2048, 768, 8, 128), (4096, 1024, 4, 64),
                                          (1024, 512, 2, 32), (6144, 2048, 8, 160)]:  # fmt: skip
        for tokens in (1, 4, 16, 64, 256, 1024, 4096, 16384):
            touched = experts * (1 - (1 - slots / experts) ** tokens)
            moved = 2 * (touched * 3 * hidden * inter)
            moved += 2 * tokens * slots * (2 * hidden + 3 * inter)
            work = 6 * tokens * slots * hidden * inter
            seconds = 1e-5 + max(moved / 2e12, work / 4e14)
            rows.append((tokens, hidden, inter, slots, experts,
                         1e3 * seconds * generator.normal(1, 0.005)))  # fmt: skip
    names = ["num_tokens", "hidden_size", "inter_size", "topk", "num_experts", "latency"]
    found = fit_roofline(pl.DataFrame(rows, schema=names, orient="row"))
    assert found.bandwidth == pytest.approx(2e12, rel=0.05)
    assert found.speed == pytest.approx(4e14, rel=0.05)
    assert found.error < 0.03
    with pytest.raises(AnalysisError, match="at least 3 shapes"):
        fit_roofline(pl.DataFrame(rows[:8] * 5, schema=names, orient="row"))
    with pytest.raises(AnalysisError, match="columns"):
        fit_roofline(pl.DataFrame({"latency": [1.0]}))
    path = data_dir / "serving" / "h100_vllm_moe_bf16.parquet"
    if path.is_file():
        measured = fit_roofline(path)
        assert measured.error < 0.06
        assert 2e12 < measured.bandwidth < 3.4e12
        assert 4e14 < measured.speed < 9.9e14
