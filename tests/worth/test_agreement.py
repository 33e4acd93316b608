"""Two traces of one text: planted conventions are recovered, and what differs is counted."""

import copy
import json
import warnings

import numpy as np
import polars as pl
import pytest
import torch
from refusals import refused
from test_interventions import decoder, moe_layers

from moe_lab.cli import main
from moe_lab.errors import AnalysisError
from moe_lab.trace import LayerMeta, TraceMeta, TraceWriter, capture, open_trace
from moe_lab.trace.rows import slot_rows
from moe_lab.worth import drift_sentence, find_conventions, routing_agreement

EXPERTS, SLOTS, LENGTH = 12, 3, 60


def chosen(documents=6, layers=5, seed=0):
    """[layers, T, K] different experts of each token, some more often than others."""
    generator = np.random.default_rng(seed)
    popular = generator.normal(0, 0.7, (layers, 1, EXPERTS))
    noise = generator.gumbel(size=(layers, documents * LENGTH, EXPERTS))
    return (-(popular + noise)).argsort(axis=2)[:, :, :SLOTS]


def write(folder, ids_LTK, *, experts=EXPERTS, first_layer=0, first_position=0):
    tokens = ids_LTK.shape[1]
    layers = [
        LayerMeta(layer=first_layer + number, num_experts=experts, top_k=SLOTS)
        for number in range(len(ids_LTK))
    ]
    doc = np.repeat(np.arange(tokens // LENGTH), LENGTH).astype(np.uint32)
    pos = (np.tile(np.arange(LENGTH), tokens // LENGTH) + first_position).astype(np.uint32)
    with TraceWriter(
        folder, TraceMeta(tuple(layers), has_weights=False, has_scores=False)
    ) as writer:
        for layer, ids in zip(layers, ids_LTK, strict=True):
            rows = slot_rows(layer, doc, pos, ids, None, None, None)
            counts = np.bincount(ids[ids >= 0], minlength=experts)
            writer.write_rows(layer.layer, rows, counts)
        writer.write_tokens(pl.DataFrame({"doc": doc, "pos": pos, "token_id": pos}))
    return open_trace(folder)


@pytest.mark.parametrize("seed", range(3))
def test_equal_traces_and_noise_have_no_convention(tmp_path, seed):
    ids = chosen(seed=seed)
    first, other = write(tmp_path / "a", ids), write(tmp_path / "b", chosen(seed=seed + 100))
    found = find_conventions(first, first)
    assert (found.positions, found.layers, found.offset, found.overlap) == (0, 0, 0, 1)
    assert "alike" in str(found)
    noise = find_conventions(first, other)
    assert noise.overlap < 0.5
    agreement = routing_agreement(first, other)
    assert agreement["slots"].to_numpy() == pytest.approx(agreement["chance"].to_numpy(), abs=0.05)


@pytest.mark.parametrize(
    ("positions", "layers", "offset"),
    [(1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -2, 0), (0, 0, 1), (1, 1, 1), (2, -1, 1)],
)
def test_planted_shifts_are_recovered_exactly(tmp_path, positions, layers, offset):
    ids = chosen()
    first = write(tmp_path / "a", ids, first_layer=4, first_position=4)
    second = write(
        tmp_path / "b", ids + offset, experts=EXPERTS + offset,
        first_layer=4 + layers, first_position=4 + positions,
    )  # fmt: skip
    found = find_conventions(first, second)
    assert (found.positions, found.layers, found.offset) == (positions, layers, offset)
    assert found.overlap == 1
    for part, name in ((positions, "positions"), (layers, "layers"), (offset, "expert ids")):
        assert (name in str(found)) == bool(part)
    undone = routing_agreement(first, second, found)
    assert undone["slots"].to_list() == undone["same_set"].to_list() == [1] * 5
    assert max(routing_agreement(first, second)["slots"].to_list()) < 0.9


def test_a_planted_permutation_of_experts_is_recovered_exactly(tmp_path):
    ids, generator = chosen(), np.random.default_rng(5)
    orders = [generator.permutation(EXPERTS) for _ in ids]
    permuted = np.stack([order[layer] for order, layer in zip(orders, ids, strict=True)])
    first, second = write(tmp_path / "a", ids), write(tmp_path / "b", permuted, first_position=1)
    found = find_conventions(first, second)
    assert (found.positions, found.layers, found.offset) == (1, 0, None)
    assert [list(found.experts[layer]) for layer in range(5)] == [o.tolist() for o in orders]
    assert "permuted" in str(found)
    assert routing_agreement(first, second, found)["slots"].to_list() == [1] * 5


def test_what_differs_is_counted(tmp_path):
    ids = chosen(documents=8)
    changed = ids.copy()
    free = np.array([[(set(range(EXPERTS)) - set(row)).pop() for row in layer] for layer in ids])
    changed[1, ::4, 0] = free[1, ::4]
    found = routing_agreement(write(tmp_path / "a", ids), write(tmp_path / "b", changed))
    assert found["same_set"].to_list() == [1, 0.75, 1, 1, 1]
    assert found["slots"].to_numpy()[1] == pytest.approx(1 - 0.25 / 3)
    assert found["lo"][1] <= found["slots"][1] <= found["hi"][1]
    assert found["docs"].to_list() == [8] * 5
    assert found["mass"].null_count() == 5


def test_rounding_moves_tokens_of_small_margin(tmp_path):
    model = decoder()
    ids = torch.randint(0, 40, (12, 30), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        with capture(model, tmp_path / "exact"):
            model(ids)
        for layer in moe_layers(model):
            layer.router.weight.data = layer.router.weight.bfloat16().double()
        with capture(model, tmp_path / "rounded"):
            model(ids)
    exact, rounded = open_trace(tmp_path / "exact"), open_trace(tmp_path / "rounded")
    found = find_conventions(exact, rounded)
    assert (found.positions, found.layers, found.offset) == (0, 0, 0)
    assert found.overlap == found.as_given == pytest.approx(1, abs=0.05)
    for row in routing_agreement(exact, rounded).iter_rows(named=True):
        assert row["slots"] > 0.95
        assert row["mass"] > 0.95
        if row["margin_differs"] is not None:
            assert row["margin_differs"] < 0.2 * row["margin_same"]


def traced(folder, model, ids):
    with torch.no_grad(), capture(model, folder):
        model(ids)
    return open_trace(folder)


def test_bfloat16_beside_float32_differs_at_near_ties_and_the_sentence_says_so(tmp_path):
    ids = torch.randint(0, 40, (40, 30), generator=torch.Generator().manual_seed(3))
    model = decoder(layers=3, num_experts=16).float()
    exact, halved = (
        traced(tmp_path / "float32", model, ids),
        traced(tmp_path / "bfloat16", copy.deepcopy(model).bfloat16(), ids),
    )
    found = find_conventions(exact, halved)
    assert (found.positions, found.layers, found.offset) == (0, 0, 0)
    agreement = routing_agreement(exact, halved, found)
    assert (agreement["same_set"] < 1).all()
    assert (agreement["slots"] > 0.97).all()
    for row in agreement.iter_rows(named=True):
        assert row["margin_differs"] < 0.25 * row["margin_same"]
        assert row["mass"] > row["slots"] - 1e-3
    assert "near ties in every layer" in drift_sentence(agreement)

    other = copy.deepcopy(model)
    for layer in moe_layers(other):
        layer.router.weight.data += (
            0.5 * torch.randn_like(layer.router.weight) * (layer.router.weight.std())
        )
    moved = routing_agreement(exact, traced(tmp_path / "other", other, ids))
    assert "more than rounding differs" in drift_sentence(moved)
    assert "equal sets" in drift_sentence(routing_agreement(exact, exact))


def test_drift_without_margins_is_not_called_near_ties(tmp_path):
    ids = chosen()
    free = np.array([[(set(range(EXPERTS)) - set(row)).pop() for row in layer] for layer in ids])
    changed = ids.copy()
    changed[0, ::5, 0] = free[0, ::5]
    agreement = routing_agreement(write(tmp_path / "a", ids), write(tmp_path / "b", changed))
    assert "4.00% of decisions" in drift_sentence(agreement)
    assert "not recorded" in drift_sentence(agreement)


def test_traces_without_a_common_token_are_refused(tmp_path):
    first = write(tmp_path / "a", chosen(documents=1))
    second = write(tmp_path / "b", chosen(documents=1), first_position=1000)
    empty = write(tmp_path / "empty", chosen(documents=0))
    for compared in (find_conventions, routing_agreement):
        for other in (second, empty):
            with refused("traces", AnalysisError):
                compared(first, other)


def test_a_layer_without_a_used_slot_shares_none(tmp_path):
    ids = chosen(layers=2)
    ids[1] = -1
    trace = write(tmp_path / "a", ids)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        used, empty = routing_agreement(trace, trace).to_dicts()
    assert used["slots"] == used["same_set"] == 1
    assert [empty[name] for name in ("slots", "lo", "hi", "chance", "mass")] == [None] * 5


def test_the_command_names_the_convention_and_prints_the_layers(tmp_path, capsys):
    write(tmp_path / "a", chosen())
    write(tmp_path / "b", chosen() + 1, experts=EXPERTS + 1)
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    printed = capsys.readouterr().out
    assert "expert ids are +1" in printed
    assert "equal sets of experts" in printed
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--json", "--as-given"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert "expert ids are +1" in result["sentence"]
    assert [row["layer"] for row in result["agreement"]] == list(range(5))
    assert max(row["slots"] for row in result["agreement"]) < 0.9
