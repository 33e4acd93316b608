"""The records of one run or of many, read from their folders.

``read_run`` never raises for what a run's folder holds: a file that cannot be read makes an empty
value, and for the result an ``error``.
"""

import os
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

from moe_lab.errors import RunError, expected
from moe_lab.files import parse_json, read_regular
from moe_lab.plain_text import one_line
from moe_lab.runs import failures
from moe_lab.runs.done_file import check_seal
from moe_lab.runs.folder_claims import claimed, holder
from moe_lab.runs.layout import CONFIG, DONE, ERROR, RESULT, STATUS, TRACE, TRACE_META, RunState

_REASON_CHARACTERS = 300
ENDED = "ended"
"""The state in ``status.json`` of a training of another program that is done."""


@dataclass(frozen=True)
class Progress:
    """The progress of a run, from its live ``status.json``; 0 or None: not recorded yet.

    Attributes:
        step, steps: optimiser steps done, and of the whole run.
        loss: of the last logged step, nats per token.
        alarms, alarm: number of alarms about the routing, and the sentence of the last one.
        ended: a training of another program is done (``training.monitor``).
    """

    step: int = 0
    steps: int = 0
    loss: float | None = None
    tokens_per_second: float | None = None
    alarms: int = 0
    alarm: str = ""
    ended: bool = False

    @classmethod
    def of(cls, status: dict[str, Any]) -> "Progress":
        """Values of another type than the field's count as not recorded."""
        step, steps = (_whole(status.get(name)) for name in ("step", "steps"))
        loss, speed = (number(status.get(name)) for name in ("loss", "tokens_per_second"))
        sentence = one_line(str(status.get("alarm") or ""))[:_REASON_CHARACTERS]
        ended = status.get("state") == ENDED
        return cls(step, steps, loss, speed, _whole(status.get("alarms")), sentence, ended)

    @property
    def fraction(self) -> float:
        return min(1.0, self.step / self.steps) if self.steps else 0.0


@dataclass(frozen=True)
class RunRecord:
    """One run as its folder shows it.

    Attributes:
        result: the content of ``result.json``; empty unless the run is finished.
        error: one line on why the run is not finished, or why its result cannot be read.
        last_lines: the end of what a failed run printed and of its traceback.
        planned: the name that a plan gives the run.
        begun: whether the run has a configuration in its folder.
    """

    folder: Path
    state: RunState
    result: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    planned: str = ""
    begun: bool = True
    progress: Progress = Progress()
    last_lines: str = ""

    @cached_property
    def config(self) -> dict[str, Any]:
        """The content of ``config.json``, read on first use; empty where it cannot be read."""
        return read_object(self.folder / CONFIG) if self.begun else {}

    @cached_property
    def name(self) -> str:
        return self.planned or str(self.config.get("name") or self.folder.name)

    @property
    def group(self) -> str:
        """The name that all seeds of one arm and ratio share; the run's name if it has no arm."""
        arm = self.result.get("arm")
        return self.name if arm is None else group_name(str(arm), number(self.result.get("ratio")))

    @property
    def label(self) -> str:
        """Arm, ratio and seed in words; the run's name if it has no arm."""
        seed = self.result.get("seed") if "arm" in self.result else None
        return self.group + ("" if seed is None else f", seed {seed}")

    @property
    def trace(self) -> Path | None:
        folder = self.folder / TRACE
        return folder if (folder / TRACE_META).is_file() else None


def group_name(arm: str, ratio: float | None) -> str:
    """The name that all seeds of one arm and ratio share."""
    return arm if ratio is None else f"{arm} {ratio:g}:1"


