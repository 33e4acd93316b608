"""Placements against DeepSeek's published answers, exhaustion, and engines' file formats."""

import itertools
import json

import numpy as np
import pytest

from moe_lab.errors import AnalysisError, ConfigError
from moe_lab.serving import (
    METHODS,
    nodes_touched,
    place,
    placement_bound,
    placement_load,
    placement_sentence,
    placement_transfer,
    read_sglang_locations,
    read_vllm_expert_map,
    tokens_needed,
    write_sglang_locations,
    write_vllm_expert_map,
)
from moe_lab.trace import import_trace


@pytest.fixture(scope="module")
def eplb(data_dir):
    folder = data_dir / "traces" / "eplb"
    if not folder.is_dir():
        pytest.skip(f"needs the published data: no folder {folder}")
    return json.loads((folder / "eplb_known_answers.json").read_text())


@pytest.fixture(scope="module")
def olmoe(data_dir):
    path = data_dir / "traces" / "olmoe" / "expert_counts.json"
    if not path.is_file():
        pytest.skip(f"needs the published data: no file {path}")
    tables = json.loads(path.read_text())["olmoe-1b-7b-0924"]["expert_counts"]
    return {
        domain: np.array([layers[f"layer_{n}"] for n in (0, 7, 15)])
        for domain, layers in tables.items()
    }


def test_the_example_of_eplb_is_reproduced_slot_by_slot(eplb):
    weight = np.array(eplb["weight"])
    hierarchical = place(weight, 8, 16, "eplb", nodes=2, groups=4)
    assert hierarchical.physical_to_logical.tolist() == eplb["phy2log"]
    assert (
        hierarchical.replicas.tolist()
        == eplb["logcnt (vllm tests/distributed/test_eplb_algo.py, Apache-2.0)"]
    )
    assert hierarchical.imbalance(weight).round(6).tolist() == [1.208132, 1.242215]
    everywhere = place(weight, 8, 16, "eplb_global")
    known = eplb["verified_here"]["global_policy(num_groups=1,num_nodes=1)"]
    assert everywhere.physical_to_logical.tolist() == known["phy2log"]
    assert everywhere.imbalance(weight).round(6).tolist() == [1.072604, 1.190311]


def test_the_reference_runs_on_olmoe_are_reproduced(data_dir, olmoe):
    runs = json.loads((data_dir / "traces/eplb/olmoe_eplb_reference_runs.json").read_text())
    for case in runs["cases"]:
        load = olmoe[case["domain"]]
        contiguous = place(load, 8, 64, "contiguous").imbalance(load)
        assert contiguous == pytest.approx(case["contiguous_no_replicas"], abs=1e-6)
        for slots in (64, 72, 80):
            found = place(load, 8, slots)
            assert found.imbalance(load) == pytest.approx(case[f"eplb_{slots}_slots"], abs=1e-6)
            assert found.replicas.max(axis=1).tolist() == case[f"logcnt_{slots}_max"]
            assert (placement_bound(load, 8, slots) <= found.imbalance(load) + 1e-12).all()
    moved = place(olmoe["c4"], 8, 72).imbalance(olmoe["github"])
    assert moved == pytest.approx(runs["transfer_c4_to_github_72"], abs=1e-6)


def best_placement(row, devices, slots):
    """The least load of the fullest device over all placements, by exhaustion."""
    experts, each = len(row), slots // devices
    best = np.inf
    for extra in itertools.combinations_with_replacement(range(experts), slots - experts):
        replicas = np.ones(experts, int)
        np.add.at(replicas, list(extra), 1)
        items = np.repeat(np.arange(experts), replicas)
        weight = row[items] / replicas[items]

        def fill(left, most, weight=weight):
            nonlocal best
            if not left or most >= best:
                best = min(best, most) if not left else best
                return
            for others in itertools.combinations(left[1:], each - 1):
                taken = (left[0], *others)
                fill([i for i in left if i not in taken], max(most, weight[list(taken)].sum()))

        fill(list(range(len(items))), 0.0)
    return best / (row.sum() / devices)


