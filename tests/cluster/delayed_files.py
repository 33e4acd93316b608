"""A shared folder whose file server shows a host the files of another one late.

``install`` changes this process: below ``$MOE_LAB_TEST_SHARED``, a file or folder that another host
made is not there until ``$MOE_LAB_TEST_DELAY`` seconds later, for a process that lists, looks or
opens.
Creating it exclusively is refused at once, as by a file server, and making something in a folder
shows what is in it, as the answer of NFS does. The host that made a file is an attribute of it,
kept when it is renamed.
"""

import builtins
import errno
import io
import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

SHARED, DELAY = "MOE_LAB_TEST_SHARED", "MOE_LAB_TEST_DELAY"
_MADE = "user.made"
_stat, _lstat, _listdir, _scandir = os.stat, os.lstat, os.listdir, os.scandir
_open, _os_open, _mkdir = builtins.open, os.open, os.mkdir
_replace, _rename, _utime, _truncate = os.replace, os.rename, os.utime, os.truncate


_told: dict[str, float] = {}
"""When this process last made something, by folder."""


def mark(path: Any) -> None:
    """This host made ``path`` now."""
    now = time.time()
    with suppress(OSError):
        os.setxattr(path, _MADE, f"{socket.gethostname()} {now}".encode())
    _told[os.path.dirname(os.path.abspath(os.fsdecode(path)))] = now


def hidden(path: Any) -> bool:
    if isinstance(path, int):
        return False
    text = os.path.abspath(os.fsdecode(path))
    if not text.startswith(os.environ[SHARED] + os.sep):
        return False
    try:
        host, when = os.getxattr(text, _MADE).decode().split()
    except (OSError, ValueError):
        return False
    late = time.time() - float(when) < float(os.environ[DELAY])
    return (
        host != socket.gethostname() and late and float(when) > _told.get(os.path.dirname(text), 0)
    )


def _missing(path: Any) -> FileNotFoundError:
    return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fsdecode(path))


def _looking(call: Callable[..., Any]) -> Callable[..., Any]:
    def look(path: Any, *words: Any, **options: Any) -> Any:
        if options.get("dir_fd") is None and hidden(path):
            raise _missing(path)
        return call(path, *words, **options)

    return look


def _making(call: Callable[..., Any]) -> Callable[..., Any]:
    def make(source: Any, target: Any, *words: Any, **options: Any) -> Any:
        call(source, target, *words, **options)
        mark(target)

    return make


def _list(path: Any = ".") -> list[Any]:
    names = _listdir(path)
    if isinstance(path, int):
        return names
    return [
        name for name in names if not hidden(os.path.join(os.fsencode(path), os.fsencode(name)))
    ]


class _Scan:
    def __init__(self, path: Any = ".") -> None:
        self._entries = _scandir(path)

    def __iter__(self) -> "_Scan":
        return self

    def __next__(self) -> Any:
        return next(entry for entry in self._entries if not hidden(entry.path))

    def __enter__(self) -> "_Scan":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._entries.close()


def _exists(path: Any) -> bool:
    try:
        _lstat(path)
    except OSError:
        return False
    return True


def _open_number(path: Any, flags: int, *words: Any, **options: Any) -> int:
    known = options.get("dir_fd") is not None or _exists(path)
    if not flags & os.O_CREAT and hidden(path):
        raise _missing(path)
    number = _os_open(path, flags, *words, **options)
    if not known:
        mark(path)
    return number


def _open_file(path: Any, mode: str = "r", *words: Any, **options: Any) -> Any:
    if isinstance(path, int):
        return _open(path, mode, *words, **options)
    if mode.startswith("r") and hidden(path):
        raise _missing(path)
    known = _exists(path) if mode[0] in "wax" else True
    file = _open(path, mode, *words, **options)
    if not known:
        mark(path)
    return file


def _make_folder(path: Any, *words: Any, **options: Any) -> None:
    _mkdir(path, *words, **options)
    mark(path)


def install() -> None:
    os.stat, os.lstat = _looking(_stat), _looking(_lstat)
    os.utime, os.truncate = _looking(_utime), _looking(_truncate)
    os.listdir, os.scandir = _list, _Scan  # type: ignore[assignment]
    os.open, os.mkdir = _open_number, _make_folder
    os.replace, os.rename = _making(_replace), _making(_rename)
    builtins.open = io.open = _open_file  # type: ignore[assignment]


if os.environ.get(SHARED):
    install()
