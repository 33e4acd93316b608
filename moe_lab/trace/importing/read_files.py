"""Files of other programs, read without trust: no pickle, and sizes are compared with the file
before anything is allocated.

An array or a tensor may be larger than its file (compression, repeated strides) up to
``MAX_RATIO`` times; plain .npy files are mapped, not loaded. Numbers keep their type.
"""

import codecs
import csv
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from moe_lab.errors import TraceError, expected, require
from moe_lab.json_input import Schema, mapping, parse_json, read_json_file

MAX_LINE_BYTES = 2**27
MAX_RATIO = 100
"""An archive of route ids is some ten times smaller than its arrays; more is a bomb."""
FREE_BYTES = 2**24
"""Arrays of at most this size are read whatever their file's."""
MAX_BYTES = 2**33
MAX_ID = 2**31 - 1


def read_json(path: Path) -> Any:
    """The value of a JSON file; raises ``ConfigError``."""
    check_file(path)
    return read_json_file(path)


def read_lines(path: Path, schema: Schema = mapping) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name of the line for messages, object) of a JSON-lines file, line by line."""
    check_file(path)
    with open(path, "rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES):
            number += 1
            where = f"{path.name}, line {number}"
            if line.strip():
                yield where, schema(parse_json(line, where), where)


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a .csv file by the names of its first line in lower case; comma, semicolon or
    tab between columns, UTF-8 or UTF-16.
    """
    check_file(path)
    with open(path, "rb") as file:
        wide = file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    try:
        with open(path, encoding="utf-16" if wide else "utf-8-sig", newline="") as file:
            header = file.readline(MAX_LINE_BYTES)
            form = {"delimiter": max(",;\t", key=header.count), "skipinitialspace": True}
            names = [name.strip().lower() for name in next(csv.reader([header], **form), [])]
            rows = csv.DictReader(file, names, restkey="", **form)
            return [row for row in rows if any(row.values())]
    except (UnicodeDecodeError, csv.Error) as error:
        raise TraceError(expected(f"a table in {path.name}", _line(error))) from None


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz by name, or the one of an .npy under ""; ``allow_pickle`` is off."""
    size = check_file(path)
    try:
        if path.suffix == ".npy":
            with open(path, "rb") as file:
                _check_header(path.name, file, size)
            return {"": np.load(path, mmap_mode="r" if size > FREE_BYTES else None)}
        with zipfile.ZipFile(path) as archive:
            total = 0
            for member in archive.infolist():
                with archive.open(member) as file:
                    _check_header(f"{path.name}: {member.filename}", file, member.file_size)
                total += member.file_size
            check_expansion(path.name, total, size)
        with np.load(path) as loaded:
            return {name: loaded[name] for name in loaded.files}
    except TraceError:
        raise
    # zip, zlib, ast and numpy raise a dozen types on a damaged file; all are the file's fault.
    except Exception as error:
        raise _unreadable("numpy arrays", path.name, error) from None


def array_of_bytes(data: bytes, where: str) -> np.ndarray:
    """The array of an .npy file in memory."""
    import io

    try:
        _check_header(where, io.BytesIO(data), len(data))
        return np.load(io.BytesIO(data))
    except TraceError:
        raise
    except Exception as error:
        raise _unreadable("a numpy array", where, error) from None


def read_torch(path: Path) -> Any:
    """A file of ``torch.save`` with plain tensors and containers (``weights_only``: nothing in it
    is executed).
    """
    import torch

    size = check_file(path)
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                total = sum(member.file_size for member in archive.infolist())
            check_expansion(path.name, total, size)
        return torch.load(path, map_location="cpu", weights_only=True)
    except TraceError:
        raise
    except Exception as error:
        raise _unreadable("tensors alone", path.name, error) from None


def check_expansion(where: str, claimed: int, size: int) -> None:
    """Refuse ``claimed`` bytes in memory from a source of ``size`` bytes if no compression explains
    that ratio.
    """
    if claimed > max(FREE_BYTES, MAX_RATIO * size) or claimed > MAX_BYTES:
        limit = min(max(FREE_BYTES, MAX_RATIO * size), MAX_BYTES)
        raise TraceError(expected(f"at most {limit} bytes in {where} ({size} bytes)", claimed))


def integers(where: str, value: Any, *dimensions: int) -> np.ndarray:
    """An integer array of one of these numbers of dimensions, from nested lists or an array.

    Floats without a fraction are integers. Raises ``TraceError`` for anything else.
    """
    try:
        array = np.asarray(value)
    except (ValueError, OverflowError, TypeError) as error:
        raise TraceError(f"{where}: " + expected("rows of one length", _line(error))) from None
    if array.dtype.kind == "f" and array.size and bool((array == np.floor(array)).all()):
        array = array.astype(np.int64) if np.abs(array).max() < 2**53 else array
    require(
        array.dtype.kind in "iu" and array.ndim in dimensions,
        f"integers of {' or '.join(map(str, dimensions))} dimensions",
        f"{array.dtype} of shape {list(array.shape)}",
        error=TraceError,
        where=where,
    )
    return array


def ids(where: str, value: Any, *dimensions: int) -> np.ndarray:
    """``integers`` that can be ids: from -1 (nothing) to ``MAX_ID``, so that none wraps around."""
    array = integers(where, value, *dimensions)
    if array.size and (int(array.max()) > MAX_ID or int(array.min()) < -1):
        got = f"{array.min()}..{array.max()}"
        raise TraceError(f"{where}: " + expected(f"ids between -1 and {MAX_ID}", got))
    return array


def check_file(path: Path) -> int:
    """Size of a file; raises ``TraceError`` if the file is not regular or is too large."""
    got = "a folder" if path.is_dir() else "none"
    require(path.is_file(), f"a file at {path}", got, error=TraceError)
    if (size := path.stat().st_size) > MAX_BYTES:
        what = f"{path.name} of at most {MAX_BYTES} bytes"
        raise TraceError(expected(what, size, "several smaller files"))
    return size


def _check_header(where: str, file: BinaryIO | Any, size: int) -> None:
    """The array that a header promises must be as large as the file."""
    old = np.lib.format.read_magic(file) == (1, 0)
    read = np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    require(not dtype.hasobject, f"plain numbers in {where}", "pickled objects", error=TraceError)
    promised = dtype.itemsize
    for length in shape:
        promised *= int(length)
    require(
        promised <= size and min(shape, default=0) >= 0,
        f"{promised} bytes of data in {where} as its header says",
        f"a file of {size}",
        error=TraceError,
    )


def _unreadable(what: str, where: str, error: Exception) -> TraceError:
    return TraceError(expected(f"{what} in {where}", f"{type(error).__name__}: {_line(error)}"))


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:120]
