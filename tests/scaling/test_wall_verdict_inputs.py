"""Tables of runs from which no gain can be computed are refused in one line."""

import json
import math

import polars as pl
import pytest
from refusals import refused

from moe_lab.errors import AnalysisError
from moe_lab.scaling import read_runs, wall_study, wall_verdict

RATIOS = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0]


def runs(ratios: list[float] = RATIOS) -> pl.DataFrame:
    rows = [
        {"ratio": ratio, "seed": seed, "loss": loss, "active_params": 9e5, "tokens": 1e9}
        for ratio, loss in zip(ratios, [3.37, 3.35, 3.34, 3.31, 3.28, 3.27], strict=True)
        for seed in (0, 1)
    ]
    return pl.DataFrame(rows).with_columns(loss=pl.col("loss") + 0.001 * pl.int_range(12) % 7)


@pytest.mark.parametrize("odd", [float("inf"), 16 * (1 + 1e-15)])
def test_ratios_that_no_fit_can_tell_apart_are_refused(odd: float) -> None:
    with pytest.raises(AnalysisError):
        wall_verdict(runs([*RATIOS[:5], odd]))


@pytest.mark.parametrize("name", ["ratio", "active_params", "tokens"])
@pytest.mark.parametrize("wrong", [math.nan, math.inf, 0.0, -1.0])
def test_a_size_that_is_no_number_above_zero_is_refused_by_its_name(
    name: str, wrong: float
) -> None:
    one = pl.when(pl.int_range(12) == 5).then(wrong).otherwise(pl.col(name))
    with refused(name, AnalysisError):
        wall_verdict(runs().with_columns(one.alias(name)))


@pytest.mark.parametrize(
    "name", ["loss", "learning_rate", "load_cv", "dead_experts", "bits_per_byte", "vocab_size"]
)
def test_text_where_numbers_belong_is_refused_by_its_name(name: str) -> None:
    with refused(name, AnalysisError):
        wall_study(runs().with_columns(pl.lit("much").alias(name)))


@pytest.mark.parametrize("name", ["seed", "arm", "sees_later_tokens"])
def test_a_list_where_one_value_belongs_is_refused_by_its_name(name: str) -> None:
    with refused(name, AnalysisError):
        wall_study(runs().with_columns(pl.concat_list("seed").alias(name)))


def test_decimals_are_judged_as_floats() -> None:
    decimals = runs().with_columns(pl.col("loss", "ratio").cast(pl.Decimal(20, 6)))
    assert wall_study(decimals).verdict.sentence == wall_study(runs()).verdict.sentence


@pytest.mark.parametrize("size", [None, math.nan, -1, 0])
def test_an_unknown_size_of_the_vocabulary_excludes_no_loss(size: float | None) -> None:
    known = runs().with_columns(vocab_size=pl.lit(size, dtype=pl.Float64))
    assert wall_study(known).verdict.sentence == wall_study(runs()).verdict.sentence


def test_more_runs_than_any_sweep_has_are_refused_before_memory_is() -> None:
    many = pl.concat([runs()] * 400).with_columns(seed=pl.int_range(4800))
    with pytest.raises(AnalysisError, match="at most 4,096 runs of one arm, got 4,800"):
        wall_verdict(many)


def test_a_run_without_its_arm_is_refused() -> None:
    some = pl.when(pl.col("seed") == 0).then(pl.lit("topk"))
    with pytest.raises(AnalysisError, match="a value of arm in every run, got 6 empty"):
        wall_study(runs().with_columns(arm=some))


def test_a_noise_larger_than_any_loss_gives_a_verdict() -> None:
    verdict = wall_verdict(runs(), noise_sd=1e9)
    assert verdict.outcome == "cannot tell"
    assert math.isfinite(verdict.gains[0].compute)


def test_json_lines_of_a_run_that_diverged_are_read(tmp_path) -> None:
    rows = runs().with_columns(
        loss=pl.when(pl.int_range(12) == 3).then(math.nan).otherwise(pl.col("loss"))
    )
    text = "\n".join(json.dumps(row) for row in rows.iter_rows(named=True))
    (tmp_path / "runs.jsonl").write_text(text)
    assert "NaN" in text
    assert read_runs(tmp_path / "runs.jsonl").equals(rows, null_equal=True)


def test_columns_are_renamed_at_once(tmp_path) -> None:
    path = tmp_path / "runs.parquet"
    runs().rename({"loss": "ratio", "ratio": "loss"}).write_parquet(path)
    assert (
        read_runs(path, names=[("loss", "ratio"), ("ratio", "loss")])
        .select(runs().columns)
        .equals(runs())
    )
    assert "loss" in read_runs(path, names=[("loss", "loss")]).columns
