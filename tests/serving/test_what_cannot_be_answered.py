"""Traces and numbers that a question cannot be answered with: each is refused in one line or told,
for every question; and small shapes that can.
"""

from functools import partial

import numpy as np
import polars as pl
import pytest
from refusals import refused

from moe_lab.errors import AnalysisError, MoELabError
from moe_lab.serving import (
    METHODS,
    calibration_tokens,
    coverage,
    distinct_experts,
    expert_cache,
    expert_sets,
    fit_roofline,
    fit_workload,
    nodes_touched,
    place,
    placement_bound,
    placement_sentence,
    placement_transfer,
    prefetch,
    speculation,
    tokens_needed,
    workload_agreement,
)
from moe_lab.serving.sentences import decode_sentence


def agreement(trace):
    return workload_agreement(trace, trace, devices=2, resamples=5)


def touched(trace):
    return nodes_touched(trace, place(np.ones((1, 4)), 2, method="contiguous", nodes=2))


QUESTIONS = {
    "cache": partial(expert_cache, budgets=[2], resamples=5),
    "distinct": partial(distinct_experts, batch=[2], window=[2], resamples=5),
    "speculation": partial(speculation, window=[2], resamples=5),
    "prefetch": partial(prefetch, resamples=5),
    "nodes": partial(touched),
    "transfer": partial(placement_transfer, devices=2, resamples=5),
    "by time": partial(placement_transfer, devices=2, by="time", resamples=5),
    "tokens needed": partial(tokens_needed, devices=2, repeats=2),
    "coverage": partial(coverage, resamples=5),
    "calibration": partial(calibration_tokens),
    "workload": fit_workload,
    "agreement": agreement,
}
OF_COUNTS = {"transfer", "tokens needed", "coverage"}
"""What a trace made up from counts can answer."""
NEEDS_TWO = {"transfer", "by time", "tokens needed", "coverage", "workload"}
TELLS = {"cache", "distinct", "speculation", "prefetch", "agreement"}
"""What is told of one document, with a note."""


@pytest.mark.parametrize("question", QUESTIONS)
def test_aliased_experts_are_refused_by_every_question(write_trace, random_ids, question):
    trace = write_trace(random_ids(20, 1, 2, 4), np.repeat([0, 1], 10), 4, zero_experts_known=False)
    with refused("zero_experts_known", AnalysisError):
        QUESTIONS[question](trace)


@pytest.mark.parametrize("question", QUESTIONS)
def test_made_up_order_is_refused_where_order_counts(write_trace, random_ids, question):
    trace = write_trace(random_ids(20, 1, 2, 4), np.repeat([0, 1], 10), 4, per_token=False)
    if question in OF_COUNTS:
        assert QUESTIONS[question](trace).height
        return
    with pytest.raises(AnalysisError, match=r"order|made up from counts"):
        QUESTIONS[question](trace)


@pytest.mark.parametrize("question", QUESTIONS)
def test_one_document_is_refused_or_told(write_trace, random_ids, question):
    trace = write_trace(random_ids(20, 1, 2, 4), None, 4)
    if question in NEEDS_TWO:
        with pytest.raises(AnalysisError, match="at least 2 documents"):
            QUESTIONS[question](trace)
        return
    frame = QUESTIONS[question](trace)
    if question in TELLS:
        assert (frame["note"] != "").all(), frame
    ends = [name for name in frame.columns if name.endswith(("lo", "hi"))]
    assert all(frame[name].null_count() == frame.height for name in ends)


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_trace_without_tokens_is_one_line(write_trace, question):
    trace = write_trace(np.zeros((0, 1, 2), int), np.zeros(0, int), 4)
    if question == "calibration":
        assert QUESTIONS[question](trace)["unreached"].to_list() == [4]
        return
    with pytest.raises(AnalysisError, match=r"^expected [^\n]*$"):
        QUESTIONS[question](trace)


@pytest.mark.parametrize(
    ("field", "call"),
    [
        ("bandwidth", partial(expert_cache, budgets=[2], bandwidth=float("nan"), compute=0.1)),
        ("bandwidth", partial(expert_cache, budgets=[2], bandwidth=-1.0, compute=0.1)),
        ("compute", partial(expert_cache, budgets=[2], bandwidth=1.0, compute=float("inf"))),
        ("budgets", partial(expert_cache, budgets=[0.5])),
        ("budgets", partial(expert_cache, budgets=[float("nan")])),
        ("expert_bytes", partial(expert_cache, budgets=[2], expert_bytes=float("nan"))),
        ("expert_bytes", partial(expert_cache, budgets=[2], expert_bytes=float("inf"))),
        ("expert_bytes", partial(expert_cache, budgets=[2], expert_bytes={1: 5})),
        ("draft_cost", partial(speculation, window=[2], draft_cost=float("nan"))),
        ("max_tokens", partial(prefetch, max_tokens=0)),
        ("devices", partial(placement_transfer, devices=0)),
        ("slots", partial(placement_transfer, devices=3)),
        ("slots", partial(placement_transfer, devices=16)),
        ("slots", partial(placement_transfer, devices=2, slots=0)),
        ("slots", partial(placement_transfer, devices=2, slots=2)),
        ("nodes", partial(placement_transfer, devices=4, nodes=3)),
        ("groups", partial(placement_transfer, devices=4, groups=3)),
        ("", partial(distinct_experts, window=[2.5])),  # type: ignore
        ("", partial(distinct_experts, batch=[0])),
    ],
)
def test_numbers_that_mean_nothing_are_refused_by_name(write_trace, random_ids, field, call):
    trace = write_trace(random_ids(20, 1, 2, 4), np.repeat([0, 1], 10), 4)
    with refused(field, MoELabError):
        call(trace)


