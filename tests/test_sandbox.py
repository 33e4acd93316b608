"""Parquet whose headers lie: the child that reads it may die, this process gets one line."""

import json
import os
import resource
import subprocess
import sys

import polars as pl
import pytest
import refusals

from moe_lab import sandbox
from moe_lab.errors import RunError, TraceError
from moe_lab.sandbox import read_parquet


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "part.parquet"
    lists = [[n % 7, n % 5 + 7] for n in range(300)]
    pl.DataFrame({"n": range(300), "text": ["a<script>b"] * 300, "ids": lists}).write_parquet(path)
    return path


def varint(number):
    number, out = number << 1, b""  # zigzag of a number that is not negative
    while number > 127:
        out, number = out + bytes([number & 127 | 128]), number >> 7
    return out + bytes([number])


def with_footer(path, change):
    data = path.read_bytes()
    start = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    footer = change(data[start:-8])
    path.write_bytes(data[:start] + footer + len(footer).to_bytes(4, "little") + b"PAR1")


def refused(path, message=".*"):
    before = seconds_of_children()
    with pytest.raises(
        TraceError, match=f"part.parquet: expected a readable file, got {message}"
    ) as caught:
        read_parquet(path, TraceError)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    assert seconds_of_children() - before < 30


def seconds_of_children():
    """Processor time of the processes that this one started and has waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_an_honest_file_is_read_whole_and_by_column(path):
    frame = read_parquet(path, TraceError)
    assert frame.equals(pl.read_parquet(path))
    assert read_parquet(path, TraceError, ["n"]).columns == ["n"]


@pytest.mark.parametrize("rows", [10**12, 2**62])
def test_headers_of_a_million_million_rows_are_refused(path, rows):
    with_footer(path, lambda footer: footer.replace(varint(300), varint(rows)))
    refused(path)


@pytest.mark.parametrize("kept", [0, 3, 11, 200, -1])
def test_a_truncated_file_is_refused(path, kept):
    path.write_bytes(path.read_bytes()[:kept])
    refused(path)


def test_a_footer_longer_than_the_file_is_refused(path):
    data = path.read_bytes()
    path.write_bytes(data[:-8] + (2**31 - 1).to_bytes(4, "little") + b"PAR1")
    refused(path)


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x04cposix\nsystem\n." * 9,
        b"PAR1" * 9,
        b"PK\x03\x04" + b"\0" * 60,
        b"PAR1" + b"\x1c" * 900,
    ],
)
def test_pickles_archives_and_endless_structures_are_refused(path, content):
    path.write_bytes(
        content
        if content[:4] != b"PAR1"
        else content + (len(content) - 4).to_bytes(4, "little") + b"PAR1"
    )
    refused(path)


def test_pages_that_claim_gigabytes_are_refused(path):
    """The page header's second number is the size before compression."""
    data = path.read_bytes()
    head = data.index(b"\x15", 4)
    sizes = data.index(b"\x15", head + 1)
    end = sizes + 1
    while data[end] > 127:
        end += 1
    path.write_bytes(data[: sizes + 1] + varint(2**31 - 1)[: end - sizes] + data[end + 1 :])
    refused(path)


def test_schemas_nested_without_end_are_refused(path):
    """A struct within a struct, 3,000 times, ends the process that decodes it."""
    deep = b"\x15\x04\x19" + b"\xfc" + varint(3001)[:2]
    data = b"PAR1" + deep + b"\x48\x01x\x15\x02\x00" * 3001 + b"\x16\x00\x19\x0c\x00"
    path.write_bytes(data + (len(data) - 4).to_bytes(4, "little") + b"PAR1")
    refused(path)


def test_one_long_text_that_many_rows_refer_to_is_refused(path):
    pl.DataFrame({"text": ["a" * 2**22] * 200}).write_parquet(path, compression="zstd")
    assert path.stat().st_size < 2**20
    refused(path, "expected at most .* bytes of text")


def test_what_takes_more_memory_than_its_size_allows_is_refused(path):
    pl.DataFrame({"n": pl.repeat(1, 2**28, dtype=pl.Int64, eager=True)}).write_parquet(path)
    assert path.stat().st_size < 2**20
    refused(path)


def test_what_is_no_regular_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.parquet")
    with pytest.raises(RunError, match="expected a regular file"):
        read_parquet(tmp_path / "pipe.parquet", RunError)
    with pytest.raises(RunError, match=r"cannot read .*: No such file"):
        read_parquet(tmp_path / "none.parquet", RunError)


def test_one_child_serves_many_requests_and_a_dead_one_is_replaced(path):
    read_parquet(path, RunError)
    first = sandbox._child
    read_parquet(path, RunError)
    assert first is sandbox._child
    first.process.kill()
    first.process.wait()
    assert read_parquet(path, RunError).height == 300
    assert sandbox._child is not first


def test_work_without_end_is_stopped_by_its_processor_time(monkeypatch):
    monkeypatch.setattr(sandbox, "BASE_SECONDS", 1)
    before = seconds_of_children()
    with pytest.raises(RunError, match="x: expected a readable file, got one that takes more"):
        sandbox.call("re:fullmatch", ["(a|aa)+", "a" * 50 + "b"], RunError, "x", 0)
    assert seconds_of_children() - before < 30


def test_the_child_imports_nothing_heavy_before_it_is_asked():
    code = "import sys, moe_lab.sandbox; print({'polars', 'numpy', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_errors_keep_their_type_and_field(tmp_path):
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "meta.json").write_text(json.dumps({"schema_version": 9}))
    arguments = (str(tmp_path / "t"), str(tmp_path / "copy"))
    with refusals.refused("schema_version", TraceError):
        sandbox.call("moe_lab.trace.foreign:clean_listing", arguments, RunError, "t", 0)
