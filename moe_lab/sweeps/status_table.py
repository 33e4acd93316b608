"""The state of each run of a sweep: as a frame, and as the lines of ``moe-lab sweep status``."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from moe_lab.number_format import listing
from moe_lab.routing.facts import LATER_TOKENS
from moe_lab.runs.layout import RunState
from moe_lab.runs.plan import planned_runs
from moe_lab.runs.record import number
from moe_lab.runs.store import open_store
from moe_lab.runs.waits import Wait, wait_lines

if TYPE_CHECKING:
    import polars as pl

MAX_ROWS = 200
"""Of a larger sweep only the rows of runs that run or need someone's attention are shown, so many
at most.
"""
MAX_FAILURES = 10
"""Failed runs whose last lines are shown, and runs whose last alarm is."""
_COLUMNS = {
    "run": "String",
    "name": "String",
    "arm": "String",
    "ratio": "Float64",
    "seed": "Int64",
    "state": "String",
    "step": "Int64",
    "steps": "Int64",
    "progress": "Float64",
    "loss": "Float64",
    "tokens_per_second": "Float64",
    "alarms": "Int64",
    "alarm": "String",
    "error": "String",
    "job": "String",
    "waits": "String",
    "last_lines": "String",
    "sees_later_tokens": "Boolean",
}
"""Of ``status``, with the names of their polars types."""
_ATTENTION = (RunState.FAILED, RunState.RUNNING, RunState.INTERRUPTED)


def status(folder: Path | str) -> "pl.DataFrame":
    """One row per planned run, in the plan's order.

    Reads small files only and may be called at any time, from any machine that sees the folder.

    Returns:
        [run, name, arm, ratio, seed, state, step, steps, progress (0 to 1), loss,
            tokens_per_second, alarms, alarm, error, job, waits, last_lines, sees_later_tokens]:
            ``loss`` is the validation loss (nats per token) of a finished run, else the last
            training loss; ``alarms`` their number and ``alarm`` the sentence of the last one;
            ``error`` the failed run's one line, ``last_lines`` the end of what it printed and of
            its traceback; ``job`` and ``waits`` the cluster's job and its reason where the run
            waits in a queue for what may never come;
            ``sees_later_tokens`` whether the loss is not that of a causal model, null where that
            was not recorded.

    Raises:
        RunError: the folder is no sweep.
    """
    import polars as pl

    store = open_store(folder)
    plan = store.plan()
    runs = planned_runs(plan)
    waits, rows = store.waits(), []
    for run, record in zip(runs, store.records(runs), strict=True):
        entry, progress, result = plan["runs"][run], record.progress, record.result
        speed = progress.tokens_per_second
        finished = record.state is RunState.FINISHED
        queued = record.state in (RunState.PENDING, RunState.INTERRUPTED)
        wait = waits.runs.get(run) if queued else None
        rows.append(
            {
                "run": run,
                **{key: entry[key] for key in ("name", "arm", "ratio", "seed")},
                "state": record.state.value,
                "step": progress.step,
                "steps": progress.steps,
                "progress": 1.0 if finished else progress.fraction,
                "loss": number(result.get("loss", progress.loss)),
                "tokens_per_second": number(result.get("tokens_per_second", speed)),
                "alarms": progress.alarms,
                "alarm": progress.alarm,
                "error": record.error if record.state is RunState.FAILED else "",
                "job": wait.job if wait else "",
                "waits": wait.reason + waits.age() if wait else "",
                "last_lines": record.last_lines,
                "sees_later_tokens": result.get("sees_later_tokens"),
            }
        )
    schema = {name: getattr(pl, kind) for name, kind in _COLUMNS.items()}
    return pl.DataFrame(rows, schema=schema, orient="row")


def status_rows(frame: "pl.DataFrame") -> "pl.DataFrame":
    """[run, name, state, step, loss, tok/s, error], and alarms where there are some: what ``sweep
    status`` shows of the frame of ``status``.
    """
    import polars as pl

    shown = frame.select(
        "run",
        "name",
        "state",
        pl.format("{}/{}", "step", "steps").alias("step"),
        "loss",
        pl.col("tokens_per_second").round(0).cast(pl.Int64).alias("tok/s"),
        *(["alarms"] if frame["alarms"].sum() else []),
        "error",
    )
    if frame.height > MAX_ROWS:
        rank = pl.col("state").replace_strict(
            {state.value: place for place, state in enumerate(_ATTENTION)}, default=None
        )
        shown = shown.filter(rank.is_not_null()).sort(rank, maintain_order=True).head(MAX_ROWS)
    return shown


def status_lines(frame: "pl.DataFrame") -> Iterator[str]:
    """The lines that ``sweep status`` prints below its table."""
    import polars as pl

    counts = dict(frame.group_by("state").len().rows())
    parts = [
        f"{counts[state.value]:,} {state.value}" for state in RunState if state.value in counts
    ]
    hidden = "" if frame.height <= MAX_ROWS else "; rows of the others: --json"
    yield f"{frame.height:,} runs: {', '.join(parts)}{hidden}"
    looking = frame.filter("sees_later_tokens")["arm"].unique(maintain_order=True)
    if looking.len():
        yield f"note: {listing(looking.to_list())}: {LATER_TOKENS}"
    warned = frame.filter(pl.col("alarms") > 0)
    for row in warned.head(MAX_FAILURES).iter_rows(named=True):
        before = f"{row['alarms']} alarms, the last: " if row["alarms"] > 1 else ""
        yield f"alarm: {row['name']} ({row['run']}): {before}{row['alarm']}"
    waiting = frame.filter(pl.col("waits") != "")
    waits = {run: Wait(*told) for run, *told in waiting.select("run", "job", "waits").rows()}
    names = dict(waiting.select("run", "name").rows())
    yield from (f"waiting: {line}" for line in wait_lines(waits, names))
    failed = frame.filter(state=RunState.FAILED.value)
    for row in failed.head(MAX_FAILURES).iter_rows(named=True):
        yield f"\n{row['name']} ({row['run']}) failed: {row['error']}"
        yield from (f"    {line}" for line in row["last_lines"].splitlines())
    if failed.height:
        more = (
            f"\nand {failed.height - MAX_FAILURES:,} more" if failed.height > MAX_FAILURES else ""
        )
        yield f"{more}\n`moe-lab sweep run ... --retry-failed` trains failed runs again"
