"""Which process holds a claim or a lease, and whether that process still runs.

A process on this host is looked up; one of another host lives while it keeps renewing what it holds
(``folder_claims``, ``object_leases``).
"""

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path


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
