"""The tables of a sweep's runs: results, unfinished runs, and the last lines of failed runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moe_lab.errors import MoELabError
from moe_lab.number_format import NOTHING, decimal, listing, magnitude
from moe_lab.report.figure_blocks import MAX_TABLE_ROWS, Table
from moe_lab.report.sources import Material, RunState
from moe_lab.routing.config import RouterConfig
from moe_lab.routing.facts import LATER_TOKENS
from moe_lab.runs import RunRecord

MAX_FAILURES = 20


COLUMNS: tuple[tuple[str, str, int], ...] = (
    ("total_params", "total params", -1),
    ("active_params", "active params", -1),
    ("flops_per_token", "FLOPs /token", -1),
    ("train_tokens", "training tokens", -1),
    ("loss", "loss, nats", 4),
    ("bits_per_byte", "bits /byte", 4),
    ("load_cv", "load cv", 3),
    ("mean_ffn_count", "mean ffn_count", 3),
    ("target_ffn_count", "target", 3),
    ("tokens_per_second", "tokens/s", -1),
)
"""Result, heading and decimals (-1: three significant digits with a letter) of the numbers in the
run table.
"""

SPARSE_COLUMNS = (
    ("expert_sparsity", "expert sparsity", 3),
    ("attention_sparsity", "attention sparsity", 3),
)
"""What is added where a run has sparse attention: the two sparsities stand beside each other."""


def results_table(material: Material) -> Table:
    """One row per finished run."""
    frame = material.table
    columns = COLUMNS + (SPARSE_COLUMNS if (frame["attention_sparsity"] > 0).any() else ())
    rows = []
    for row in frame.head(MAX_TABLE_ROWS).iter_rows(named=True):
        texts = [
            magnitude(row[name]) if digits < 0 else decimal(row[name], digits)
            for name, _, digits in columns
        ]
        ratio = NOTHING if row["ratio"] is None else f"{row['ratio']:.4g}"
        rows.append(
            (
                row["arm"] or row["name"] or row["run"],
                ratio,
                NOTHING if row["seed"] is None else str(row["seed"]),
                *texts,
            )
        )
    header = ("arm", "ratio", "seed", *(heading for _, heading, _ in columns))
    return Table(
        header, tuple(rows), (False, *[True] * (len(header) - 1)), frame.height - len(rows)
    )


def sees_later_tokens(run: RunRecord) -> bool:
    """Whether the run's router does in evaluation: by its result, or its configuration where the
    result is from before it was recorded.
    """
    recorded = run.result.get("sees_later_tokens")
    if isinstance(recorded, bool):
        return recorded
    try:
        values = run.config["model"]["moe"]["router"]
        return RouterConfig.from_dict(values).sees_later_tokens
    except (KeyError, TypeError, MoELabError):
        return False


def later_token_note(runs: Sequence[RunRecord]) -> str:
    """The sentence that belongs beside the losses of these runs; "" if nothing is to be said."""
    arms = dict.fromkeys(
        str(run.result.get("arm") or run.name) for run in runs if sees_later_tokens(run)
    )
    return f"{listing(list(arms))}: {LATER_TOKENS}." if arms else ""


def unfinished_table(material: Material) -> Table | None:
    """The runs that did not finish, with why; None where all did."""
    others = [run for run in material.runs if run.state is not RunState.FINISHED]
    if not others:
        return None
    others.sort(key=lambda run: run.state is not RunState.FAILED)
    rows = tuple((run.name, run.state.value, run.error) for run in others[:MAX_TABLE_ROWS])
    return Table(("run", "state", "why"), rows, (False, False, False), len(others) - len(rows))


@dataclass(frozen=True)
class Failures:
    """What failed runs said last, as (name, reason, lines); ``left_out`` how many further runs
    failed.
    """

    shown: tuple[tuple[str, str, str], ...]
    left_out: int


def failed_runs(material: Material) -> Failures | None:
    """The failed runs that left something to read; None without any."""
    failed = [run for run in material.runs if run.state is RunState.FAILED]
    shown: list[tuple[str, str, str]] = []
    for seen, run in enumerate(failed, start=1):
        if lines := run.last_lines:
            shown.append((run.name, run.error, lines))
        if len(shown) == MAX_FAILURES:
            return Failures(tuple(shown), len(failed) - seen)
    return Failures(tuple(shown), 0) if shown else None
