"""The run store: one folder per sweep, in it ``sweep.json`` (the plan) and one folder per run,
named by the run's content hash.

What a run is up to is read from its folder alone, so any process on any machine that sees the store
knows it: ``done`` (written last) is the only proof of a whole run; ``error.txt`` tells why one
failed; a living claim (``claims.py``) says that it is being trained.
"""

import json
import os
import random
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from moe_lab import failures
from moe_lab.errors import RunError, expected
from moe_lab.failures import ERROR
from moe_lab.files import content_hash, skim_json, write_json, write_text
from moe_lab.sweeps.claims import Claim, acquire, claimed, holder
from moe_lab.sweeps.config import SweepConfig

if TYPE_CHECKING:
    import polars as pl

    from moe_lab.sweeps.object_store import ObjectStore

PLAN = "sweep.json"
DONE = "done"
_RUN_NAME = re.compile(r"[0-9a-f]{12}")
SCHEMA_VERSION = 1
PATIENCE_SECONDS = 300.0
"""How long a process waits for its turn to add to the plan; the plan of a large sweep takes a good
part of a second to write.
"""


class RunState(StrEnum):
    PENDING = "pending"
    RUNNING = "running"
    FINISHED = "finished"
    FAILED = "failed"
    INTERRUPTED = "interrupted"


@dataclass(frozen=True)
class Progress:
    """How far a run came, from its live ``status.json``; everything 0 or None where there is none
    yet.
    """

    step: int = 0
    steps: int = 0
    loss: float | None = None
    tokens_per_second: float | None = None

    @classmethod
    def of(cls, status: dict[str, Any]) -> "Progress":
        return cls(
            status.get("step", 0),
            status.get("steps", 0),
            status.get("loss"),
            status.get("tokens_per_second"),
        )

    @property
    def fraction(self) -> float:
        return min(1.0, self.step / self.steps) if self.steps else 0.0


@dataclass(frozen=True)
class Record:
    """What a run's files say; ``result`` is empty unless it is finished, ``error`` and
    ``last_lines`` unless it failed.
    """

    state: RunState
    progress: Progress
    result: dict[str, Any]
    error: str
    last_lines: str