@pytest.mark.parametrize(("experts", "devices", "slots"), [(8, 4, 8), (4, 3, 6), (5, 2, 6)])
def test_no_placement_of_all_beats_the_bound(experts, devices, slots):
    for seed in range(12 if slots == experts else 5):
        row = np.random.default_rng(seed).dirichlet(np.ones(experts) * 0.4) * 1000
        optimum = best_placement(row, devices, slots)
        bound = placement_bound(row[None], devices, slots)[0]
        assert bound <= optimum + 1e-9
        for method in METHODS:
            assert (
                place(row[None], devices, slots, method).imbalance(row[None])[0] >= optimum - 1e-9
            )


def test_the_bound_is_reached_where_one_expert_has_all_load():
    row = np.array([[97.0, 1, 1, 1]])
    assert placement_bound(row, 4, 4)[0] == pytest.approx(4 * 0.97)
    # 97 over r replicas: with 4 spare slots five replicas of 19.4, below the mean of 25
    assert placement_bound(row, 4, 8)[0] == 1
    assert placement_bound(np.array([[94.0, 2, 2, 2]]), 20, 20)[0] == pytest.approx(
        94 / 17 / 5, rel=1e-6
    )


def test_every_method_places_every_expert_and_greedy_no_expert_twice_on_a_device():
    load = np.random.default_rng(1).dirichlet(np.ones(32) * 0.3, 4) * 1e5
    for method in METHODS:
        placement = place(load, 8, 40, method, nodes=2, groups=4)
        assert (placement.replicas >= 1).all()
        assert placement.shares.sum(axis=2) == pytest.approx(np.ones((4, 32)))
        assert placement.device_load(load).sum(axis=1) == pytest.approx(load.sum(axis=1))
    held = place(load, 8, 40, "greedy").physical_to_logical.reshape(4, 8, 5)
    assert all(len(set(device.tolist())) == 5 for layer in held for device in layer)
    frame = placement_load(place(load, 8, 40), load)
    assert frame.columns == ["layer", "device", "load", "experts"]
    assert frame["load"].mean() == pytest.approx(1)


def test_numbers_that_do_not_fit_are_refused():
    load = np.ones((2, 8))
    for options in ({"devices": 3}, {"devices": 4, "slots": 4}, {"devices": 4, "nodes": 3},
                    {"devices": 4, "groups": 3}, {"devices": 4, "method": "best"}):  # fmt: skip
        with pytest.raises(ConfigError):
            place(load, **options)  # type: ignore
    with pytest.raises(AnalysisError):
        place(-load, 4)


def test_zero_compute_experts_need_no_device(write_trace, random_ids):
    trace = write_trace(random_ids(50, 2, 3, 6), None, 4, num_zero=2)
    placement = place(trace.counts(), 2)
    assert placement.physical_to_logical.shape == (2, 4)


def test_engines_read_what_was_written(tmp_path):
    """By readers written from the formats: vllm-ascend's expert map, SGLang's init_by_mapping."""
    placement = place(np.random.default_rng(0).random((2, 6)), 3, 9, "greedy")
    write_vllm_expert_map(placement, tmp_path / "map.json")
    data = json.loads((tmp_path / "map.json").read_text())
    assert data["moe_layer_count"] == len(data["layer_list"]) == 2
    table = [[d["device_expert"] for d in layer["device_list"]] for layer in data["layer_list"]]
    assert np.array(table).reshape(2, 9).tolist() == placement.physical_to_logical.tolist()
    assert data["layer_list"][1]["layer_id"] == 1
    assert [d["device_id"] for d in data["layer_list"][0]["device_list"]] == [0, 1, 2]
    assert read_vllm_expert_map(tmp_path / "map.json", 6).device_load(
        np.ones((2, 6))
    ) == pytest.approx(placement.device_load(np.ones((2, 6))))

    from dataclasses import replace

    deep = replace(placement, layers=(1, 3))
    write_sglang_locations(deep, tmp_path / "locations.json")
    data = json.loads((tmp_path / "locations.json").read_text())
    physical = np.array(data["physical_to_logical_map"])
    assert physical.shape == (4, 9)
    assert physical[[1, 3]].tolist() == placement.physical_to_logical.tolist()
    assert physical[0].tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2]
    assert read_sglang_locations(tmp_path / "locations.json", 6, 3).layers == (0, 1, 2, 3)
    with pytest.raises(AnalysisError):
        read_sglang_locations(tmp_path / "locations.json", 7, 3)
    (tmp_path / "bad.json").write_text('{"physical_to_logical_map": [[0, "1"]]}')
    with pytest.raises(ConfigError):
        read_sglang_locations(tmp_path / "bad.json", 2, 1)


