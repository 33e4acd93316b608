"""Domain and vocabulary specialisation: known answers, and OLMoE's published counts."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from refusals import refused

from moe_lab.analysis import (
    domain_divergence,
    domain_specialisation,
    expert_vocabulary,
    vocabulary_specialisation,
)
from moe_lab.analysis.document_bootstrap import Resampling
from moe_lab.analysis.specialisation import _divergences, vocabulary_shares
from moe_lab.errors import AnalysisError
from moe_lab.measures import jensen_shannon_bits

DATA = (
    Path(os.environ.get("MOE_LAB_DATA", Path(__file__).parents[2] / ".." / "shared" / "data"))
    / "traces"
    / "olmoe"
)


def test_domains_that_share_no_expert_are_one_bit_apart(make_trace):
    trace = make_trace([[0, 1]] * 4 + [[2, 3]] * 2, 4, domain=["a"] * 4 + ["b"] * 2)
    assert domain_divergence(trace, "domain").rows() == [
        (0, "a", "b", pytest.approx(1), None, None, None, None)
    ]  # one document
    table = domain_specialisation(trace, "domain").filter(pl.col("expert") == 0)
    assert table.select("domain", "count", "tokens", "specialisation").rows() == [
        ("a", 4, 4, 1.0),
        ("b", 0, 2, 0.0),
    ]
    assert table["at_random"].to_list() == pytest.approx([4 / 6, 4 / 6])


def test_domains_that_play_no_part_hardly_diverge(make_trace, draw):
    trace = make_trace(
        draw(0, 20_000, 8, 2), 6, 2, domain=np.array(["a", "b", "c"])[np.arange(20_000) % 3]
    )
    divergence = domain_divergence(trace, "domain")
    assert divergence.height == 3
    assert max(divergence["bits"]) < 0.001
    table = domain_specialisation(trace, "domain")
    assert table["specialisation"].to_list() == pytest.approx([2 / 8] * 24, abs=0.03)


def test_a_layer_that_looks_up_the_token_id_is_fully_specialised(make_trace, draw):
    ids = np.arange(3000) % 10
    lookup, blind = ids[:, None] % 5, draw(0, 3000, 5, 1)
    profile = vocabulary_specialisation(make_trace({0: lookup, 1: blind}, 5, token_id=ids))
    assert profile["mean"].to_list() == pytest.approx([1, 0.2], abs=0.05)
    assert profile["load_bound"].to_list() == pytest.approx([0.2, 0.2], abs=0.02)
    assert profile.select("ids", "tokens").rows() == [(10, 3000)] * 2


def test_rare_ids_can_be_left_out(make_trace):
    trace = make_trace([[0], [1], [0], [1]], 2, token_id=[7, 7, 8, 9])
    assert vocabulary_specialisation(trace)["mean"].to_list() == pytest.approx([(0.5 + 1 + 1) / 3])
    assert vocabulary_specialisation(trace)["token_weighted"].to_list() == pytest.approx([3 / 4])
    assert vocabulary_specialisation(trace, min_count=2).select("ids", "mean").rows() == [(1, 0.5)]


@pytest.mark.data
@pytest.mark.parametrize("domain", ["book", "github"])
@pytest.mark.parametrize("layer", [0, 7, 15])
def test_vocabulary_specialisation_of_olmoe_equals_the_known_answers(domain, layer):
    if not DATA.is_dir():
        pytest.skip(f"published data not found at {DATA}; set MOE_LAB_DATA")
    answer = json.loads((DATA / "derived_known_answers.json").read_text())[
        f"olmoe_{domain}/layer_{layer}"
    ]
    with np.load(DATA / f"eid2token_olmoe_{domain}.npz", allow_pickle=False) as arrays:
        table = pl.DataFrame({name: arrays[name] for name in arrays.files}).filter(
            pl.col("layer") == layer
        )
    ids = table.group_by("token_id").agg(
        highest=pl.col("count").max(), tokens=pl.col("count").sum() / 8
    )
    assert ids.height == answer["vocab_types"]
    mean, weighted = vocabulary_shares(ids["highest"], ids["tokens"])
    assert mean == pytest.approx(answer["vocab_spec_topk_mean"], abs=5.1e-7)
    assert weighted == pytest.approx(answer["vocab_spec_topk_tokenweighted"], abs=5.1e-7)


def test_intervals_of_a_divergence_hold_what_is_true():
    """Documents of their own taste: the plain percentile interval would hold the truth in 13 % of
    such samples, the reflected in most.
    """
    generator, held = np.random.default_rng(0), []
    even = np.ones(16) / 16
    other = even * np.exp(0.3 * generator.standard_normal(16))
    truth = float(jensen_shannon_bits(even, other))
    for seed in range(60):
        counts, here = np.zeros((40, 2, 16), np.uint32), np.zeros((40, 2), bool)
        for unit in range(40):
            side = unit % 2
            taste = generator.dirichlet((even, other / other.sum())[side] * 60)
            counts[unit, side], here[unit, side] = generator.multinomial(300, taste), True
        bits, low, high, shuffled, point = _divergences(
            counts, here, np.array([[0, 1]]), Resampling(200, seed)
        )[:, 0]
        held.append(low <= truth <= high)
        assert low <= bits <= high
        assert 0 < shuffled < point < bits
    assert 0.85 <= np.mean(held) <= 1


def test_intervals_of_specialisation_come_from_documents(make_trace, draw):
    """A domain in which every document has an expert of its own: few documents, wide intervals,
    however many tokens.
    """
    own = np.repeat(np.arange(6), 200)[:, None]
    trace = make_trace(
        own,
        6,
        doc=np.repeat(np.arange(6), 200),
        pos=np.tile(np.arange(200), 6),
        domain=["a"] * 1200,
    )
    table = domain_specialisation(trace, "domain")
    assert table["specialisation"].to_list() == pytest.approx([1 / 6] * 6)
    assert table["lo"].max() == 0
    assert (table["hi"] > 0.4).all()
    assert domain_specialisation(trace, "domain", resamples=0)["lo"].null_count() == 6


def test_many_documents_are_drawn_in_bundles(make_trace, draw, monkeypatch):
    monkeypatch.setattr("moe_lab.analysis.document_sums.MAX_UNITS", 40)
    doc = np.arange(2000) // 4
    trace = make_trace(
        draw(0, 2000, 4, 1),
        4,
        doc=doc,
        pos=np.arange(2000) % 4,
        domain=np.array(["a", "b"])[doc % 2],
    )
    table = domain_specialisation(trace, "domain")
    assert (table["hi"] - table["lo"]).mean() == pytest.approx(
        2 * 1.96 * np.sqrt(0.25 * 0.75 / 1000), rel=0.5
    )
    assert table["count"].sum() == 2000


def test_a_column_of_many_values_is_no_domain(make_trace):
    with refused("column", AnalysisError):
        domain_specialisation(
            make_trace(np.zeros((300, 1), int), 2, token_id=np.arange(300)), "token_id"
        )


def test_the_ids_of_an_expert_fall_by_share(make_trace):
    trace = make_trace([[0], [0], [0], [1], [1], [1]], 3, token_id=[5, 5, 7, 7, 8, 8])
    assert expert_vocabulary(trace, min_count=1).drop("layer", "is_zero").rows() == [
        (0, 5, 2, 2, 1.0), (0, 7, 1, 2, 0.5), (1, 8, 2, 2, 1.0), (1, 7, 1, 2, 0.5),
    ]  # fmt: skip
    assert expert_vocabulary(trace, top=1, min_count=1)["id"].to_list() == [5, 8]


def test_labels_are_permuted_alike_in_every_layer(make_trace, monkeypatch):
    """Held for all layers or drawn again for each: the same permutations."""
    doc = np.repeat(np.arange(8), 5)
    names = [("a", "b")[number % 2] for number in doc]
    ids = np.random.default_rng(0).integers(0, 4, (40, 1))
    trace = make_trace(ids, 4, doc=doc, pos=np.tile(np.arange(5), 8), domain=names)
    held = domain_divergence(trace, resamples=20)
    module = sys.modules[
        "moe_lab.analysis.specialisation"
    ]  # the package has a function of that name
    monkeypatch.setattr(module, "MAX_CELLS", 0)
    assert domain_divergence(trace, resamples=20).equals(held)
