"""The runs of a place as they are now. Each look reads the files that changed since the last."""

import time
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moe_lab.errors import MoELabError
from moe_lab.number_format import listing
from moe_lab.plain_text import one_line
from moe_lab.report.sources import RESULT_COLUMNS
from moe_lab.runs import RunRecord, RunState, RunStore, read_run
from moe_lab.runs.layout import PLAN, STATUS
from moe_lab.runs.record import file_names, folders_in, state_of
from moe_lab.watch.place import LOGS, Place, is_run

SETTLED_SECONDS = 3.0
"""A folder that changed so lately is looked at again: two changes may bear one date."""
_PLANNED = ("name", "arm", "ratio", "seed")


class Index:
    """The records of the runs of a place.

    Attributes:
        runs: folder name -> record. Of the results only the columns of a report are kept, beside
            arm, ratio and seed of runs that have none yet.
        notes: what cannot be read, one sentence each.
        waiting: folders that changed and were not read yet.
        looked: the runs that the last update read, changed or not.
    """

    def __init__(self, place: Place) -> None:
        self.place = place
        self.runs: dict[str, RunRecord] = {}
        self.notes: dict[str, str] = {}
        self.questions: tuple[str, ...] = ()
        self.waiting: deque[str] = deque()
        self.looked: set[str] = set()
        self._keys: dict[str, Any] = {}
        self._closed: dict[str, str] = {}
        self._plan: dict[str, dict[str, Any]] = {}
        self._plan_key: Any = None

    def update(self, seconds: float | None = None) -> set[str]:
        """Look for changes and read them, for at most ``seconds``; the runs that changed. What is
        left comes with the next call.
        """
        began = time.monotonic()
        before = self.notes.pop("place", "")
        try:
            changed = self._look()
        except (OSError, MoELabError) as error:
            why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            self.notes["place"] = f"{self.place.name} cannot be read: {why}; trying again."
            changed = set()
        if before != self.notes.get("place", ""):
            changed.add("")
        self.looked = set()
        while self.waiting:
            run = self.waiting.popleft()
            try:
                differs = self._read(run)
                self._closed.pop(run, None)
            except OSError as error:
                differs = self.runs.pop(run, None) is not None
                self._closed[run] = error.strerror or str(error)
            if differs:
                changed.add(run)
            self.looked.add(run)
            if seconds is not None and time.monotonic() - began > seconds:
                break
        if self._closed:
            which = listing([f"{one_line(run)} ({why})" for run, why in self._closed.items()], 4)
            self.notes["folders"] = f"Folders that cannot be read: {which}."
        else:
            self.notes.pop("folders", None)
        return changed

    def _look(self) -> set[str]:
        self.place.sync()
        changed = set() if self.place.alone else self._read_plan()
        queued = set(self.waiting)
        here = set()
        for run, modified in self._folders():
            here.add(run)
            self.place.clock.see(modified)
            key = self._key(run, modified)
            if key != self._keys.get(run) and run not in queued:
                self._keys[run] = key
                self.waiting.append(run)
        for run in [run for run in self._keys if run not in here]:
            del self._keys[run]
            self._closed.pop(run, None)
            if self.runs.pop(run, None) is not None:
                changed.add(run)
        for run in self._plan:
            if run not in self.runs and run not in here:
                self.runs[run] = self._pending(run)
                changed.add(run)
        return changed

    def _folders(self) -> Iterator[tuple[str, float]]:
        """Name and date of each folder that may be a run's."""
        if self.place.alone:
            yield self.place.folder.absolute().name, self.place.folder.stat().st_mtime
            return
        for entry in folders_in(self.place.folder):
            yield entry.name, entry.stat().st_mtime

    def _key(self, run: str, modified: float) -> Any:
        """What is another after a change. A run that a process holds is always looked at: a process
        that is killed changes no file.
        """
        record = self.runs.get(run)
        if run in self._closed or abs(time.time() - modified) < SETTLED_SECONDS:
            return object()
        if record is None or record.state is RunState.FINISHED:
            return modified
        if record.state is RunState.RUNNING:
            return object()
        return modified, *(_stamp(self.place.path(run) / name) for name in (STATUS, *LOGS))

    def _read_plan(self) -> set[str]:
        path = self.place.folder / PLAN
        if (key := _stamp(path)) == self._plan_key:
            return set()
        self._plan_key = key
        self.notes.pop(PLAN, None)
        try:
            plan = RunStore(self.place.folder).plan() if key else {}
        except MoELabError as error:
            self.notes[PLAN] = f"The plan cannot be read: {error}."
            return {""}
        self._plan = {
            run: {name: entry[name] for name in _PLANNED}
            for run, entry in plan.get("runs", {}).items()
        }
        self.questions = tuple(dict.fromkeys(s["question"] for s in plan.get("sweeps", ())))
        return {""}

    def _pending(self, run: str) -> RunRecord:
        planned = self._plan[run]
        about = {name: planned[name] for name in ("arm", "ratio", "seed")}
        folder = self.place.path(run)
        name = planned["name"]
        return RunRecord(folder, RunState.PENDING, about, "not started", name, begun=False)

    def _read(self, run: str) -> bool:
        """Read the record of a run; whether it is another than before."""
        folder = self.place.path(run)
        names = file_names(folder)
        if not is_run(names) and run not in self._plan:
            return self.runs.pop(run, None) is not None
        state = state_of(folder, names, lambda: self.place.held(folder, names))
        planned = self._plan.get(run, {})
        record = read_run(folder, names, planned.get("name", ""), state)
        new = _slim(record, planned)
        changed = new != self.runs.get(run)
        self.runs[run] = new
        return changed


def _slim(record: RunRecord, planned: Mapping[str, Any]) -> RunRecord:
    """A record that keeps little memory and holds no files' content. A finished run whose result
    cannot be read is a failed one, as on the page of a report. A training of another program is
    finished where its status says so: it has no result.
    """
    result = {name: record.result[name] for name in RESULT_COLUMNS if name in record.result}
    about = {name: planned[name] for name in ("arm", "ratio", "seed") if planned}
    state = record.state
    if state is RunState.FINISHED and record.error:
        state = RunState.FAILED
    elif state is RunState.INTERRUPTED and record.progress.ended:
        state = RunState.FINISHED
    return RunRecord(
        record.folder,
        state,
        about | result,
        record.error,
        record.planned or str(record.result.get("name") or record.name),
        record.begun,
        record.progress,
        record.last_lines,
    )


def _stamp(path: Path) -> tuple[int, int] | None:
    """Date and size of a file; None: there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size
