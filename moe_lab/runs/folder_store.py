"""The run store of a folder: ``sweep.json`` (the plan) and one folder per run.

What a run is up to is read from its folder alone, so any process on any machine that sees the
folder knows it.
"""

import os
import random
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from moe_lab.errors import RunError, expected, require
from moe_lab.files import parse_json, read_regular, remove_temporaries, write_json, write_text
from moe_lab.runs.failures import Failure, read_failure, write_failure
from moe_lab.runs.folder_claims import Claim, acquire, holder
from moe_lab.runs.layout import (
    CHECKPOINT,
    DAMAGED_CHECKPOINT,
    DONE,
    PLAN,
    RESUMED_FROM,
    STATUS,
    WAITS,
    RunState,
)
from moe_lab.runs.plan import SCHEMA_VERSION, PlannedSweep, check_plan, plan_entry
from moe_lab.runs.record import Progress, RunRecord, read_object, read_run, state_of
from moe_lab.runs.waits import Waits

PATIENCE_SECONDS = 300.0
"""How long a process waits for its turn to add to the plan; the plan of a large sweep takes a good
part of a second to write.
"""


class RunStore:
    """The runs of one sweep in a folder; the methods are those of ``store.Store``."""

    is_folder = True

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)

    def path(self, run: str) -> Path:
        return self.folder / run

    def state(self, run: str) -> RunState:
        return state_of(self.path(run))

    def states(self, runs: Iterable[str]) -> dict[str, RunState]:
        return {run: self.state(run) for run in runs}

    def progress(self, run: str) -> Progress:
        return Progress.of(read_object(self.path(run) / STATUS))

    def failure(self, run: str) -> Failure:
        return read_failure(self.path(run))

    def read(self, run: str, name: str) -> bytes | None:
        try:
            return read_regular(self.path(run) / name)
        except FileNotFoundError:
            return None

    def records(self, runs: Sequence[str]) -> Iterator[RunRecord]:
        return (read_run(self.path(run)) for run in runs)

    def record_failure(self, run: str, failure: Failure) -> None:
        claim = acquire(self.path(run))
        if claim is not None:
            with claim:
                if not (self.path(run) / DONE).exists():
                    write_failure(self.path(run), failure)

    def waits(self) -> Waits:
        try:
            return Waits.of(read_regular(self.folder / WAITS))
        except OSError:
            return Waits()

    def record_waits(self, waits: Waits) -> None:
        if waits.runs:
            write_text(self.folder / WAITS, waits.content())
        else:
            (self.folder / WAITS).unlink(missing_ok=True)

    def set_checkpoint_aside(self, run: str) -> None:
        with suppress(FileNotFoundError):
            os.replace(self.path(run) / CHECKPOINT, self.path(run) / DAMAGED_CHECKPOINT)

    def tidy(self, finished: Iterable[str]) -> None:
        for run in finished:
            for name in RESUMED_FROM:
                (self.path(run) / name).unlink(missing_ok=True)

    def plan(self) -> dict[str, Any]:
        path = self.folder / PLAN
        require(
            path.exists(),
            f"a sweep folder with {PLAN}",
            f"{self.folder} without one",
            "moe-lab sweep run first",
            error=RunError,
        )
        try:
            plan = parse_json(read_regular(path))
        except (OSError, ValueError) as error:
            hint = "running the sweep again into another folder"
            raise RunError(expected("a readable plan", f"{path}: {error}", hint)) from error
        return check_plan(plan, path)

    def add(self, sweep: PlannedSweep) -> None:
        entry, runs = plan_entry(sweep)
        # A plan only grows and is replaced whole: seeing that it has a sweep needs no claim.
        if self._has(entry["hash"]):
            return
        with self._claim_plan():
            remove_temporaries(self.folder, PLAN)
            plan = {"schema_version": SCHEMA_VERSION, "sweeps": [], "runs": {}}
            if (self.folder / PLAN).exists():
                plan = self.plan()
            if all(other["hash"] != entry["hash"] for other in plan["sweeps"]):
                grown = {"sweeps": [*plan["sweeps"], entry], "runs": plan["runs"] | runs}
                write_json(self.folder / PLAN, plan | grown)

    def _has(self, sweep: str) -> bool:
        return (self.folder / PLAN).exists() and any(
            other["hash"] == sweep for other in self.plan()["sweeps"]
        )

    def _claim_plan(self) -> Claim:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while (claim := acquire(self.folder)) is None:
            if time.monotonic() > deadline:
                by = holder(self.folder) or "one process after the other"
                waited = f"has been held by {by} for {PATIENCE_SECONDS:.0f} s; try again later"
                raise RunError(f"{self.folder / PLAN} {waited}")
            time.sleep(random.uniform(0.05, 0.5))
        return claim

    def check_writable(self) -> None:
        probe = self.folder / ".writable"
        write_text(probe, " " * 65536)
        probe.unlink(missing_ok=True)

    @contextmanager
    def readable(self) -> Iterator[Path]:
        yield self.folder
