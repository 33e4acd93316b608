"""``sweep status`` for a terminal: how many runs are in which state, a row per run, and the last
lines of failed ones.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from moe_lab.sweeps.store import RunState

if TYPE_CHECKING:
    import polars as pl

MAX_ROWS = 200
"""Of a larger sweep only the rows of runs that run or need someone's attention are shown, so many
at most.
"""
MAX_FAILURES = 10
"""Failed runs whose last lines are shown."""
_ATTENTION = (RunState.FAILED, RunState.RUNNING, RunState.INTERRUPTED)


def status_lines(frame: "pl.DataFrame") -> Iterator[str]:
    """The lines of ``sweep status`` from the frame of ``status``."""
    import polars as pl

    shown = frame.drop("last_lines")
    if frame.height > MAX_ROWS:
        rank = pl.col("state").replace_strict(
            {state.value: place for place, state in enumerate(_ATTENTION)}, default=None
        )
        shown = shown.filter(rank.is_not_null()).sort(rank, maintain_order=True).head(MAX_ROWS)
    if shown.height:
        with pl.Config(
            tbl_rows=-1,
            tbl_cols=-1,
            tbl_hide_dataframe_shape=True,
            tbl_hide_column_data_types=True,
            fmt_str_lengths=80,
        ):
            yield str(shown)
    counts = dict(frame.group_by("state").len().rows())
    parts = [
        f"{counts[state.value]:,} {state.value}" for state in RunState if state.value in counts
    ]
    hidden = "" if shown.height == frame.height else "; rows of the others: --json"
    yield f"{frame.height:,} runs: {', '.join(parts)}{hidden}"
    failed = frame.filter(state=RunState.FAILED.value)
    for row in failed.head(MAX_FAILURES).iter_rows(named=True):
        yield f"\n{row['name']} ({row['run']}) failed: {row['error']}"
        yield from (f"    {line}" for line in row["last_lines"].splitlines())
    if failed.height:
        more = (
            f"\nand {failed.height - MAX_FAILURES:,} more" if failed.height > MAX_FAILURES else ""
        )
        yield f"{more}\n`moe-lab sweep run ... --retry-failed` trains failed runs again"