def test_the_transfer_of_olmoe_has_an_interval_over_domains(data_dir, tmp_path):
    path = data_dir / "traces" / "olmoe" / "expert_counts.json"
    if not path.is_file():
        pytest.skip(f"needs the published data: no file {path}")
    trace = import_trace("counts", path, tmp_path / "olmoe", num_experts=64, top_k=8,
                         model="olmoe-1b-7b-0924", tokens=208896)  # fmt: skip
    frame = placement_transfer(trace, 8, 72, by="domain", resamples=50)
    one = frame.filter(chosen_on="c4", judged_on="github").row(0, named=True)
    assert one["imbalance"] == pytest.approx(np.mean([1.439491, 2.070229, 1.414369]), abs=1e-6)
    assert one["in_sample"] == pytest.approx(np.mean([1.008155, 1.013102, 1.011429]), abs=1e-6)
    assert one["lo"] is None
    rest = frame.filter(chosen_on="c4", judged_on="all others").row(0, named=True)
    assert rest["lo"] < rest["imbalance"] < rest["hi"]
    assert rest["n_docs"] == 5
    assert (frame["bound"] <= frame["imbalance"] + 1e-12).all()
    assert "On text that it was not chosen on (all others" in placement_sentence(frame)
    with pytest.raises(AnalysisError, match="in their order"):
        placement_transfer(trace, 8, 72, by="time")


def test_a_placement_holds_on_text_of_the_same_kind_and_not_on_another(write_trace, random_ids):
    alike = random_ids(600, 2, 2, 16, seed=1, skew=1.5)
    other = random_ids(600, 2, 2, 16, seed=9, skew=1.5)
    doc = np.repeat(np.arange(20), 60)
    same = write_trace(
        np.concatenate([alike, random_ids(600, 2, 2, 16, seed=1, skew=1.5)]), doc, 16
    )
    frame = placement_transfer(same, 4, resamples=100)
    assert frame["beats"][0] == "yes"
    assert frame["in_sample"][0] <= frame["imbalance"][0] + 0.05
    mixed = write_trace(np.concatenate([alike, other]), doc, 16,
                        columns={"kind": np.repeat(["a", "b"], 600)})  # fmt: skip
    moved = placement_transfer(mixed, 4, by="kind", resamples=50)
    assert (moved["imbalance"] > 1.05 * moved["bound"]).all()
    late = placement_transfer(mixed, 4, by="time", resamples=50)
    assert late["chosen_on"].to_list() == ["first half"]
    needed = tokens_needed(same, 4, repeats=8)
    assert needed["documents"].to_list() == [1, 2, 4, 8, 10]
    assert needed["imbalance"][-1] < needed["imbalance"][0]
    assert needed["tokens"][0] == 60
    assert needed["gain_lo"][-1] > 0


def test_one_document_cannot_be_chosen_and_judged_on(write_trace, random_ids):
    with pytest.raises(AnalysisError, match="at least 2 documents"):
        placement_transfer(write_trace(random_ids(20, 1, 2, 8), None, 8), 2)
    with pytest.raises(AnalysisError, match="zero-compute"):
        placement_transfer(
            write_trace(random_ids(20, 1, 2, 8), None, 8, zero_experts_known=False), 2
        )


def test_nodes_that_a_token_touches_are_counted(write_trace):
    ids = np.array([[[0, 1]], [[0, 2]], [[2, 3]], [[0, 3]]])
    trace = write_trace(ids, [0, 0, 1, 1], 4)
    two = place(np.ones((1, 4)), 2, method="contiguous", nodes=2)
    assert nodes_touched(trace, two)["nodes"][0] == pytest.approx((1 + 2 + 1 + 2) / 4)
    replicated = place(np.ones((1, 4)), 4, 8, "contiguous", nodes=4)  # 0 1 | 2 3 | 0 1 | 2 3
    assert nodes_touched(trace, replicated)["crossing"][0] == pytest.approx(0.5)
