"""Files of other programs, read without trust: no pickle, and sizes compared with the file before
anything is allocated.
"""

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from moe_lab.errors import TraceError, expected

MAX_BYTES = 2**33
"""Of one array or JSON document in memory."""
MAX_LINE_BYTES = 2**30


def read_json(path: Path) -> Any:
    _check_size(path)
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise TraceError(
            expected(f"JSON in {path.name}", f"{type(error).__name__}: {_line(error)}")
        ) from error


def read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of a JSON-lines file, one line in memory at a time."""
    with open(path, "rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES):
            number += 1
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                got = f"{type(error).__name__}: {_line(error)}"
                raise TraceError(
                    f"{path.name}, line {number}: " + expected("a JSON object", got)
                ) from error
            if not isinstance(value, dict):
                raise TraceError(
                    f"{path.name}, line {number}: "
                    + expected("a JSON object", type(value).__name__)
                )
            yield number, value


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz by name, or the one of an .npy under ""; ``allow_pickle`` is off."""
    _check_size(path)
    try:
        if path.suffix == ".npy":
            with open(path, "rb") as file:
                _check_header(path.name, file, path.stat().st_size)
            return {"": np.load(path, allow_pickle=False)}
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if (total := sum(member.file_size for member in members)) > MAX_BYTES:
                raise TraceError(expected(f"at most {MAX_BYTES} bytes in {path.name}", total))
            for member in members:
                with archive.open(member) as file:
                    _check_header(f"{path.name}: {member.filename}", file, member.file_size)
        with np.load(path, allow_pickle=False) as loaded:
            return {name: loaded[name] for name in loaded.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, KeyError, MemoryError) as error:
        raise TraceError(
            expected(f"numpy arrays in {path.name}", f"{type(error).__name__}: {_line(error)}")
        ) from error


def read_torch(path: Path) -> Any:
    """A file of ``torch.save`` with plain tensors and containers (``weights_only``: nothing in it
    is executed).
    """
    import pickle

    import torch

    _check_size(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as error:
        raise TraceError(
            expected(f"tensors alone in {path.name}", f"{type(error).__name__}: {_line(error)}")
        ) from error


def integers(where: str, value: Any, dimensions: int) -> np.ndarray:
    """An int64 array of that many dimensions from nested lists or an array.

    Raises ``TraceError`` for anything else.
    """
    try:
        array = np.asarray(value)
    except (ValueError, OverflowError) as error:
        raise TraceError(f"{where}: " + expected("rows of one length", _line(error))) from error
    if array.dtype.kind not in "iu" or array.ndim != dimensions:
        raise TraceError(
            f"{where}: "
            + expected(
                f"integers of {dimensions} dimensions",
                f"{array.dtype} of shape {list(array.shape)}",
            )
        )
    return array.astype(np.int64)


def _check_size(path: Path) -> None:
    if not path.is_file():
        raise TraceError(expected(f"a file at {path}", "none"))
    if (size := path.stat().st_size) > MAX_BYTES:
        raise TraceError(
            expected(f"{path.name} of at most {MAX_BYTES} bytes", size, "several smaller files")
        )


def _check_header(name: str, file: Any, size: int) -> None:
    """The array that a header promises must be as large as the file."""
    version = np.lib.format.read_magic(file)
    reader = (
        np.lib.format.read_array_header_1_0
        if version == (1, 0)
        else np.lib.format.read_array_header_2_0
    )
    shape, _, dtype = reader(file)
    if dtype.hasobject:
        raise TraceError(expected(f"plain numbers in {name}", "pickled objects"))
    promised = int(np.prod([int(length) for length in shape], dtype=object)) * dtype.itemsize
    if promised > size:
        raise TraceError(
            expected(f"{promised} bytes of data in {name} as its header says", f"a file of {size}")
        )


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:120]
