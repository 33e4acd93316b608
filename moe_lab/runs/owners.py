"""Which process holds a claim, a lease or a temporary folder, and whether that process still runs.

A process on this host is looked up; one of another host lives while it keeps renewing what it holds
(``folder_claims``, ``object_leases``).
"""

import hashlib
import os
import re
import shutil
import socket
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from moe_lab.errors import StorageError
from moe_lab.files import cannot_write

_TEMPORARY = re.compile(r"moe_lab-[a-z]+-([0-9a-f]{16})-(\d{1,9})-(\d{1,18})-\w+")
"""Name of a temporary folder: a digest of ``this_host``, process id and start time."""


@dataclass(frozen=True)
class Owner:
    host: str
    pid: int
    started: int | None
    """The kernel's start time of the process in clock ticks since boot; None where ``/proc`` is
    missing.
    """

    def __post_init__(self) -> None:
        """Raises ``TypeError`` for values that no claim of ours has."""
        started = self.started is None or isinstance(self.started, int)
        if not (isinstance(self.host, str) and isinstance(self.pid, int) and started):
            raise TypeError(f"expected host, pid and start time, got {self.host!r:.100}")


@cache
def this_host() -> str:
    """This machine, this boot and this process-id namespace: process ids mean something only within
    all three.
    """
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    parts = [socket.gethostname()]
    if boot.exists():
        parts.append(boot.read_text().strip()[:8])
    if namespace.is_symlink():
        parts.append(os.readlink(namespace).strip("pid:[]"))
    return "/".join(parts)


def process_start(pid: int) -> int | None:
    """Start time of a running process; None: it is gone, a zombie, or cannot be looked up."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def owner_alive(owner: Owner) -> bool:
    if owner.started is not None:
        return process_start(owner.pid) == owner.started
    try:
        os.kill(owner.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def owner_of_this_process() -> Owner:
    return Owner(this_host(), os.getpid(), process_start(os.getpid()))


def living(owner: Owner, renewed: Callable[[], bool]) -> str | None:
    """The owner in words ("process 12 on host") if its process runs, else None. For an owner on
    another host, ``renewed`` says whether it renewed its claim lately.
    """
    alive = owner_alive(owner) if owner.host == this_host() else renewed()
    return f"process {owner.pid} on {owner.host.split('/')[0]}" if alive else None


@contextmanager
def temporary_folder(kind: str) -> Iterator[Path]:
    """A folder of this user alone, removed when the block ends. One that a killed process of this
    host left is removed by the next process that makes one.

    Args:
        kind: lower-case letters, a part of its name.

    Raises:
        StorageError: no temporary folder takes it.
    """
    owner = owner_of_this_process()
    prefix = f"moe_lab-{kind}-{_host_digest()}-{owner.pid}-{owner.started or 0}-"
    try:
        place = Path(tempfile.gettempdir())
        _remove_abandoned(place)
        folder = tempfile.TemporaryDirectory(prefix=prefix, dir=place, ignore_cleanup_errors=True)
    except OSError as error:
        raise StorageError(cannot_write("a temporary folder (TMPDIR)", error)) from error
    with folder as name:
        yield Path(name)


def _host_digest() -> str:
    return hashlib.sha256(this_host().encode()).hexdigest()[:16]


def _remove_abandoned(place: Path) -> None:
    """Remove the temporary folders in ``place`` whose processes ran on this host and ended. Where
    anyone may write there, a folder of another user or open to others, or a link, is left alone.
    """
    with suppress(OSError):
        for path in place.glob("moe_lab-*"):
            match = _TEMPORARY.fullmatch(path.name)
            if match is None or match[1] != _host_digest():
                continue
            if owner_alive(Owner(this_host(), int(match[2]), int(match[3]) or None)):
                continue
            with suppress(OSError):
                found = path.lstat()
                mine = not hasattr(os, "geteuid") or found.st_uid == os.geteuid()
                if stat.S_ISDIR(found.st_mode) and mine and not found.st_mode & 0o077:
                    shutil.rmtree(path, ignore_errors=True)
