"""Tables, sentences and progress: aligned or as records on a terminal, one line a row in a pipe."""

import contextlib
import io
import os
import struct
import subprocess
import sys
import termios
from pathlib import Path

import polars as pl
import pytest

from moe_lab import progress, terminal
from moe_lab.plain_text import PlainStream
from moe_lab.runs import RunStore
from moe_lab.sweeps.launchers import Job
from moe_lab.sweeps.progress import LiveView

NAMES = ("run", "tokens", "loss", "detail")
HASH = "0a1b2c3d4e5f60718293a4b5c6d7e8f9"
LONG = "the noise between seeds is larger than the margin, so that nothing can be said of it"
ROWS = [(HASH, 3000, 3.14159265, LONG), ("short", None, -0.0001, "fine")]


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_pipe_gets_one_line_a_row_with_tabs_and_all_digits() -> None:
    lines = terminal.table_text(NAMES, [*ROWS, ("a\tb\nc", 1, 2.0, "x")], None).splitlines()
    assert [line.split("\t") for line in lines] == [
        list(NAMES),
        [HASH, "3000", "3.14159", LONG],
        ["short", "", "-0.0001", "fine"],
        ["a b c", "1", "2", "x"],
    ]


def test_a_wide_terminal_gets_columns_with_numbers_on_the_right() -> None:
    lines = terminal.table_text(NAMES, ROWS, 200).splitlines()
    assert lines[0] == f"{'run':32}  tokens   loss  detail"
    assert lines[1] == f"{HASH}    3000  3.142  {LONG}"
    assert lines[2] == f"{'short':32}          0.000  fine"


def test_the_last_column_wraps_before_a_table_becomes_records() -> None:
    lines = terminal.table_text(NAMES, ROWS, 100).splitlines()
    assert max(map(len, lines)) <= 100
    assert len(lines) == 4
    assert lines[2].strip() in LONG


@pytest.mark.parametrize("width", [20, 50, 60])
def test_a_narrow_terminal_gets_records_of_whole_words(width: int) -> None:
    lines = terminal.table_text(NAMES, ROWS, width).splitlines()
    assert f"run     {HASH}" in lines
    assert "tokens  3000" in lines
    words = " ".join(lines).split()
    assert set(LONG.split()) <= set(words)
    assert max(map(len, lines)) <= max(width, 8 + len(HASH))


