"""The committed sweep that decides: its verdict is computed again, and the pages quote it."""

from pathlib import Path

import polars as pl

from moe_lab.scaling import wall_study

ROOT = Path(__file__).parents[2]
RUNS = ROOT / "experiments" / "sparsity_wall" / "decisive" / "runs.parquet"


def test_the_committed_runs_give_the_verdict_that_the_page_quotes() -> None:
    study = wall_study(pl.read_parquet(RUNS))
    assert study.verdict.outcome == "no wall"
    assert study.verdict.r_star == (8, None)
    assert f"> {study.verdict.sentence}\n" in (ROOT / "docs" / "scaling.md").read_text()
    stated = dict(study.confounds.select("confound", "status").iter_rows())
    assert stated["learning rate bracketed"] == "clear"
    assert stated["hash-routing control"] == "suspect"
