"""What a report is made from: folders in, records of runs and traces out.

A source is a sweep folder (run folders inside), a run folder, a trace folder, or an open ``Trace``.
Nothing is trusted: a run counts as finished only when its ``done`` file lies there and its
``result.json`` can be read; the others are listed with their error line.
"""

from __future__ import annotations

import gc
import json
import math
import os
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import polars as pl

from moe_lab import failures
from moe_lab.errors import RunError, expected
from moe_lab.files import skim_json

if TYPE_CHECKING:
    from moe_lab.trace import Trace

Source: TypeAlias = "str | Path | Trace"
PLAN = "sweep.json"
"""Where a sweep's folder says which runs it wants and which question they are to answer."""

RESULT_COLUMNS: dict[str, pl.DataType] = {
    "run": pl.String(),
    "name": pl.String(),
    "arm": pl.String(),
    "ratio": pl.Float64(),
    "ratio_meaning": pl.String(),
    "seed": pl.Int64(),
    "num_experts": pl.Int64(),
    "num_zero_experts": pl.Int64(),
    "top_k": pl.Int64(),
    "total_params": pl.Int64(),
    "active_params": pl.Int64(),
    "flops_per_token": pl.Float64(),
    "train_tokens": pl.Int64(),
    "eval_tokens": pl.Int64(),
    "loss": pl.Float64(),
    "bits_per_byte": pl.Float64(),
    "train_loss": pl.Float64(),
    "mean_ffn_count": pl.Float64(),
    "sd_ffn_count": pl.Float64(),
    "target_ffn_count": pl.Float64(),
    "expert_sparsity": pl.Float64(),
    "attention_sparsity": pl.Float64(),
    "load_cv": pl.Float64(),
    "max_violation": pl.Float64(),
    "seconds": pl.Float64(),
    "tokens_per_second": pl.Float64(),
    "tokens_per_expert": pl.Float64(),
    "learning_rate": pl.Float64(),
    "dead_experts": pl.Float64(),
    "drop_rate": pl.Float64(),
    "device": pl.String(),
}
"""The keys of ``result.json`` that a report reads; a key that is missing is null."""


class RunState(StrEnum):
    FINISHED = "finished"
    FAILED = "failed"
    UNFINISHED = "unfinished"


@dataclass(frozen=True)
class RunRecord:
    """One run folder as it was found.

    Attributes:
        error: one line, for runs that did not finish.
        planned: the name that a plan gives the run.
        begun: whether the run has a configuration in its folder.
    """

    folder: Path
    state: RunState
    result: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    planned: str = ""
    begun: bool = True

    @cached_property
    def config(self) -> dict[str, Any]:
        """Read when it is asked for, as a page shows a hundred of ten thousand; empty where it
        cannot be read.
        """
        return _read_json(self.folder / "config.json")[0] if self.begun else {}

    @property
    def last_lines(self) -> str:
        """What a failed run said last; read when it is asked for."""
        return failures.last_lines(self.folder) if self.state is RunState.FAILED else ""

    @cached_property
    def name(self) -> str:
        return self.planned or str(self.config.get("name") or self.folder.name)

    @property
    def label(self) -> str:
        """Arm, ratio and seed in words; the run's name where it has none."""
        arm, ratio, seed = (self.result.get(key) for key in ("arm", "ratio", "seed"))
        if arm is None:
            return self.name
        return group_name(str(arm), _number(ratio)) + (f", seed {seed}" if seed is not None else "")

    @property
    def trace(self) -> Path | None:
        folder = self.folder / "trace"
        return folder if (folder / "meta.json").is_file() else None


@dataclass(frozen=True)
class NamedTrace:
    """An open trace and what the page calls it; ``run`` where it belongs to one."""

    label: str
    trace: Trace
    run: RunRecord | None = None

    @property
    def group(self) -> str:
        """What the seeds of one arm and ratio share; a bare trace is alone."""
        result = self.run.result if self.run else {}
        return (
            group_name(str(result["arm"]), _number(result.get("ratio")))
            if "arm" in result
            else self.label
        )


@dataclass(frozen=True)
class Material:
    """Everything a page is made from.

    ``questions`` are those of the sweeps, in their authors' words.
    """

    runs: tuple[RunRecord, ...]
    traces: tuple[NamedTrace, ...]
    questions: tuple[str, ...] = ()

    @cached_property
    def finished(self) -> tuple[RunRecord, ...]:
        return tuple(run for run in self.runs if run.state is RunState.FINISHED)

    @cached_property
    def all_runs(self) -> pl.DataFrame:
        """``run_table`` of all runs."""
        return run_table(self.runs)

    @property
    def table(self) -> pl.DataFrame:
        """That of the finished runs."""
        return self.all_runs.filter(state=RunState.FINISHED.value)


