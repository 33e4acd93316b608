"""Claims on a folder: which process may write into it. A claim survives ``kill -9``, and only one
process can take it over.

A claim is a small file ``.claim-N`` holding the owner's host, process id and start time. Only the
highest N counts, and it comes into being by an exclusive create, so of all who see claim N
abandoned exactly one can create N + 1. The highest claim is never removed while the folder is
unfinished: giving up empties it and dates it back to 1970. This needs nothing of the file system
but exclusive create, which shared file systems have too, and giving up needs no free space.

On the owner's host a claim is alive while its process is (the start time tells a reused process
id). Seen from another host it is alive while its owner keeps touching it, by the file server's
clock: those of two machines are never compared.
"""

import json
import os
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from moe_lab.errors import RunError, StorageError, require
from moe_lab.files import cannot_write, read_regular
from moe_lab.runs.owners import Owner, living, owner_of_this_process

PREFIX = ".claim-"
_CLAIM = re.compile(re.escape(PREFIX) + "([0-9]{1,18})")
MAX_CLAIM_BYTES = 2**16
HEARTBEAT_SECONDS = 5.0
SILENT_SECONDS = 60.0
"""A claim of another host that was not touched for this long has lost its owner."""


def _numbers(names: Iterable[str]) -> list[int]:
    return [int(match[1]) for name in names if (match := _CLAIM.fullmatch(name))]


def claimed(names: Iterable[str]) -> bool:
    """Whether a folder with these file names was ever claimed."""
    return any(name.startswith(PREFIX) for name in names)


def holder(
    folder: Path,
    names: Iterable[str] | None = None,
    now: Callable[[Path], float] | None = None,
) -> str | None:
    """The process that holds the folder, in words ("process 12 on host"); None if the folder is
    free.

    Args:
        names: of the files in the folder; they save listing it.
        now: the time by the clock that dates the files of a folder. By default a file is written
            there and removed to read it; a caller that must not write has another way.
    """
    numbers = _numbers(os.listdir(folder) if names is None else names)
    return _living_owner(folder / f"{PREFIX}{max(numbers)}", now or _now) if numbers else None


def _living_owner(path: Path, now: Callable[[Path], float]) -> str | None:
    try:
        touched = path.stat().st_mtime
        text = read_regular(path, MAX_CLAIM_BYTES).decode()
    except (OSError, UnicodeDecodeError):  # gone meanwhile, or no claim of ours
        return None

    def age() -> float:
        # The clock that dated the claim may have been wrong: one dated in the future is no newer.
        return abs(now(path.parent) - touched)

    try:
        owner = Owner(**json.loads(text))
    except (ValueError, TypeError, RecursionError):
        # Empty: given back, or created this very moment and not yet written.
        return "a process that is just starting" if age() < HEARTBEAT_SECONDS else None
    return living(owner, lambda: age() < SILENT_SECONDS)


def _now(folder: Path) -> float:
    """The time by the clock that dates the files of ``folder``, which on a shared file system is
    not this machine's.
    """
    probe = folder / f".clock-{uuid.uuid4().hex[:8]}"
    try:
        probe.touch()
        return probe.stat().st_mtime
    except OSError:  # a reader without the right to write
        return time.time()
    finally:
        with suppress(OSError):
            probe.unlink()


def _give_back(path: Path) -> None:
    with suppress(OSError):
        os.truncate(path, 0)
        os.utime(path, (0, 0))


class Claim:
    """The right to write into one folder, held until ``release`` (or the end of the ``with`` block)
    or the end of the process.
    """

    def __init__(self, folder: Path, number: int, on_lost: Callable[[], None]) -> None:
        self.path = folder / f"{PREFIX}{number}"
        self._number = number
        self._on_lost = on_lost
        self._released = threading.Event()
        threading.Thread(target=self._beat, daemon=True).start()

    def _beat(self) -> None:
        while not self._released.wait(HEARTBEAT_SECONDS):
            try:
                os.utime(self.path)
                overtaken = max(_numbers(os.listdir(self.path.parent))) > self._number
            except FileNotFoundError:
                overtaken = True
            except OSError:  # a real fault of the file system shows when the run writes
                continue
            if overtaken and not self._released.is_set():
                self._on_lost()
                return

    def release(self, *, forget: bool = False) -> None:
        """Release the folder.

        ``forget`` removes every trace, which is safe only where a ``done`` file tells newcomers to
        stay out.
        """
        self._released.set()
        if forget:
            for number in _numbers(os.listdir(self.path.parent)):
                with suppress(OSError):
                    (self.path.parent / f"{PREFIX}{number}").unlink()
        else:
            _give_back(self.path)

    def __enter__(self) -> "Claim":
        return self

    def __exit__(self, *_: object) -> None:
        if not self._released.is_set():
            self.release()


def acquire(folder: Path, on_lost: Callable[[], None] = lambda: None) -> Claim | None:
    """Claim ``folder`` (made if missing) for this process; None while a living process holds it.

    ``on_lost`` is called from a thread if another host took the claim over because this process
    stayed silent for too long.
    """
    require(
        not folder.exists() or folder.is_dir(),
        f"a folder at {folder}",
        "a file",
        "removing it",
        error=RunError,
        field="folder",
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        numbers = _numbers(os.listdir(folder))
        if numbers and _living_owner(folder / f"{PREFIX}{max(numbers)}", _now):
            return None
        number = max(numbers, default=0) + 1
        mine = folder / f"{PREFIX}{number}"
        with open(mine, "x") as file:
            try:
                json.dump(asdict(owner_of_this_process()), file)
                file.flush()
            except OSError:
                _give_back(mine)
                raise
        everyone = _numbers(os.listdir(folder))
        if number not in everyone or max(everyone) > number:
            # The folder was listed before the last owner tidied up: a newer claim stands.
            mine.unlink(missing_ok=True)
            return None
        for older in everyone:
            with suppress(OSError):  # an older claim that stays does no harm
                if older < number:
                    (folder / f"{PREFIX}{older}").unlink()
    except FileExistsError:
        return None
    except OSError as error:
        raise StorageError(cannot_write(folder, error)) from error
    return Claim(folder, number, on_lost)
