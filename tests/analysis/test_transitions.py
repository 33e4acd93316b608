"""From layer to layer, counted again by a plain loop, and OLMoE's published counts."""

from collections import Counter

import numpy as np
import polars as pl
import pytest
from refusals import refused

from moe_lab.analysis import coactivation, coactivation_order, transitions
from moe_lab.errors import AnalysisError


def by_loop(first, second, pairing):
    pairs = Counter()
    for a, b in zip(first, second, strict=True):
        used_a, used_b = ([int(i) for i in row if i >= 0] for row in (a, b))
        pairs.update(
            zip(used_a, used_b, strict=False)
            if pairing == "rank_aligned"
            else [(i, j) for i in used_a for j in used_b]
        )
    return dict(pairs)


@pytest.mark.parametrize("pairing", ["all", "rank_aligned"])
@pytest.mark.parametrize("rows", [7, 1000])
def test_pairs_of_slots_equal_those_of_a_loop(make_trace, draw, pairing, rows):
    first, second = draw(0, 150, 6, 3), draw(1, 150, 6, 3)
    first[np.random.default_rng(2).random(first.shape) < 0.2] = -1
    table = transitions(
        make_trace({1: first, 4: second}, 5, 1, rows_per_part=rows), pairing=pairing
    )
    assert table.height == 36
    counts = {
        (a, b): n for a, b, n in table.select("expert_from", "expert_to", "count").rows() if n
    }
    assert counts == by_loop(first, second, pairing)
    assert table.select("from_layer", "to_layer").unique().rows() == [(1, 4)]


def test_layers_that_copy_each_other_and_layers_that_do_not(make_trace, draw):
    ids = draw(0, 30_000, 6, 1)
    table = transitions(make_trace({0: ids, 1: ids, 2: draw(1, 30_000, 6, 1)}, 6))
    copied = table.filter(pl.col("from_layer") == 0)
    assert (
        copied.filter(pl.col("expert_from") == pl.col("expert_to"))["given_from"].to_list()
        == [1] * 6
    )
    independent = table.filter(pl.col("from_layer") == 1)
    assert independent["lift"].to_list() == pytest.approx([1] * 36, abs=0.15)
    assert independent["expected"].sum() == pytest.approx(30_000)


def test_any_two_layers_can_be_asked_for(make_trace, draw):
    trace = make_trace({layer: draw(layer, 20, 4, 2) for layer in (0, 3, 9)}, 4)
    assert transitions(trace).select("from_layer", "to_layer").unique(
        maintain_order=True
    ).rows() == [(0, 3), (3, 9)]
    assert transitions(trace, [(0, 9)])["count"].sum() == 20 * 4
    with refused("layers", AnalysisError):
        transitions(trace, [(0, 1)])
    with refused("pairing", AnalysisError):
        transitions(trace, pairing="ranked")


def test_one_layer_has_no_transition(make_trace):
    assert transitions(make_trace([[0]], 2)).height == 0


@pytest.mark.data
def test_olmoes_counter_zips_ranks_so_its_rows_sum_to_the_slots_of_an_expert(data_dir):
    """What tells the two pairings apart in published tables: k pairs a token, not k squared."""
    folder = data_dir / "traces" / "olmoe"
    with np.load(folder / "crosslayer_counts.npz", allow_pickle=False) as arrays:
        tables = {
            name: arrays[name]
            for name in arrays.files
            if name.startswith("olmoe|") or "olmoe" in name.split("|")[0].lower()
        }
    full = {name: table for name, table in tables.items() if "top1" not in name}
    assert full
    assert {int(table[0].sum()) for name, table in full.items() if "tulu" not in name} == {
        8 * 208_896
    }


def test_experts_that_run_together_stand_together(make_trace):
    """Three groups of experts that are never mixed."""
    groups = [[0, 4, 8], [1, 5, 7], [2, 3, 6]]
    random = np.random.default_rng(0)
    ids = np.array([random.permutation(groups[i % 3])[:2] for i in range(600)])
    order = coactivation_order(coactivation(make_trace(ids, 9)))
    assert order["place"].to_list() == list(range(9))
    places = dict(order.select("expert", "place").rows())
    assert all(np.ptp([places[expert] for expert in group]) == 2 for group in groups)
