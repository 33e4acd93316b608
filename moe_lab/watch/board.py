"""What the page shows, as named parts. A part is made again when its runs changed, and a browser
that has a part is not sent it again.

    answer      one sentence, facts, notes
    curves      which runs the figure of all runs shows, and its metrics
    curve/RUN   the points of one run
    alarms, failures, missing, frontier
    table       of a view: the runs that match a search
    run, layers, load   of a view: the run that is looked into
"""

import re
import secrets
import threading
import time
import zlib
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import polars as pl

from moe_lab.errors import MoELabError, RunError, require
from moe_lab.files import content_hash
from moe_lab.number_format import NOTHING, count_of, decimal, duration, listing, magnitude, whole
from moe_lab.report.canvas import Canvas, evenly, packed
from moe_lab.report.document import script_json
from moe_lab.report.run_figures import line_style
from moe_lab.runs import Progress, RunRecord, RunState
from moe_lab.runs.record import number
from moe_lab.sandbox import end_child
from moe_lab.watch.curves import EMPTY, Curves
from moe_lab.watch.figures import LAYER_METRICS, layer_curves, load_map
from moe_lab.watch.forecast import run_seconds_left, seconds_left
from moe_lab.watch.index import Index
from moe_lab.watch.place import Place

METRICS = {
    "loss": "training loss, nats/token",
    "validation": "validation loss, nats/token",
    "load_cv": "load CV, mean over layers",
    "max_violation": "MaxVio, mean over layers",
    "router_entropy": "router entropy, nats",
    "mean_ffn_count": "mean ffn_count",
    "aux_loss": "balance loss",
    "grad_norm": "gradient norm",
    "tokens_per_second": "tokens per second",
}
"""What the figure of all runs can show, with its axis titles."""
MAX_ROWS = 200
"""Of a table."""
MAX_FAILURES = 20
READ_SECONDS = 1.5
"""Of one look at a place: what is left is read at the next, and the page says so."""
SHARE = 100
"""A look that took s seconds is followed by the next after SHARE * s at the earliest."""
LONGEST_PAUSE = 30.0
BEHIND_SECONDS = 0.2
IDLE_SECONDS = 120.0
"""After so long without a change the child process that decodes Parquet (``sandbox``) is ended."""
MAX_CURVES = 120
"""Runs of the figure of all runs."""
MAX_VIEWS = 64
"""Parts of views that are kept for readers who ask for the same again."""
FILE_STEPS = 16
"""Maps of load of each run in a page that is one file."""
FILE_RUNS, FILE_CHARACTERS = 24, 15_000_000
"""Runs that such a page lets a reader look into, as long as it stays within so many characters."""
_PLAIN = re.compile(r"[A-Za-z0-9._=-]{1,80}")
_RANK = {
    RunState.RUNNING: 0,
    RunState.FAILED: 1,
    RunState.INTERRUPTED: 2,
    RunState.FINISHED: 3,
    RunState.PENDING: 4,
}
"""What a reader looks for first."""


@dataclass(frozen=True)
class View:
    """What a reader looks at: a search among runs, a run, a metric of its layers, and a step of its
    loads (None: the last).
    """

    search: str = ""
    run: str = ""
    metric: str = ""
    step: int | None = None

    @classmethod
    def of(cls, values: Mapping[str, str]) -> "View":
        """Texts of a query; what is none of them is left out."""
        step = values.get("step", "")
        known = int(step) if step.isdecimal() and len(step) < 16 else None
        metric = values.get("metric", "")
        return cls(
            values.get("search", "")[:200],
            values.get("run", ""),
            metric if metric in LAYER_METRICS else "",
            known,
        )


