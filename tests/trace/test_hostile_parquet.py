"""Parquet whose headers lie: the guard refuses what no rows could hold."""

import polars as pl
import pytest

from moe_lab.errors import TraceError
from moe_lab.trace.parquet_guard import check_parquet


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


def refused(path, message, max_rows=1000, values=2):
    with pytest.raises(TraceError, match=f"x: expected readable Parquet, got {message}") as caught:
        check_parquet(path, "x", max_rows=max_rows, max_values_per_row=values)
    assert "\n" not in str(caught.value)


def test_an_honest_file_is_let_through(path):
    assert check_parquet(path, "x", max_rows=300, max_values_per_row=2) == 300


@pytest.mark.parametrize("rows", [10**12, 2**62])
def test_headers_of_a_million_million_rows_are_refused(path, rows):
    with_footer(path, lambda footer: footer.replace(varint(300), varint(rows)))
    refused(path, f"{rows} rows where at most 1000 can be")


def test_more_rows_or_values_than_were_announced_are_refused(path):
    refused(path, "300 rows where at most 299 can be", max_rows=299)
    refused(path, "a column chunk of 600 values where at most 300 can be", values=1)


@pytest.mark.parametrize("kept", [0, 3, 11, 200, -1])
def test_a_truncated_file_is_refused(path, kept):
    path.write_bytes(path.read_bytes()[:kept])
    refused(path, ".*")


def test_a_footer_longer_than_the_file_is_refused(path):
    data = path.read_bytes()
    path.write_bytes(data[:-8] + (2**31 - 1).to_bytes(4, "little") + b"PAR1")
    refused(path, r"a footer of 2147483647 bytes in a file of \d+")


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
    refused(path, ".*")


def test_pages_that_claim_gigabytes_are_refused(path):
    """The page header's second number is the size before compression."""
    data = path.read_bytes()
    head = data.index(b"\x15", 4)
    sizes = data.index(b"\x15", head + 1)
    end = sizes + 1
    while data[end] > 127:
        end += 1
    path.write_bytes(data[: sizes + 1] + varint(2**31 - 1)[: end - sizes] + data[end + 1 :])
    refused(path, ".*")
