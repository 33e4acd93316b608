import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from stub_trainer import STUB, StubRun, stub_grid, stub_sweep

from moe_lab.files import write_json
from moe_lab.number_format import duration
from moe_lab.runs import Progress
from moe_lab.sweeps import Ending, Job, Result, RunStore, progress, run
from moe_lab.sweeps.progress import Forecast, PlainView


def job(name: str, cost: float = 1.0) -> Job:
    return Job(run=name, name=name, folder=Path(name), config={}, cost=cost)


def test_plain_lines_tell_start_and_end_of_each_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    runs = [StubRun(name="short", steps=2), StubRun(name="broken", steps=4, trouble="diverges")]
    run(stub_sweep(*runs), tmp_path, workers=1, trainer=STUB)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"2 runs in {tmp_path}"
    assert any(line.startswith("started   short") for line in lines)
    assert any(line.startswith("[1/2] ") or line.startswith("[2/2] ") for line in lines)
    assert any("finished  short  (step 2/2, loss " in line for line in lines)
    assert any(
        line.endswith(
            "FAILED    broken: the loss is nan at step 10; try a lower learning rate than 1"
        )
        for line in lines
    )


def test_a_plain_view_speaks_every_ten_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    running = job("a")
    write_json(
        tmp_path / "a" / "status.json",
        {"step": 3, "steps": 12, "loss": 2.5, "tokens_per_second": 1234.5},
    )
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    now = 100.0
    view = PlainView(RunStore(tmp_path), [running])
    view.refresh([running])
    assert capsys.readouterr().out == ""
    now += 11
    view.refresh([running])
    view.refresh([running])
    assert (
        capsys.readouterr().out
        == "running   a  step 3/12, loss 2.500, 1,234 tok/s, ? left  (sweep: 0/1, ? left)\n"
    )


def test_nothing_is_printed_when_progress_is_off(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    run(stub_sweep(StubRun(steps=2)), tmp_path, progress=False, trainer=STUB)
    assert capfd.readouterr() == ("", "")


def test_the_forecast_counts_only_what_this_sweep_did(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock)
    clock = 0.0
    small, resumed, before = job("small", 10), job("resumed", 40), job("before", 50)
    forecast = Forecast([small, resumed, before, job("waiting", 40)], [before])
    assert (
        forecast.seconds_left([(resumed, Progress(step=2, steps=4))]) is None
    )  # half of it was done by an earlier sweep
    clock = 30.0
    forecast.ended(small)
    # 10 + 40 * (3/4 - 2/4) = 20 done in 30 s; 40 / 4 + 40 = 50 left
    assert forecast.seconds_left([(resumed, Progress(step=3, steps=4))]) == pytest.approx(75.0)
    assert forecast.run_seconds_left(resumed, Progress(step=3, steps=4)) == pytest.approx(
        30.0
    )  # a quarter took 30 s


def test_a_sweep_needs_no_less_time_than_its_slowest_run(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock)
    clock = 0.0
    runs = [job("quick", 90), job("slow", 40)]
    forecast = Forecast(runs, [])
    forecast.seconds_left([(run, Progress(step=0, steps=4)) for run in runs])
    clock = 30.0
    forecast.ended(runs[0])
    # 90 + 10 FLOPs in 30 s would leave 9 s for the other 30; the run itself took 30 s a quarter
    left = forecast.seconds_left([(runs[1], Progress(step=1, steps=4))])
    assert left == pytest.approx(90.0)


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "?"), (5, "5 s"), (600, "10 min"), (9000, "2.5 h")]
)
def test_durations_read_at_a_glance(seconds: float | None, text: str):
    assert duration(seconds) == text


def test_a_run_that_stopped_has_one_line():
    lines = {
        result: progress.ending_line(job("a"), Ending("a", result, "why"), Progress())
        for result in Result
    }
    assert lines[Result.BUSY] == "waiting   a: another sweep is training it"
    assert lines[Result.DIED] == "again     a: why; resuming from its checkpoint"


def test_a_terminal_shows_a_bar_per_run(tmp_path: Path):
    ours, theirs = pty.openpty()
    command = [
        sys.executable,
        str(Path(__file__).parent / "stub_trainer.py"),
        str(tmp_path),
        "3",
        "25",
        "0.05",
        "2",
    ]
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "100"}
    process = subprocess.Popen(command, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    seen = b""
    while True:
        try:
            chunk = os.read(ours, 4096)
        except OSError:  # the terminal closes with its last writer
            break
        seen += chunk
    os.close(ours)
    assert process.wait() == 0
    text = seen.decode()
    assert "sweep" in text
    assert "25/25" in text or "loss" in text
    assert all(f"finished  {run.name}" in text for run in stub_grid(3, 25, 0.05))
    assert "started   " not in text
