"""No text from a file moves the cursor of a terminal, sets its clipboard or turns its direction."""

import io
import os
import subprocess
import sys
import tarfile
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_lab.cli import main
from moe_lab.plain_text import LONGEST_MESSAGE, PlainStream, one_line, plain, plain_output

KEPT = "\n\t\r"


@given(st.text())
def test_no_control_format_or_unpaired_character_is_left(text: str) -> None:
    found = plain(text).replace("\x1b[31m", "")
    dangerous = {c for c in found if unicodedata.category(c) in ("Cc", "Cs") and c not in KEPT}
    assert dangerous <= {"\x1b"}  # colours alone begin with it
    assert not set(found) & set(
        "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200e\u200f"
    )


@pytest.mark.parametrize(
    "text",
    [
        "\x1b[2J",
        "\x1b]52;c;aGk=\x07",
        "\x9b2J",
        "\x1b[6n",
        "\x1bc",
        "\x1b[1;1H",
        "\u202e",
        "\ud800",
    ],
)
def test_sequences_that_do_something_become_visible(text: str) -> None:
    assert plain(text).isascii()
    assert "\x1b" not in plain(text)
    assert plain(text) != text


def test_plain_text_of_any_language_and_colours_stay() -> None:
    text = "Größe 日本語 हिन्दी עברית 👍\u00a0\t\x1b[1;31mred\x1b[0m\r\n"
    assert plain(text) == text


def test_a_message_is_one_line_of_bounded_length() -> None:
    line = one_line("a\nb \x1b[31m " + "x" * 100_000)
    assert line.startswith("a b \\x1b[31m x")
    assert len(line) == LONGEST_MESSAGE


def test_a_stream_writes_plain_text_and_is_else_the_same() -> None:
    below = io.StringIO()
    stream = PlainStream(below)
    print("name\x1b[2J", file=stream)
    assert stream.getvalue() == "name\\x1b[2J\n"


def test_what_an_encoding_lacks_is_written_as_escapes(monkeypatch) -> None:
    below = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", below)
    with plain_output():
        print("±0.02 ≥1")
    below.flush()
    assert below.buffer.getvalue() == b"\\xb10.02 \\u22651\n"
    assert below.errors == "strict"


def test_a_name_that_is_no_text_is_refused(capsys) -> None:
    """polars writes no such file, and a page cannot show its name."""
    assert main(["report", "traces/x\udcff"]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("moe-lab report: expected arguments in UTF-8, got 'traces/x\\udcff'")


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "command"),
    [("ansi_meta", ["report"]), ("ansi_sweep", ["sweep", "status"]), ("ansi_sweep", ["report"])],
)
def test_escape_sequences_of_files_do_not_reach_the_terminal(name, command, data_dir, tmp_path):
    archive = data_dir / "hostile" / f"{name}.tar.gz"
    if not archive.is_file():
        pytest.skip(f"needs {archive}")
    with tarfile.open(archive) as file:
        file.extractall(tmp_path, filter="data")
    out = ["--out", str(tmp_path / "page.html")] if command == ["report"] else []
    done = subprocess.run(
        [sys.executable, "-m", "moe_lab", *command, str(tmp_path / name), *out],
        capture_output=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode in (0, 2)
    shown = done.stdout + done.stderr
    assert b"Traceback" not in shown
    assert not any(byte < 32 and byte not in b"\n\t\r" for byte in shown)
    assert len(shown) < 20_000
