"""Runs that wait in the queue of a cluster for what may never come: said once for each reason, and
kept in the store for ``sweep status``.
"""

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress

from moe_lab.errors import RunError
from moe_lab.runs.store import Store
from moe_lab.runs.waits import Wait, Waits, wait_lines
from moe_lab.sweeps.launchers.protocol import Job
from moe_lab.sweeps.progress import View

AGAIN_SECONDS = 60.0
"""Between two times that unchanged waits are written."""


class Waiting:
    """What a driver last said of runs that wait."""

    def __init__(self, store: Store, jobs: Sequence[Job], view: View) -> None:
        self._store, self._view = store, view
        self._names = {job.run: job.name for job in jobs}
        self._waits: Mapping[str, Wait] = {}
        self._written = time.monotonic()

    def tell(self, waits: Mapping[str, Wait]) -> None:
        """Say the reasons that are new, and write what changed."""
        known = {wait.reason for wait in self._waits.values()}
        new = {run: wait for run, wait in waits.items() if wait.reason not in known}
        for line in wait_lines(new, self._names):
            self._view.say(f"waiting   {line}")
        now = time.monotonic()
        if waits != self._waits or (waits and now - self._written >= AGAIN_SECONDS):
            self._waits, self._written = dict(waits), now
            self._store.record_waits(Waits(waits, time.time()))

    def close(self) -> None:
        if self._waits:
            with suppress(RunError, OSError):  # a store that takes no more: the sweep says so
                self._store.record_waits(Waits())
