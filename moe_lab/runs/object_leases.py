"""The lease of a run in an object store: it names the process that trains the run, and that process
renews it.

A lease is an object with its owner's name. Object stores need not have an exclusive create, so the
guarantee is weaker than that of ``folder_claims``: a worker that finds no living lease writes its
own, waits, and goes on only if its own still stands. Two workers that do so at the same moment may
train the same run at worst; the first to renew then sees the other's name and stops. Nothing is
lost by it: runs of one configuration are equal to the bit, objects appear whole, and ``done`` is
written last by either.

A lease on this host is alive while its process is; one of another host is alive while it was
renewed within ``SILENT_SECONDS`` of the store's clock. The clocks of two machines are never
compared.
"""

import json
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict

from moe_lab.errors import BusyError, RunError
from moe_lab.runs.bucket import Bucket
from moe_lab.runs.owners import Owner, living, owner_of_this_process
from moe_lab.runs.record import read_object

RENEW_SECONDS = 15.0
SILENT_SECONDS = 90.0
SETTLE_SECONDS = 0.5
"""Between writing a lease and trusting it: longer than between another's look and its write."""


def living_owner(bucket: Bucket, name: str) -> str | None:
    """The process that holds a valid lease, in words; None if there is none."""
    try:
        owner = Owner(**read_object(bucket.read(name))["where"])
    except (KeyError, TypeError):
        return None

    def renewed() -> bool:
        age = bucket.age(name)
        return age is not None and abs(age) < SILENT_SECONDS

    return living(owner, renewed)


def _key(bucket: Bucket, name: str) -> object:
    return read_object(bucket.read(name)).get("key")


class Lease:
    """The right to train one run, held until ``release``, the end of the ``with`` block, or the end
    of the process.
    """

    def __init__(self, bucket: Bucket, name: str, key: str, on_lost: Callable[[], None]) -> None:
        self._bucket, self._name, self._key, self._on_lost = bucket, name, key, on_lost
        self._released = threading.Event()
        self._renewals = 0
        self._thread = threading.Thread(target=self._renew, daemon=True)
        self._thread.start()

    def _renew(self) -> None:
        while not self._released.wait(RENEW_SECONDS):
            try:
                key = _key(self._bucket, self._name)
                if key == self._key:
                    self._renewals += 1
                    _write(self._bucket, self._name, self._key, self._renewals)
            except RunError:  # a real fault of the store shows when the run's files are copied
                continue
            if key != self._key and not self._released.is_set():
                self._on_lost()
                return

    def confirm(self) -> None:
        """Raise ``BusyError`` if another process took the lease over, as it may while this one
        could not renew it.
        """
        if _key(self._bucket, self._name) != self._key:
            raise BusyError("another worker took over the lease of this run")

    def __enter__(self) -> "Lease":
        return self

    def __exit__(self, *_: object) -> None:
        self._released.set()
        self._thread.join()
        with suppress(RunError):  # a lease that stays ends with its process, or by its silence
            if _key(self._bucket, self._name) == self._key:
                self._bucket.delete([self._name])


def take(bucket: Bucket, name: str, on_lost: Callable[[], None] = lambda: None) -> Lease | None:
    """Take the lease ``name``; None while another process holds it.

    ``on_lost`` is called from a thread when another took it over.
    """
    if living_owner(bucket, name):
        return None
    key = uuid.uuid4().hex
    _write(bucket, name, key, 0)
    time.sleep(SETTLE_SECONDS)
    return Lease(bucket, name, key, on_lost) if _key(bucket, name) == key else None


def _write(bucket: Bucket, name: str, key: str, renewals: int) -> None:
    lease = {"key": key, "where": asdict(owner_of_this_process()), "renewals": renewals}
    bucket.write(name, json.dumps(lease).encode())
