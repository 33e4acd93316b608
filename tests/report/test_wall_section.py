"""The evidence under the verdict: figures drawn from known sweeps say what those sweeps hold."""

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest
from refusals import refused

from moe_lab.errors import AnalysisError
from moe_lab.report import figures, write_report
from moe_lab.report import wall_section as wall
from moe_lab.report.answer_section import answer
from moe_lab.report.figure_blocks import Block
from moe_lab.report.frames import Frames
from moe_lab.report.runs_section import frontier_block
from moe_lab.report.sources import gather
from moe_lab.scaling import WallStudy, wall_study


def put(
    folder: Path, arm: str, ratio: float, seed: int, loss: float, tokens: int, lr: float = 2e-3
) -> None:
    run = folder / f"{arm}-{ratio:g}-{seed}-{lr:.4f}"
    run.mkdir(parents=True)
    (run / "config.json").write_text("{}")
    result = {
        "run": run.name, "name": run.name, "arm": arm, "ratio": ratio, "seed": seed,
        "active_params": 4_500_000, "train_tokens": tokens,
        "loss": loss, "bits_per_byte": loss / 3, "learning_rate": lr, "drop_rate": 0.0,
        "dead_experts": 0.0, "flops_per_token": 2.7e7,
    }  # fmt: skip
    (run / "result.json").write_text(json.dumps(result))
    (run / "done").write_text("")


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A line of .04 nats per doubling at 1.2B tokens; at 300M it ends at 32; rates bracketed at
    ratios 1 and 64.
    """
    folder = tmp_path_factory.mktemp("wall") / "sweep"
    rng = np.random.default_rng(0)
    for seed in range(3):
        for power in range(10):
            put(
                folder,
                "topk",
                2.0**power,
                seed,
                2.6 - 0.04 * power + rng.normal(0, 0.002),
                1_200_000_000,
            )
            put(
                folder,
                "topk-short",
                2.0**power,
                seed,
                2.95 - 0.04 * min(power, 5) + rng.normal(0, 0.002),
                300_000_000,
            )
        put(folder, "hash", 8.0, seed, 2.55, 1_200_000_000)
    for ratio, lr in ((1.0, 1.4e-3), (1.0, 2.8e-3), (64.0, 1.4e-3), (64.0, 2.8e-3)):
        put(folder, "lr", ratio, 0, 2.97 - 0.04 * min(math.log2(ratio), 5), 300_000_000, lr)
    return folder


def test_the_verdict_is_of_the_long_budget_with_the_slope_between_the_two(sweep: Path) -> None:
    study = judged(sweep)
    told = answer(gather(sweep), study, {}, Frames())
    assert told.outcome == "no wall"
    assert re.match(
        r"Doubling the ratio from 256 to 512 lowered the loss of topk by 0\.\d{4} nats per token "
        r"\(90 % interval 0\.\d{4} to 0\.\d{4}\); a doubling pays above 0\.\d{4}\.$",
        told.sentence,
    )
    reasons = wall.wall_folded(study)[0]
    assert any("measured over a 4x range of compute" in reason for reason in reasons.items)
    assert "arm topk:" in reasons.notes[0]


def judged(sweep: Path) -> WallStudy:
    study = wall.judged_runs(gather(sweep).table, False, Frames()).study
    assert isinstance(study, WallStudy)
    return study


def blocks(study: WallStudy) -> list[Block]:
    return [block for _, block in wall.wall_blocks(study)]


def test_the_section_has_every_figure_and_both_tables(sweep: Path) -> None:
    study = judged(sweep)
    assert [heading for heading, _ in wall.wall_blocks(study)] == [
        wall.TITLES[block.name] for block in blocks(study)
    ]
    assert all(hasattr(figures, block.name) for block in blocks(study))
    _, confounded, forms = wall.wall_folded(study)[:3]
    assert confounded.table is not None
    assert forms.table is not None
    confounds = {row[0]: row for row in confounded.table.rows}
    assert confounds["break moves with tokens"][1] == "suspect"
    assert confounds["learning rate bracketed"][1] == "clear"
    assert forms.table.rows[0][0] == "line"


def test_the_one_frontier_has_one_kind_of_bars_for_every_arm(sweep: Path) -> None:
    material = gather(sweep)
    study = wall.judged_runs(material.table, False, Frames()).study
    assert isinstance(study, WallStudy)
    block = frontier_block(material, study)
    means = study.means
    widths = means.with_columns(unit=(pl.col("hi") - pl.col("mean")) * pl.col("n").sqrt())
    assert widths["unit"].to_numpy() == pytest.approx(widths["unit"][0], rel=1e-6)
    figure = block.plots[0].variants[0].figure
    bars = {trace.name: trace for trace in figure.data if trace.error_y.array is not None}
    assert set(bars) == {"topk", "topk-short", "hash"}
    assert list(bars["topk"].y) == pytest.approx(study.band.means["loss"].to_list())
    assert bars["topk"].marker.symbol == ("circle",) * 9 + ("circle-open",)
    assert [trace.name for trace in figure.data[:2]] == ["90 % band", "fitted"]
    assert "without ratio 512" in block.caption
    assert "wall_frontier" not in {block.name for block in blocks(judged(sweep))}


@pytest.mark.parametrize(
    ("settled", "words"),
    [
        ([0.0, 0.0, 0.0, 0.0], "With up to 3 seeds at each ratio, this grid never settles a and b"),
        ([0.0, 1.0, 0.02, 0.0], "this grid settles a from 3 seeds and never settles b."),
        ([1.0, 1.0, 1.0, 0.98], "this grid settles a from 2 seeds and b from 2 seeds."),
        ([0.0, 1.0, 0.5, 0.0], None),
    ],
)
def test_a_power_of_zeros_and_ones_is_a_sentence(settled, words) -> None:
    rows = {"truth": ["a", "a", "b", "b"], "seeds": [2, 3, 2, 3], "settled": settled}
    others = dict.fromkeys(("wall", "below_margin", "no_wall", "cannot_tell"), 0.0)
    power = pl.DataFrame(rows | others | {"tokens": 1e9, "draws": 200})
    study: Any = SimpleNamespace(noise=(0.002, True), power=power)
    block = wall._power(study)
    assert (block.plots == ()) == (words is not None)
    assert words is None or words in block.caption


def test_published_frontiers_lie_under_the_users_own(sweep: Path) -> None:
    saved = blocks(judged(sweep))[0]
    names = [trace.name for trace in saved.plots[0].variants[0].figure.data]
    assert {"Clark S-BASE, 15M", "Kimi K2", "this sweep"} <= set(names)
    data = saved.data.filter((pl.col("frontier") == "Kimi K2") & (pl.col("ratio") > 511))
    assert data["compute"][0] == pytest.approx(512**0.289, rel=0.01), "multiplied 1.21 per doubling"
    assert any("Marin" in str(trace.name) for trace in saved.plots[0].variants[1].figure.data)


def test_the_law_is_drawn_beside_its_runs_with_what_it_is_worth(sweep):
    block = blocks(judged(sweep))[1]
    assert block.name == "law_fit"
    assert re.search(r"R2 [01]\.\d{3}; rmse 0\.\d{4} nats", block.caption)
    assert "AICc above it: " in block.caption
    names = [trace.name for trace in block.plots[0].variants[0].figure.data]
    assert names == ["fitted law", "runs"]


def test_the_gain_is_drawn_against_the_margin(sweep: Path) -> None:
    gain = blocks(judged(sweep))[2]
    figure = gain.plots[0].variants[0].figure
    margin = gain.data["margin"][0]
    assert {figure.layout.shapes[0].y0, figure.layout.shapes[0].y1} == {-margin, margin}
    assert np.allclose(figure.data[0].y, 0.04, atol=0.01)


def test_elasticity_has_a_row_per_budget_and_published_laws_without_intervals(sweep: Path) -> None:
    frame = blocks(judged(sweep))[3].data
    ours = frame.filter(~pl.col("published"))
    assert ours["what"].to_list() == ["topk, 1.2B tokens", "topk-short, 300M tokens"]
    assert ours["lo"][0] > 0.07 > ours["hi"][1]
    assert frame.filter(pl.col("published"))["lo"].null_count() == 3


def test_runs_that_cannot_be_judged_have_no_section(tmp_path: Path) -> None:
    put(tmp_path / "sweep", "topk", 1.0, 0, 3.0, 1000)
    finished = gather(tmp_path / "sweep").table
    assert isinstance(wall.judged_runs(finished, True, Frames()).study, AnalysisError)
    page = write_report(tmp_path / "sweep", tmp_path / "page.html")
    assert 'id="figure-wall_compute"' not in page.read_text()


def test_a_hostile_arm_name_stays_text(tmp_path: Path) -> None:
    for seed in range(2):
        for power in range(4):
            put(
                tmp_path / "sweep",
                "<b>x<b>".replace("/", ""),
                2.0**power,
                seed,
                3 - 0.04 * power + 0.001 * seed * power,
                1000,
            )
    page = write_report(tmp_path / "sweep", tmp_path / "page.html").read_text()
    assert "<b>x" not in page


def test_a_figure_of_the_wrong_frame_is_one_line() -> None:
    with refused("ratio_from", AnalysisError):
        figures.wall_gain(pl.DataFrame({"gain": [1.0]}))


def test_alternatives_to_experts_have_a_figure_where_the_sweep_has_them(sweep: Path) -> None:
    study = wall.judged_runs(gather(sweep).table, False, Frames()).study
    runs = study.judged.with_columns(total_params=(1e6 * pl.col("ratio")).cast(pl.Int64))
    other = runs.filter(pl.col("ratio") > 1).with_columns(
        arm=pl.lit("ngram"), ratio=pl.col("ratio") / 2, loss=pl.col("loss") + 0.5
    )
    assert wall._alternatives(wall_study(runs)) is None
    block = wall._alternatives(wall_study(pl.concat([runs, other]), arm="topk"))
    assert block is not None
    assert block.data["difference"].to_list() == pytest.approx(
        [0.5] * (runs["ratio"].n_unique() - 1)
    )
    assert "Ngram loses at ratio 2, 4, 8, 16" in block.caption
    (trace,) = block.plots[0].variants[0].figure.data
    assert trace.name == "ngram"
    assert list(trace.y) == pytest.approx(block.data["difference"].to_list())
