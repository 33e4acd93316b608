"""The sources of a report: folders in, records of runs and traces out.

A source is a sweep folder (run folders inside), a run folder, a trace folder, or an open ``Trace``.
Nothing is trusted: a run counts as finished only when its ``done`` file lies there and its
``result.json`` can be read; the others are listed with their error line.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import polars as pl

from moe_lab.errors import RunError, expected, require
from moe_lab.number_format import count_of
from moe_lab.report.canvas import evenly
from moe_lab.report.second_process import SecondProcess
from moe_lab.runs import RunRecord, RunState, RunStore, read_run
from moe_lab.runs.done_file import TRACE_META_NAME, check_seal
from moe_lab.runs.layout import CONFIG, PLAN, TRACE_META
from moe_lab.runs.record import group_name, number, read_some, run_folders
from moe_lab.runs.tables import METRICS_TABLE, read_table_of_runs

if TYPE_CHECKING:
    from moe_lab.trace import Trace

Source: TypeAlias = "str | Path | Trace"

RUNS_OF_PART = 256
"""Run folders that are read by one process in one go."""
LARGEST_NUMBER = 1e100
"""No result of a training; figures cannot place more."""

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


@dataclass(frozen=True)
class NamedTrace:
    """An open trace and what the page calls it; ``run`` where it belongs to one."""

    label: str
    trace: Trace
    run: RunRecord | None = None

    @property
    def group(self) -> str:
        """The name that all seeds of one arm and ratio share; a trace without a run is alone."""
        return self.run.group if self.run else self.label

    @property
    def width(self) -> int:
        """The most experts that a layer chooses from, zero-compute ones included."""
        return max(layer.num_choices for layer in self.trace.meta.layers)

    @property
    def layers(self) -> list[int]:
        """The traced layers, rising."""
        return sorted(layer.layer for layer in self.trace.meta.layers)

    def even_layers(self, most: int) -> list[int]:
        """At most ``most`` of them, evenly spaced."""
        return [self.layers[index] for index in evenly(len(self.layers), most)]

    def labelled(self, frame: pl.DataFrame) -> pl.DataFrame:
        """``frame`` with the label in front, as column run."""
        return frame.select(pl.lit(self.label).alias("run"), pl.all())


@dataclass(frozen=True)
class Material:
    """All that a page is made from.

    ``questions`` are those of the sweeps, in their authors' words.
    """

    runs: tuple[RunRecord, ...]
    traces: tuple[NamedTrace, ...]
    questions: tuple[str, ...] = ()

    @property
    def about(self) -> str:
        """What the page is about: "sweep", "run", "trace" or "traces"."""
        if self.runs:
            alone = len(self.runs) == 1 and all(named.run for named in self.traces)
            return "run" if alone else "sweep"
        return "trace" if len(self.traces) == 1 else "traces"

    @cached_property
    def finished(self) -> tuple[RunRecord, ...]:
        return tuple(run for run in self.runs if run.state is RunState.FINISHED)

    @cached_property
    def all_runs(self) -> pl.DataFrame:
        """``run_table`` of all runs."""
        return run_table(self.runs)

    @cached_property
    def anchors(self) -> dict[Path, str]:
        """Folder of each run -> what its elements on the page are called after."""
        names: dict[str, int] = {}
        found = {}
        for run in self.runs:
            name = re.sub(r"[^\w-]+", "-", run.folder.name)
            names[name] = names.get(name, 0) + 1
            found[run.folder] = name if names[name] == 1 else f"{name}-{names[name]}"
        return found

    @cached_property
    def trained(self) -> tuple[RunRecord, ...]:
        """The runs that logged steps, those that run or stopped among them."""
        return tuple(run for run in self.runs if run.state is RunState.FINISHED or logged(run))

    @cached_property
    def table(self) -> pl.DataFrame:
        """``run_table`` of the finished runs."""
        return self.all_runs.filter(state=RunState.FINISHED.value)


def gather(sources: Source | Sequence[Source], beside: SecondProcess | None = None) -> Material:
    """Read the sources.

    Args:
        sources: one sweep folder, run folder, trace folder or ``Trace``, or a sequence of them.
        beside: reads a part of many run folders.

    Raises:
        RunError: a folder is missing, holds neither runs nor a trace, or none of the runs is
            finished or has logged a step.
        TraceError: a trace is damaged.
    """
    runs: list[RunRecord] = []
    traces: list[NamedTrace] = []
    questions: dict[str, None] = {}
    for item in as_list(sources):
        if not isinstance(item, str | Path):
            traces.append(NamedTrace(item.meta.model or "trace", item))
        elif (folder := Path(item)).joinpath(TRACE_META).is_file():
            traces.append(_open(folder, folder.name))
        else:
            records, asked = _read_folder(folder, beside or SecondProcess())
            runs += records
            questions |= dict.fromkeys(asked)
    runs.sort(key=_order)
    finished = [run for run in runs if run.state is RunState.FINISHED]
    if runs and not finished and not traces and not any(map(logged, runs)):
        raise RunError(_none_finished(runs))
    traces += _traces_of(finished)
    return Material(tuple(runs), tuple(traces), tuple(questions))


def _traces_of(finished: Iterable[RunRecord]) -> list[NamedTrace]:
    """The trace of the first run that has one, for each arm and ratio: figures show no other."""
    traces: dict[str, NamedTrace] = {}
    for run in finished:
        if run.group not in traces and run.trace:
            check_seal(run.folder, (TRACE_META_NAME,))
            traces[run.group] = _open(run.trace, run.label, run)
    return list(traces.values())


def as_list(sources: Source | Sequence[Source]) -> list[Source]:
    return list(sources) if isinstance(sources, list | tuple) else [sources]  # type: ignore[list-item]


def run_table(runs: Iterable[RunRecord]) -> pl.DataFrame:
    """One row per run: ``RESULT_COLUMNS``, then label, group, state, error and folder (text)."""
    runs = tuple(runs)
    results = [run.result for run in runs]
    columns: dict[str, list[Any]] = {}
    for name, dtype in RESULT_COLUMNS.items():
        values = [result.get(name) for result in results]
        columns[name] = values if _plain(values, dtype) else list(map(_CASTS[type(dtype)], values))
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
    run has metrics. Of a run that is not finished, the steps that it logged so far.
    """
    frames, runs = [], tuple(runs)
    tables = read_table_of_runs([run.folder for run in runs], "metrics")
    for run, numbers in zip(runs, tables, strict=True):
        names = {"run": run.label, "group": run.group}
        if not numbers.is_empty():
            labels = (pl.lit(value).alias(name) for name, value in names.items())
            frames.append(numbers.with_columns(*labels))
    return pl.concat(frames, how="diagonal") if frames else pl.DataFrame()


