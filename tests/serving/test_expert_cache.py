"""Caches of whole traces: an engine's own rates, exact worlds, bounds and refusals."""

import json
from itertools import chain

import numpy as np
import plain_cache
import polars as pl
import pytest
from refusals import refused

from moe_lab.analysis.map_reduce import mapped
from moe_lab.compiled import SWITCH
from moe_lab.errors import AnalysisError
from moe_lab.serving import distinct_experts, expert_cache, expert_sets, prefetch, replay
from moe_lab.serving.expert_cache import POLICIES

MIB = 2**20


def rate(frame, policy, budget, phase="all"):
    return frame.filter(policy=policy, budget=budget, phase=phase)["hit_rate"].item()


@pytest.mark.parametrize("name", ["qwen3_30b_a3b", "gemma4_26b_a4b"])
def test_the_published_traces_have_their_known_rates(engine_traces, data_dir, name):
    known = json.loads((data_dir / "serving" / "known_answers.json").read_text())[name]
    trace = engine_traces[name]
    sets = expert_sets(trace)
    assert sum(len(block.experts) for block in sets.blocks()) == known["requests"]
    assert sorted({layer.expert_bytes for layer in sets.layers}) == sorted(known["expert_bytes"])
    budgets = [int(size) * MIB for size in known["cache"]]
    frame = expert_cache(trace, budgets, ["lru", "clairvoyant", "bound"])
    for size, rates in known["cache"].items():
        for ours, theirs in (("lru", "lru"), ("clairvoyant", "belady")):
            for phase in ("all", "decode"):
                found = 100 * rate(frame, ours, int(size) * MIB, phase)
                assert round(found, 2) == rates[f"{theirs}_{phase}"]
        assert rate(frame, "bound", int(size) * MIB) >= rate(frame, "clairvoyant", int(size) * MIB)
    engine = {"qwen3_30b_a3b": 74.9, "gemma4_26b_a4b": 76.8}[name]
    assert round(100 * rate(frame, "lru", 4000 * MIB), 1) == engine
    assert set(frame["note"]) == {"No interval: fewer than 5 documents."}


def test_independent_even_routing_hits_the_share_that_is_held(write_trace):
    generator = np.random.default_rng(0)
    ids = np.stack([generator.permuted(np.arange(20)[None].repeat(6000, 0), axis=1)[:, :1]], 1)
    frame = expert_cache(write_trace(ids, None, 20), [5, 10], ["lru", "lfu"])
    for policy in ("lru", "lfu"):
        for held in (5, 10):
            assert abs(rate(frame, policy, held) - held / 20) < 0.02


def test_a_cycle_longer_than_the_budget_gives_lru_nothing(write_trace):
    ids = (np.arange(400) % 10)[:, None, None]
    frame = expert_cache(write_trace(ids, None, 10), [9, 10], ["lru", "clairvoyant"])
    assert rate(frame, "lru", 9) == 0
    assert rate(frame, "lru", 10) == 390 / 400
    assert rate(frame, "clairvoyant", 9) > 0.8


@pytest.fixture(params=["compiled", "plain"])
def way(request, monkeypatch):
    """With the compiled replays, and without."""
    replay.library.cache_clear()
    if request.param == "plain":
        monkeypatch.setenv(SWITCH, "0")
    yield request.param
    replay.library.cache_clear()