def gather(sources: Source | Sequence[Source]) -> Material:
    """Read the sources.

    Args:
        sources: one sweep folder, run folder, trace folder or ``Trace``, or a sequence of them.

    Raises:
        RunError: a folder is missing, holds neither runs nor a trace, or none of the runs is
            finished.
        TraceError: a trace is damaged.
    """
    runs: list[RunRecord] = []
    traces: list[NamedTrace] = []
    questions: dict[str, None] = {}
    for item in as_list(sources):
        if not isinstance(item, str | Path):
            traces.append(NamedTrace(item.meta.model or "trace", item))
        elif (folder := Path(item)).joinpath("meta.json").is_file():
            traces.append(_open(folder, folder.name))
        else:
            with _no_search_for_cycles():
                found, asked = _read_folder(folder)
            runs += found
            questions |= dict.fromkeys(asked)
    runs.sort(key=_order)
    finished = [run for run in runs if run.state is RunState.FINISHED]
    if runs and not finished and not traces:
        raise RunError(_none_finished(runs))
    traces += _traces_of(finished)
    return Material(tuple(runs), tuple(traces), tuple(questions))


def _traces_of(finished: Iterable[RunRecord]) -> list[NamedTrace]:
    """The trace of the first run that has one, for each arm and ratio: figures show no other, and
    opening reads every byte.
    """
    found: dict[str, NamedTrace] = {}
    for run in finished:
        result = run.result
        group = (
            group_name(str(result["arm"]), _number(result.get("ratio")))
            if "arm" in result
            else run.label
        )
        if group not in found and run.trace:
            found[group] = _open(run.trace, run.label, run)
    return list(found.values())


def as_list(sources: Source | Sequence[Source]) -> list[Source]:
    return list(sources) if isinstance(sources, list | tuple) else [sources]  # type: ignore[list-item]


def read_run(folder: Path, files: Container[str], planned: str = "") -> RunRecord:
    """The record of one run folder, which holds ``files``; never raises for what is inside it."""
    if "done" in files:
        result, error = _read_json(folder / "result.json")
        return RunRecord(
            folder, RunState.FAILED if error else RunState.FINISHED, result, error, planned
        )
    if failures.ERROR in files:
        return RunRecord(
            folder,
            RunState.FAILED,
            {},
            failures.reason(folder)[:300] or "failed without a message",
            planned,
        )
    status, _ = _read_json(folder / "status.json")
    reached = (
        f"stopped at step {status['step']} of {status['steps']}"
        if {"step", "steps"} <= set(status)
        else "not started"
    )
    return RunRecord(folder, RunState.UNFINISHED, {}, reached, planned)


def run_table(runs: Iterable[RunRecord]) -> pl.DataFrame:
    """One row per run: ``RESULT_COLUMNS``, then label, group, state, error and folder (text)."""
    runs = tuple(runs)
    results = [run.result for run in runs]
    columns: dict[str, list[Any]] = {}
    for name, dtype in RESULT_COLUMNS.items():
        cast = _CASTS[type(dtype)]
        columns[name] = [cast(result.get(name)) for result in results]
    columns["run"] = [
        name or run.folder.name for name, run in zip(columns["run"], runs, strict=True)
    ]
    columns["label"] = [run.label for run in runs]
    columns["group"] = [
        group_name(arm or "", ratio)
        for arm, ratio in zip(columns["arm"], columns["ratio"], strict=True)
    ]
    columns["state"] = [run.state.value for run in runs]
    columns["error"] = [run.error for run in runs]
    columns["folder"] = [str(run.folder) for run in runs]
    extra = dict.fromkeys(("label", "group", "state", "error", "folder"), pl.String())
    return pl.DataFrame(columns, schema=RESULT_COLUMNS | extra)


def training_metrics(runs: Iterable[RunRecord]) -> pl.DataFrame:
    """The logged steps of all runs in one frame, with columns run (label) and group; empty where no
    run has metrics.
    """
    frames = []
    for run in runs:
        path = run.folder / "metrics.parquet"
        if not path.is_file():
            continue
        try:
            frame = pl.read_parquet(path)
        except (pl.exceptions.PolarsError, OSError) as error:
            raise RunError(
                expected(
                    f"a Parquet file at {path}",
                    str(error).splitlines()[0],
                    "removing the run and running it again",
                )
            ) from error
        numbers = frame.select(pl.selectors.numeric().cast(pl.Float64))
        names = {
            "run": run.label,
            "group": group_name(str(run.result.get("arm", "")), _number(run.result.get("ratio"))),
        }
        frames.append(
            numbers.with_columns(*(pl.lit(value).alias(name) for name, value in names.items()))
        )
    return pl.concat(frames, how="diagonal") if frames else pl.DataFrame()


