"""The programs of ``examples/`` run as they stand, and are short."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAMS = sorted((Path(__file__).resolve().parents[1] / "examples").glob("*.py"))


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
def test_an_example_runs_and_prints_its_answer(
    program: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if program.stem == "trace_transformers":
        pytest.importorskip("transformers")
    monkeypatch.chdir(program.parent)
    if program.stem == "add_a_router":  # what it registers must not stay in this process
        out = subprocess.run(
            [sys.executable, program], capture_output=True, text=True, check=True
        ).stdout
    else:
        runpy.run_path(str(program), run_name="__main__")
        out = capsys.readouterr().out
    assert len(out.splitlines()) >= 2
    assert len(program.read_text().splitlines()) < 40


def test_there_are_ten_examples() -> None:
    assert len(PROGRAMS) >= 10