def plan_entry(sweep: SweepConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """A sweep's entry in a plan, and those of its runs by hash."""
    runs = {
        run_hash: {
            "name": run.name,
            "arm": run.arm,
            "ratio": run.ratio,
            "seed": run.seed,
            "config": run.to_dict(),
        }
        for run_hash, run in zip(sweep.hashes, sweep.runs, strict=True)
    }
    entry = {
        "name": sweep.name,
        "question": sweep.question,
        "preset": sweep.preset,
        "runs": list(sweep.hashes),
    }
    return entry | {"hash": content_hash(entry)}, runs


def check_run_names(plan: dict[str, Any], source: Path | str) -> dict[str, Any]:
    """``plan`` itself.

    Raises ``RunError`` where it names a run by anything but 12 hexadecimal digits: run names become
    folder names.
    """
    for run in [*plan["runs"], *(run for sweep in plan["sweeps"] for run in sweep["runs"])]:
        if not (isinstance(run, str) and _RUN_NAME.fullmatch(run)):
            got = ascii(run)[:100]
            raise RunError(
                expected(
                    "runs named by 12 hexadecimal digits",
                    f"{got} in {source}",
                    "a plan that moe-lab sweep wrote",
                )
            )
    return plan


class RunStore:
    """The folder of one sweep. ``object_store.ObjectStore`` is the same for an object store."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)

    def path(self, run: str) -> Path:
        return self.folder / run

    def state(self, run: str) -> RunState:
        return _state(self.path(run))

    def progress(self, run: str) -> Progress:
        return _progress(self.path(run))

    def states(self, runs: Iterable[str]) -> dict[str, RunState]:
        return {run: self.state(run) for run in runs}

    def error(self, run: str) -> str:
        return failures.reason(self.path(run))

    def records(self, runs: Sequence[str]) -> Iterator[Record]:
        for run in runs:
            path = self.path(run)
            names = _names(path)
            state = _state(path, names)
            failed = state is RunState.FAILED
            yield Record(
                state,
                _progress(path) if "status.json" in names else Progress(),
                _json(path / "result.json") if state is RunState.FINISHED else {},
                failures.reason(path) if failed else "",
                failures.last_lines(path) if failed else "",
            )

    def record_failure(self, run: str, reason: str) -> None:
        """Write ``error.txt`` for a worker that died, unless someone else has taken the run up by
        now.
        """
        claim = acquire(self.path(run))
        if claim is not None:
            with claim:
                if not (self.path(run) / DONE).exists():
                    write_text(self.path(run) / ERROR, reason + "\n")

    def plan(self, configs: bool = True) -> dict[str, Any]:
        """``{"sweeps": [{hash, name, question, preset, runs}], "runs": {hash: {name, arm, ratio,
        seed, config}}}``; ``config`` may be missing where nobody asked for ``configs``.
        """
        path = self.folder / PLAN
        try:
            plan = (
                json.loads(path.read_text(encoding="utf-8"))
                if configs
                else skim_json(path, "config", depth=3)
            )
        except FileNotFoundError:
            raise RunError(
                expected(
                    f"a sweep folder with {PLAN}",
                    f"{self.folder} without one",
                    "moe-lab sweep run first",
                )
            ) from None
        except (OSError, ValueError) as error:
            raise RunError(
                expected(
                    "a readable plan",
                    f"{path}: {error}",
                    "running the sweep again into another folder",
                )
            ) from error
        if plan.get("schema_version") != SCHEMA_VERSION:
            raise RunError(
                expected(
                    f"a plan of version {SCHEMA_VERSION}",
                    f"{plan.get('schema_version')} in {path}",
                    "another folder",
                )
            )
        return check_run_names(plan, path)

    def add(self, sweep: SweepConfig) -> None:
        """Record ``sweep`` in the plan beside what is there.

        Runs of the same hash are shared, so finished ones are reused.
        """
        entry, runs = plan_entry(sweep)
        if self._has(entry["hash"]):
            return
        with self._claim_plan():
            plan = (
                self.plan()
                if (self.folder / PLAN).exists()
                else {"schema_version": SCHEMA_VERSION, "sweeps": [], "runs": {}}
            )
            if all(other["hash"] != entry["hash"] for other in plan["sweeps"]):
                write_json(
                    self.folder / PLAN,
                    plan | {"sweeps": [*plan["sweeps"], entry], "runs": plan["runs"] | runs},
                )

    def _has(self, sweep: str) -> bool:
        """A plan only grows, and is replaced whole: what stands there stays, and needs no claim to
        be seen.
        """
        return (self.folder / PLAN).exists() and any(
            other["hash"] == sweep for other in self.plan()["sweeps"]
        )

    def _claim_plan(self) -> Claim:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while (claim := acquire(self.folder)) is None:
            if time.monotonic() > deadline:
                by = holder(self.folder) or "one process after the other"
                raise RunError(
                    f"{self.folder / PLAN} has been held by {by} for {PATIENCE_SECONDS:.0f} s; try again later"
                )
            time.sleep(random.uniform(0.05, 0.5))
        return claim

    def check_writable(self) -> None:
        """Raise ``RunError`` where the folder takes no file of 64 KiB: it is full, read-only or
        gone.
        """
        probe = self.folder / ".writable"
        write_text(probe, " " * 65536)
        probe.unlink(missing_ok=True)


def _state(folder: Path, names: set[str] | None = None) -> RunState:
    names = _names(folder) if names is None else names
    if DONE in names:
        return RunState.FINISHED
    if claimed(names) and holder(folder, names):
        return RunState.RUNNING
    if ERROR in names:
        return RunState.FAILED
    return RunState.INTERRUPTED if claimed(names) else RunState.PENDING


def _names(folder: Path) -> set[str]:
    try:
        return set(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return set()


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not there yet, or a full disk cut it short: nothing is known
        return {}
    return values if isinstance(values, dict) else {}


def _progress(folder: Path) -> Progress:
    return Progress.of(_json(folder / "status.json"))


def open_store(place: "Path | str") -> "RunStore | ObjectStore":
    """The store of a folder, or of an fsspec URL (``s3://bucket/sweep``); ``file://`` is a folder.

    Raises ``RunError`` for a URL that cannot be opened.
    """
    protocol, mark, rest = str(place).partition("://")
    if not mark or protocol in ("file", "local"):
        return RunStore(Path(unquote(rest)) if mark else place)
    from moe_lab.sweeps.object_store import ObjectStore

    return ObjectStore(str(place))


def status(folder: Path | str) -> "pl.DataFrame":
    """One row per planned run, in the plan's order: run, name, arm, ratio, seed, state, step,
    steps, progress (0 to 1), loss, tokens_per_second, error, last_lines.

    ``loss`` is the validation loss (nats per token) of a finished run, else the last training loss;
    ``error`` the failed run's one line, ``last_lines`` the end of what it printed and of its
    traceback. Reads small files only and may be called at any time, from any machine that sees the
    folder. Raises ``RunError`` where it is no sweep.
    """
    import polars as pl

    store = open_store(folder)
    plan = store.plan(configs=False)
    runs = list(dict.fromkeys(run for sweep in plan["sweeps"] for run in sweep["runs"]))
    rows = []
    for run, found in zip(runs, store.records(runs), strict=True):
        finished = found.state is RunState.FINISHED
        rows.append(
            {
                "run": run,
                **{key: plan["runs"][run][key] for key in ("name", "arm", "ratio", "seed")},
                "state": found.state.value,
                "step": found.progress.step,
                "steps": found.progress.steps,
                "progress": 1.0 if finished else found.progress.fraction,
                "loss": found.result.get("loss", found.progress.loss),
                "tokens_per_second": found.result.get(
                    "tokens_per_second", found.progress.tokens_per_second
                ),
                "error": found.error,
                "last_lines": found.last_lines,
            }
        )
    return pl.DataFrame(rows, schema=_status_schema(), orient="row")


def _status_schema() -> dict[str, Any]:
    import polars as pl

    return {
        "run": pl.String,
        "name": pl.String,
        "arm": pl.String,
        "ratio": pl.Float64,
        "seed": pl.Int64,
        "state": pl.String,
        "step": pl.Int64,
        "steps": pl.Int64,
        "progress": pl.Float64,
        "loss": pl.Float64,
        "tokens_per_second": pl.Float64,
        "error": pl.String,
        "last_lines": pl.String,
    }
