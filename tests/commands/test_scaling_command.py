"""``moe-lab scaling`` and ``moe-lab sweep plan --power`` as a user meets them."""

import io
import json
import math
import re
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from moe_lab.cli import main
from moe_lab.scaling import read_runs

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
    assert (
        "expected --total as a number above 0, with k, M, B or T, got 'many'; try --total 48B"
        in fails(*STEP[:3], "many", *STEP[4:])
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
        "got only bits_per_byte; try --column loss=YOURS and --unit bits",
    ),
    "bits": (
        runs(loss=pl.col("loss") / math.log(2), vocab_size=pl.lit(32)),
        "try multiplying by ln 2 if they are bits",
    ),
    "perplexity": (runs(loss=pl.col("loss").exp()), "expected losses in nats per token"),
    "no ratio": (runs().drop("ratio"), "try --column ratio=YOURS"),
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


@pytest.mark.parametrize(
    ("bytes_per_token", "unit"),
    [(1.0, ("--unit", "bits")), (4.2, ("--unit", "bpb", "--bytes-per-token", "4.2"))],
)
def test_losses_in_bits_become_nats_per_token_when_told(
    file: Any, bytes_per_token: float, unit: tuple[str, ...]
) -> None:
    plain = file(runs())
    bits = runs().with_columns(val_bpb=pl.col("loss") / math.log(2) / bytes_per_token)
    path = file(bits, "bits.parquet")
    mapped = ("scaling", "verdict", path, "--column", "loss=val_bpb")
    told = json.loads(prints(*mapped, *unit, "--json"))[0]
    nats = json.loads(prints("scaling", "verdict", plain, "--json"))[0]
    for name in ("outcome", "elasticity", "margin"):
        assert told[name] == pytest.approx(nats[name]), name


def test_a_loss_in_bits_without_its_unit_is_refused(file: Any) -> None:
    path = file(runs().with_columns(val_bpb=pl.col("loss") / 3, arbitrary=pl.col("loss")))
    for verb in (("verdict", path), ("fit", "line", path)):
        said = fails("scaling", *verb, "--column", "loss=val_bpb")
        assert "expected losses in nats per token, the unit of the margin" in said
        assert "got a loss from the column val_bpb; try --unit bits" in said
    mapped = ("scaling", "verdict", path, "--column", "loss=val_bpb")
    assert "expected bytes per token above 0" in fails(*mapped, "--unit", "bpb")
    plain = ("scaling", "verdict", path)
    assert "try --unit bpb" in fails(*plain, "--bytes-per-token", "4")
    assert prints(*plain, "--column", "loss=arbitrary") == prints(*plain)


def test_perplexities_are_refused_until_their_unit_is_given(file: Any) -> None:
    path = file(runs().with_columns(val_ppl=pl.col("loss").exp()).drop("loss"))
    mapped = ("scaling", "verdict", path, "--column", "loss=val_ppl")
    assert "got a loss from the column val_ppl; try" in fails(*mapped)
    assert "--unit perplexity" in fails("scaling", "verdict", path)
    outcome = prints(*mapped, "--unit", "perplexity").partition("\n")[0]
    assert outcome == prints("scaling", "verdict", file(runs())).partition("\n")[0]


