"""The committed results of ``experiments/ablation``: their pages follow from their tables."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

FOLDER = Path(__file__).parents[2] / "experiments" / "ablation"
if not FOLDER.exists():
    pytest.skip("experiments are not part of this installation", allow_module_level=True)


def script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"ablation_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


planted, minis = script("planted"), script("minis")


def table(name: str) -> pl.DataFrame:
    return pl.read_parquet(FOLDER / f"{name}.parquet")


def test_planted_experts_are_found_in_95_of_100_draws():
    draws = table("draws")
    assert sorted(draws["draw"]) == list(range(planted.FIRST, planted.FIRST + draws.height))
    assert draws.height >= 50
    for plant in ("dead", "copies", "excess", "crucial"):
        assert draws[f"{plant}_found"].sum() >= 0.95 * draws.height
    assert (draws["dead_loss"] == 0).all()
    assert (draws["copies_kl"].abs() < 1e-9).all()
    assert (draws["both_loss"] > 2 * draws["single_loss"]).all()


@pytest.mark.parametrize("docs", [8, 12, 20, 40])
def test_intervals_cover_the_truth_in_92_to_98_of_100(docs):
    coverage = table("coverage")
    assert set(coverage["draw"]) == set(table("draws")["draw"])
    rates = planted.coverage_rates(coverage).filter(docs=docs)
    assert rates.height == 6
    assert rates["coverage"].round(2).is_between(0.92, 0.98).all()


def test_rates_count_what_is_not_covered():
    counted = {"intervals": 12, "missing": 1, "zero": 1}
    rows = [
        {"draw": number, "quantity": "d_loss", "docs": 5, **counted, "below": below, "above": 0}
        for number, below in enumerate((1, 0))
    ]
    (rate,) = planted.coverage_rates(pl.DataFrame(rows)).to_dicts()
    assert rate["coverage"] == pytest.approx(19 / 20)
    assert rate["below"] == pytest.approx(1 / 20)
    assert rate["missing"] == pytest.approx(1 / 12)
    assert rate["se"] == pytest.approx(np.std([0.9, 1.0], ddof=1) / np.sqrt(2))
    assert planted.wilson(95, 100) == pytest.approx((0.8882, 0.9785), abs=1e-4)


def test_a_language_and_its_plants_are_those_of_the_draw():
    documents = planted.Language(3).documents(4)
    again = planted.Language(3).documents(4)
    assert all(np.array_equal(a, b) for a, b in zip(documents, again, strict=True))
    language = planted.Language(3)
    ids = np.concatenate([document[:-1] for document in language.documents(200)])
    following = np.concatenate([document[1:] for document in planted.Language(3).documents(200)])
    assert 0.78 < (language.follower[ids] == following).mean() < 0.84
    plants = planted.Plants(3)
    assert plants.copies_class != plants.crucial_class
    named = [plants.dead, plants.crucial, *((plants.copies[0], e) for e in plants.copies[1:])]
    assert len(set(named)) == 4


def test_the_page_of_the_planted_draws_is_that_of_their_tables():
    page = planted.summary(table("draws"), table("coverage"), table("percentiles"))
    assert page == (FOLDER / "planted.md").read_text()


def test_the_page_of_the_minis_is_that_of_their_tables():
    frames = {name: table(f"minis_{name}") for name in minis.TABLES}
    assert frames["worth"]["run"].n_unique() == 3
    assert minis.page(frames) == (FOLDER / "minis.md").read_text()
