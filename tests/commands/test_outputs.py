"""Where commands write: refused before any work, and no file of another kind is replaced.

No source of these command lines exists, so a command that looked at its source first would name it.
"""

from pathlib import Path

import polars as pl
import pytest

from moe_lab.cli import main
from moe_lab.commands.options import refuse_other

LINES = (
    "train --text nowhere --out {}",
    "trace nowhere --text nowhere --out {}",
    "difficulty nowhere --out {}",
    "ablate nowhere --out {}",
    "scaling verdict nowhere --out {}",
    "scaling fit line nowhere --out {}",
    "sweep run nowhere.py --out {}",
    "sweep run nowhere.py --report {}/page.html",
    "demo --out {}",
    "report nowhere --out {}/page.html",
    "watch nowhere --once {}/page.html",
    "place nowhere --devices 2 --vllm {}/map.json",
    "place nowhere --devices 2 --sglang {}/map.json",
    "cache nowhere --workers 2 --partial-frames {}",
)


@pytest.mark.parametrize("line", LINES)
def test_an_output_that_cannot_be_written_is_named_before_any_work(
    line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("kept")
    assert main(line.format(blocker / "below").split()) == 2
    error = capsys.readouterr().err
    assert f"cannot write {blocker / 'below'}" in error
    assert error.count("\n") == 1
    assert blocker.read_text() == "kept"


@pytest.mark.parametrize("line", ["report nowhere --out {}", "watch nowhere --once {}"])
def test_a_page_replaces_an_older_page_and_nothing_else(
    line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    notes, page, folder = tmp_path / "notes.md", tmp_path / "page.html", tmp_path / "folder"
    notes.write_text("# Mine")
    page.write_text("<!doctype html>\n<html></html>")
    folder.mkdir()
    assert main(line.format(notes).split()) == 2
    assert "expected a new file, or an older page, got another file" in capsys.readouterr().err
    assert notes.read_text() == "# Mine"
    assert main(line.format(folder).split()) == 2
    assert "expected a file to write, got the folder" in capsys.readouterr().err
    assert main(line.format(page).split()) == 2
    assert "nowhere" in capsys.readouterr().err  # the page is no obstacle, the source is


def test_a_verdict_does_not_replace_the_runs_it_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / "runs.parquet"
    pl.DataFrame({"ratio": [1.0], "loss": [2.0], "mine": ["kept"]}).write_parquet(runs)
    before = runs.read_bytes()
    assert main(["scaling", "verdict", str(runs), "--out", str(tmp_path)]) == 2
    assert "runs.parquet without verdict.md" in capsys.readouterr().err
    (tmp_path / "verdict.md").write_text("of an earlier call")
    assert main(["scaling", "verdict", str(runs), "--out", str(tmp_path)]) == 2
    assert "a folder without the runs that are read" in capsys.readouterr().err
    assert runs.read_bytes() == before


def test_tables_of_an_earlier_call_may_be_replaced(tmp_path: Path) -> None:
    refuse_other(tmp_path, "x", ["a.parquet"], "last.json")
    for name in ("a.parquet", "last.json"):
        (tmp_path / name).write_text("")
    refuse_other(tmp_path, "x", ["a.parquet"], "last.json")


@pytest.mark.parametrize(
    ("line", "option"),
    [
        ("train --parallel fsdp", "--parallel"),
        ("train --tokenizer byte --vocab-size 300", "--vocab-size"),
        ("train --text folder --text-column words", "--text-column"),
        ("trace --import vllm records --out t --device cuda", "--device"),
        ("ablate runs/x --alone", "--alone"),
        ("cache traces/x --launcher-option cpus=2", "--launcher-option"),
        ("place traces/x --devices 2 --overwrite", "--overwrite"),
        ("place traces/x --devices 2 --vllm a --sglang a", "two files for --vllm and --sglang"),
        ("scaling fit line runs --bootstrap 0 --cluster seed", "--cluster"),
        ("count --context 8k", "--context"),
        ("count --where sparsity>.9 --batch 8", "--batch"),
        ("sweep plan recipe.py --ratios 1,2,4", "--ratios"),
        ("sweep plan recipe.py --no-calibration --workers 3", "--workers"),
    ],
)
def test_an_option_that_nothing_reads_is_refused(
    line: str, option: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert main(line.split()) == 2
    error = capsys.readouterr().err
    assert option in error
    assert "expected" in error


@pytest.mark.parametrize("option", ["--text nowhere", "--no-gain", "--max-tokens 9"])
def test_what_only_a_run_has_is_refused_for_a_trace(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "meta.json").write_text("{}")
    assert main(["difficulty", str(tmp_path), *option.split()]) == 2
    assert f"options that a trace reads, got {option.split()[0]}" in capsys.readouterr().err


def test_a_field_of_fields_is_not_replaced_by_a_number(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--set", "model=3"]) == 2
    assert "expected --set model as an object of fields" in capsys.readouterr().err