def test_a_whole_trace_is_its_plain_simulation(way, write_trace, random_ids):
    ids, doc = random_ids(60, 2, 2, 5, seed=3), np.repeat(np.arange(6), 10)
    decode = np.tile(np.arange(10) >= 3, 6)
    trace = write_trace(ids, doc, 5, decode=decode, expert_bytes=[3, 2])
    steps, size, phases = [], {item: 3 if item < 5 else 2 for item in range(10)}, []
    for block in expert_sets(trace).blocks():
        for place in range(len(block.doc)):
            experts = block.experts[block.starts[place] : block.starts[place + 1]]
            steps.append((experts + 5 * block.place[place]).tolist())
            phases.append([bool(block.decode[place])] * len(experts))
    frame = expert_cache(trace, [9, 14], ["lru", "lfu"], resamples=20)
    for policy in ("lru", "lfu"):
        for budget in (9, 14):
            hits = np.array([*chain(*getattr(plain_cache, policy)(steps, size, budget))])
            assert rate(frame, policy, budget) == pytest.approx(hits.mean())
            decoded = np.array([*chain(*phases)])
            assert rate(frame, policy, budget, "decode") == pytest.approx(hits[decoded].mean())
    row = frame.filter(policy="lru", budget=14, phase="all").row(0, named=True)
    assert (row["tokens"], row["n_docs"]) == (60, 6)
    missed = sum(
        size[item]
        for step, found in zip(steps, plain_cache.lru(steps, size, 14), strict=True)
        for item, hit in zip(step, found, strict=True)
        if not hit
    )
    assert row["bytes_per_token"] == pytest.approx(missed / 60)
    assert row["hit_rate_lo"] <= row["hit_rate"] <= row["hit_rate_hi"]


def test_no_policy_beats_the_bound_and_lru_grows_with_the_budget(write_trace, random_ids):
    ids, doc = random_ids(300, 3, 2, 12, seed=5), np.repeat(np.arange(10), 30)
    frame = expert_cache(write_trace(ids, doc, 12), list(range(2, 37, 3)), resamples=10)
    wide = frame.filter(phase="all").pivot("policy", index="budget", values="hit_rate")
    for policy in POLICIES:
        assert (wide[policy] <= wide["bound"]).all(), policy
    for policy in ("lru", "lfu", "static"):
        assert (wide[policy] <= wide["clairvoyant"]).all(), policy
    assert (wide["lru"].diff().drop_nulls() >= 0).all()


def test_a_cache_per_document_finds_what_caches_of_single_documents_find(
    write_trace, random_ids, way
):
    """Prompts and decoded tokens, in files that cut both, read by workers in odd groups."""
    ids, doc = random_ids(90, 2, 2, 6), np.repeat(np.arange(6), 15)
    decode = np.tile(np.arange(15) >= 6, 6)
    budgets, policies = [2, 5, 8], ["lru", "lru_per_layer", "lfu", "clairvoyant", "bound"]
    trace = write_trace(ids, doc, 6, decode=decode, rows_per_part=17)
    found = expert_cache(trace, budgets, policies, per_document=True)
    singles = [
        expert_cache(
            write_trace(ids[doc == d], None, 6, decode=decode[doc == d]), budgets, policies
        )
        for d in range(6)
    ]
    for column in ("requests", "tokens"):
        assert found[column].to_list() == sum(one[column] for one in singles).to_list()
    hits = sum(one["hit_rate"] * one["requests"] for one in singles)
    assert (found["hit_rate"] * found["requests"]).to_list() == pytest.approx(hits.to_list())
    everything = {"budgets": budgets, "per_document": True}
    whole = expert_cache(trace, **everything)
    assert (
        whole.filter(pl.col("policy").is_in(policies)).sort("policy").equals(found.sort("policy"))
    )


@pytest.mark.parametrize(("prompts", "shuffled"), [(False, False), (True, False), (True, True)])
def test_answers_by_document_do_not_depend_on_the_workers(
    write_trace, random_ids, tmp_path, prompts, shuffled
):
    """Rows in any order make one task of all documents."""
    trace = write_trace(
        random_ids(90, 2, 2, 6),
        np.repeat(np.arange(6), 15),
        6,
        decode=np.tile(np.arange(15) >= 6, 6) if prompts else None,
        rows_per_part=17,
        order=np.random.default_rng(0).permutation(90) if shuffled else None,
    )
    questions = (
        lambda: expert_cache(trace, [2, 5, 8], per_document=True, resamples=20),
        lambda: distinct_experts(trace, [2, 3], [2, 4], resamples=20),
        lambda: prefetch(trace, max_tokens=50, resamples=20),
    )
    for ask in questions:
        whole = ask()
        for rows in (1, 40):
            with mapped(InThisProcess(), cache=tmp_path / "kept", rows=rows):
                assert ask().equals(whole)


