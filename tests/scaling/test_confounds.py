"""Each confound made on purpose, and the report naming it."""

import math

import numpy as np
import polars as pl
import pytest
from refusals import refused

from moe_lab.errors import AnalysisError
from moe_lab.scaling import confounds

RATIOS = (1.0, 4.0, 16.0, 64.0)


def runs(
    rates=(1e-3, 1.4e-3, 2e-3, 2.8e-3, 4e-3),
    optimum=lambda ratio: 2e-3,
    curvature=0.02,
    tokens=(1e9,),
    gain=lambda tokens: 0.03,
):
    rows = [
        {
            "ratio": ratio,
            "seed": seed,
            "tokens": budget,
            "active_params": 1e7,
            "learning_rate": rate,
            "loss": 3
            - gain(budget) * math.log2(ratio)
            + curvature * math.log(rate / optimum(ratio)) ** 2,
        }
        for ratio in RATIOS
        for seed in range(3)
        for budget in tokens
        for rate in rates
    ]
    return pl.DataFrame(rows)


def status(frame: pl.DataFrame, name: str) -> str:
    table = confounds(frame)
    return table.filter(pl.col("confound") == name)["status"][0]


def test_a_clean_sweep_is_clear_where_it_measured_and_says_where_it_did_not():
    table = dict(confounds(runs()).select("confound", "status").iter_rows())
    for name in (
        "seeds",
        "learning rate bracketed",
        "learning rate spacing",
        "gain depends on learning rate",
        "tokens per expert",
        "active size",
    ):
        assert table[name] == "clear"
    for name in (
        "dropped tokens",
        "dead experts",
        "load",
        "hash-routing control",
        "break moves with tokens",
    ):
        assert table[name] == "not measured"


def test_an_optimum_rate_that_moves_with_the_ratio_is_seen():
    moving = runs(optimum=lambda ratio: 1.5e-3 if ratio < 16 else 3e-3)
    assert status(moving, "learning rate moves with ratio") == "suspect"


def test_a_rate_at_the_end_of_its_grid_is_not_bracketed():
    assert status(runs(optimum=lambda ratio: 8e-3), "learning rate bracketed") == "suspect"


def test_a_coarse_grid_of_rates_costs_more_than_the_margin():
    assert (
        status(runs(rates=(1e-3, 2e-3, 4e-3), curvature=0.3), "learning rate spacing") == "suspect"
    )


def test_a_wall_at_one_rate_only_is_the_rates():
    """The last ratio is mistuned at the rate that is best before it, and nowhere else."""
    frame = runs(rates=(1e-3, 2e-3, 4e-3))
    spoilt = frame.with_columns(
        loss=pl.when((pl.col("ratio") == 64) & (pl.col("learning_rate") == 2e-3))
        .then(pl.col("loss") + 0.06)
        .otherwise(pl.col("loss"))
    )
    assert status(frame, "gain depends on learning rate") == "clear"
    assert status(spoilt, "gain depends on learning rate") == "suspect"


def test_a_gain_that_grows_with_tokens_is_data_not_sparsity():
    starved = runs(tokens=(1e9, 4e9), gain=lambda tokens: 0.005 if tokens < 2e9 else 0.03)
    assert status(starved, "break moves with tokens") == "suspect"
    assert status(runs(tokens=(1e9, 4e9)), "break moves with tokens") == "clear"


@pytest.mark.parametrize(
    ("values", "expected"), [([False, True], "suspect"), (["0", "1"], "suspect"), ([0.0], "clear")]
)
def test_a_loss_that_no_causal_model_has_is_said(values, expected):
    frame = runs()
    assert status(frame, "causal loss") == "not measured"
    looks = pl.Series(values * frame.height).head(frame.height)
    frame = frame.with_columns(sees_later_tokens=looks)
    assert status(frame, "causal loss") == expected
    table = confounds(frame)
    said = any("not that of a causal model" in detail for detail in table["detail"])
    assert said == (expected == "suspect")


def test_few_tokens_per_expert_dropped_tokens_dead_experts_and_load_are_seen():
    assert status(runs(tokens=(1e7,)), "tokens per expert") == "suspect"
    frame = runs().with_columns(
        drop_rate=pl.col("ratio") / 1000,
        dead_experts=pl.when(pl.col("ratio") == 64).then(0.2).otherwise(0.0),
        load_cv=0.1 * pl.col("ratio"),
        arm=pl.lit("topk"),
        bits_per_byte=pl.col("loss") * 0.4,
    )
    table = dict(confounds(frame).select("confound", "status").iter_rows())
    assert table["dropped tokens"] == table["dead experts"] == table["load"] == "suspect"
    assert table["hash-routing control"] == "not measured"
    assert table["held-out text"] == "clear"
    assert (
        status(
            frame.with_columns(arm=pl.Series(["topk", "hash"] * (frame.height // 2))),
            "hash-routing control",
        )
        == "clear"
    )


def test_sizes_that_differ_and_too_few_seeds_are_seen():
    frame = (
        runs()
        .with_columns(active_params=1e7 * (1 + pl.col("ratio") / 640))
        .filter(pl.col("seed") < 2)
    )
    assert status(frame, "active size") == "suspect"
    assert status(frame, "seeds") == "suspect"


def test_a_frame_that_is_no_sweep_is_told_in_one_line():
    with refused("tokens", AnalysisError):
        confounds(runs().drop("tokens"))
    with refused("ratio", AnalysisError):
        confounds(runs().with_columns(loss=np.nan))


def test_an_arm_is_judged_with_its_short_budget_and_its_learning_rates_alone():
    rows = [
        {
            "arm": arm,
            "ratio": ratio,
            "seed": seed,
            "learning_rate": rate,
            "tokens": tokens,
            "active_params": 1e7,
            "loss": loss,
        }
        for ratio in (1.0, 8.0, 64.0)
        for seed in (0, 1, 2)
        for arm, rate, tokens, loss in (
            ("topk", 2e-3, 4e9, 3 - 0.03 * math.log2(ratio) + 1e-3 * seed),
            ("topk-short", 2e-3, 1e9, 3.2 - 0.03 * min(math.log2(ratio), 3) + 1e-3 * seed),
            ("lr", 1.4e-3, 1e9, 3.21 - 0.03 * min(math.log2(ratio), 3)),
            ("lr", 2.8e-3, 1e9, 3.21 - 0.03 * min(math.log2(ratio), 3)),
            ("hash", 2e-3, 4e9, 9.0),
        )
        if seed == 0 or arm != "lr"
    ]
    found = {
        name: (status, detail)
        for name, status, detail in confounds(pl.DataFrame(rows), arm="topk").rows()
    }
    assert found["learning rate bracketed"][0] == "clear"
    assert found["break moves with tokens"][0] == "suspect"
    assert "0.0000 at 1e+09 tokens and 0.0300 at 4e+09" in found["break moves with tokens"][1]
    assert found["hash-routing control"][0] == "clear"
    assert found["seeds"][1].startswith("3 at the ratio")
