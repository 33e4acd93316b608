"""The plan of a sweep's folder: which runs its sweeps want, and with which configurations.

    {"schema_version": 1,
     "sweeps": [{hash, name, question, preset, runs: [run, ...]}],
     "runs": {run: {name, arm, ratio, seed, config}}}

A run is named by its configuration's hash, 12 hexadecimal digits; that is its folder's name too.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from moe_lab.errors import RunError, expected, require
from moe_lab.files import content_hash

SCHEMA_VERSION = 1
_RUN_NAME = re.compile(r"[0-9a-f]{12}")
_NUMBER = (int, float)
_SWEEP_FIELDS = {"hash": str, "name": str, "question": str, "preset": str, "runs": list}
_RUN_FIELDS = {"name": str, "arm": str, "ratio": _NUMBER, "seed": int}
_HINT = "a plan that moe-lab sweep wrote"


class PlannedSweep(Protocol):
    """The part of a sweep (``sweeps.SweepConfig``) that a plan keeps."""

    @property
    def name(self) -> str: ...
    @property
    def question(self) -> str: ...
    @property
    def preset(self) -> str: ...
    @property
    def runs(self) -> Sequence[Any]: ...
    @property
    def hashes(self) -> Any: ...  # Sequence[str]; a protocol takes no cached_property of one


def plan_entry(sweep: PlannedSweep) -> tuple[dict[str, Any], dict[str, Any]]:
    """A sweep's entry in a plan, and those of its runs by hash."""
    runs = {
        run_hash: {name: getattr(run, name) for name in _RUN_FIELDS} | {"config": run.to_dict()}
        for run_hash, run in zip(sweep.hashes, sweep.runs, strict=True)
    }
    entry = {name: getattr(sweep, name) for name in ("name", "question", "preset")}
    entry["runs"] = list(sweep.hashes)
    return entry | {"hash": content_hash(entry)}, runs


def check_plan(plan: Any, source: Path | str) -> dict[str, Any]:
    """``plan`` itself, if it has the fields above and is of this version.

    Raises ``RunError`` that names the first fault; ``source`` is what it calls the plan's place.
    """
    version = plan.get("schema_version") if isinstance(plan, dict) else None
    require(
        version == SCHEMA_VERSION,
        f"a plan of version {SCHEMA_VERSION}",
        f"{ascii(version)[:100]} in {source}",
        "another folder",
        error=RunError,
        field="schema_version",
    )
    _check_fields("the plan", plan, {"sweeps": list, "runs": dict}, source)
    for run, entry in plan["runs"].items():
        check_run_name(run, source)
        _check_fields(f"run {run}", entry, _RUN_FIELDS, source)
    for sweep in plan["sweeps"]:
        _check_fields("a sweep", sweep, _SWEEP_FIELDS, source)
        for run in sweep["runs"]:
            require(
                check_run_name(run, source) in plan["runs"],
                "an entry of every run",
                f"none of {run} in {source}",
                _HINT,
                error=RunError,
            )
    return plan


def check_run_name(run: object, source: Path | str) -> str:
    """``run`` itself. Raises ``RunError`` for anything but 12 hexadecimal digits: run names become
    folder names.
    """
    if not (isinstance(run, str) and _RUN_NAME.fullmatch(run)):
        got = f"{ascii(run)[:100]} in {source}"
        raise RunError(expected("runs named by 12 hexadecimal digits", got, _HINT), field="runs")
    return run


def planned_runs(plan: Mapping[str, Any]) -> list[str]:
    """The runs of all sweeps of a plan in their order, each once."""
    return list(dict.fromkeys(run for sweep in plan["sweeps"] for run in sweep["runs"]))


def _check_fields(what: str, values: Any, fields: Mapping[str, Any], source: Path | str) -> None:
    if not isinstance(values, dict):
        got = f"{ascii(values)[:100]} in {source}"
        raise RunError(expected(f"an object for {what}", got, _HINT))
    for name, kind in fields.items():
        if not isinstance(values.get(name), kind) or isinstance(values.get(name), bool):
            got = f"{ascii(values.get(name))[:100]} in {source}"
            wanted = " or ".join(
                one.__name__ for one in (kind if isinstance(kind, tuple) else (kind,))
            )
            raise RunError(expected(f"{name} of {what} as {wanted}", got, _HINT))