class Parts:
    """Named JSON texts, each with the number of its last change."""

    def __init__(self) -> None:
        self._epoch = secrets.token_hex(4)
        self._number = 0
        self._kept: dict[str, tuple[int, str]] = {}

    def put(self, name: str, value: Any) -> None:
        text = script_json(value)
        if self._kept.get(name, (0, ""))[1] != text:
            self._number += 1
            self._kept[name] = self._number, text

    def drop(self, name: str) -> None:
        self._kept.pop(name, None)

    def since(self, mark: str) -> tuple[str, dict[str, str]]:
        """The present mark, and the parts that changed since ``mark`` was the present one; all of
        them for a mark of another process.
        """
        epoch, _, number_of = mark.partition("-")
        known = int(number_of) if epoch == self._epoch and number_of.isdecimal() else 0
        changed = {name: text for name, (at, text) in self._kept.items() if at > known}
        return f"{self._epoch}-{self._number}", changed


class Board:
    """The parts of a place, brought up to date at each ``refresh``. Threads may share one.

    Raises ``RunError`` for a place without runs.
    """

    def __init__(self, place: Place) -> None:
        self.place = place
        self.index, self.curves, self.parts = Index(place), Curves(), Parts()
        self._styles: dict[str, int] = {}
        self._unread: dict[str, None] = {}
        self._lock = threading.Lock()
        self._due = self._frontier_due = self._cost = self._read_at = 0.0
        self._finished: tuple[str, ...] | None = None
        self._remade = 0
        self._by_id: dict[str, str] = {}
        self._views: OrderedDict[tuple[str, View], tuple[Any, str, str]] = OrderedDict()
        self.refresh()
        require(
            self.runs or self.index.waiting or self.index.notes,
            "a run, a sweep, or a folder of runs",
            f"{place.name} without any run",
            "the same command once a run has begun",
            error=RunError,
            field="place",
        )

    @property
    def runs(self) -> dict[str, RunRecord]:
        return self.index.runs

    def refresh(self, seconds: float | None = READ_SECONDS) -> None:
        """Look at the place, unless the last look was just now. Reads for about ``seconds``; None:
        until all is read.
        """
        with self._lock:
            if seconds is not None and time.monotonic() < self._due:
                return
            began = time.monotonic()
            changed = self.index.update(seconds)
            self._unread |= dict.fromkeys(self.index.looked)
            if changed or self._unread:
                self._remake(changed, None if seconds is None else began + seconds)
            now = time.monotonic()
            # The first look, and one that finds much, is not what the next will take.
            cost, self._cost = min(now - began, self._cost), now - began
            behind = bool(self.index.waiting or self._unread)
            if self.index.looked or behind:
                self._read_at = now
            elif now - self._read_at > IDLE_SECONDS:
                end_child()
            pause = max(self.place.seconds, min(LONGEST_PAUSE, SHARE * cost))
            self._due = now + (BEHIND_SECONDS if behind else pause)

    def changes(self, mark: str, seen: str, view: View) -> str:
        """The answer to a browser, a JSON text.

        Args:
            mark: as of its last answer; "" at first.
            seen: the digests of the parts of the view that it shows.
        """
        with self._lock:
            present, parts = self.parts.since(mark)
            known = set(seen.split("."))
            digests = []
            for name in ("table", "run", "layers", "load"):
                digest, text = self._viewed(name, view)
                digests.append(digest)
                if digest not in known:
                    parts[name] = text
        body = ",".join(f"{script_json(name)}:{text}" for name, text in parts.items())
        seen = ".".join(digests)
        return f'{{"mark":"{present}","seen":"{seen}","parts":{{{body}}}}}'

    def held(self) -> dict[str, dict[str, str]]:
        """All that a page of one file holds, after ``refresh(None)``: the parts, and those of views
        by what a reader asks for.
        """
        with self._lock:
            _, parts = self.parts.since("")
            parts["table"] = self._viewed("table", View())[1]
            views: dict[str, str] = {}
            for run in [*self._drawn()][:FILE_RUNS]:
                if sum(map(len, views.values())) > FILE_CHARACTERS:
                    break
                tables, _ = self.curves.details(run, self.runs[run])
                steps = tables["loads"]["step"].drop_nulls().unique().sort().to_list()
                asked = View(run=_id(run))
                views[f"run {asked.run}"] = self._viewed("run", asked)[1]
                for metric in LAYER_METRICS:
                    shown = self._viewed("layers", replace(asked, metric=metric))[1]
                    views[f"layers {asked.run} {metric}"] = shown
                for step in [steps[place] for place in evenly(len(steps), FILE_STEPS)]:
                    shown = self._viewed("load", replace(asked, step=step))[1]
                    views[f"load {asked.run} {step}"] = shown
        return {"parts": parts, "views": views}

    # what is made again ---------------------------------------------------------------------------

    def _remake(self, changed: set[str], until: float | None) -> None:
        self._remade += 1
        self._by_id = {_id(run): run for run in self.runs}
        drawn = self._drawn()
        order = [run for run in drawn if run in self._unread or run not in self.curves.of]
        for run in order:
            self._unread.pop(run, None)
            if self.curves.update(run, self.runs[run]) or run in changed:
                self._put_curve(run)
            if until is not None and time.monotonic() > until:
                break
        else:
            self._unread.clear()
        for run in [run for run in self.curves.of if run not in drawn]:
            del self.curves.of[run]
            self.parts.drop(f"curve/{_id(run)}")
        self._put_curves(drawn)
        self._put_frontier(until is None)
        self.parts.put("alarms", self._alarms())
        self.parts.put("answer", self._answer())
        if changed:
            self.parts.put("failures", self._failures())
            self.parts.put("missing", self._missing())

    def _drawn(self) -> dict[str, RunRecord]:
        """The runs of the figure of all runs, in the order of their arms and ratios. Of more than
        ``MAX_CURVES`` those that run, failed or raised alarms, and others by a digest of their
        names: a run that begins does not exchange the others.
        """
        begun = {run: record for run, record in self.runs.items() if record.begun}
        if len(begun) > MAX_CURVES:
            first = sorted(begun, key=lambda run: (self._rank(run), _digest(run)))
            begun = {run: begun[run] for run in first[:MAX_CURVES]}
        return dict(sorted(begun.items(), key=lambda item: _order(*item)))

    def _rank(self, run: str) -> int:
        state = self.runs[run].state
        return _RANK[RunState.FAILED] if self._alarm_count(run) and _RANK[state] else _RANK[state]

    def _alarm_count(self, run: str) -> int:
        return max(len(self.curves.of.get(run, EMPTY).alarms), self.runs[run].progress.alarms)

    def _put_curve(self, run: str) -> None:
        curve, record = self.curves.of.get(run, EMPTY), self.runs[run]
        y = {name: curve.y[name] for name in METRICS if name in curve.y}
        style = self._styles.setdefault(record.group, len(self._styles))
        line = {"name": record.label, "group": record.group, "line": line_style(style)}
        tokens, loss = curve.validation
        self.parts.put(
            f"curve/{_id(run)}",
            line
            | {"x": packed(curve.x), "y": {name: packed(y[name]) for name in y}}
            | ({"validation": [packed(tokens), packed(loss)]} if len(loss) else {}),
        )

    def _put_curves(self, drawn: Mapping[str, RunRecord]) -> None:
        known = {name for run in drawn for name in self.curves.of.get(run, EMPTY).y}
        if any(len(self.curves.of.get(run, EMPTY).validation[1]) for run in drawn):
            known.add("validation")
        begun = sum(record.begun for record in self.runs.values())
        left_out = begun - len(drawn)
        units = {self.curves.of.get(run, EMPTY).unit for run in drawn}
        value = {
            "runs": [_id(run) for run in drawn],
            "unit": " or ".join(sorted(units, reverse=True)) or EMPTY.unit,
            "metrics": [[name, title] for name, title in METRICS.items() if name in known],
            "note": f"{count_of(left_out, 'run')} more are not drawn." if left_out else "",
        }
        self.parts.put("curves", value)

    def _answer(self) -> dict[str, Any]:
        records = list(self.runs.values())
        numbers = {state: sum(record.state is state for record in records) for state in RunState}
        per_step = {run: self.curves.of[run].tokens_per_step for run in self.curves.of}
        left = seconds_left(records, per_step)
        alarms = sum(self._alarm_count(run) for run in self.runs)
        best = min(
            (record for record in records if _loss(record) is not None),
            key=lambda record: (_loss(record), record.label),
            default=None,
        )
        if len(records) == 1:
            sentence = self._answer_of_one(records[0])
        else:
            parts = [f"{numbers[state]:,} {state.value}" for state in RunState if numbers[state]]
            sentence = f"Of {count_of(len(records), 'run')}, {listing(parts)}."
            if best is not None:
                sentence += (
                    f" The lowest validation loss is {decimal(_loss(best), 4)} nats per token "
                    f"({best.label})."
                )
        if numbers[RunState.RUNNING]:
            sentence += f" About {duration(left)} left." if left is not None else ""
        elif len(records) > 1 and numbers[RunState.FINISHED] < len(records):
            sentence += " No run trains now."
        sentence += f" {count_of(alarms, 'alarm')}." if alarms else " No alarm."
        speeds = [
            record.progress.tokens_per_second
            for record in records
            if record.state is RunState.RUNNING and record.progress.tokens_per_second is not None
        ]
        facts = {"place": self.place.name}
        if speeds:
            facts["tokens per second"] = (
                f"{magnitude(sum(speeds))} in {count_of(len(speeds), 'run')}"
            )
        if self.index.questions:
            facts["question"] = " ".join(self.index.questions)
        notes = [*self.index.notes.values()]
        notes += [
            f"The tables of {self.runs[run].label} cannot be read: {why}."
            for run, why in list(self.curves.notes.items())[:MAX_FAILURES]
            if run in self.runs
        ]
        if unread := len(self.index.waiting) + len(self._unread):
            notes.append(f"{count_of(unread, 'folder')} not read yet.")
        return {"sentence": sentence, "facts": list(facts.items()), "notes": notes}

    def _answer_of_one(self, record: RunRecord) -> str:
        progress, curve = record.progress, self.curves.of.get(record.folder.name, EMPTY)
        sentence = f"{record.label} is {record.state.value}"
        if reached := _reached(progress, " of "):
            sentence += f" at step {reached}"
        if (loss := _loss(record)) is not None:
            return f"{sentence}; its validation loss is {decimal(loss, 4)} nats per token."
        if progress.loss is not None:
            sentence += f"; its training loss is {decimal(progress.loss)}"
        if len(curve.validation[1]):
            sentence += f", its last validation loss {decimal(float(curve.validation[1][-1]), 4)}"
        return f"{sentence}."

    def _alarms(self) -> dict[str, Any] | None:
        rows = [
            (alarm.get("step") or 0, run, alarm)
            for run, curve in self.curves.of.items()
            for alarm in curve.alarms
            if run in self.runs
        ]
        if not rows:
            return None
        rows.sort(key=lambda row: -row[0])
        texts = [
            [
                self.runs[run].label,
                whole(alarm.get("step")),
                NOTHING if alarm.get("layer") is None else str(alarm["layer"]),
                str(alarm.get("kind") or NOTHING).replace("_", " "),
                str(alarm.get("sentence") or NOTHING),
                str(alarm.get("advice") or NOTHING),
            ]
            for _, run, alarm in rows[:MAX_ROWS]
        ]
        header = ["run", "step", "layer", "alarm", "what is so", "what to do"]
        return _table(
            header, texts, [_id(run) for _, run, _ in rows[:MAX_ROWS]], len(rows) - len(texts)
        )

    def _failures(self) -> list[dict[str, str]]:
        failed = [record for record in self.runs.values() if record.state is RunState.FAILED]
        shown = [
            {"name": record.label, "reason": record.error, "lines": record.last_lines}
            for record in failed[:MAX_FAILURES]
        ]
        if len(failed) > MAX_FAILURES:
            more = count_of(len(failed) - MAX_FAILURES, "further run")
            where = "error.txt and log.txt of their folders"
            shown.append({"name": more, "reason": f"their last lines are in {where}", "lines": ""})
        return shown

    def _missing(self) -> dict[str, Any] | None:
        """What the frontier lacks: for each arm and ratio, its runs that are not finished."""
        points: dict[str, list[RunRecord]] = {}
        for _, record in sorted(self.runs.items(), key=lambda item: _order(*item)):
            if "arm" in record.result:
                points.setdefault(record.group, []).append(record)
        rows = []
        for group, records in points.items():
            done = sum(record.state is RunState.FINISHED for record in records)
            lacks = [
                f"seed {record.result.get('seed', NOTHING)} {record.state.value}"
                for record in records
                if record.state is not RunState.FINISHED
            ]
            if lacks:
                rows.append([group, f"{done} of {len(records)}", listing(lacks)])
        if not rows or len(self.runs) < 2:
            return None
        shown = rows[:MAX_ROWS]
        return _table(["arm and ratio", "finished", "missing"], shown, None, len(rows) - len(shown))

    def _put_frontier(self, now: bool) -> None:
        """The frontier of the finished runs, when they changed; the more runs, the more seldom."""
        finished = [record for record in self.runs.values() if record.state is RunState.FINISHED]
        key = tuple(record.folder.name for record in finished)
        if key == self._finished or not (now or time.monotonic() >= self._frontier_due):
            return
        if (self.index.waiting or self._unread) and not now:
            return
        began = time.monotonic()
        from moe_lab.report.runs_section import frontier_block
        from moe_lab.report.sources import Material

        block = None
        self.index.notes.pop("frontier", "")
        try:
            block = frontier_block(Material(tuple(finished), ())) if len(self.runs) > 1 else None
        except MoELabError as error:
            self.index.notes["frontier"] = f"The frontier cannot be drawn: {error}."
        figure = (
            None
            if block is None or not block.plots
            else _figure(block.plots[0].variants[0].canvas, block.caption, block.plots[0].summary)
        )
        self.parts.put("frontier", figure)
        self._finished = key
        self._frontier_due = time.monotonic() + SHARE * (time.monotonic() - began)

    # what a reader asked for ----------------------------------------------------------------------

    def _viewed(self, name: str, view: View) -> tuple[str, str]:
        """Digest and text of a part of a view; made again where its run, or the table, changed."""
        run = self._by_id.get(view.run, "")
        record, tables, key = self.runs.get(run), {}, None
        if name == "table":
            view, key = View(search=view.search), self._remade
        elif record is not None and record.begun:
            tables, number_of = self.curves.details(run, record)
            key = record, number_of, self.curves.notes.get(run)
        kept = self._views.pop((name, view), None)
        if kept is None or kept[0] != key:
            made = None
            if key is not None:
                made = {"table": self._table, "run": self._run, "layers": _layers, "load": _load}[
                    name
                ](view, tables)
            text = script_json(made)
            kept = key, f"{name}{zlib.crc32(text.encode()):08x}", text
        self._views[name, view] = kept
        while len(self._views) > MAX_VIEWS:
            self._views.popitem(last=False)
        return kept[1:]

    def _table(self, view: View, _tables: dict[str, pl.DataFrame]) -> dict[str, Any]:
        """The runs that match a search, those that need attention first."""
        wanted = view.search.lower()
        found = [
            (run, record)
            for run, record in self.runs.items()
            if not wanted or wanted in f"{record.label} {record.state.value} {run}".lower()
        ]
        found.sort(key=lambda item: (_RANK[item[1].state], *_order(*item)))
        rows = []
        for run, record in found[:MAX_ROWS]:
            curve, progress = self.curves.of.get(run, EMPTY), record.progress
            judged = curve.validation[1]
            loss = _loss(record)
            if loss is None and len(judged):
                loss = float(judged[-1])
            left = run_seconds_left(record, curve.tokens_per_step)
            rows.append(
                [
                    record.label,
                    record.state.value,
                    _reached(progress, "/") or NOTHING,
                    decimal(progress.loss),
                    decimal(loss, 4),
                    magnitude(progress.tokens_per_second),
                    NOTHING if left is None else duration(left),
                    str(self._alarm_count(run) or NOTHING),
                    run,
                ]
            )
        header = ["run", "state", "step", "training loss", "validation loss", "tokens/s", "left"]
        header += ["alarms", "folder"]
        runs = [_id(run) for run, _ in found[:MAX_ROWS]]
        return _table(header, rows, runs, len(found) - len(rows))

    def _run(self, view: View, tables: dict[str, pl.DataFrame]) -> dict[str, Any]:
        run = self._by_id[view.run]
        record, layers, loads = self.runs[run], tables["layers"], tables["loads"]
        steps = loads["step"].drop_nulls().unique().sort().to_list()
        metrics = _known(layers)
        facts = {"state": record.state.value}
        if reached := _reached(record.progress, " of "):
            facts["step"] = reached
        last = layers.tail(layers["layer"].n_unique()) if layers.height else layers
        for name in metrics:
            values = last[name].drop_nulls().to_list()
            if not values:  # not at the last step
                continue
            ends = dict.fromkeys(f"{end:.3g}" for end in (min(values), max(values)))
            facts[LAYER_METRICS[name].partition(",")[0]] = " to ".join(ends)
        if (target := last["ffn_target"].drop_nulls()).len():
            facts["target of ffn_count"] = f"{target[0]:.4g}"
        note = self.curves.notes.get(run, "")
        return {
            "id": view.run,
            "name": record.label,
            "facts": list(facts.items()),
            "metrics": [[name, LAYER_METRICS[name]] for name in metrics],
            "steps": steps,
            "note": note or ("" if layers.height else "It has recorded nothing by layer."),
        }