def read_run(
    folder: Path,
    names: Collection[str] | None = None,
    planned: str = "",
    state: RunState | None = None,
) -> RunRecord:
    """The record of the run in ``folder``, whose file ``names`` and ``state`` may be given if they
    are known.
    """
    names = file_names(folder) if names is None else names
    state = state_of(folder, names) if state is None else state
    record: dict[str, Any] = {"planned": planned, "begun": CONFIG in names}
    if STATUS in names:
        record["progress"] = Progress.of(read_object(folder / STATUS))
    if state is RunState.FINISHED:
        try:
            result = parse_object(folder / RESULT)
            check_seal(folder)
            return RunRecord(folder, state, result, **record)
        except RunError as error:
            return RunRecord(folder, state, {}, str(error), **record)
    if state is RunState.FAILED:
        reason = (
            failures.read_failure(folder).reason[:_REASON_CHARACTERS] or "failed without a message"
        )
        record["last_lines"] = failures.last_lines(folder)
        return RunRecord(folder, state, {}, reason, **record)
    return RunRecord(folder, state, {}, _reached(record.get("progress")), **record)


def folders_in(folder: Path) -> list[os.DirEntry[str]]:
    """The folders in ``folder`` that may hold a run; hidden ones and links that lead nowhere are
    left out.
    """
    with os.scandir(folder) as entries:
        return [
            entry
            for entry in entries
            if not entry.name.startswith(".")
            # A link to itself is an error for the entry, and no folder for the path.
            and (entry.is_dir(follow_symlinks=False) or Path(entry.path).is_dir())
        ]


def read_runs(
    folder: Path, planned: Mapping[str, str] = MappingProxyType({})
) -> dict[str, RunRecord]:
    """The records of all run folders in ``folder``, by name; ``planned`` names runs of a plan."""
    return read_some(folder, run_folders(folder), planned)


def run_folders(folder: Path) -> list[str]:
    """The names of the folders in ``folder`` that may hold runs, in order."""
    return sorted(entry.name for entry in folders_in(folder))


def read_some(
    folder: Path, runs: Iterable[str], planned: Mapping[str, str] = MappingProxyType({})
) -> dict[str, RunRecord]:
    """``read_runs`` of the folders ``runs`` alone."""
    names = {run: file_names(folder / run) for run in runs}
    return {
        run: read_run(folder / run, found, planned.get(run, ""))
        for run, found in names.items()
        if CONFIG in found
    }


def state_of(
    folder: Path,
    names: Collection[str] | None = None,
    held: Callable[[], object] | None = None,
) -> RunState:
    """The state of the run in ``folder``, from the names of its files and whether a running process
    claims it: ``held``, in place of the claims in the folder.
    """
    names = file_names(folder) if names is None else names
    if DONE in names:
        return RunState.FINISHED
    if held() if held else claimed(names) and holder(folder, names):
        return RunState.RUNNING
    if not held and claimed(names):  # by a process that may have ended the run meanwhile
        names = file_names(folder)
        if DONE in names:
            return RunState.FINISHED
    if ERROR in names:
        return RunState.FAILED
    return RunState.INTERRUPTED if STATUS in names or claimed(names) else RunState.PENDING


def file_names(folder: Path) -> frozenset[str]:
    """Names of the files in ``folder``; empty if there is no such folder."""
    try:
        return frozenset(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return frozenset()


def parse_object(source: Path | bytes, name: str = "") -> dict[str, Any]:
    """The object in a JSON file, or in its bytes. Raises ``RunError`` if there is none."""
    name = name or getattr(source, "name", "the file")
    try:
        value = parse_json(source if isinstance(source, bytes) else read_regular(source))
    except (OSError, ValueError) as error:
        why = str(error).splitlines()[0]
        raise RunError(f"{name} cannot be read: {why}; try running it again") from error
    if not isinstance(value, dict):
        raise RunError(expected(f"an object in {name}", type(value).__name__))
    return value


def read_object(source: Path | bytes | None) -> dict[str, Any]:
    """As ``parse_object``, but an empty object in place of an error: the file may be missing or cut
    off.
    """
    try:
        return {} if source is None else parse_object(source)
    except RunError:
        return {}


def number(value: Any) -> float | None:
    """A JSON value as a float; None for anything but a number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:  # an integer beyond the range of floats
        return None


def _whole(value: Any) -> int:
    return value if isinstance(value, int) and value >= 0 else 0


def _reached(progress: Progress | None) -> str:
    if progress is None or not progress.steps:
        return "not started"
    return f"stopped at step {progress.step} of {progress.steps}"
