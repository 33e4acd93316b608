"""The folder of a trace while it is written, and its renaming: one writer at a time, and never an
incomplete trace under the final name.
"""

import ctypes
import errno
import os
import shutil
from pathlib import Path

from moe_lab.errors import TraceError, TraceStorageError, expected

try:
    import fcntl
except ImportError:  # pragma: no cover - not on Windows
    fcntl = None  # type: ignore[assignment]

INCOMPLETE_SUFFIX = ".incomplete"
LOCK_FILE = "writer.lock"


def lock(folder: Path) -> int | None:
    """Lock ``folder`` for this writer; the system releases the lock when the process ends for any
    reason.

    Raises ``TraceError`` where another writer holds it. Returns the descriptor to close, or None
    where the system has no such locks.
    """
    if fcntl is None:
        return None
    descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        got = "one that is writing it now"
        raise TraceError(
            expected(
                f"no other writer of {folder}", got, "another folder, or waiting until it ends"
            ),
            field="folder",
        ) from error
    return descriptor


def unlock(folder: Path, descriptor: int | None) -> None:
    if descriptor is not None:
        (folder / LOCK_FILE).unlink(missing_ok=True)
        os.close(descriptor)


def put_in_place(new: Path, target: Path) -> None:
    """Give ``new`` the name ``target``.

    An older folder there is swapped out in one step where the system can, and removed after.
    """
    try:
        if put_where_none_is(new, target):
            return
        if _exchange(new, target):
            shutil.rmtree(new, ignore_errors=True)
            return
        aside = new.with_name(new.name + "-old")
        os.rename(target, aside)
        try:
            os.rename(new, target)
        except OSError:
            os.rename(aside, target)
            raise
        shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        raise TraceStorageError(
            f"cannot write {target}: {error.strerror or error}; try another folder"
        ) from error


def put_where_none_is(new: Path, target: Path) -> bool:
    """Give ``new`` the name ``target``; False where a folder with files has it, of whichever
    process. Raises ``OSError``.
    """
    try:
        os.rename(new, target)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            return False
        raise
    return True


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names atomically with Linux's renameat2(RENAME_EXCHANGE); False where that does not
    exist.
    """
    at_fdcwd, rename_exchange = -100, 2
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    return (
        renameat2(at_fdcwd, os.fsencode(first), at_fdcwd, os.fsencode(second), rename_exchange) == 0
    )
