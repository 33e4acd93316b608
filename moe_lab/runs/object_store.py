"""The run store of an object store (an fsspec URL).

    sweeps/<hash>.json    a plan, named by its content: adding one needs no lock
    waits.json            runs that wait in a cluster's queue, while some do
    state/<run>/          small files: lease, status, result, error, log, done (written last)
    files/<run>/          the others: checkpoint while it trains; metrics, weights, trace

State lies apart so that one listing tells the state of ten thousand runs. A worker trains in a
scratch folder of its own machine and copies from there (``mirror.py``); it writes below its own
run's names only.
"""

import json
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moe_lab.errors import RunError, require
from moe_lab.files import below, content_hash
from moe_lab.runs import failures
from moe_lab.runs.bucket import Bucket
from moe_lab.runs.failures import Failure
from moe_lab.runs.layout import (
    CHECKPOINT,
    CONFIG,
    DAMAGED_CHECKPOINT,
    DONE,
    ERROR,
    FAILURE,
    LOG,
    METRICS,
    PLAN,
    RESULT,
    RESUMED_FROM,
    STATUS,
    TRACE,
    WAITS,
    RunState,
)
from moe_lab.runs.object_leases import living_owner
from moe_lab.runs.owners import temporary_folder
from moe_lab.runs.plan import SCHEMA_VERSION, PlannedSweep, check_plan, plan_entry
from moe_lab.runs.record import Progress, RunRecord, read_object
from moe_lab.runs.waits import Waits

STATE, FILES, SWEEPS = "state", "files", "sweeps"
LEASE = "lease.json"
STATE_FILES = (CONFIG, STATUS, RESULT, LOG, FAILURE, ERROR)
"""Of a run's folder, what goes to ``state/``; ``done`` follows when everything else is there."""
PROGRESS_SECONDS = 2.0