@pytest.mark.parametrize(
    "load", [np.full((1, 4), np.nan), [[1, 2], [3]], [["a"]], 7, [], np.ones(4)]
)
def test_what_is_no_load_is_refused(load):
    with pytest.raises(AnalysisError):
        place(load, 1)


def test_frames_that_are_no_counts_are_refused():
    gaps = pl.DataFrame({"layer": [0, 0], "expert": [0, 2], "count": [1, 1]})
    for frame in (gaps, gaps.drop("count")):
        with pytest.raises(AnalysisError):
            place(frame, 1)
    with pytest.raises(AnalysisError):
        place(np.ones((1, 4)), 2).imbalance(np.ones((1, 6)))
    with refused("devices"):
        placement_bound(np.ones((1, 4)), 0)


def test_a_placement_of_another_model_is_refused(write_trace, random_ids):
    trace = write_trace(random_ids(20, 1, 2, 4), None, 4)
    with pytest.raises(AnalysisError, match="experts of a layer"):
        nodes_touched(trace, place(np.ones((1, 8)), 2, nodes=2))


@pytest.mark.parametrize("seed", range(12))
def test_random_small_shapes_have_answers_within_their_bounds(write_trace, tmp_path, seed):
    """One expert, one slot, one layer, documents of one token, budgets below one expert."""
    generator = np.random.default_rng(seed)
    experts, layers = int(generator.integers(1, 6)), int(generator.integers(1, 4))
    slots, docs = int(generator.integers(1, experts + 1)), int(generator.integers(2, 8))
    doc = np.repeat(np.arange(docs), generator.integers(1, 7, docs))
    ids = generator.random((len(doc), layers, experts)).argsort(axis=2)[:, :, :slots]
    trace = write_trace(ids, doc, experts, expert_bytes=generator.integers(1, 9, layers))
    frame = expert_cache(trace, [1, 5, 10**6], resamples=5).filter(phase="all")
    wide = frame.pivot("policy", index="budget", values="hit_rate")
    assert wide["lru"].is_sorted()
    for policy in ("lru", "lru_per_layer", "lfu", "static", "clairvoyant"):
        assert (wide[policy] <= wide["bound"] + 1e-12).all(), policy
    requests = len(doc) * layers * slots
    used = len(
        {(layer, expert) for token in ids for layer, row in enumerate(token) for expert in row}
    )
    assert wide["lru"][2] == pytest.approx(1 - used / requests)
    windows = distinct_experts(trace, batch=[1, docs], window=[1, 2], resamples=5)
    assert windows.filter(size=1)["measured"].drop_nulls().to_list() == pytest.approx(
        [slots] * 2 * (layers + 1)
    )
    assert (windows["measured"].drop_nulls() <= experts).all()
    moved = placement_transfer(trace, 1, resamples=5)
    assert moved["imbalance"][0] == pytest.approx(1)
    for method in METHODS:
        placement = place(trace.counts(), experts + 1, 2 * (experts + 1), method)
        assert (placement.replicas >= 1).all()
    lists = coverage(trace, [1.0], resamples=5)
    assert (lists["n_experts"] <= experts).all()
    sample = fit_workload(trace).sample(tmp_path / "sample", 20, seed=seed).check()
    assert sum(len(block.experts) for block in expert_sets(sample).blocks()) > 0


def test_times_that_are_no_times_are_left_out():
    rows = pl.DataFrame(
        {name: ["x"] * 40 for name in
         ("num_tokens", "hidden_size", "inter_size", "topk", "num_experts", "latency")}
    )  # fmt: skip
    with pytest.raises(AnalysisError, match="at least 3 shapes"):
        fit_roofline(rows)


def test_speculation_of_zero_compute_experts_alone_is_refused(write_trace):
    ids = np.tile([4, 5], (20, 1, 1))
    with pytest.raises(AnalysisError, match="a trace in which a real expert ran, got none"):
        speculation(write_trace(ids, np.repeat([0, 1], 10), 4, num_zero=2), [2], expert_bytes=1)


def test_layers_in_which_no_real_expert_ran_are_left_out_of_placements(write_trace):
    """The first layer is as it is alone; documents have 10 tokens, whatever their slots ran."""
    doc, generator = np.repeat(np.arange(12), 10), np.random.default_rng(0)
    ids = generator.random((120, 2, 8)).argsort(axis=2)[:, :, :3]
    ids[:, 1] = [5, 6, 7]
    both, alone = write_trace(ids, doc, 4, num_zero=4), write_trace(ids[:, :1], doc, 4, num_zero=4)
    moved = placement_transfer(both, 2, resamples=20)
    assert moved.equals(placement_transfer(alone, 2, resamples=20))
    assert moved["lo"][0] is not None
    needed = tokens_needed(both, 2, repeats=4)
    assert needed.equals(tokens_needed(alone, 2, repeats=4))
    assert needed["tokens"].to_list() == [10 * size for size in needed["documents"]]


def test_a_trace_in_which_no_real_expert_ran_is_told(write_trace):
    ids = np.tile([4, 5, 6], (120, 1, 1))
    trace = write_trace(ids, np.repeat(np.arange(12), 10), 4, num_zero=4)
    sentence = placement_sentence(placement_transfer(trace, 2, resamples=5))
    assert "no real expert ran" in sentence
    assert "no real expert" in decode_sentence(distinct_experts(trace, window=[3], resamples=5))
    with pytest.raises(AnalysisError, match="a trace in which a real expert ran, got none"):
        tokens_needed(trace, 2, repeats=2)
