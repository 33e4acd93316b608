"""The run store on an object store: what ``RunStore`` is for a folder, for an fsspec URL.

    sweeps/<hash>.json          a plan, named by its content: two sweeps that are added at once need no lock
    state/<run>/                small files that say what a run is up to: lease, status, result, error, log, done (written last)
    files/<run>/                everything else: checkpoint while it trains, then metrics, weights, trace

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

from moe_lab import failures
from moe_lab.errors import RunError, expected
from moe_lab.files import below, content_hash
from moe_lab.sweeps.bucket import Bucket, parse
from moe_lab.sweeps.config import SweepConfig
from moe_lab.sweeps.leases import living_owner
from moe_lab.sweeps.store import (
    DONE,
    PLAN,
    SCHEMA_VERSION,
    Progress,
    Record,
    RunState,
    RunStore,
    check_run_names,
    open_store,
    plan_entry,
)

STATE, FILES, SWEEPS = "state", "files", "sweeps"
LEASE, STATUS, RESULT = "lease.json", "status.json", "result.json"
STATE_FILES = ("config.json", STATUS, RESULT, failures.LOG, failures.ERROR)
"""Of a run's folder, what goes to ``state/``; ``done`` follows when everything else is there."""
PROGRESS_SECONDS = 2.0


class ObjectStore:
    """See ``RunStore``, whose methods these are."""

    def __init__(self, url: str) -> None:
        self.folder = url.rstrip("/")
        self.bucket = Bucket(url)
        self.token = uuid.uuid4().hex[:8]
        self._progress: dict[str, tuple[float, Progress]] = {}

    def path(self, run: str) -> Path:
        """Where a worker keeps claim and log of this call's attempt at a run, on its own machine."""
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
        if failures.ERROR in names:
            return RunState.FAILED
        return RunState.INTERRUPTED if names else RunState.PENDING

    def _names(self, run: str = "") -> dict[str, set[str]]:
        """Run -> names of its state."""
        found: dict[str, set[str]] = {}
        for name in self.bucket.names(f"{STATE}/{run}".rstrip("/")):
            _, owner, own = name.split("/", 2)
            found.setdefault(owner, set()).add(own)
        return found

    def progress(self, run: str) -> Progress:
        """At most ``PROGRESS_SECONDS`` old: whoever watches asks several times a second."""
        read_at, known = self._progress.get(run, (-PROGRESS_SECONDS, Progress()))
        if time.monotonic() - read_at >= PROGRESS_SECONDS:
            known = Progress.of(parse(self.bucket.read(f"{STATE}/{run}/{STATUS}")))
            self._progress[run] = time.monotonic(), known
        return known

    def error(self, run: str) -> str:
        return failures.first_line(_text(self.bucket.read(f"{STATE}/{run}/{failures.ERROR}")))

    def record_failure(self, run: str, reason: str) -> None:
        if self.state(run) not in (RunState.FINISHED, RunState.RUNNING, RunState.FAILED):
            self.bucket.write(f"{STATE}/{run}/{failures.ERROR}", f"{reason}\n".encode())

    def records(self, runs: Sequence[str]) -> Iterator[Record]:
        names = self._names()
        states = {run: self._state(run, names.get(run, set())) for run in runs}
        wanted = {
            STATUS: [run for run in runs if STATUS in names.get(run, ())],
            RESULT: [run for run in runs if states[run] is RunState.FINISHED],
            failures.LOG: [
                run for run in runs if states[run] is RunState.FAILED and failures.LOG in names[run]
            ],
            failures.ERROR: [run for run in runs if states[run] is RunState.FAILED],
        }
        found = self.bucket.read_many(
            f"{STATE}/{run}/{name}" for name, owners in wanted.items() for run in owners
        )
        for run in runs:
            status, result, log, error = (found.get(f"{STATE}/{run}/{name}") for name in wanted)
            lines = failures.excerpt(_text(log), _text(error)) if error is not None else ""
            reason = failures.first_line(_text(error))
            yield Record(states[run], Progress.of(parse(status)), parse(result), reason, lines)

    def plan(self, configs: bool = True) -> dict[str, Any]:
        found = self.bucket.read_many(self.bucket.names(SWEEPS))
        plans = sorted(
            (parse(content) for content in found.values()),
            key=lambda plan: (plan.get("added", 0), plan.get("hash", "")),
        )
        if not plans:
            raise RunError(
                expected(
                    f"a sweep's store with {SWEEPS}/",
                    f"{self.folder} without one",
                    "moe-lab sweep run first",
                )
            )
        versions = {plan.get("schema_version") for plan in plans} - {SCHEMA_VERSION}
        if versions:
            raise RunError(
                expected(
                    f"plans of version {SCHEMA_VERSION}",
                    f"{versions.pop()} in {self.folder}",
                    "another URL",
                )
            )
        sweeps = [
            {key: plan[key] for key in ("hash", "name", "question", "preset", "runs")}
            for plan in plans
        ]
        runs = {run: entry for plan in plans for run, entry in plan["entries"].items()}
        return check_run_names(
            {"schema_version": SCHEMA_VERSION, "sweeps": sweeps, "runs": runs}, self.folder
        )

    def add(self, sweep: SweepConfig) -> None:
        """Write the plan under its own hash; where it lies already, nothing changes."""
        entry, runs = plan_entry(sweep)
        name = f"{SWEEPS}/{entry['hash']}.json"
        if self.bucket.read(name) is None:
            # The time only orders plans for the reader.
            plan = {
                "schema_version": SCHEMA_VERSION,
                "added": time.time(),
                **entry,
                "entries": runs,
            }
            self.bucket.write(name, json.dumps(plan).encode())

    def check_writable(self) -> None:
        self.bucket.check_writable()


def fetch(store: ObjectStore, folder: Path) -> None:
    """Make ``folder`` a sweep's folder for readers: the plan, the state and metrics of every run,
    and one trace per arm and ratio.
    """
    plan = store.plan()
    names = store.bucket.names(STATE)
    contents = store.bucket.read_many(name for name in names if not name.endswith(LEASE))
    finished = [run for run in plan["runs"] if f"{STATE}/{run}/{DONE}" in contents]
    metrics = store.bucket.read_many(f"{FILES}/{run}/metrics.parquet" for run in finished)
    for name, content in (contents | metrics).items():
        path = below(folder, name.split("/", 1)[1], store.folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (folder / PLAN).write_text(json.dumps(plan), encoding="utf-8")
    points: dict[tuple[Any, Any], str] = {}
    for run in sorted(finished, key=lambda run: plan["runs"][run]["seed"]):
        points.setdefault((plan["runs"][run]["arm"], plan["runs"][run]["ratio"]), run)
    for run in points.values():
        for name in store.bucket.names(f"{FILES}/{run}/trace"):
            store.bucket.download(name, below(folder, name.split("/", 1)[1], store.folder))


@contextmanager
def readable(place: Path | str) -> Iterator[Path]:
    """The folder ``place``, or a temporary one with what a report needs of the store at that URL."""
    store = open_store(place)
    if isinstance(store, RunStore):
        yield store.folder
        return
    with tempfile.TemporaryDirectory(prefix="moe-lab-report-") as folder:
        fetch(store, Path(folder))
        yield Path(folder)


def scratch_name(url: str) -> str:
    return f"moe_lab-{content_hash(url)}"


def _text(content: bytes | None) -> str:
    return (content or b"")[-failures.TAIL_BYTES :].decode("utf-8", errors="replace")