class ObjectStore:
    """The runs of one sweep in an object store; the methods are those of ``store.Store``."""

    is_folder = False

    def __init__(self, url: str) -> None:
        self.folder = url.rstrip("/")
        self.bucket = Bucket(url)
        self.token = uuid.uuid4().hex[:8]
        self._progress: dict[str, tuple[float, Progress]] = {}

    def path(self, run: str) -> Path:
        """The folder on a worker's own machine that holds the claim and the log of this call's
        attempt.
        """
        return Path(tempfile.gettempdir()) / f"{scratch_name(self.folder)}-{run}-{self.token}"

    def states(self, runs: Iterable[str]) -> dict[str, RunState]:
        names = self._names()
        return {run: self._state(run, names.get(run, set())) for run in runs}

    def state(self, run: str) -> RunState:
        return self._state(run, self._names(run).get(run, set()))

    def _state(self, run: str, names: set[str]) -> RunState:
        if DONE in names:
            return RunState.FINISHED
        if LEASE in names and living_owner(self.bucket, f"{STATE}/{run}/{LEASE}"):
            return RunState.RUNNING
        if ERROR in names:
            return RunState.FAILED
        return RunState.INTERRUPTED if names else RunState.PENDING

    def _names(self, run: str = "") -> dict[str, set[str]]:
        """Run -> names of its state."""
        names: dict[str, set[str]] = {}
        for path in self.bucket.names(f"{STATE}/{run}".rstrip("/")):
            parts = path.split("/", 2)
            if len(parts) == 3:  # else an object beside the runs, which is none of ours
                names.setdefault(parts[1], set()).add(parts[2])
        return names

    def progress(self, run: str) -> Progress:
        """The progress of runs, at most ``PROGRESS_SECONDS`` old: a display asks several times a
        second.
        """
        read_at, known = self._progress.get(run, (-PROGRESS_SECONDS, Progress()))
        if time.monotonic() - read_at >= PROGRESS_SECONDS:
            known = Progress.of(read_object(self.bucket.read(f"{STATE}/{run}/{STATUS}")))
            self._progress[run] = time.monotonic(), known
        return known

    def failure(self, run: str) -> Failure:
        return Failure.of(
            *(_text(self.bucket.read(f"{STATE}/{run}/{name}")) for name in (ERROR, FAILURE))
        )

    def record_failure(self, run: str, failure: Failure) -> None:
        if self.state(run) not in (RunState.FINISHED, RunState.RUNNING, RunState.FAILED):
            write_failure(self.bucket, run, failure)

    def waits(self) -> Waits:
        return Waits.of(self.bucket.read(WAITS))

    def record_waits(self, waits: Waits) -> None:
        if waits.runs:
            self.bucket.write(WAITS, waits.content().encode())
        else:
            self.bucket.delete([WAITS])

    def set_checkpoint_aside(self, run: str) -> None:
        names = (f"{FILES}/{run}/{name}" for name in (CHECKPOINT, DAMAGED_CHECKPOINT))
        self.bucket.rename(*names)

    def tidy(self, finished: Iterable[str]) -> None:
        """Remove checkpoints of finished runs that still have a lease. A worker removes its
        checkpoint before it releases its lease, so no other run can have one.
        """
        leased = [run for run, names in self._names().items() if LEASE in names]
        for run in set(leased) & set(finished):
            self.bucket.delete(f"{FILES}/{run}/{name}" for name in RESUMED_FROM)
            self.bucket.delete([f"{STATE}/{run}/{LEASE}"])

    def read(self, run: str, name: str) -> bytes | None:
        return self.bucket.read(f"{STATE if name in STATE_FILES else FILES}/{run}/{name}")

    def records(self, runs: Sequence[str]) -> Iterator[RunRecord]:
        names = self._names()
        states = {run: self._state(run, names.get(run, set())) for run in runs}
        failed = [run for run in runs if states[run] is RunState.FAILED]
        wanted = {
            STATUS: [run for run in runs if STATUS in names.get(run, ())],
            RESULT: [run for run in runs if states[run] is RunState.FINISHED],
            LOG: [run for run in failed if LOG in names[run]],
            ERROR: failed,
        }
        contents = self.bucket.read_many(
            f"{STATE}/{run}/{name}" for name, owners in wanted.items() for run in owners
        )
        for run in runs:
            status, result, log, error = (contents.get(f"{STATE}/{run}/{name}") for name in wanted)
            yield RunRecord(
                Path(run),
                states[run],
                read_object(result),
                failures.first_line(_text(error)),
                progress=Progress.of(read_object(status)),
                last_lines="" if error is None else failures.excerpt(_text(log), _text(error)),
            )

    def plan(self) -> dict[str, Any]:
        contents = self.bucket.read_many(self.bucket.names(SWEEPS))
        require(
            contents,
            f"a sweep's store with {SWEEPS}/",
            f"{self.folder} without one",
            "the URL of a sweep or of a trace, or moe-lab sweep run first",
            error=RunError,
        )
        plans = [
            check_plan(_as_plan(read_object(content)), f"{self.folder}/{name}")
            for name, content in contents.items()
        ]
        plans.sort(key=lambda plan: (plan["added"], plan["sweeps"][0]["hash"]))
        return {
            "schema_version": SCHEMA_VERSION,
            "sweeps": [sweep for plan in plans for sweep in plan["sweeps"]],
            "runs": {run: entry for plan in plans for run, entry in plan["runs"].items()},
        }

    def add(self, sweep: PlannedSweep) -> None:
        """Write the plan under its own hash. A plan that is there already stays as it is."""
        entry, runs = plan_entry(sweep)
        name = f"{SWEEPS}/{entry['hash']}.json"
        if self.bucket.read(name) is None:
            # The time only orders plans for the reader.
            head = {"schema_version": SCHEMA_VERSION, "added": time.time()}
            self.bucket.write(name, json.dumps({**head, **entry, "entries": runs}).encode())

    def check_writable(self) -> None:
        self.bucket.check_writable()

    @contextmanager
    def readable(self) -> Iterator[Path]:
        with temporary_folder("report") as folder:
            self._fetch(folder)
            yield folder

    def _fetch(self, folder: Path) -> None:
        """Make ``folder`` a sweep's folder: the plan, the state and metrics of every run, and one
        trace per arm and ratio.
        """
        plan = self.plan()
        names = self.bucket.names(STATE)
        contents = self.bucket.read_many(name for name in names if not name.endswith(LEASE))
        finished = [run for run in plan["runs"] if f"{STATE}/{run}/{DONE}" in contents]
        metrics = self.bucket.read_many(f"{FILES}/{run}/{METRICS}" for run in finished)
        for name, content in (contents | metrics).items():
            path = below(folder, name.split("/", 1)[1], self.folder)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        (folder / PLAN).write_text(json.dumps(plan), encoding="utf-8")
        points: dict[tuple[Any, Any], str] = {}
        for run in sorted(finished, key=lambda run: plan["runs"][run]["seed"]):
            points.setdefault((plan["runs"][run]["arm"], plan["runs"][run]["ratio"]), run)
        for run in points.values():
            for name in self.bucket.names(f"{FILES}/{run}/{TRACE}"):
                self.bucket.download(name, below(folder, name.split("/", 1)[1], self.folder))


def write_failure(bucket: Bucket, run: str, failure: Failure, traceback: str = "") -> None:
    for name, text in failure.files(traceback).items():
        bucket.write(f"{STATE}/{run}/{name}", text.encode())


def scratch_name(url: str) -> str:
    return f"moe_lab-{content_hash(url)}"


def _text(content: bytes | None) -> str:
    return (content or b"")[-failures.TAIL_BYTES :].decode("utf-8", errors="replace")


def _as_plan(values: dict[str, Any]) -> dict[str, Any]:
    """The content of ``sweeps/<hash>.json``, one sweep, in the form of a plan."""
    runs, added = values.get("entries"), values.get("added")
    keys = ("hash", "name", "question", "preset", "runs")
    return {
        "schema_version": values.get("schema_version"),
        "added": added if isinstance(added, int | float) else 0,
        "sweeps": [{key: values.get(key) for key in keys}],
        "runs": runs,
    }
