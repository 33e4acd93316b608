"""The recipe ``experiments/balance_control.py``: its committed results say what docs/routing.md
says, and it still runs.
"""

import importlib.util
import sys
from pathlib import Path

import polars as pl
import pytest

RECIPE = Path(__file__).parents[2] / "experiments" / "balance_control.py"
if not RECIPE.exists():
    pytest.skip("experiments are not part of this installation", allow_module_level=True)
spec = importlib.util.spec_from_file_location("balance_control", RECIPE)
assert spec is not None
assert spec.loader is not None
recipe = importlib.util.module_from_spec(spec)
sys.modules["balance_control"] = recipe
spec.loader.exec_module(recipe)


def committed(name: str) -> pl.DataFrame:
    return pl.read_parquet(RECIPE.with_suffix("") / f"{name}.parquet")


def last(frame: pl.DataFrame, column: str, steps: int = 30) -> float:
    return float(frame.sort("step").tail(steps)[column].to_numpy().mean())


@pytest.mark.parametrize("shape", list(recipe.SHAPES))
@pytest.mark.parametrize(
    "rule",
    ["proportional, mu 0.3", "proportional, mu 1", "quantile dual", "sign with target, u 1e-4"],
)
def test_committed_step_responses_end_within_one_percent_of_the_target(shape, rule):
    frame = committed("step_response").filter(pl.col("shape") == shape, pl.col("rule") == rule)
    assert last(frame, "mean_ffn_count") == pytest.approx(8, rel=0.01)


def test_a_rate_too_large_holds_the_mean_while_single_experts_oscillate():
    frame = committed("step_response").filter(pl.col("shape").str.starts_with("768"))
    steady, oscillating = (
        frame.filter(pl.col("rule") == f"proportional, mu {mu}") for mu in (1, 3)
    )
    assert last(oscillating, "mean_ffn_count") == pytest.approx(8, rel=0.02)
    assert last(oscillating, "load_cv") > 2 * last(steady, "load_cv")


def test_a_decayed_rate_no_longer_answers_a_change_of_the_mix():
    frame = committed("mix_shift")
    awake = frame.filter(pl.col("rule") == "proportional, mu 1")
    asleep = frame.filter(pl.col("rule") == "proportional, mu 1 decaying (0.1)")
    assert last(awake, "mean_ffn_count") == pytest.approx(8, rel=0.01)
    assert abs(last(asleep, "mean_ffn_count") / 8 - 1) > 0.02


def test_the_wander_of_the_mean_shrinks_with_the_batch_and_not_with_mu():
    frame = committed("steady_state").filter(pl.col("mu") == 0.3).sort("tokens")
    wander = frame["wander"].to_list()
    assert wander[0] > 1.6 * wander[1] > 2.5 * wander[2]


def test_a_trained_decoder_ends_at_its_target_under_every_rule_and_not_without_one():
    frame = committed("trained_model")
    for (rule,), part in frame.group_by("rule"):
        expected = pytest.approx(4, rel=0.05)
        assert (last(part, "mean_ffn_count") == expected) == (rule != "no rule")


def test_the_recipe_simulates_and_draws():
    router = recipe.router_of(24, 12, recipe.proportional(1.0))
    frame = recipe.simulate(router, recipe.Plant(36, tokens=64), steps=4)
    assert frame["step"].to_list() == [0, 1, 2, 3]
    assert frame["mean_ffn_count"][0] == pytest.approx(8, rel=0.2)
    figure = recipe.lines(frame.with_columns(rule=pl.lit("one")), "title", 8)
    assert list(figure.data[0].x) == [0, 1, 2, 3]
    errors = recipe.errors(committed("steady_state"), "title")
    assert len(errors.data) == 6
