"""The rates of the alarms, from the committed runs of ``experiments/alarms``."""

import importlib.util
from pathlib import Path
from types import ModuleType

import polars as pl
import pytest

from moe_lab.training.alarms import ALARMS

REPOSITORY = Path(__file__).parents[2]
FOLDER = REPOSITORY / "experiments" / "alarms"


@pytest.fixture(scope="module")
def judge() -> ModuleType:
    spec = importlib.util.spec_from_file_location("judge_of_alarms", FOLDER / "judge.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def runs() -> pl.DataFrame:
    frame = pl.read_parquet(FOLDER / "runs.parquet")
    return frame.filter(pl.col("split") == "judge")


MORE_FALSE = {"budget_drift": 2, "dead_experts": 2, "router_collapse": 2}
"""False alarms of the kinds that miss the bar of one in 200 healthy runs (docs/alarms.md)."""
FOUND_LESS = {"budget": 45, "no_balance": 47}
"""Runs with a fault that is found in fewer than 48 of 50."""


def test_two_hundred_healthy_runs_raise_at_most_one_false_alarm_of_most_kinds(judge, runs):
    healthy = runs.filter(pl.col("fault") == "")
    assert healthy.select("arm", "size", "seed").n_unique() == 200
    false = dict(judge.false_alarms(runs).select("alarm", "false").iter_rows())
    assert set(false) == set(ALARMS)
    assert {alarm: number for alarm, number in false.items() if number > 1} == MORE_FALSE


def test_no_seed_that_judged_the_thresholds_had_set_them(runs):
    every = pl.read_parquet(FOLDER / "runs.parquet")
    setting = every.filter(pl.col("split") != "judge")
    assert set(setting["split"]) == {"set", "again"}
    assert not set(setting["seed"]) & set(runs["seed"])
    healthy = setting.filter(pl.col("fault") == "").select("split", "arm", "size", "seed")
    assert healthy.n_unique() == 266


def test_most_faults_are_found_by_one_of_their_alarms_in_48_of_50_runs(judge, runs):
    faulty = runs.filter(pl.col("fault") != "")
    assert set(faulty.select("fault", "alarm").iter_rows()) == set(judge.FINDS)
    assert {alarm for _, alarm in judge.FINDS} == set(ALARMS)
    found = (
        faulty.group_by("fault", "arm", "size", "seed", "onset")
        .agg(found=pl.col("raised").is_not_null().any())
        .group_by("fault")
        .agg(planted=pl.len(), found=pl.col("found").sum())
    )
    assert set(found["planted"]) == {50}
    numbers = dict(found.select("fault", "found").iter_rows())
    assert {fault: number for fault, number in numbers.items() if number < 48} == FOUND_LESS


def test_the_default_thresholds_are_those_that_the_runs_were_judged_with(judge, runs):
    """A value past the threshold of today was held exactly where the alarm was raised (but for
    an episode that began before the onset).
    """
    part = runs.filter(pl.col("peak").is_not_null(), ~pl.col("early"))
    for (name,), rows in part.group_by("alarm"):
        rule = ALARMS[name]
        peak = pl.col("peak") < rule.threshold if rule.below else pl.col("peak") > rule.threshold
        assert rows.filter(peak != pl.col("raised").is_not_null()).is_empty()


def test_the_tables_of_the_docs_are_those_of_the_committed_runs(judge):
    text = (REPOSITORY / "docs" / "alarms.md").read_text()
    shown = text.partition(judge.BEGIN)[2].partition(judge.END)[0].strip()
    assert shown == judge.tables(pl.read_parquet(FOLDER / "runs.parquet"))


def test_the_committed_roc_is_that_of_the_committed_runs(judge):
    every = pl.read_parquet(FOLDER / "runs.parquet").filter(pl.col("split") == "judge")
    saved = pl.read_parquet(FOLDER / "roc.parquet")
    assert judge.roc(every).equals(saved.select(judge.roc(every).columns))
