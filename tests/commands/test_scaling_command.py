"""``moe-lab scaling`` and ``moe-lab sweep plan --power`` as a user meets them."""

import io
import json
import math
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from moe_lab.cli import main

REPOSITORY = Path(__file__).resolve().parents[2]
RECIPE = REPOSITORY / "experiments" / "sparsity_wall.py"


def moe_lab(*arguments: object) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = int(end.code or 0)
    return code, out.getvalue(), err.getvalue()


def prints(*arguments: object) -> str:
    code, out, err = moe_lab(*arguments)
    assert code == 0, err
    return out


def fails(*arguments: object) -> str:
    """The one line of a command that must end with exit code 2."""
    code, _, err = moe_lab(*arguments)
    lines = err.strip().splitlines()
    assert code == 2, err
    assert len(lines) == 1, err
    return lines[0]


def runs(
    truth: Any = lambda x: 3 - 0.03 * x, top: int = 10, seeds: int = 3, **columns: Any
) -> pl.DataFrame:
    rng = np.random.default_rng(0)
    rows = [
        {
            "ratio": 2.0**e,
            "seed": seed,
            "loss": truth(e) + rng.normal(0, 0.003),
            "active_params": 1e7,
            "tokens": 1e9,
        }
        for e in range(top)
        for seed in range(seeds)
    ]
    return pl.DataFrame(rows).with_columns(**columns)


@pytest.fixture
def file(tmp_path: Path) -> Any:
    def write(frame: pl.DataFrame, name: str = "runs.parquet") -> Path:
        path = tmp_path / name
        {".parquet": frame.write_parquet, ".csv": frame.write_csv, ".jsonl": frame.write_ndjson}[
            path.suffix
        ](path)
        return path

    return write


STEP = ("scaling", "step", "--total", "1.6T", "--active", "48B", "--add", "135B", "--tokens", "35T")


def test_the_step_of_longcat_is_an_eighth_of_a_doubling_and_small_under_every_law() -> None:
    text = prints(*STEP)
    assert "8.4 %, 0.117 of a doubling" in text
    assert "9.2 %, 0.127 of a doubling" in text
    assert "ratio 1 to 32" in text, "Ludziejewski's runs end there"
    rows = json.loads(prints(*STEP, "--included", "--json"))
    by_law = {(row["law"], row["coefficients"]): row for row in rows}
    assert rows[0]["doublings"] == pytest.approx(0.127, abs=5e-4)
    assert by_law["ludziejewski", "joint"]["gain"] == pytest.approx(0.0008, abs=5e-5)
    assert by_law["ling", "table 2"]["compute"] == pytest.approx(1.052, abs=2e-3)
    assert all(row["gain"] < 0.004 for row in rows)
    assert by_law["ludziejewski", "joint"]["seeds"] == math.ceil(
        2 * (2.925 * 0.0005 / by_law["ludziejewski", "joint"]["gain"]) ** 2
    )


def test_a_bad_amount_is_one_line() -> None:
    assert "expected a number above 0, with k, M, B or T, got 'many'" in fails(
        *STEP[:3], "many", *STEP[4:]
    )
    assert "total before the step" in fails(
        "scaling", "step", "--total", "1B", "--active", "48B", "--add", "1B", "--tokens", "1T"
    )


@pytest.mark.parametrize("name", ["runs.parquet", "runs.csv", "runs.jsonl"])
def test_a_frame_of_ones_own_gets_its_verdict(file: Any, name: str) -> None:
    found = json.loads(prints("scaling", "verdict", file(runs(), name), "--json"))[0]
    assert (found["outcome"], found["at"]) == ("no wall", 512)
    assert found["interval"][0] < found["elasticity"] < found["interval"][1]
    text = prints("scaling", "verdict", file(runs(lambda x: 3 - 0.03 * min(x, 5)), name))
    assert text.startswith("WALL\nA wall at ratio 32: from 32 to 512")
    assert "learning rate bracketed" in text