def test_a_missing_or_unreadable_file_is_one_line(tmp_path: Path) -> None:
    assert "no such path" in fails("scaling", "verdict", tmp_path / "none.parquet")
    (tmp_path / "runs.parquet").write_text("no parquet")
    assert "runs.parquet: expected a readable" in fails(
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
        (folder / name / "config.json").write_text("{}")
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


def written(rows: pl.DataFrame, path: Path, how: str) -> Path:
    """``rows`` as people have them."""
    columns = ["ratio", "seed", "loss", "active_params", "tokens"]
    lines = [[str(value) for value in row] for row in rows.select(columns).rows()]
    text = {
        "semicolon": "\n".join([";".join(columns), *(";".join(line) for line in lines)]),
        "decimal comma": "\n".join(
            [";".join(columns), *(";".join(line).replace(".", ",") for line in lines)]
        ),
        "tabs": "\n".join(["\t".join(columns), *("\t".join(line) for line in lines)]),
        "spaces": "\n".join([", ".join(columns), *(", ".join(line) for line in lines)]),
        "names": "\n".join(
            ["Ratio,Seed,Val Loss,Active Params,Train Tokens", *(",".join(line) for line in lines)]
        ),
        "thousands": "\n".join(
            [
                ";".join(columns),
                *(
                    ";".join(
                        [*line[:3], f"{float(line[3]):,.0f}", f"{float(line[4]):,.0f}"]
                    ).replace(",", "'")
                    for line in lines
                ),
            ]
        ),
    }
    encoding = "utf-8"
    if how == "utf-16":
        how, encoding = "semicolon", "utf-16"
    path.write_text(text[how], encoding=encoding)
    return path


@pytest.mark.parametrize(
    "how", ["semicolon", "decimal comma", "tabs", "spaces", "names", "thousands", "utf-16"]
)
def test_tables_as_people_have_them_are_read_to_the_same_numbers(tmp_path: Path, how: str) -> None:
    frame = runs()
    path = written(frame, tmp_path / "runs.csv", how)
    read = read_runs(path).select("ratio", "seed", "loss", "active_params", "tokens")
    assert read.to_numpy() == pytest.approx(
        frame.select("ratio", "seed", "loss", "active_params", "tokens").to_numpy()
    )


def test_a_column_is_mapped_by_an_option_and_a_missing_one_names_it(file) -> None:
    frame = runs().rename({"loss": "eval"})
    message = fails("scaling", "verdict", file(frame))
    assert "got only ratio, seed, eval" in message
    assert "try --column loss=YOURS" in message
    assert "NO WALL" in prints("scaling", "verdict", file(frame), "--column", "loss=eval")
    wrong = fails("scaling", "verdict", file(frame), "--column", "loss=evil")
    assert "expected a column of ratio, seed, eval" in wrong
    experts = runs().with_columns(num_experts=2 * pl.col("ratio"), top_k=2).drop("ratio")
    assert "No wall up to ratio 512" in prints("scaling", "verdict", file(experts))


def test_the_verdict_as_json_knows_every_field_of_the_fourth_outcome(file) -> None:
    below = runs().with_columns(loss=3 + 0.01 * (pl.col("loss") - 3))
    below = below.with_columns(pl.col("loss") + 0.0005 * (pl.int_range(pl.len()) % 3))
    (found,) = json.loads(prints("scaling", "verdict", file(below), "--json"))
    assert found["outcome"] == "below margin"
    assert found["r_star"][1] is not None
    assert {"pays", "outlier", "without", "caveats", "settles"} <= set(found)


def test_a_fit_of_one_size_says_what_it_cannot_fix_and_prints_no_interval_of_it(file) -> None:
    text = prints("scaling", "fit", "clark", file(runs()), "--bootstrap", 20)
    assert re.search(r"a\s+\(.*\)\s+not identified", text)
    assert "not identified: d, a, b, c" in text
    (tokens_tied,) = [runs().with_columns(tokens=20 * pl.col("active_params"))]
    assert "not identified" in prints(
        "scaling", "fit", "hoffmann", file(tokens_tied), "--bootstrap", 0
    )


def test_a_fit_of_a_form_has_its_own_units_and_its_rivals(file) -> None:
    for name in ("line", "plateau", "saturation"):
        text = prints("scaling", "fit", name, file(runs()))
        assert "by squares on loss, nats" in text
        assert "R2 of the loss 0.9" in text
        assert "AICc above the best" in text


def test_a_fit_takes_one_arm(file) -> None:
    both = pl.concat(
        [
            runs().with_columns(arm=pl.lit("topk")),
            runs().with_columns(pl.col("loss") + 0.5, arm=pl.lit("hash")),
        ]
    )
    found = json.loads(prints("scaling", "fit", "line", file(both), "--arm", "hash", "--json"))
    assert found["runs"] == 30
    assert found["rmse_nats"] < 0.1


def test_options_are_spelt_out(file) -> None:
    assert "got --boot; try --bootstrap" in fails(
        "scaling", "fit", "line", file(runs()), "--boot", 5
    )


def test_a_fit_leaves_the_law_beside_the_runs(file: Any, tmp_path: Path) -> None:
    out = tmp_path / "law"
    prints("scaling", "fit", "line", file(runs()), "--out", out)
    assert pl.read_parquet(out / "points.parquet").columns == ["ratio", "loss", "group"]
    assert pl.read_parquet(out / "curves.parquet")["ratio"].max() == runs()["ratio"].max()
    assert pl.read_parquet(out / "coefficients.parquet").height == 2
    page = (out / "law.html").read_text(encoding="utf-8")
    assert "loss, nats" in page
    assert 'src="http' not in page
