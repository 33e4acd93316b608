"""Best points, against the calculus they approximate."""

import math

import numpy as np
import polars as pl
import pytest
from refusals import refused

from moe_lab.errors import AnalysisError
from moe_lab.scaling import LAWS, compute_optimal, constrained_optimum, fixed_total_optima, isoflop


def test_the_optimal_split_is_the_closed_form_of_chinchilla():
    k = LAWS["hoffmann"].coefficients("epoch")
    scale = (k["alpha"] * k["A"] / (k["beta"] * k["B"])) ** (1 / (k["alpha"] + k["beta"]))
    for compute in (1e19, 1e23):
        active, tokens = compute_optimal("hoffmann", compute)
        assert active == pytest.approx(
            scale * (compute / 6) ** (k["beta"] / (k["alpha"] + k["beta"])), rel=1e-6
        )
        assert 6 * active * tokens == pytest.approx(compute)


def test_isoflop_parabolas_find_the_split_the_runs_were_made_from():
    rows = []
    for compute in (1e19, 1e20, 1e21):
        best, _ = compute_optimal("hoffmann", compute)
        for factor in np.geomspace(0.5, 2, 7):
            active = best * factor
            point = {"active_params": active, "tokens": compute / 6 / active}
            rows.append(
                {"compute": compute, **point, "loss": float(LAWS["hoffmann"].predict(point))}
            )
    found = isoflop(pl.DataFrame(rows))
    k = LAWS["hoffmann"].coefficients("epoch")
    assert found.active_exponent == pytest.approx(k["beta"] / (k["alpha"] + k["beta"]), abs=2e-3)
    for row in found.optima.iter_rows(named=True):
        assert row["active_params"] == pytest.approx(
            compute_optimal("hoffmann", row["compute"])[0], rel=0.02
        )


def test_budgets_without_a_minimum_inside_are_refused():
    size = np.geomspace(1e8, 1e9, 5)
    falling = pl.DataFrame(
        {
            "compute": [1e20] * 5,
            "active_params": size,
            "tokens": 1e20 / 6 / size,
            "loss": -np.log(size),
        }
    )
    with refused("budgets", AnalysisError):
        isoflop(falling)


def arm(best=16.0, sd=0.001, total=1e9, draw=0):
    rng = np.random.default_rng(draw)
    rows = [
        {
            "ratio": float(r),
            "seed": s,
            "loss": 3 + 0.01 * math.log2(r / best) ** 2 + rng.normal(0, sd),
            "total_params": total,
        }
        for r in 2.0 ** np.arange(8)
        for s in range(3)
    ]
    return pl.DataFrame(rows)


def test_an_optimum_at_fixed_size_is_found_and_its_interval_covers_it():
    found = [constrained_optimum(arm(best=12.0, draw=draw), repetitions=200) for draw in range(60)]
    assert all(optimum.inside for optimum in found)
    assert np.mean([optimum.ratio for optimum in found]) == pytest.approx(12, rel=0.01)
    covered = np.mean([optimum.interval[0] < 12 < optimum.interval[1] for optimum in found])
    assert 0.75 < covered <= 1


def test_an_optimum_at_the_edge_of_the_grid_is_not_claimed():
    found = constrained_optimum(arm(best=512.0))
    assert not found.inside
    assert found.interval[1] == math.inf
    assert "at least 128 (95 %)" in found.sentence
    start = constrained_optimum(arm(best=0.25))
    assert start.interval[0] == 0
    assert "at most 1 (95 %)" in start.sentence


def test_an_arm_of_changing_size_is_refused():
    with refused("total_params", AnalysisError):
        constrained_optimum(arm().with_columns(total_params=pl.col("ratio") * 1e6))
    with refused("ratio", AnalysisError):
        constrained_optimum(arm().filter(pl.col("ratio") < 4))


def test_only_arms_of_one_total_and_several_active_sizes_have_a_constrained_optimum():
    rows = [
        {
            "arm": arm,
            "ratio": 2.0**e,
            "seed": seed,
            "loss": 3 + 0.01 * (e - 3) ** 2 + 1e-4 * seed,
            "total_params": total(e),
            "active_params": active(e),
        }
        for arm, total, active in (
            ("total", lambda e: 1e8, lambda e: 1e8 / 2**e),
            ("topk", lambda e: 1e7 * 2**e, lambda e: 1e7),
        )
        for e in range(7)
        for seed in range(3)
    ]
    found = fixed_total_optima(pl.DataFrame(rows))
    assert list(found) == ["total"]
    assert found["total"].ratio == pytest.approx(8, rel=0.02)
    assert fixed_total_optima(pl.DataFrame(rows).drop("arm")) == {}