def test_two_budgets_are_refused_until_they_are_asked_for_apart(file: Any) -> None:
    longer = runs(lambda x: 2.8 - 0.03 * x, tokens=pl.lit(4e9))
    path = file(pl.concat([runs(lambda x: 3 - 0.03 * min(x, 5)), longer]))
    assert "expected one token budget, got 1e+09, 4e+09; try --by-budget" in fails(
        "scaling", "verdict", path
    )
    both = json.loads(prints("scaling", "verdict", path, "--by-budget", "--json"))
    assert [(one["tokens"], one["outcome"]) for one in both] == [(1e9, "wall"), (4e9, "no wall")]
    moves = next(
        row for row in both[0]["confounds"] if row["confound"] == "break moves with tokens"
    )
    assert moves["status"] == "suspect"


BAD = {
    "two ratios": (runs(top=2), "expected three or more ratios, got 2"),
    "nan": (
        runs(loss=pl.when(pl.col("ratio") == 8).then(math.nan).otherwise(pl.col("loss"))),
        "expected a finite loss at every ratio, got nan at ratio 8",
    ),
    "duplicates": (pl.concat([runs(), runs()]), "expected one run per ratio and seed, got 2"),
    "mixed budgets": (
        runs(tokens=pl.when(pl.col("ratio") > 8).then(2e9).otherwise(1e9)),
        "try --by-budget",
    ),
    "bits per byte alone": (
        runs().rename({"loss": "bits_per_byte"}),
        "expected losses in nats per token in a column loss",
    ),
    "bits": (
        runs(loss=pl.col("loss") / math.log(2), vocab_size=pl.lit(32)),
        "try multiplying by ln 2 if they are bits",
    ),
    "perplexity": (runs(loss=pl.col("loss").exp()), "expected losses in nats per token"),
    "no ratio": (runs().drop("ratio"), "none called ratio"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_runs_are_one_line(file: Any, name: str) -> None:
    frame, message = BAD[name]
    assert message in fails("scaling", "verdict", file(frame))


def test_one_seed_cannot_tell_and_says_so(file: Any) -> None:
    text = prints("scaling", "verdict", file(runs(seeds=1)))
    assert text.startswith("CANNOT TELL")
    assert "one seed" in text
    assert prints("scaling", "verdict", file(runs(seeds=1)), "--noise", "0.003").startswith(
        "NO WALL"
    )


def test_losses_in_bits_are_taken_as_such_when_told(file: Any) -> None:
    bits = file(runs(loss=pl.col("loss") / math.log(2)), "bits.parquet")
    told = json.loads(prints("scaling", "verdict", bits, "--bits", "--json"))[0]
    assert told["elasticity"] == pytest.approx(
        json.loads(prints("scaling", "verdict", file(runs()), "--json"))[0]["elasticity"]
    )


def test_a_missing_or_unreadable_file_is_one_line(tmp_path: Path) -> None:
    assert "no such path" in fails("scaling", "verdict", tmp_path / "none.parquet")
    (tmp_path / "runs.parquet").write_text("no parquet")
    assert "expected a readable PARQUET file" in fails(
        "scaling", "verdict", tmp_path / "runs.parquet"
    )
    (tmp_path / "runs.xlsx").write_text("")
    assert "expected a file ending in .parquet" in fails(
        "scaling", "verdict", tmp_path / "runs.xlsx"
    )
    assert "finished runs" in fails("scaling", "verdict", tmp_path)


def test_a_sweeps_folder_is_judged_on_the_arm_with_most_ratios_and_can_be_kept(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "sweep"
    arms = [
        (f"{row['ratio']:g}-{row['seed']}", {**row, "arm": "topk"})
        for row in runs().iter_rows(named=True)
    ]
    arms.append(("zero", {**arms[0][1], "arm": "zero", "loss": 1.0}))
    for name, row in arms:
        (folder / name).mkdir(parents=True)
        result = {**row, "train_tokens": row["tokens"]} | {"versions": {"torch": "2"}}
        (folder / name / "result.json").write_text(
            json.dumps({key: value for key, value in result.items() if key != "tokens"})
        )
        (folder / name / "done").write_text("")
    (folder / "half").mkdir()
    (folder / "half" / "result.json").write_text("{}")
    text = prints("scaling", "verdict", folder, "--out", tmp_path / "kept")
    assert text.startswith("NO WALL (arm topk)\nNo wall up to ratio 512")
    assert pl.read_parquet(tmp_path / "kept" / "runs.parquet").height == 31
    assert pl.read_parquet(tmp_path / "kept" / "gains.parquet").height == 9
    assert "Confounds" in (tmp_path / "kept" / "verdict.md").read_text()
    assert "expected an arm of these runs (topk, zero), got tpok" in fails(
        "scaling", "verdict", folder, "--arm", "tpok"
    )


def test_a_law_is_fitted_with_intervals_and_says_what_it_cannot_know(file: Any) -> None:
    rng = np.random.default_rng(1)
    sizes, tokens = np.meshgrid(np.geomspace(1e7, 1e9, 6), np.geomspace(1e9, 1e11, 6))
    loss = (1.8 + 480 / sizes**0.35 + 2000 / tokens**0.37) * np.exp(
        rng.normal(0, 1e-3, sizes.shape)
    )
    frame = pl.DataFrame(
        {"active_params": sizes.ravel(), "tokens": tokens.ravel(), "loss": loss.ravel()}
    )
    found = json.loads(
        prints(
            "scaling", "fit", "hoffmann", file(frame), "--bootstrap", "100", "--squares", "--json"
        )
    )
    for name, value in {"alpha": 0.35, "beta": 0.37, "E": 1.8}.items():
        low, high = found["intervals"][name]
        assert low < found["coefficients"][name] < high
        assert found["coefficients"][name] == pytest.approx(value, rel=0.1)
    assert "beta" in prints("scaling", "fit", "hoffmann", file(frame), "--bootstrap", "0")
    assert "expected" in fails("scaling", "fit", "nobody", file(frame))
    assert "none called ratio" in fails("scaling", "fit", "clark", file(frame))


def test_the_planner_says_what_the_recipes_sweep_could_tell_and_what_would() -> None:
    arguments = (
        "sweep",
        "plan",
        RECIPE,
        "--preset",
        "demo",
        "--power",
        "--no-calibration",
        "--draws",
        40,
    )
    text = prints(*arguments, "--truth", "line", "--truth", "wall:8", "--noise", "0.002")
    assert "5 ratios 1-16 x 2 seeds" in text
    assert "noise 0.002 nats between seeds (as given)" in text
    assert "the cheapest design that settles each of these truths with probability 0.9" in text
    found = json.loads(
        prints(*arguments, "--truth", "line", "--truth", "wall:8", "--noise", "0.002", "--json")
    )
    assert [row["cannot_tell"] for row in found["power"]] == [1.0, 1.0], (
        "200k tokens starve every expert"
    )
    assert found["cheapest"]["ratios"][-1] >= 32, "two doublings past a wall at 8"
    assert found["cheapest"]["tokens"] >= 1e6 * found["cheapest"]["ratios"][-1]
    assert {row["truth"] for row in found["tried"]} == {"line", "wall at 8"}
    assert "expected a truth such as line" in fails(*arguments, "--truth", "cliff")


def test_the_planner_takes_another_grid_and_other_seeds() -> None:
    options = ("--ratios", "1,4,16,64", "--seeds", "4", "--truth", "line", "--draws", 20, "--json")
    found = json.loads(
        prints("sweep", "plan", RECIPE, "--preset", "gpu", "--power", "--no-calibration", *options)
    )
    assert found["design"]["ratios"] == [1.0, 4.0, 16.0, 64.0]
    assert found["design"]["runs"] == 16
    assert found["design"]["flops"] == pytest.approx(
        6 * sum(found["design"]["active_at"]) * found["design"]["tokens"] * 4
    )
