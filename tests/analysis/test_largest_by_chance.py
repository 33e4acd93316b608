"""What the largest of many cells is by chance, against simulation."""

import numpy as np
import pytest

from moe_lab.analysis import domain_divergence, domain_specialisation
from moe_lab.analysis.largest_by_chance import domain_tables, largest_of_deals, largest_ratio


@pytest.mark.parametrize("mean", [6.0, 40.0, 1000.0])
def test_the_largest_ratio_is_the_95_point_of_simulated_maxima(mean):
    drawn = np.random.default_rng(0).poisson(mean, (4000, 500)).max(axis=1) / mean
    found = largest_ratio(np.full(500, mean))
    assert found is not None
    assert (drawn > found * (1 + 1e-9)).mean() <= 0.06
    assert (drawn > found - 2 / mean).mean() >= 0.04


def test_more_cells_reach_further_and_rare_ones_are_left_out():
    few, many = largest_ratio(np.full(10, 50.0)), largest_ratio(np.full(10_000, 50.0))
    assert few is not None
    assert many is not None
    assert 1 < few < many
    assert largest_ratio(np.append(np.full(10, 50.0), 0.01)) == few
    assert largest_ratio([1.0, 4.9]) is None


def test_a_blind_router_stays_below_the_largest_of_deals_and_one_with_a_taste_does_not(
    make_trace, draw
):
    """Documents have tastes of their own, so tokens are not independent: the documents' labels are
    permuted.
    """
    generator = np.random.default_rng(3)
    tastes = generator.dirichlet(np.full(8, 8.0), 40)
    blind = np.concatenate([generator.choice(8, 100, p=taste) for taste in tastes])[:, None]
    doc, pos = np.arange(4000) // 100, np.arange(4000) % 100
    domain = np.where(doc % 2 == 0, "a", "b")
    taste = np.where((domain == "a") & (generator.random(4000) < 0.5), 0, blind[:, 0])[:, None]
    columns = {"doc": doc, "pos": pos, "domain": domain.tolist()}
    trace = make_trace({0: blind, 1: taste}, 8, **columns)
    found = domain_specialisation(trace, resamples=0)
    largest = {
        layer: (rows["specialisation"] / rows["at_random"]).max()
        for (layer,), rows in found.group_by("layer")
    }
    blind_only = largest_of_deals(make_trace(blind, 8, **columns), "domain", ["a", "b"])
    assert blind_only is not None
    assert 1 < largest[0] < blind_only.ratio < 1.5  # type: ignore
    both = largest_of_deals(trace, "domain", ["a", "b"])
    assert both is not None
    assert largest[1] > both.ratio  # type: ignore
    assert 0 < blind_only.bits < 0.05


def test_documents_that_mix_domains_or_are_few_have_no_deal(make_trace, draw):
    doc, pos = np.arange(400) // 100, np.arange(400) % 100
    ids = draw(0, 400, 8, 2)
    mixed = make_trace(ids, 8, doc=doc, pos=pos, domain=["a", "b"] * 200)
    assert largest_of_deals(mixed, "domain", ["a", "b"]) is None
    few = make_trace(ids, 8, doc=doc, pos=pos, domain=np.where(doc < 2, "a", "b").tolist())
    assert largest_of_deals(few, "domain", ["a", "b"]) is None


def test_tables_of_one_reading_are_those_of_three(make_trace):
    generator = np.random.default_rng(3)
    doc = np.repeat(np.arange(12), 30)
    trace = make_trace(
        [generator.permutation(8)[:2] for _ in doc],
        8,
        doc=doc,
        pos=np.tile(np.arange(30), 12),
        domain=[("a", "b")[number % 2] for number in doc],
    )
    tables = domain_tables(trace, "domain", ["a", "b"], resamples=50)
    assert tables.specialisation.equals(domain_specialisation(trace, resamples=50))
    assert tables.divergence.equals(domain_divergence(trace, resamples=50))
    assert tables.largest == largest_of_deals(trace, "domain", ["a", "b"])
    assert domain_tables(trace, "domain", ["a"], resamples=0).largest is None
