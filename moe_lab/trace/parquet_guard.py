"""A look at a Parquet file before a decoder allocates anything for it: are the sizes that it claims
possible?

A checksum tells damage, not forgery. A few forged bytes in a footer or a page header make a decoder
ask for gigabytes, which ends the process, and no exception can be caught. So the footer and every
page header are read here first, in plain Python (Thrift's compact protocol; field numbers from
apache/parquet-format, parquet.thrift), and a file is refused unless its chunks lie inside the file,
its pages fill its chunks, and no page claims more than its rows can hold. What remains possible is
wrong values, which ``Trace.check`` is for.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_lab.errors import TraceError, expected

MAGIC = b"PAR1"
MAX_FOOTER = 2**24
MAX_COLUMNS = 1024
MAX_ROW_GROUPS = 4096
MAX_PAGE = 2**28
"""Largest page before compression: the text of a million tokens in one page is a tenth of it."""
MAX_CHUNK = 2**30
"""Largest column of one row group before compression."""
MAX_LENGTH = 2**16
MAX_PAGES = 2**16
MAX_DEPTH = 16
HEADER_BYTES = 2**16
PLAIN_CODECS = range(8)

_STOP, _TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = (
    0,
    1,
    2,
    3,
    7,
    8,
    9,
    10,
    11,
    12,
)
_INTEGERS = (4, 5, 6)

Struct = dict[int, Any]


class _ForgedError(ValueError):
    """What is wrong, in a few words."""


def check_parquet(path: Path, name: str, *, max_rows: int, max_values_per_row: int) -> int:
    """Rows of a Parquet file whose structure holds together.

    Args:
        path: the file.
        name: what the error calls it.
        max_rows: rows that it may have at most.
        max_values_per_row: values of one column that a row may have at most (the slots of a list
            column).

    Raises:
        TraceError: not Parquet, or sizes and offsets that contradict each other or exceed what
            those rows can hold.
    """
    try:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            footer = _footer(file, size)
            return _check_groups(file, size, footer, max_rows, max_values_per_row)
    except OSError as error:
        raise TraceError(f"{name}: {error.strerror or error}") from error
    except _ForgedError as error:
        raise TraceError(
            f"{name}: " + expected("readable Parquet", str(error), "writing the trace again")
        ) from error


def _footer(file: Any, size: int) -> Struct:
    if size < 12 or _read(file, 0, 4) != MAGIC or _read(file, size - 4, 4) != MAGIC:
        raise _ForgedError("a file without its first and last four bytes PAR1")
    length = int.from_bytes(_read(file, size - 8, 4), "little")
    if not 0 < length <= min(size - 12, MAX_FOOTER):
        raise _ForgedError(f"a footer of {length} bytes in a file of {size}")
    return _Thrift(_read(file, size - 8 - length, length)).struct()


def _check_groups(
    file: Any, size: int, footer: Struct, max_rows: int, max_values_per_row: int
) -> int:
    schema, rows = _structs(footer, 2), _integer(footer, 3)
    groups = _structs(footer, 4)
    if len(schema) > 3 * MAX_COLUMNS or len(groups) > MAX_ROW_GROUPS:
        raise _ForgedError(f"{len(schema)} schema elements and {len(groups)} row groups")
    if not 0 <= rows <= max_rows:
        raise _ForgedError(f"{rows} rows where at most {max_rows} can be")
    leaves, total = _leaves(schema), 0
    for group in groups:
        columns, group_rows = _structs(group, 1), _integer(group, 3)
        if len(columns) != leaves or not 0 <= group_rows <= rows:
            raise _ForgedError(
                f"a row group of {group_rows} rows and {len(columns)} columns, where there are "
                f"{rows} and {leaves}"
            )
        total += group_rows
        for column in columns:
            _check_chunk(file, size, column, group_rows * max_values_per_row)
    if total != rows:
        raise _ForgedError(f"row groups that sum to {total} rows, not {rows}")
    return rows


def _leaves(schema: list[Struct]) -> int:
    """Columns of a schema, which is a tree written out depth first with the number of children of
    each element.
    """
    children = [_integer(element, 5) if 5 in element else 0 for element in schema]
    lengths = [_integer(element, 2) for element in schema if 2 in element]
    if (
        sum(children) != len(schema) - 1
        or min(children, default=0) < 0
        or not all(0 <= length <= MAX_LENGTH for length in lengths)
    ):
        raise _ForgedError("a schema that is no tree of columns")
    return sum(1 for count in children[1:] if count == 0)


@dataclass(frozen=True)
class _Chunk:
    """One column of one row group: where its pages lie, and what it may hold."""

    start: int
    length: int
    values: int


def _check_chunk(file: Any, size: int, column: Struct, max_values: int) -> None:
    if 1 in column or 8 in column or 9 in column:
        raise _ForgedError("a column in another file or an encrypted one")
    meta = column.get(3)
    if not isinstance(meta, dict):
        raise _ForgedError("a column without its metadata")
    starts = [_integer(meta, field) for field in (9, 11) if field in meta]
    if not starts or meta.get(4) not in PLAIN_CODECS:
        raise _ForgedError("a column without pages or of an unknown compression")
    chunk = _Chunk(min(starts), _integer(meta, 7), _integer(meta, 5))
    if not (
        len(MAGIC) <= chunk.start and chunk.length >= 0 and chunk.start + chunk.length <= size - 8
    ):
        raise _ForgedError(
            f"a column chunk of {chunk.length} bytes at {chunk.start} in a file of {size}"
        )
    if not 0 <= chunk.values <= max_values:
        raise _ForgedError(
            f"a column chunk of {chunk.values} values where at most {max_values} can be"
        )
    uncompressed = _integer(meta, 6)
    found = sum(_check_pages(file, chunk))
    if found > uncompressed or not 0 <= uncompressed <= MAX_CHUNK:
        raise _ForgedError(f"pages of {found} bytes in a chunk of {uncompressed}")


def _check_pages(file: Any, chunk: _Chunk) -> Iterator[int]:
    """Uncompressed bytes of each page of a chunk; the values of its data pages must be those of the
    chunk.
    """
    at, end, values = chunk.start, chunk.start + chunk.length, 0
    for number in range(MAX_PAGES + 1):
        if at == end:
            break
        if number == MAX_PAGES:
            raise _ForgedError(f"more than {MAX_PAGES} pages in a chunk")
        reader = _Thrift(_read(file, at, min(HEADER_BYTES, end - at)))
        header = reader.struct()
        plain, packed = _integer(header, 2), _integer(header, 3)
        at += reader.at + packed
        if not (packed >= 0 and at <= end and 0 <= plain <= MAX_PAGE):
            raise _ForgedError(f"a page of {packed} bytes ({plain} unpacked)")
        values += _page_values(header, plain, chunk.values)
        yield plain
    if values != chunk.values:
        raise _ForgedError(f"pages of {values} values in a chunk of {chunk.values}")


def _page_values(header: Struct, plain: int, most: int) -> int:
    """Values of a data page, 0 for a dictionary page, whose entries take at least a bit each."""
    kind = _integer(header, 1)
    field = {0: 5, 2: 7, 3: 8}.get(kind)
    details = header.get(field) if field else None
    if not isinstance(details, dict):
        raise _ForgedError(f"a page of kind {kind}")
    values = _integer(details, 1)
    if kind == 2:
        if not 0 <= values <= 8 * plain:
            raise _ForgedError(f"a dictionary of {values} entries in {plain} bytes")
        return 0
    levels = _integer(details, 5) + _integer(details, 6) if kind == 3 else 0
    if not (0 <= values <= most and 0 <= levels <= plain):
        raise _ForgedError(f"a page of {values} values in a chunk of {most}")
    return values


def _read(file: Any, at: int, length: int) -> bytes:
    file.seek(at)
    data = file.read(length)
    if len(data) != length:
        raise _ForgedError("an end in the middle")
    return data


def _structs(values: Struct, field: int) -> list[Struct]:
    found = values.get(field, [])
    if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
        raise _ForgedError("a footer of another shape")
    return found


def _integer(values: Struct, field: int) -> int:
    found = values.get(field)
    if not isinstance(found, int) or isinstance(found, bool):
        raise _ForgedError("a header without one of its numbers")
    return found


class _Thrift:
    """Reads Thrift's compact protocol from bytes that may lie; every length is compared with what
    is left.
    """

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def struct(self, depth: int = 0) -> Struct:
        """Field number -> value: int, bool, bytes, float, list or struct."""
        if depth > MAX_DEPTH:
            raise _ForgedError("structures inside each other without end")
        values: Struct = {}
        field = 0
        while True:
            head = self._byte()
            kind = head & 15
            if kind == _STOP:
                return values
            field = field + (head >> 4) if head >> 4 else _signed(self._varint())
            if field in values:
                raise _ForgedError("a field that is given twice")
            values[field] = kind == _TRUE if kind in (_TRUE, _FALSE) else self._value(kind, depth)

    def _value(self, kind: int, depth: int) -> Any:
        if kind in (_TRUE, _FALSE, _BYTE):
            return self._byte()
        if kind in _INTEGERS:
            return _signed(self._varint())
        if kind == _DOUBLE:
            return self._bytes(8)
        if kind == _BINARY:
            return self._bytes(self._varint())
        if kind in (_LIST, _SET):
            return self._list(depth)
        if kind == _STRUCT:
            return self.struct(depth + 1)
        raise _ForgedError(f"a value of kind {kind}")

    def _list(self, depth: int) -> list[Any]:
        head = self._byte()
        length = head >> 4 if head >> 4 < 15 else self._varint()
        if length > len(self.data) - self.at:
            raise _ForgedError(f"a list of {length} items in {len(self.data) - self.at} bytes")
        return [self._value(head & 15, depth) for _ in range(length)]

    def _varint(self) -> int:
        value, shift = 0, 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
            if shift > 63:
                raise _ForgedError("a number without end")

    def _byte(self) -> int:
        return self._bytes(1)[0]

    def _bytes(self, length: int) -> bytes:
        data = self.data[self.at : self.at + length]
        if len(data) != length:
            raise _ForgedError("an end in the middle of a header")
        self.at += length
        return data


def _signed(value: int) -> int:
    """Zigzag: 0, -1, 1, -2 ... are 0, 1, 2, 3 ... on disk."""
    return value >> 1 ^ -(value & 1)