def test_a_frame_leaves_out_optional_columns_that_have_no_room(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from moe_lab.commands import options

    frame = pl.DataFrame({"layer": [0], "a_rather_long_name": [1], "another_long_name": [2]})
    for width, names in ((80, frame.columns), (30, ["layer", "another_long_name"])):
        monkeypatch.setattr(options, "window_width", lambda width=width: width)
        monkeypatch.setattr(terminal, "window_width", lambda width=width: width)
        options.print_frame(frame, optional=("a_rather_long_name", "another_long_name"))
        assert capsys.readouterr().out.splitlines()[0].split() == names


def test_a_dot_plot_puts_means_and_ranges_on_one_axis() -> None:
    lines = terminal.dot_plot([("ratio 1", [3.0, 3.2]), ("ratio 16", [2.0])], 60, digits=1)
    assert [line.index("o", 10) for line in lines[:2]] == [54, 15]
    assert lines[2].split() == ["2.0", "3.2"]
    assert max(map(len, lines)) <= 60


def test_progress_is_one_rewritten_line_with_the_time_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = iter(range(0, 1000, 10))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    monkeypatch.setattr(sys, "stderr", screen := Screen())
    with progress.shown():
        assert list(progress.tracked([5, 6, 7, 8], "scoring")) == [5, 6, 7, 8]
    drawn = [line.rstrip() for line in screen.getvalue().split("\r") if line.strip()]
    assert drawn == [
        "scoring   0%",
        "scoring  25%, 0:00:30 left",
        "scoring  50%, 0:00:20 left",
        "scoring  75%, 0:00:10 left",
        "scoring 100%",
    ]
    assert "\n" not in screen.getvalue()


@pytest.mark.parametrize(("stream", "wanted"), [(io.StringIO, True), (Screen, False)])
def test_no_progress_in_a_pipe_or_where_nobody_wants_it(
    monkeypatch: pytest.MonkeyPatch, stream: type[io.StringIO], wanted: bool
) -> None:
    monkeypatch.setattr(sys, "stderr", out := stream())
    with progress.shown(wanted):
        assert list(progress.tracked([1], "scoring")) == [1]
    assert out.getvalue() == ""


def test_live_bars_move_the_cursor_and_names_do_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    screen = Screen()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", PlainStream(screen))
    job = Job("h", "a\x1b]0;title\x07b", tmp_path, {}, 1.0, "cpu", 0, True)
    view = LiveView(RunStore(tmp_path), [job])
    view.opened([], [])
    view.started(job)
    view.say("said \x1b[2J")
    view.close()
    text = screen.getvalue()
    assert "\x1b[2K" in text
    assert "\\x1b[2K" not in text
    assert "a\\x1b]0;title\\x07b" in text
    assert "\x1b]0" not in text
    assert "said \\x1b[2J" in text


def on_a_terminal(width: int, *arguments: str) -> str:
    """What a command writes to a terminal of that width."""
    pty, fcntl = pytest.importorskip("pty"), pytest.importorskip("fcntl")
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 40, width, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    with subprocess.Popen(
        [sys.executable, "-m", "moe_lab", *arguments],
        stdout=follower,
        stderr=follower,
        env=environment | {"NO_COLOR": "1", "TERM": "xterm"},
    ):
        os.close(follower)
        written = b""
        with contextlib.suppress(OSError):  # the end of a terminal
            while part := os.read(leader, 65536):
                written += part
    os.close(leader)
    return written.decode().replace("\r\n", "\n")


def test_a_command_fits_the_terminal_it_runs_on_and_a_pipe_is_plain(tmp_path: Path) -> None:
    frame = pl.DataFrame({"ratio": [1.0, 2.0, 4.0] * 2, "seed": [0] * 3 + [1] * 3})
    losses = [3.3, 3.2, 3.1, 3.31, 3.21, 3.11]
    runs = frame.with_columns(loss=pl.Series(losses), active_params=1e6, tokens=1e9)
    runs.write_parquet(tmp_path / "runs.parquet")
    arguments = "scaling", "verdict", str(tmp_path / "runs.parquet")
    shown = on_a_terminal(60, *arguments)
    assert "\x1b" not in shown
    assert max(map(len, shown.splitlines())) <= 60
    assert "from  to" in shown
    piped = subprocess.run(
        [sys.executable, "-m", "moe_lab", *arguments], capture_output=True, text=True, check=True
    ).stdout
    assert "from\tto\tnats\t90 % interval\tcompute" in piped.splitlines()
    said = shown[shown.index("CANNOT TELL") :]  # the line of progress stands before it
    assert " ".join(piped.split()).startswith(" ".join(said.split())[:300])


def test_a_sweep_ends_with_its_verdict_and_its_losses(tmp_path: Path) -> None:
    from moe_lab.commands.sweep import _judged

    ratios = [1.0, 2.0, 4.0, 8.0, 16.0]
    rows = [
        {"ratio": ratio, "seed": seed, "loss": 3.4 - 0.05 * number + 0.001 * seed}
        for number, ratio in enumerate(ratios)
        for seed in range(3)
    ]
    runs = pl.DataFrame(rows).with_columns(active_params=1e6, tokens=1e9)
    runs.write_parquet(tmp_path / "runs.parquet")
    outcome, sentence, lines = _judged(tmp_path / "runs.parquet")
    assert sentence.lower().startswith(outcome)
    assert "\n" not in sentence
    drawn = [line.index("|") for line in lines[1:6]]
    assert len(set(drawn)) == 1
    places = [line.rindex("o") for line in lines[1:6]]
    assert places == sorted(places, reverse=True)
    assert [line.split()[1] for line in lines[1:6]] == ["1", "2", "4", "8", "16"]
    runs.drop("loss").write_parquet(tmp_path / "none.parquet")
    assert _judged(tmp_path / "none.parquet")[0] == "cannot tell"