def group_name(arm: str, ratio: float | None) -> str:
    """What the seeds of one arm and ratio are called together."""
    return arm if ratio is None else f"{arm} {ratio:g}:1"


def _read_folder(folder: Path) -> tuple[list[RunRecord], list[str]]:
    """The runs of a run folder or a sweep folder, planned ones that never began among them, and the
    questions of the sweep.
    """
    if not folder.exists():
        raise RunError(
            expected(
                "a sweep folder, a run folder or a trace",
                f"no such folder: {folder}",
                "`moe-lab demo` to make one",
            )
        )
    if (folder / "config.json").is_file():
        return [read_run(folder, os.listdir(folder))], []
    found = _run_folders(folder)
    plan = _read_plan(folder)
    runs = plan.get("runs")
    entries = runs.items() if isinstance(runs, dict) else ()
    names = {
        run: str(entry.get("name") or "") if isinstance(entry, dict) else ""
        for run, entry in entries
    }
    waiting = [run for run in names if run not in found]
    if not found and not waiting:
        hint = "the folder that `moe-lab sweep run` was given with --out"
        raise RunError(
            expected("a folder with finished runs or a trace", f"{folder} without any", hint)
        )
    records = [read_run(folder / run, files, names.get(run, "")) for run, files in found.items()]
    records += [
        RunRecord(folder / run, RunState.UNFINISHED, {}, "not started", names[run], begun=False)
        for run in waiting
    ]
    sweeps = plan.get("sweeps") or []
    return records, [str(sweep["question"]) for sweep in sweeps if sweep.get("question")]


@contextmanager
def _no_search_for_cycles() -> Iterator[None]:
    """What JSON files hold has no reference cycles, and looking for them takes a fifth of the time
    of reading ten thousand.
    """
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _run_folders(folder: Path) -> dict[str, frozenset[str]]:
    """The files of each folder with a configuration, sorted by name; each folder is listed once."""
    if not folder.is_dir():
        return {}
    with os.scandir(folder) as entries:
        found = {
            entry.name: frozenset(os.listdir(entry.path))
            for entry in entries
            if entry.is_dir() and not entry.name.startswith(".")
        }
    return {name: found[name] for name in sorted(found) if "config.json" in found[name]}


def _none_finished(runs: list[RunRecord]) -> str:
    failed = [run for run in runs if run.state is RunState.FAILED]
    first = f", the first with: {failed[0].error}" if failed else ""
    got = f"{len(runs)} runs of which none is finished ({len(failed)} failed{first})"
    return expected(
        "at least one finished run", got, "running the same sweep command again: it resumes"
    )


def _open(folder: Path, label: str, run: RunRecord | None = None) -> NamedTrace:
    from moe_lab.trace import open_trace

    trace = open_trace(folder)
    return NamedTrace(
        label, trace if run else trace.check(), run
    )  # a run's own trace was checked as it was written


def _read_json(path: Path) -> tuple[dict[str, Any], str]:
    """The object in a JSON file, and why there is none."""
    try:
        with open(path, "rb", buffering=0) as file:
            value = json.loads(file.read())
    except (OSError, ValueError) as error:
        return {}, f"{path.name} cannot be read: {str(error).splitlines()[0]}"
    return (value, "") if isinstance(value, dict) else ({}, f"{path.name} holds no object")


def _read_plan(folder: Path) -> dict[str, Any]:
    """What a sweep's folder says of its runs, without their configurations; empty where it says
    nothing that can be read.
    """
    try:
        plan = skim_json(folder / PLAN, "config", depth=3)
    except (OSError, ValueError):
        return {}
    return plan if isinstance(plan, dict) else {}


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _whole(value: Any) -> int | None:
    number = _number(value)
    return None if number is None or not math.isfinite(number) else int(number)


_CASTS: dict[type[pl.DataType], Callable[[Any], Any]] = {
    pl.String: _text,
    pl.Int64: _whole,
    pl.Float64: _number,
}


def _order(run: RunRecord) -> tuple[bool, str, float, int]:
    result = run.result
    return (
        run.state is not RunState.FINISHED,
        str(result.get("arm", "")),
        _number(result.get("ratio")) or 0.0,
        int(_number(result.get("seed")) or 0),
    )
