"""The planner around a design, and runs read from files."""

import numpy as np
import polars as pl
import pytest
from refusals import refused

from moe_lab.errors import AnalysisError
from moe_lab.scaling import (
    Design,
    main_arm,
    parse_truth,
    plan_power,
    read_runs,
    typical_noise,
    wall_verdict,
)

GRID = tuple(2.0**e for e in range(8))


def test_the_cheapest_sufficient_design_is_the_first_by_flops_and_settles_everything():
    truths = [parse_truth("line"), parse_truth("wall:8")]
    found = plan_power(Design(GRID, 2, 1e7, 1e9), noise_sd=0.004, truths=truths, draws=150)
    assert found.best is not None
    settled = (
        found.others.group_by("design")
        .agg(pl.col("settled").min(), pl.col("flops").first())
        .sort("design")
    )
    assert settled["flops"].is_sorted()
    assert (settled["settled"][:-1] < 0.9).all()
    assert settled["settled"][-1] >= 0.9
    assert settled["flops"][-1] == pytest.approx(found.best.flops)
    assert found.own["truth"].to_list() == ["line", "wall at 8"]


def test_a_hopeless_noise_has_no_sufficient_design():
    found = plan_power(
        Design(GRID[:4], 2, 1e7, 1e9), noise_sd=0.5, truths=[parse_truth("line")], draws=20
    )
    assert found.best is None


def test_truths_are_named_with_their_number():
    ratios, design = np.array([1.0, 8.0, 16.0]), Design(GRID, 3, 1e7, 1e9)
    wall = parse_truth("wall:8")
    assert wall.wall == 8
    assert wall.loss(ratios, design)[1] == wall.loss(ratios, design)[2]
    assert parse_truth("saturation:64").name == "saturation at 64"
    steep, flat = (parse_truth(f"line:{worth}").loss(ratios, design) for worth in (1.3, 1.1))
    assert np.diff(steep)[0] < np.diff(flat)[0] < 0
    for wrong in ("cliff", "wall:many", "wall:0", "law:nobody"):
        with refused("truth", AnalysisError):
            parse_truth(wrong)


def test_noise_shrinks_with_the_model():
    small, middle, large = (typical_noise(size)[0] for size in (3e6, 5e7, 1e9))
    assert small > middle > large


def test_the_arm_with_most_ratios_is_the_main_one():
    frame = pl.DataFrame({"arm": ["a", "b", "b", "a"], "ratio": [1.0, 1.0, 2.0, 1.0]})
    assert main_arm(frame)[1] == "b"
    assert main_arm(frame, "a")[0].height == 2
    assert main_arm(frame.drop("arm"))[1] == ""


def test_a_csv_with_diverged_runs_keeps_them_for_the_verdict_to_refuse(tmp_path):
    path = tmp_path / "runs.csv"
    path.write_text(
        "ratio,seed,val_loss,active_params,train_tokens\n1,0,3.1,1e7,1e9\n2,0,nan,1e7,1e9\n4,0,,1e7,1e9\n"
    )
    frame = read_runs(path)
    assert frame.columns == ["ratio", "seed", "loss", "active_params", "tokens"]
    assert frame["loss"].is_nan().sum() == 1
    assert frame["loss"].null_count() == 1


@pytest.mark.parametrize("name", ["wide.csv", "deep.jsonl", "mixed.jsonl", "quotes.csv"])
def test_a_table_of_another_make_is_one_line(tmp_path, name):
    texts = {
        "wide.csv": ",".join(f"c{number}" for number in range(200_000)) + "\n1",
        "deep.jsonl": "[" * 100_000,
        "mixed.jsonl": '{"ratio": 1}\n5\nnull\n',
        "quotes.csv": '"' * 100_001,
    }
    (tmp_path / name).write_text(texts[name])
    with pytest.raises(AnalysisError) as caught:
        wall_verdict(read_runs(tmp_path / name))
    assert "\n" not in str(caught.value)
