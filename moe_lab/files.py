"""Writing without half-written files: a temporary name beside the target, then a rename.

A reader therefore sees the old file, the new file, or none. `kill -9` leaves at most a ``.tmp-*``
file, which nothing reads.
"""

import errno
import hashlib
import io
import json
import math
import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_lab.errors import RunError, StorageError, expected, require

if TYPE_CHECKING:
    import polars as pl

TEMPORARY_PREFIX = ".tmp-"
_ANY_TEMPORARY = ".tmp*"
"""Ours, and those that safetensors left in run folders of older versions."""
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_PART = re.compile(r"[A-Za-z0-9._=-]+")
_ONE_READ = 2**16


@contextmanager
def atomic_path(target: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside ``target``, renamed to it if the block raises nothing."""
    target = Path(target)
    temporary = target.parent / f"{TEMPORARY_PREFIX}{uuid.uuid4().hex[:8]}-{target.name}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, target)
        _sync_folder(target.parent)
    except OSError as error:
        raise StorageError(cannot_write(target, error)) from error
    finally:
        with suppress(OSError):  # the folder itself may be what could not be made
            temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Let a rename in ``folder`` survive a power cut, where the file system can promise that."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def private_folder(folder: Path) -> Path:
    """Make ``folder`` for this user alone and return it. Raises ``RunError`` if it belongs to
    another user, is a link, or is open to others: its name can be guessed, so anyone could have put
    files there.
    """
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        pass
    except OSError as error:
        raise StorageError(cannot_write(folder, error)) from error
    status = folder.lstat()
    if not hasattr(os, "geteuid"):  # Windows: folders are a user's own by its own rules
        return folder
    require(
        stat.S_ISDIR(status.st_mode)
        and status.st_uid == os.geteuid()
        and not (status.st_mode & 0o077),
        f"a folder of this user alone at {folder}",
        f"mode {stat.filemode(status.st_mode)} of user {status.st_uid}",
        "removing it, or another TMPDIR",
        error=RunError,
    )
    return folder


def remove_temporaries(folder: Path, target: str | None = None) -> None:
    """Remove the unfinished files that a killed process left in ``folder``: all of them, or those
    of the name ``target``. Only the one process that writes these files may call it.
    """
    pattern = _ANY_TEMPORARY if target is None else f"{TEMPORARY_PREFIX}????????-{target}"
    for leftover in folder.glob(pattern):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)


def cannot_write(target: Path | str, error: OSError) -> str:
    """The message for a file that could not be written."""
    return (
        f"cannot write {target}: {error.strerror or error}; try another folder or free some space"
    )


def check_name(name: str, source: Path | str) -> str:
    """``name`` itself, if it is a relative path that stays below the folder it is joined to.

    Every name that comes from the content of a file or from a store passes here before it becomes a
    path. Each part between slashes holds only letters, digits and ``. _ = -``, and is neither ``.``
    nor ``..``; so no absolute path, no drive, no control character. ``source`` is what the message
    calls the place of the name. Raises ``RunError``.
    """
    if not all(_PART.fullmatch(part) and part not in (".", "..") for part in name.split("/")):
        got = ascii(name)[:100]
        raise RunError(
            expected(
                "file names of letters, digits and . _ = - between slashes",
                f"{got} in {source}",
                "removing that file",
            )
        )
    return name


def below(folder: Path, name: str, source: Path | str) -> Path:
    """The path of ``name`` under ``folder``. Raises ``RunError`` as ``check_name``."""
    return folder / check_name(name, source)


def default_cache_dir() -> Path:
    """``MOE_LAB_CACHE``, or ``~/.cache/moe_lab``."""
    return Path(os.environ.get("MOE_LAB_CACHE") or Path.home() / ".cache" / "moe_lab")


def write_text(target: Path | str, text: str) -> None:
    with atomic_path(target) as path:
        path.write_text(text, encoding="utf-8")


def write_parquet(target: Path | str, frame: "pl.DataFrame") -> None:
    """Write a small frame through a Python file, because polars has no error type for a full
    disk.
    """
    content = io.BytesIO()
    frame.write_parquet(content)
    with atomic_path(target) as path:
        path.write_bytes(content.getbuffer())


def open_regular(path: Path | str) -> io.BufferedReader:
    """Open a regular file for reading. Raises ``OSError`` at once for any other kind: opening a
    FIFO would wait for a writer, and a device may have no end.
    """
    return open(_descriptor(path)[0], "rb")


def read_regular(path: Path | str, most: int = -1) -> bytes:
    """The bytes of a file, or its first ``most``. Raises ``OSError`` as ``open_regular``."""
    descriptor, size = _descriptor(path)
    if most >= 0 or size >= _ONE_READ:
        with open(descriptor, "rb") as file:
            return file.read(most)
    parts = []
    try:  # without the object of an open file: thousands of small ones are read
        while part := os.read(descriptor, _ONE_READ):
            parts.append(part)
    finally:
        os.close(descriptor)
    return b"".join(parts)


def _descriptor(path: Path | str) -> tuple[int, int]:
    """An open regular file and its size."""
    found = os.stat(path)
    descriptor = -1
    if stat.S_ISREG(found.st_mode):  # asked again below: the name may be another file's by then
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        found = os.fstat(descriptor)
    if stat.S_ISREG(found.st_mode):
        return descriptor, found.st_size
    if descriptor >= 0:
        os.close(descriptor)
    raise OSError(errno.EINVAL, "not a regular file", str(path))


def digest_of(path: Path) -> str:
    """32 hex digits of the SHA-256 of a file. Raises ``OSError``."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:32]


def json_text(value: Any, **options: Any) -> str:
    """JSON, which has neither NaN nor infinity: null stands for both. ``options``: of
    ``json.dumps``.
    """
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:
        return json.dumps(_finite(value), allow_nan=False, **options)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(target: Path | str, value: Any) -> None:
    write_text(target, json_text(value, indent=1, sort_keys=True) + "\n")


def parse_json(text: bytes) -> Any:
    """The value of a JSON file whose content is not trusted.

    Integers of 19 digits and more, which no 64-bit column holds, become floats. Raises
    ``ValueError`` for everything that is no JSON, is nested too deep, or holds a lone surrogate.
    """
    if not text.strip():
        raise ValueError("it is empty")
    try:
        value = json.loads(text, parse_int=_parse_int)
    except RecursionError:
        raise ValueError("nested too deep") from None
    if _SURROGATE.search(text):
        json.dumps(value, ensure_ascii=False).encode()  # UnicodeEncodeError is a ValueError
    return value


def _parse_int(digits: str) -> int | float:
    return int(digits) if len(digits) < 19 else float(digits)


def content_hash(value: Any, length: int = 12) -> str:
    """Hex digest of a JSON-serialisable value; equal values give equal digests on every machine."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:length]