def _reached(progress: Progress, between: str) -> str:
    """The step, and how many there will be where that is known; "" before the first."""
    if not progress.steps:
        return f"{progress.step:,}" if progress.step else ""
    return f"{progress.step:,}{between}{progress.steps:,}"


def _layers(view: View, tables: dict[str, pl.DataFrame]) -> dict[str, Any] | None:
    layers = tables["layers"]
    known = _known(layers)
    metric = view.metric if view.metric in known else next(iter(known), "")
    if not metric:
        return None
    count = count_of(layers["layer"].n_unique(), "layer")
    title = LAYER_METRICS[metric]
    return _figure(
        layer_curves(layers, metric), f"{title} of {count}, steps as they were logged.", title
    )


def _known(layers: pl.DataFrame) -> list[str]:
    """The metrics of layers that are recorded."""
    return [name for name in LAYER_METRICS if layers[name].null_count() < layers.height]


def _load(view: View, tables: dict[str, pl.DataFrame]) -> dict[str, Any] | None:
    loads = tables["loads"].drop_nulls("load")
    if loads.is_empty():
        return None
    steps = loads["step"].unique().sort()
    known = steps.filter(steps <= view.step) if view.step is not None else steps
    step = known[-1] if len(known) else steps[0]
    caption = f"Load of every expert at step {step:,}; 1 is the fair share."
    return _figure(load_map(loads, step), caption, caption) | {"step": step}


def _figure(canvas: Canvas, caption: str, summary: str) -> dict[str, Any]:
    words = canvas.in_words
    return {
        "spec": None if words else canvas.spec(),
        "height": canvas.height,
        "caption": f"Not drawn: {words}. {caption}" if words else caption,
        "summary": summary,
    }


def _table(
    header: list[str], rows: list[list[str]], runs: list[str] | None, left_out: int
) -> dict[str, Any]:
    """``runs``: the run that each row is about."""
    return {"header": header, "rows": rows, "runs": runs, "left_out": left_out}


def _loss(record: RunRecord) -> float | None:
    return number(record.result.get("loss"))


def _order(run: str, record: RunRecord) -> tuple[str, float, float, str]:
    result = record.result
    ratio, seed = (number(result.get(name)) or 0.0 for name in ("ratio", "seed"))
    return str(result.get("arm", "")), ratio, seed, run


def _id(run: str) -> str:
    """What the page calls a run: the name of its folder, where that is plain."""
    return run if _PLAIN.fullmatch(run) else content_hash(run)


def _digest(run: str) -> int:
    return zlib.crc32(run.encode(errors="replace"))
