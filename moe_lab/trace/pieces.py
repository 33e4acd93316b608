"""The pieces of a Parquet file: what can be fetched and verified without the rest of the file.

The column chunks lie one after another, and the footer behind them. A piece begins where a chunk
does; the last one is the footer with whatever lies before it. Together they are the whole file. The
manifest keeps for each piece its size (u32) and the first 16 bytes of BLAKE2b. A file of several
row groups, or with columns of columns, has no pieces: it is read whole.

The footer is Thrift's compact protocol (parquet-format, ``FileMetaData``), parsed here from files
that this process has just written.
"""

import hashlib
import struct
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from moe_lab.files import open_regular
from moe_lab.trace.seal import new_digest

_FORM = struct.Struct("<I16s")
_ROW_GROUPS, _COLUMNS, _META, _PATH, _DATA_PAGE, _DICTIONARY_PAGE = 4, 1, 3, 3, 9, 11
"""Numbers of fields: of FileMetaData, RowGroup, ColumnChunk, and of ColumnMetaData."""


class Piece(NamedTuple):
    """Bytes ``start`` to ``end`` of a file, and their BLAKE2b, of any length."""

    start: int
    end: int
    digest: bytes

    def fits(self, content: bytes) -> bool:
        """Whether ``content`` is this piece."""
        size = self.end - self.start
        return len(content) == size and _digest(content, len(self.digest)) == self.digest


class Checksum(NamedTuple):
    """Size of a file in bytes, its BLAKE2b, and its pieces as the manifest keeps them, or None."""

    size: int
    digest: bytes
    pieces: bytes | None


def checksum(path: Path) -> Checksum:
    """The checksum of a Parquet file that this process has written. Raises ``OSError``."""
    whole, pieces = new_digest(), []
    with open_regular(path) as file:
        size = file.seek(0, 2)
        starts = _starts(file, size)
        file.seek(0)
        for start, end in pairwise([*starts, size]):
            content = file.read(end - start)
            whole.update(content)
            pieces.append((len(content), _digest(content, 16)))
    packed = b"".join(_FORM.pack(*piece) for piece in pieces) if len(starts) > 1 else None
    return Checksum(size, whole.digest(), packed)


def unpacked(pieces: bytes) -> list[Piece]:
    """The pieces of a file, in their order: one for each column, and the footer."""
    found, end = [], 0
    for size, value in _FORM.iter_unpack(pieces):
        found.append(Piece(end, end + size, value))
        end += size
    return found


def _digest(content: bytes, size: int) -> bytes:
    return hashlib.blake2b(content, digest_size=size).digest()


def _starts(file: Any, size: int) -> list[int]:
    """Where pieces begin; [0] of a file that has none."""
    file.seek(max(size - 8, 0))
    length = int.from_bytes(file.read(4), "little")
    file.seek(max(size - 8 - length, 0))
    try:
        groups = _value(file.read(length), 0, 12)[0][_ROW_GROUPS]
        columns = [chunk[_META] for chunk in groups[0][_COLUMNS]]
    except (IndexError, KeyError, TypeError, ValueError):
        return [0]
    names = {column[_PATH][0] for column in columns}
    begins = [
        min(column[_DATA_PAGE], column.get(_DICTIONARY_PAGE, column[_DATA_PAGE]))
        for column in columns
    ]
    ends = [begin + column[7] for begin, column in zip(begins, columns, strict=True)]
    starts = [0, *begins[1:], ends[-1]]
    usable = len(groups) == 1 and len(names) == len(columns) and starts == sorted(set(starts))
    small = all(end - start < 2**32 for start, end in pairwise([*starts, size]))
    return starts if usable and small else [0]


def _value(data: bytes, at: int, kind: int) -> tuple[Any, int]:
    """A value of the compact protocol at ``at``, and where the next one begins; a struct is a dict
    by the numbers of its fields.
    """
    if kind in (1, 2):
        return kind == 1, at
    if kind == 3:
        return data[at], at + 1
    if kind in (4, 5, 6):
        number, at = _varint(data, at)
        return _signed(number), at
    if kind == 7:
        return None, at + 8
    if kind == 8:
        length, at = _varint(data, at)
        return data[at : at + length], at + length
    if kind in (9, 10):
        return _list(data, at)
    if kind != 12:
        raise ValueError(kind)
    fields: dict[int, Any] = {}
    number = 0
    while head := data[at]:
        at += 1
        if head >> 4:
            number += head >> 4
        else:
            read, at = _varint(data, at)
            number = _signed(read)
        fields[number], at = _value(data, at, head & 15)
    return fields, at + 1


def _list(data: bytes, at: int) -> tuple[list[Any], int]:
    length, kind, at = data[at] >> 4, data[at] & 15, at + 1
    if length == 15:
        length, at = _varint(data, at)
    items = []
    for _ in range(length):
        item, at = _value(data, at, 3 if kind in (1, 2) else kind)
        items.append(item)
    return items, at


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, at


def _signed(number: int) -> int:
    return (number >> 1) ^ -(number & 1)
