"""The place that is watched: a folder, or a local copy of what changed in an object store.

Nothing is ever written to it. Whether a run of another machine lives is decided by the dates of the
files alone: they are compared with the newest date of the place, never with this machine's clock.
"""

import json
import os
import tempfile
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from moe_lab.errors import RunError, require
from moe_lab.files import below
from moe_lab.runs.bucket import Bucket
from moe_lab.runs.folder_claims import SILENT_SECONDS, claimed, holder
from moe_lab.runs.layout import CONFIG, DONE, ERROR, PLAN, STATUS
from moe_lab.runs.object_leases import SILENT_SECONDS as SILENT_LEASE
from moe_lab.runs.object_store import FILES, LEASE, STATE, STATE_FILES, SWEEPS, ObjectStore
from moe_lab.runs.owners import Owner, living
from moe_lab.runs.record import read_object
from moe_lab.runs.store import open_store
from moe_lab.runs.tables import TABLES

LOGS = tuple(table.log for table in TABLES.values())
TABLE_FILES = (*LOGS, *(table.parquet for table in TABLES.values()))
CLOCKS_AGREE = 120.0
"""Seconds that the clock of a file server is taken to be behind this machine's, at most."""
WRONG_CLOCK = 86400.0
"""A date so many seconds ahead of this machine's clock is none of the file server's."""


class Clock:
    """The time by the clock that dates the files of a place: at least the newest date that was
    seen, carried on by this machine's own clock.
    """

    def __init__(self) -> None:
        self._ahead = time.time() - CLOCKS_AGREE - time.monotonic()

    def see(self, date: float) -> None:
        if date < time.time() + WRONG_CLOCK:
            self._ahead = max(self._ahead, date - time.monotonic())

    def now(self, _folder: Path | None = None) -> float:
        return time.monotonic() + self._ahead


class Place:
    """A folder that is watched: of one run, or of many.

    Attributes:
        name: the place as the user wrote it.
        folder: where its files are read.
        alone: the folder is a run's own.
        seconds: between two looks at it, at least.
    """

    seconds = 1.0

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.alone = is_run(_names(folder))
        self.clock = Clock()

    def sync(self) -> None:
        """Bring the folder up to date, where it is a copy."""

    def path(self, run: str) -> Path:
        return self.folder if self.alone else self.folder / run

    def held(self, folder: Path, names: Collection[str]) -> bool:
        """Whether a process trains the run in ``folder``. One without a claim (of ``moe-lab train``
        or of another program) does while it writes.
        """
        if claimed(names):
            return holder(folder, names, self.clock.now) is not None
        if ERROR in names:
            return False
        dates = [_date(folder / name) for name in (STATUS, *LOGS) if name in names]
        return bool(dates) and self.clock.now() - max(dates) < SILENT_SECONDS


class StorePlace(Place):
    """An object store, of which the small files are copied to a temporary folder as they change."""

    seconds = 4.0

    def __init__(self, store: ObjectStore) -> None:
        self._store, self._bucket = store, Bucket(store.folder)
        self._temporary = tempfile.TemporaryDirectory(prefix="moe-lab-watch-")
        self._copied: dict[str, Any] = {}
        self._renewed: dict[str, float] = {}
        super().__init__(store.folder, Path(self._temporary.name))
        self.sync()

    def sync(self) -> None:
        """Copy what changed since the last call, ``done`` of each run last."""
        listed: dict[str, Any] = {}
        for folder in (SWEEPS, STATE, FILES):  # a run whose end is listed has all its files listed
            listed |= self._bucket.signatures(folder)
        changed = [name for name in listed if self._copied.get(name) != listed[name]]
        if any(name.startswith(SWEEPS) for name in changed):
            self._write(self.folder / PLAN, json.dumps(self._store.plan()).encode())
        for name in sorted(filter(_wanted, changed), key=lambda name: name.endswith(f"/{DONE}")):
            self._copy(name)
        for name in filter(_wanted, set(self._copied) - set(listed)):
            below(self.folder, name.split("/", 1)[1], self.name).unlink(missing_ok=True)
        self._copied = listed

    def _copy(self, name: str) -> None:
        content = self._bucket.read(name)
        if content is None:
            return
        self._write(below(self.folder, name.split("/", 1)[1], self.name), content)
        if name.endswith(f"/{LEASE}"):
            self._renewed[name.split("/")[1]] = time.monotonic()

    @staticmethod
    def _write(path: Path, content: bytes) -> None:
        path.parent.mkdir(exist_ok=True)
        part = path.with_name(f".tmp-{path.name}")
        part.write_bytes(content)
        os.replace(part, path)

    def held(self, folder: Path, names: Collection[str]) -> bool:
        if LEASE not in names:
            return False
        try:
            owner = Owner(**read_object(folder / LEASE)["where"])
        except (KeyError, TypeError):
            return False
        age = time.monotonic() - self._renewed.get(folder.name, 0.0)
        return living(owner, lambda: age < SILENT_LEASE) is not None


def open_place(place: Path | str) -> Place:
    """The place of a run, a sweep or a folder of runs; or of a store's URL.

    Raises ``RunError`` where there is no run.
    """
    store = open_store(place)
    if isinstance(store, ObjectStore):
        return StorePlace(store)
    folder = Path(store.folder)
    require(
        folder.is_dir(),
        "a run, a sweep, or a folder of runs",
        f"{folder}, a file" if folder.exists() else f"no such folder: {folder}",
        "the folder that `moe-lab sweep run` was given with --out",
        error=RunError,
        field="place",
    )
    return Place(str(place), folder.resolve())  # a run is named by its folder: "." has no name


def is_run(names: Collection[str]) -> bool:
    """Whether a folder with these files is a run's."""
    return CONFIG in names or any(name in names for name in TABLE_FILES)


def _wanted(name: str) -> bool:
    parts = name.split("/")
    wanted = (*STATE_FILES, *TABLE_FILES, DONE, LEASE)
    return len(parts) == 3 and parts[2] in wanted


def _names(folder: Path) -> frozenset[str]:
    try:
        return frozenset(os.listdir(folder))
    except OSError as error:
        raise RunError(f"cannot read {folder}: {error.strerror or error}") from error


def _date(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
