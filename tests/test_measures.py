"""The numbers of uneven load, against their definitions at the extremes and against published count
tables.
"""

import json
import os
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon

from moe_lab import measures
from moe_lab.trace import score_spread

DATA = (
    Path(os.environ.get("MOE_LAB_DATA", Path(__file__).parents[1] / ".." / "shared" / "data"))
    / "traces"
    / "olmoe"
)

EVEN, ONE = np.full(8, 5), np.array([40, 0, 0, 0, 0, 0, 0, 0])


@pytest.mark.parametrize(
    ("function", "even", "one"),
    [
        (measures.load_cv, 0, 7**0.5),
        (measures.max_over_mean, 1, 8),
        (measures.max_violation, 0, 7),
        (measures.balancedness, 1, 1 / 8),
        (measures.gini, 0, 7 / 8),
        (measures.load_entropy, np.log(8), 0),
        (measures.effective_experts, 8, 1),
        (measures.dead_experts, 0, 7),
    ],
)
def test_even_load_and_one_expert_that_takes_all_have_their_known_values(function, even, one):
    assert function(np.stack([EVEN, ONE])) == pytest.approx([even, one])


@given(st.lists(st.integers(0, 50), min_size=1, max_size=20).filter(any))
def test_gini_is_the_mean_absolute_difference_over_twice_the_mean(counts):
    array = np.array(counts, dtype=float)
    assert measures.gini(array) == pytest.approx(
        np.abs(array[:, None] - array).mean() / 2 / array.mean(), abs=1e-12
    )


@given(st.lists(st.integers(0, 50), min_size=2, max_size=20).filter(any), st.randoms())
def test_divergence_agrees_with_scipy(counts, random):
    other = counts.copy()
    random.shuffle(other)
    assert measures.jensen_shannon_bits(counts, other) == pytest.approx(
        jensenshannon(counts, other, base=2) ** 2, abs=1e-9
    )


def test_disjoint_loads_diverge_by_one_bit():
    assert measures.jensen_shannon_bits([3, 0, 1], [0, 2, 0]) == pytest.approx(1)


def test_dead_experts_stay_in_the_mean():
    assert measures.max_over_mean([10, 10, 0, 0]) == pytest.approx(2)


def test_nothing_counted_gives_nan():
    for function in (
        measures.load_cv,
        measures.max_over_mean,
        measures.gini,
        measures.effective_experts,
        measures.balancedness,
    ):
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
    assert measures.load_cv(counts) == rounded(answer["load_cv"])
    assert measures.max_over_mean(counts) == rounded(answer["max_over_mean"])
    assert measures.max_violation(counts) == rounded(answer["maxvio"])
    assert measures.effective_experts(counts) == rounded(answer["effective_experts"])


@pytest.mark.data
def test_divergence_of_olmoe_domains_equals_the_known_answers(known):
    domains = json.loads((DATA / "expert_counts.json").read_text())["olmoe-1b-7b-0924"][
        "expert_counts"
    ]
    for layer, answers in known["_domain_jsd_bits_olmoe_expert_counts"].items():
        for one, other in combinations(domains, 2):
            found = measures.jensen_shannon_bits(domains[one][layer], domains[other][layer])
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


ALL_LOADS = [
    measures.load_cv,
    measures.max_over_mean,
    measures.max_violation,
    measures.balancedness,
    measures.load_entropy,
    measures.effective_experts,
    measures.dead_experts,
]


@pytest.mark.parametrize("function", ALL_LOADS)
@given(st.lists(st.lists(st.integers(0, 50), min_size=5, max_size=5), min_size=1, max_size=4))
def test_tensors_and_arrays_have_the_same_load(function, counts):
    tensor = function(torch.tensor(counts))
    assert isinstance(tensor, torch.Tensor)
    np.testing.assert_allclose(tensor.numpy(), function(counts), rtol=1e-12, atol=1e-12)


@given(st.integers(1, 6), st.integers(0, 2**16))
def test_tensors_and_arrays_have_the_same_entropy_and_margin(top_k, seed):
    scores = torch.rand(7, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    expected = (
        -(scores / scores.sum(dim=1, keepdim=True))
        .log()
        .mul(scores / scores.sum(dim=1, keepdim=True))
        .sum(dim=1)
    )
    for values in (scores, scores.numpy()):
        np.testing.assert_allclose(measures.router_entropy(values), expected, rtol=1e-12)
    ordered = np.sort(scores.numpy(), axis=1)[:, ::-1]
    gap = ordered[:, top_k - 1] - ordered[:, top_k] if top_k < 5 else np.full(7, np.inf)
    for values in (scores, scores.numpy()):
        np.testing.assert_array_equal(np.asarray(measures.score_margin(values, top_k)), gap)


def test_a_score_on_one_expert_has_entropy_0_and_not_minus_0():
    for one in (np.eye(3), torch.eye(3)):
        entropy = np.asarray(measures.router_entropy(one))
        assert (entropy == 0).all()
        assert not np.signbit(entropy).any()


def test_the_fast_margin_of_a_trace_is_that_of_the_definition():
    scores = torch.rand(50, 8, generator=torch.Generator().manual_seed(1))
    best = scores.topk(3, dim=1).indices
    others = torch.stack([torch.randperm(8)[:3] for _ in range(50)])  # a bias chose, not the score
    for indices in (best, others, torch.where(torch.arange(3) < 2, best, -1)):
        torch.testing.assert_close(
            score_spread.margin(scores, indices), measures.score_margin(scores, 3)
        )


def test_measures_load_no_torch():
    code = "import sys, moe_lab.measures as m; m.load_cv([1, 2]); print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "False\n"
