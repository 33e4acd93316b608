"""Alternatives beside more experts: pairs of one seed and total, intervals over seeds, and what may
be said of them.
"""

import math

import numpy as np
import polars as pl
import pytest
from refusals import refused
from scipy import stats

from moe_lab.errors import AnalysisError
from moe_lab.scaling import against_experts, crossing
from moe_lab.scaling.alternatives_compared import Result, result_of

SEEDS = (0, 1, 2, 3)


def run(arm: str, ratio: float, seed: int, loss: float, total: int) -> dict[str, object]:
    return {
        "arm": arm,
        "ratio": ratio,
        "seed": seed,
        "loss": loss,
        "total_params": total,
        "tokens": 1000,
    }


def sweep(differences: dict[float, tuple[float, ...]], kind: str = "ngram") -> pl.DataFrame:
    """Experts at ratios 1 to 16, and an alternative of half the ratio and nearly the same total, so
    much worse by seed.
    """
    rows = [
        run("topk", ratio, seed, 3 - 0.1 * math.log2(ratio) + 0.5 * seed, round(1e6 * ratio))
        for ratio in (1, 2, 4, 8, 16)
        for seed in SEEDS
    ]
    for ratio, values in differences.items():
        rows += [
            run(
                kind,
                ratio / 2,
                seed,
                3 - 0.1 * math.log2(ratio) + 0.5 * seed + value,
                round(1.01e6 * ratio),
            )
            for seed, value in enumerate(values)
        ]
    return pl.DataFrame(rows)


def test_pairs_are_of_one_seed_and_total_and_their_interval_is_students() -> None:
    differences = (0.02, 0.05, 0.03, 0.06)
    table = against_experts(sweep({8.0: differences}), compute_slope=0.2)
    low, high = stats.t.interval(0.95, df=3, loc=np.mean(differences), scale=stats.sem(differences))
    (row,) = table.to_dicts()
    assert (row["alternative"], row["ratio"], row["total_params"], row["seeds"], row["result"]) == (
        "ngram",
        8.0,
        8_000_000,
        4,
        "worse",
    )
    assert (row["difference"], row["lo"], row["hi"]) == pytest.approx(
        (np.mean(differences), low, high)
    )
    assert (row["compute"], row["compute_lo"], row["compute_hi"]) == pytest.approx(
        [math.exp(-value / 0.2) for value in (np.mean(differences), high, low)]
    )


def test_one_pair_tells_nothing_and_no_slope_no_compute() -> None:
    (row,) = against_experts(sweep({4.0: (-0.3,)})).to_dicts()
    assert (row["seeds"], row["lo"], row["hi"], row["compute"], row["result"]) == (
        1,
        None,
        None,
        None,
        "cannot tell",
    )


@pytest.mark.parametrize(
    ("low", "high", "result"),
    [
        (-0.2, -0.1, Result.BETTER),
        (0.1, 0.2, Result.WORSE),
        (-0.01, 0.015, Result.NO_DIFFERENCE),
        (-0.01, 0.03, Result.CANNOT_TELL),
        (None, None, Result.CANNOT_TELL),
    ],
)
def test_a_result_is_what_the_interval_allows(
    low: float | None, high: float | None, result: Result
) -> None:
    assert result_of(low, high, 0.02) is result


def test_the_crossing_is_told_where_the_intervals_settle_it() -> None:
    worse, better, open_ = (
        (0.1, 0.11, 0.1, 0.11),
        (-0.1, -0.11, -0.1, -0.11),
        (-0.2, 0.2, 0.1, -0.1),
    )
    told = lambda differences: crossing(against_experts(sweep(differences), compute_slope=0.2))  # noqa: E731
    assert (
        told({2.0: worse, 4.0: open_, 8.0: better, 16.0: better})
        == "loses up to ratio 2 and wins from ratio 8: the curves cross between"
    )
    assert (
        told({2.0: worse, 4.0: open_})
        == "loses at ratio 2 and wins at none: no crossing is seen in this range"
    )
    assert (
        told({2.0: better, 8.0: worse})
        == "wins at ratio 2 and loses at ratio 8: no single crossing"
    )
    assert told({2.0: open_}) == "cannot tell: the intervals settle no ratio"


def test_the_arm_that_was_made_for_the_pairs_has_precedence() -> None:
    runs = sweep({8.0: (0.1, 0.1, 0.1, 0.1)})
    made = runs.filter(arm="topk").with_columns(arm=pl.lit("experts"), loss=pl.col("loss") - 0.5)
    assert against_experts(pl.concat([runs, made]))["difference"].to_list() == pytest.approx([0.6])
    assert against_experts(pl.concat([runs, made]), arm="topk")[
        "difference"
    ].to_list() == pytest.approx([0.6])


def test_a_sweep_without_alternatives_has_no_rows_and_a_half_finished_one_says_so() -> None:
    runs = sweep({})
    assert against_experts(runs).is_empty()
    lone = pl.concat(
        [runs, pl.DataFrame([run("depth", 2.0, 9, 3.0, 4_000_000)])], how="vertical_relaxed"
    )
    with refused("arm", AnalysisError):
        against_experts(lone)
    with refused("seed", AnalysisError):
        against_experts(runs.drop("seed"))