def logged(run: RunRecord) -> bool:
    """Whether a run that is not finished has logged a step."""
    log = run.folder / METRICS_TABLE.log
    return run.begun and run.state is not RunState.FINISHED and log.is_file()


def _read_folder(folder: Path, beside: SecondProcess) -> tuple[list[RunRecord], list[str]]:
    """The runs of a run folder or a sweep folder, planned ones that never began among them, and the
    questions of the sweep.
    """
    require(
        folder.exists(),
        "a sweep folder, a run folder or a trace",
        f"no such folder: {folder}",
        "`moe-lab demo` to make one",
        error=RunError,
        field="source",
    )
    if (folder / CONFIG).is_file():
        return [_judged(read_run(folder))], _questions_about(folder)
    plan = beside.begin(_plan, folder)
    runs = run_folders(folder) if folder.is_dir() else []
    parts = [
        beside.begin(read_some, folder, runs[start : start + RUNS_OF_PART])
        for start in range(0, len(runs), RUNS_OF_PART)
    ]
    read = [part() for part in reversed(parts)]  # the last ones are begun last
    names, questions = plan()
    records = {
        run: replace(record, planned=names.get(run, ""))
        for part in reversed(read)
        for run, record in part.items()
    }
    waiting = [run for run in names if run not in records]
    require(
        records or waiting,
        "a folder with finished runs or a trace",
        f"{folder} without any",
        "the folder that `moe-lab sweep run` was given with --out",
        error=RunError,
        field="source",
    )
    pending = [
        RunRecord(folder / run, RunState.PENDING, {}, "not started", names[run], begun=False)
        for run in waiting
    ]
    return [*map(_judged, records.values()), *pending], questions


def _plan(folder: Path) -> tuple[dict[str, str], list[str]]:
    """Names of the planned runs, and the questions of the sweeps; none without a plan."""
    plan = RunStore(folder).plan() if (folder / PLAN).is_file() else {}
    names = {run: entry["name"] for run, entry in plan.get("runs", {}).items()}
    return names, [sweep["question"] for sweep in plan.get("sweeps", ()) if sweep["question"]]


def _questions_about(run: Path) -> list[str]:
    """Of the sweeps that planned the run, where it lies in their folder."""
    place = run.resolve()
    if not (place.parent / PLAN).is_file():
        return []
    sweeps = RunStore(place.parent).plan().get("sweeps", ())
    return [sweep["question"] for sweep in sweeps if place.name in sweep["runs"]]


def _judged(run: RunRecord) -> RunRecord:
    """A page trusts no finished run whose result cannot be read."""
    damaged = run.state is RunState.FINISHED and run.error
    return replace(run, state=RunState.FAILED) if damaged else run


def _none_finished(runs: list[RunRecord]) -> str:
    failed = [run for run in runs if run.state is RunState.FAILED]
    first = f", the first with: {failed[0].error}" if failed else ""
    got = f"{count_of(len(runs), 'run')}, none finished ({len(failed)} failed{first})"
    return expected(
        "at least one finished run", got, "running the same sweep command again: it resumes"
    )


def _open(folder: Path, label: str, run: RunRecord | None = None) -> NamedTrace:
    from moe_lab.trace import open_trace

    return NamedTrace(label, open_trace(folder), run)


def _plain(values: list[Any], dtype: pl.DataType) -> bool:
    """Whether ``_CASTS`` would change none of ``values``."""
    kinds = set(map(type, values)) - {type(None)}
    if kinds <= {str} and dtype == pl.String:
        return True
    most = {pl.Int64: 2**53, pl.Float64: LARGEST_NUMBER}.get(type(dtype), 0)
    kind = int if dtype == pl.Int64 else float
    numbers = [value for value in values if value is not None]
    return (
        most > 0
        and kinds <= {kind}
        and -most < min(numbers, default=0) <= max(numbers, default=0) < most
    )


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _whole(value: Any) -> int | None:
    real = number(value)
    return None if real is None or not abs(real) < 2**63 else int(real)


def _real(value: Any) -> float | None:
    real = number(value)
    return None if real is None or abs(real) > LARGEST_NUMBER else real


_CASTS: dict[type[pl.DataType], Callable[[Any], Any]] = {
    pl.String: _text,
    pl.Int64: _whole,
    pl.Float64: _real,
}


def _order(run: RunRecord) -> tuple[bool, str, float, int]:
    result = run.result
    return (
        run.state is not RunState.FINISHED,
        str(result.get("arm", "")),
        number(result.get("ratio")) or 0.0,
        int(number(result.get("seed")) or 0),
    )
