"""What experts are worth on the page: figures, where the tables are found, and what is refused."""

import base64
import json

import numpy as np
import polars as pl
import pytest
from refusals import refused
from report_fixtures import Shape, make_run, make_trace, make_worth

from moe_lab.errors import AnalysisError, RunError
from moe_lab.report import figures, write_report
from moe_lab.report.sources import gather
from moe_lab.report.worth_section import worth_section


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = make_run(tmp_path_factory.mktemp("run") / "run", "topk", 8, 0, Shape(experts=16))
    make_worth(folder / "worth")
    return folder


def values(raw):
    """Numbers that plotly packed, or as they are."""
    if isinstance(raw, dict):
        return np.frombuffer(base64.b64decode(raw["bdata"]), raw["dtype"])
    return np.array(raw, dtype=float)


def test_the_map_shows_each_measured_expert_with_its_interval(run):
    worth = pl.read_parquet(run / "worth" / "worth.parquet")
    (drawn,) = figures.expert_worth(worth).to_plotly_json()["data"]
    table = values(drawn["z"]).reshape(4, 16)
    assert np.isnan(table[3, 14:]).all()
    assert table[0, 3] == pytest.approx(0.4)
    assert drawn["customdata"][0][3] == "+0.4000 (0.3970 to 0.4040)"
    layout = figures.expert_worth(worth).to_plotly_json()["layout"]
    assert 0 < layout["coloraxis"]["cmax"] < 0.4  # one large value does not take all colour
    assert layout["coloraxis"]["cmin"] == -layout["coloraxis"]["cmax"]


def test_experts_are_in_order_with_a_band(run):
    worth = pl.read_parquet(run / "worth" / "worth.parquet")
    low, high, middle = figures.sorted_worth(worth, bound=0.003).to_plotly_json()["data"]
    assert values(middle["y"]).tolist() == worth["d_loss"].sort().to_list()
    assert (values(low["y"]) < values(middle["y"])).all()
    assert (values(high["y"]) > values(middle["y"])).all()


def test_random_orders_are_one_series_and_scores_have_intervals(run):
    curves = pl.read_parquet(run / "worth" / "curves.parquet")
    drawn = figures.removal_curves(curves).to_plotly_json()["data"]
    assert [trace["name"] for trace in drawn][:2] == ["random orders, mean", "frequency"]
    assert len(drawn) == 1 + 6
    random = curves.filter(pl.col("order").str.starts_with("random"), share=0.5)["d_loss"].mean()
    assert values(drawn[0]["y"])[-1] == pytest.approx(random)
    assert "error_y" in drawn[1]
    top_k = pl.read_parquet(run / "worth" / "top_k.parquet")
    names = [trace["name"] for trace in figures.top_k_losses(top_k).to_plotly_json()["data"]]
    assert names == ["all tokens", "keyword", "name"]


def test_tables_in_a_runs_folder_are_found_and_others_are_named(run, tmp_path):
    section = worth_section(gather(run))
    assert section is not None
    assert section.before == ("12 of 62 measured experts matter.",)
    assert [block.name for _, block in section.blocks] == [
        "expert_worth", "sorted_worth", "score_agreement", "removal_curves", "top_k_losses",
        "pair_losses", "exchange_losses",
    ]  # fmt: skip
    trace = make_trace(tmp_path / "trace", Shape(layers=2, experts=8, documents=4, tokens=60))
    assert worth_section(gather(trace)) is None
    page = write_report(trace, tmp_path / "page.html", worth=run / "worth").read_text()
    assert 'id="figure-expert_worth"' in page
    with refused("worth", AnalysisError):
        worth_section(gather(trace), tmp_path)


def test_pairs_are_drawn_beside_the_sum_of_their_losses(run):
    pairs = pl.read_parquet(run / "worth" / "pairs.parquet")
    line, points = figures.pair_losses(pairs).to_plotly_json()["data"]
    assert values(line["x"]).tolist() == values(line["y"]).tolist()
    excess = sorted((values(points["y"]) - values(points["x"])).tolist())
    assert excess == pytest.approx(sorted(pairs["excess"]))
    exchanges = pl.read_parquet(run / "worth" / "exchanges.parquet")
    (drawn,) = figures.exchange_losses(exchanges).to_plotly_json()["data"]
    assert values(drawn["x"]) == pytest.approx(np.full(12, 700 / 9000))


def test_of_very_many_pairs_the_page_draws_some_and_says_how_many(run, tmp_path):
    folder = make_worth(tmp_path / "worth", layers=1)
    for name in ("pairs", "exchanges"):
        frame = pl.read_parquet(folder / f"{name}.parquet")
        pl.concat([frame] * 400).write_parquet(folder / f"{name}.parquet")
    section = worth_section(gather(run), folder)
    assert section is not None
    for _, block in section.blocks[-2:]:
        assert "the 1,000 of 1,200 pairs with the " in block.caption
        (drawn,) = (
            item for item in block.plots[0].variants[0].figure.data if item.mode == "markers"
        )
        assert len(drawn.x) == 1000
        assert len(block.table.rows) == 240
        assert block.table.left_out == 960


def test_pairs_of_texts_are_refused_and_pairs_that_nothing_used_are_left_out(run, tmp_path):
    folder = make_worth(tmp_path / "worth", layers=1)
    exchanges = pl.read_parquet(folder / "exchanges.parquet")
    unused = exchanges.with_columns(d_loss_used=pl.lit(None, pl.Float64))
    unused.write_parquet(folder / "exchanges.parquet")
    section = worth_section(gather(run), folder)
    assert section is not None
    assert section.blocks[-1][1].name == "pair_losses"
    hostile = exchanges.with_columns(first=pl.lit("<script>alert(1)</script>"))
    hostile.write_parquet(folder / "exchanges.parquet")
    with refused("worth", RunError):
        worth_section(gather(run), folder)


def test_damaged_tables_are_refused_in_one_line(tmp_path):
    folder = make_worth(tmp_path / "worth", layers=1)
    for name, text in (("meta.json", json.dumps({"sentences": 1})), ("worth.parquet", "PAR1")):
        broken = make_worth(tmp_path / f"broken-{name}", layers=1)
        (broken / name).write_text(text)
        with pytest.raises((AnalysisError, RunError)):
            worth_section(gather(make_run(tmp_path / name, "topk", 8, 0, None)), broken)
    (folder / "agreement.parquet").unlink()
    with refused("worth", RunError):
        worth_section(gather(make_run(tmp_path / "run", "topk", 8, 0, None)), folder)
