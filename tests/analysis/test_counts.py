"""The numbers of uneven load, against their definitions at the extremes and against published count
tables.
"""

import json
import os
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon

from moe_lab.analysis import counts as of

DATA = (
    Path(os.environ.get("MOE_LAB_DATA", Path(__file__).parents[2] / ".." / "shared" / "data"))
    / "traces"
    / "olmoe"
)

EVEN, ONE = np.full(8, 5), np.array([40, 0, 0, 0, 0, 0, 0, 0])


@pytest.mark.parametrize(
    ("function", "even", "one"),
    [
        (of.load_cv, 0, 7**0.5),
        (of.max_over_mean, 1, 8),
        (of.max_violation, 0, 7),
        (of.balancedness, 1, 1 / 8),
        (of.gini, 0, 7 / 8),
        (of.load_entropy, np.log(8), 0),
        (of.effective_experts, 8, 1),
        (of.dead_experts, 0, 7),
    ],
)
def test_even_load_and_one_expert_that_takes_all_have_their_known_values(function, even, one):
    assert function(np.stack([EVEN, ONE])) == pytest.approx([even, one])


@given(st.lists(st.integers(0, 50), min_size=1, max_size=20).filter(any))
def test_gini_is_the_mean_absolute_difference_over_twice_the_mean(counts):
    array = np.array(counts, dtype=float)
    assert of.gini(array) == pytest.approx(
        np.abs(array[:, None] - array).mean() / 2 / array.mean(), abs=1e-12
    )


@given(st.lists(st.integers(0, 50), min_size=2, max_size=20).filter(any), st.randoms())
def test_divergence_agrees_with_scipy(counts, random):
    other = counts.copy()
    random.shuffle(other)
    assert of.jensen_shannon_bits(counts, other) == pytest.approx(
        jensenshannon(counts, other, base=2) ** 2, abs=1e-9
    )


def test_disjoint_loads_diverge_by_one_bit():
    assert of.jensen_shannon_bits([3, 0, 1], [0, 2, 0]) == pytest.approx(1)


def test_dead_experts_stay_in_the_mean():
    assert of.max_over_mean([10, 10, 0, 0]) == pytest.approx(2)


def test_nothing_counted_gives_nan():
    for function in (of.load_cv, of.max_over_mean, of.gini, of.effective_experts, of.balancedness):
        assert np.isnan(function([0, 0, 0])), function.__name__


@pytest.fixture(scope="module")
def known():
    if not DATA.is_dir():
        pytest.skip(f"published data not found at {DATA}; set MOE_LAB_DATA")
    return json.loads((DATA / "derived_known_answers.json").read_text())


def rounded(value):
    """The published answers are rounded to six decimals."""
    return pytest.approx(value, abs=5.1e-7)


@pytest.mark.data
@pytest.mark.parametrize("domain", ["book", "github"])
@pytest.mark.parametrize("layer", [0, 7, 15])
def test_load_of_olmoe_equals_the_known_answers(known, domain, layer):
    with np.load(DATA / f"eid2token_olmoe_{domain}.npz", allow_pickle=False) as table:
        counts = np.bincount(
            table["expert"], weights=table["count"] * (table["layer"] == layer), minlength=64
        )
    answer = known[f"olmoe_{domain}/layer_{layer}"]
    assert counts.sum() == 8 * answer["tokens"]
    assert of.load_cv(counts) == rounded(answer["load_cv"])
    assert of.max_over_mean(counts) == rounded(answer["max_over_mean"])
    assert of.max_violation(counts) == rounded(answer["maxvio"])
    assert of.effective_experts(counts) == rounded(answer["effective_experts"])


@pytest.mark.data
def test_divergence_of_olmoe_domains_equals_the_known_answers(known):
    domains = json.loads((DATA / "expert_counts.json").read_text())["olmoe-1b-7b-0924"][
        "expert_counts"
    ]
    for layer, answers in known["_domain_jsd_bits_olmoe_expert_counts"].items():
        for one, other in combinations(domains, 2):
            found = of.jensen_shannon_bits(domains[one][layer], domains[other][layer])
            assert found == rounded(answers.get(f"{one}|{other}", answers.get(f"{other}|{one}"))), (
                layer,
                one,
                other,
            )


@pytest.mark.data
def test_published_counts_are_conserved(known):
    models = json.loads((DATA / "expert_counts.json").read_text())
    slots = {"olmoe": 8 * 208_896, "mixtral": 2 * 208_896}
    for model, kinds in models.items():
        for domain, layers in kinds["expert_counts"].items():
            if domain != "tulu":
                assert {sum(counts) for counts in layers.values()} == {
                    next(n for name, n in slots.items() if name in model)
                }