class InThisProcess:
    """Workers that compute when the result is asked for."""

    ahead = 2

    def submit(self, task):
        return task

    def result(self, submitted):
        return submitted()

    def close(self):
        pass


def test_the_static_list_comes_from_other_documents(write_trace):
    """Each document keeps to its own expert: what others use is worth nothing to it."""
    doc = np.repeat(np.arange(10), 20)
    own = np.stack([doc, np.where(np.arange(200) % 2, 10, 11)], 1)[:, None, :]
    frame = expert_cache(write_trace(own, doc, 12), [4], ["static"], resamples=10)
    # 10 and 11 alternate and are on every list; of the own expert the first use is a miss
    found = rate(frame, "static", 4)
    assert found == pytest.approx((198 + 10 * 19) / 400, abs=0.02)


def test_one_document_has_no_static_list_and_says_so(write_trace, random_ids):
    frame = expert_cache(write_trace(random_ids(20, 1, 2, 5), None, 5), [4], ["static", "lru"])
    assert frame.filter(policy="static")["hit_rate"].null_count() == 2
    assert "at least 2 documents" in frame.filter(policy="static")["note"][0]
    assert frame.filter(policy="lru")["hit_rate"].null_count() == 0


def test_tokens_a_second_follow_from_bytes_and_compute(write_trace, random_ids):
    ids, doc = random_ids(120, 2, 2, 8, seed=2), np.repeat(np.arange(6), 20)
    trace = write_trace(ids, doc, 8, expert_bytes=10)
    frame = expert_cache(trace, [60], ["lru"], bandwidth=1000.0, compute=0.01)
    row = frame.filter(phase="decode").row(0, named=True)
    assert row["tokens_per_second"] == pytest.approx(1 / (0.01 + row["bytes_per_token"] / 1000))
    assert row["tokens_per_second_lo"] <= row["tokens_per_second"] <= row["tokens_per_second_hi"]
    slower = max(0.01, row["bytes_per_token"] / 1000)
    assert row["tokens_per_second_overlapped"] == pytest.approx(1 / slower)
    assert row["cycle_bytes"] == 40
    with refused("bandwidth"):
        expert_cache(trace, [60], ["lru"], bandwidth=1.0)


def test_sizes_of_experts_come_from_a_configuration_or_are_asked_for(write_trace, random_ids):
    trace = write_trace(random_ids(10, 1, 2, 4), None, 4, expert_bytes=0)
    with pytest.raises(AnalysisError, match="got none for layer 0; try --config") as error:
        expert_cache(trace, [4], ["lru"])
    assert error.value.field == "expert_bytes"
    from moe_lab.model import DecoderConfig, MoEConfig
    from moe_lab.routing import RouterConfig

    moe = MoEConfig(d_model=16, d_expert=8, router=RouterConfig(num_experts=4, top_k=2))
    config = DecoderConfig(vocab_size=10, d_model=16, num_layers=1, num_heads=2, moe=moe)
    with refused("config", AnalysisError):  # 128 experts
        expert_cache(trace, [1000], ["lru"], config="Qwen/Qwen3-30B-A3B")
    frame = expert_cache(trace, [1000], ["lru"], config=config, bytes_per_parameter=2)
    assert frame["cycle_bytes"][0] == 2 * (3 * 16 * 8) * 2
    frame = expert_cache(trace, [1000], ["lru"], expert_bytes={0: 5})
    assert frame["cycle_bytes"][0] == 10
    with refused("policies", AnalysisError):
        expert_cache(trace, [4], ["mru"], expert_bytes=1)


def test_default_budgets_reach_from_a_part_to_all_experts(write_trace, random_ids):
    frame = expert_cache(write_trace(random_ids(30, 2, 2, 10), None, 10), policies=["lru"])
    assert frame["budget"].max() == 20
    assert rate(frame, "lru", 20) > rate(frame, "lru", 4)
    assert frame.filter(pl.col("hit_rate").is_null()).height == 0
