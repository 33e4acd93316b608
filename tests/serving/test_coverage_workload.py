"""Lists of experts that cover a share, calibration text, and workloads drawn from a trace."""

import json

import numpy as np
import polars as pl
import pytest

from moe_lab.errors import AnalysisError, ConfigError
from moe_lab.serving import (
    calibration_tokens,
    coverage,
    fit_workload,
    workload_agreement,
    write_expert_lists,
)


def test_the_shortest_list_is_found_and_judged_elsewhere(write_trace):
    """Experts 0, 1, 2 have 60, 30 and 10 % of the slots, in every document alike."""
    ids = np.tile(np.repeat([0, 1, 2], [6, 3, 1]), 20)[:, None, None]
    trace = write_trace(ids, np.repeat(np.arange(20), 10), 5)
    frame = coverage(trace, [0.6, 0.61, 0.9, 1.0], resamples=20)
    assert frame["n_experts"].to_list() == [1, 2, 2, 3]
    assert frame["experts"].to_list()[3] == [0, 1, 2]
    assert frame["held"].to_list() == pytest.approx([0.6, 0.9, 0.9, 1.0])
    assert frame["lo"].to_list() == pytest.approx([0.6, 0.9, 0.9, 1.0])
    assert frame["n_docs"][0] == 10


def test_lists_chosen_on_other_documents_hold_less_than_on_their_own(write_trace, random_ids):
    ids, doc = random_ids(200, 2, 2, 30, skew=0.0), np.repeat(np.arange(10), 20)
    frame = coverage(write_trace(ids, doc, 30), [0.5], resamples=50)
    assert (frame["held"] < frame["chosen"]).all()
    assert (frame["lo"] <= frame["held"]).all()


def test_gate_mass_and_domains_have_lists_of_their_own(write_trace, tmp_path):
    ids = np.tile([0, 1], 60).reshape(60, 2, 1).transpose(0, 2, 1)[:, :, :]
    weights = np.broadcast_to(np.float32([0.9, 0.1]), ids.shape)  # type: ignore
    kind = {"kind": np.repeat(["a", "b"], 30)}
    trace = write_trace(ids, np.repeat(np.arange(12), 5), 4, weights=weights, columns=kind)
    frame = coverage(trace, [0.8], of="gate_mass", by="kind", resamples=20)
    assert frame["kind"].to_list() == ["a", "b"]
    assert frame["n_experts"].to_list() == [1, 1]
    assert frame["held"].to_list() == pytest.approx([0.9, 0.9], abs=1e-3)
    assert coverage(trace, [0.8], resamples=20)["n_experts"].to_list() == [2]
    write_expert_lists(frame.filter(kind="a"), tmp_path / "lists.json")
    assert json.loads((tmp_path / "lists.json").read_text()) == {"layers": {"0": [0]}}
    with pytest.raises(AnalysisError, match="one list for each layer"):
        write_expert_lists(frame, tmp_path / "lists.json")


def test_what_cannot_be_covered_is_refused(write_trace, random_ids):
    one = write_trace(random_ids(10, 1, 2, 4), None, 4)
    with pytest.raises(AnalysisError, match="at least 2 documents"):
        coverage(one)
    with pytest.raises(AnalysisError, match="gate weights"):
        coverage(one, of="gate_mass")
    with pytest.raises(ConfigError):
        coverage(one, [1.5])


def test_calibration_tokens_are_the_coupon_collectors(write_trace, random_ids):
    ids = random_ids(4000, 1, 1, 8, seed=3, skew=0.0)
    trace = write_trace(ids, np.repeat(np.arange(400), 10), 8)
    frame = calibration_tokens(trace, least=5)
    row = frame.row(0, named=True)
    assert row["unreached"] == 0
    assert 40 <= row["measured"] <= row["bound"]
    # the bound holds: of 200 worlds of that many even tokens few leave an expert short
    generator = np.random.default_rng(0)
    short = sum(
        np.bincount(generator.integers(8, size=row["bound"]), minlength=8).min() < 5
        for _ in range(200)
    )
    assert short <= 10
    dead = calibration_tokens(write_trace(ids % 4, np.repeat(np.arange(400), 10), 8))
    assert dead.row(0) == (0, None, None, 4)
    with pytest.raises(AnalysisError):
        calibration_tokens(write_trace(ids, None, 8, per_token=False))


@pytest.fixture
def dependent_trace(write_trace):
    """Documents of their own skew; half of a token's experts are those of the token before."""
    generator = np.random.default_rng(5)
    ids, doc = [], np.repeat(np.arange(40), 50)
    for number in range(len(doc)):
        fresh = number % 50 == 0
        if fresh:
            worth = generator.normal(size=(2, 16))
        row = []
        for layer in range(2):
            keys = worth[layer] + generator.gumbel(size=16)  # type: ignore
            if not fresh:
                kept = ids[-1][layer][generator.random(3) < 0.5]
                keys[kept] = np.inf
            row.append(np.argsort(-keys)[:3])
        ids.append(np.array(row))
    return write_trace(np.array(ids), doc, 16)


def test_a_fitted_workload_may_stand_for_its_trace(dependent_trace, tmp_path):
    workload = fit_workload(dependent_trace)
    assert workload.length == 50
    assert workload.slots.tolist() == [3, 3]
    assert workload.keep == pytest.approx([0.5, 0.5], abs=0.12)
    sample = workload.sample(tmp_path / "sample", 2000, seed=1).check()
    assert sample.num_tokens == 2000
    frame = workload_agreement(dependent_trace, sample, resamples=100)
    assert frame.height == 5
    assert frame["agrees"].sum() >= 4
    again = workload.sample(tmp_path / "again", 2000, seed=1)
    assert again.counts().equals(sample.counts())


def test_a_sample_without_the_dependence_is_told_apart(dependent_trace, tmp_path):
    from dataclasses import replace

    workload = replace(fit_workload(dependent_trace), keep=np.zeros(2))
    sample = workload.sample(tmp_path / "sample", 2000, seed=1)
    frame = workload_agreement(dependent_trace, sample, resamples=100)
    windows = frame.filter(pl.col("question").str.contains("4 tokens"))
    assert windows["agrees"].to_list() == [False]
