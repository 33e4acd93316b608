"""What a failed run leaves to read, wherever it is shown."""

import json
from pathlib import Path

import polars as pl
import pytest
from stub_trainer import STUB, StubRun, stub_sweep

from moe_lab.cli import main
from moe_lab.runs import failures
from moe_lab.sweeps import run, status, status_lines, status_rows, status_table


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sweep")
    runs = [
        StubRun(name="good"),
        StubRun(name="bug", trouble="bug"),
        StubRun(name="killed", trouble="killed every time"),
    ]
    run(stub_sweep(*runs), out, progress=False, trainer=STUB)
    return out


def test_status_holds_the_end_of_the_traceback(sweep: Path):
    rows = {row["name"]: row for row in status(sweep).rows(named=True)}
    assert rows["good"]["last_lines"] == ""
    lines = rows["bug"]["last_lines"].splitlines()
    assert 'raise ZeroDivisionError("division by zero\\nand a second line")' in "\n".join(lines)
    assert lines[-2:] == ["ZeroDivisionError: division by zero", "and a second line"]


def test_the_command_shows_failed_runs_with_their_last_lines(
    sweep: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["sweep", "status", str(sweep)]) == 0
    text = capsys.readouterr().out
    assert "3 runs: 1 finished, 2 failed" in text
    assert (
        ") failed: worker killed by SIGKILL (out of memory? try fewer workers or a "
        "smaller batch), 3 times\n" in text
    )
    assert "\n    ZeroDivisionError: division by zero\n" in text
    assert "`moe-lab sweep run ... --retry-failed` trains failed runs again" in text


def test_the_last_lines_are_in_the_json_too(sweep: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["sweep", "status", str(sweep), "--json"]) == 0
    assert any(
        "ZeroDivisionError" in row["last_lines"] for row in json.loads(capsys.readouterr().out)
    )


def test_what_a_run_printed_comes_before_its_traceback(tmp_path: Path):
    (tmp_path / "log.txt").write_text("\n".join(f"line {number}" for number in range(100)))
    (tmp_path / "error.txt").write_text(
        "it broke\n\nTraceback (most recent call last):\nValueError: it broke\n"
    )
    lines = failures.last_lines(tmp_path).splitlines()
    assert lines == [
        *(f"line {number}" for number in range(94, 100)),
        "Traceback (most recent call last):",
        "ValueError: it broke",
    ]
    assert failures.read_failure(tmp_path).reason == "it broke"


def test_a_reason_alone_is_not_repeated(tmp_path: Path):
    (tmp_path / "error.txt").write_text("worker killed by SIGKILL\n")
    assert failures.last_lines(tmp_path) == ""


def test_last_lines_are_bounded_whatever_was_printed(tmp_path: Path):
    (tmp_path / "log.txt").write_text("x" * 10**6 + "\nend\n" + "\n" * 50)
    (tmp_path / "error.txt").write_text("why\n" + "y" * 10**6)
    text = failures.last_lines(tmp_path)
    assert len(text) <= failures.LINE_CHARACTERS * (
        failures.PRINTED_LINES + failures.TRACEBACK_LINES
    )
    assert "end" in text.splitlines()


def test_last_lines_do_nothing_to_a_terminal(tmp_path: Path):
    (tmp_path / "log.txt").write_bytes(
        b"\x1b[31mred\x1b[0m \x1b]0;title\x07\xff\x00\x9b2J\n10 %\r20 %\rdone \xe2\x80\xae\n"
    )
    assert failures.last_lines(tmp_path).splitlines() == ["red \ufffd\ufffd2J", "done"]


def test_a_run_without_files_said_nothing(tmp_path: Path):
    assert (failures.read_failure(tmp_path).reason, failures.last_lines(tmp_path)) == ("", "")


def test_a_large_sweep_shows_the_rows_that_need_attention():
    number = 5 * status_table.MAX_ROWS
    states = ["finished"] * (number - 30) + ["running"] * 10 + ["failed"] * 20
    frame = pl.DataFrame(
        {
            "run": [f"h{index}" for index in range(number)],
            "name": "a",
            "state": states,
            "step": 1,
            "steps": 2,
            "loss": 3.5,
            "tokens_per_second": 100.4,
            "alarms": [2, 1] + [0] * (number - 2),
            "alarm": ["Step 9, layer 1: it fell.", "Step 8: it rose."] + [""] * (number - 2),
            "error": "why",
            "job": "",
            "waits": "",
            "last_lines": "deep\nsaid",
            "arm": ["topk", "expert_choice"] * (number // 2),
            "sees_later_tokens": [False, True] * (number // 2),
        }
    )
    shown = status_rows(frame)
    assert shown["state"].to_list() == ["failed"] * 20 + ["running"] * 10
    lines = "\n".join(status_lines(frame))
    assert lines.count("why") == status_table.MAX_FAILURES
    assert "1,000 runs: 10 running, 970 finished, 20 failed; rows of the others: --json" in lines
    assert "note: expert_choice: later tokens of a text change how earlier ones" in lines
    assert "alarm: a (h0): 2 alarms, the last: Step 9, layer 1: it fell." in lines
    assert "alarm: a (h1): Step 8: it rose." in lines
    assert "alarms" in shown.columns
    assert "alarms" not in status_rows(frame.with_columns(alarms=0)).columns
    causal = frame.with_columns(sees_later_tokens=pl.lit(None, pl.Boolean))
    assert "later tokens" not in "\n".join(status_lines(causal))
    assert "and 10 more" in lines
