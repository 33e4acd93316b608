"""The section on a sweep's runs: results, unfinished runs, and the last lines of failed runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_lab.errors import MoELabError
from moe_lab.number_format import NOTHING, count_of, decimal, listing, magnitude
from moe_lab.report.figure_blocks import MAX_TABLE_ROWS, Table
from moe_lab.report.sections import Folded, Section
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
    ("load_cv", "load CV", 3),
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
"""What is added where a run has sparse attention, so that the table shows both sparsities."""


def results_table(material: Material) -> Table:
    """One row per finished run."""
    frame = material.table
    columns = COLUMNS + (SPARSE_COLUMNS if (frame["attention_sparsity"] > 0).any() else ())
    rows, anchors = [], []
    for row in frame.head(MAX_TABLE_ROWS).iter_rows(named=True):
        texts = [
            magnitude(row[name]) if digits < 0 else decimal(row[name], digits)
            for name, _, digits in columns
        ]
        arm = row["arm"] or row["name"] or row["run"]
        ratio = NOTHING if row["ratio"] is None else f"{row['ratio']:.4g}"
        seed = NOTHING if row["seed"] is None else str(row["seed"])
        rows.append((arm, ratio, seed, *texts, Path(row["folder"]).name))
        anchors.append(f"run-{material.anchors[Path(row['folder'])]}")
    header = ("arm", "ratio", "seed", *(heading for _, heading, _ in columns), "run")
    numeric = (False, *[True] * (len(header) - 2), False)
    return Table(header, tuple(rows), numeric, frame.height - len(rows), tuple(anchors))


def run_rows(material: Material) -> dict[str, str]:
    """Label, or folder name, of each finished run in the table of results -> the id of its row."""
    shown = material.finished[:MAX_TABLE_ROWS]
    anchors = [f"run-{material.anchors[run.folder]}" for run in shown]
    labels = dict(zip((run.label for run in shown), anchors, strict=True))
    return labels | dict(zip((run.folder.name for run in shown), anchors, strict=True))


def runs_section(material: Material, command: str) -> Section:
    """The tables of all runs; empty without runs."""
    folded = []
    if material.finished:
        meanings = {
            words: dict.fromkeys(
                str(run.result[key]) for run in material.finished if run.result.get(key)
            )
            for words, key in (("Ratio", "ratio_meaning"), ("Parameters", "params_meaning"))
        }
        notes = [f"{words}: {'; '.join(texts)}." for words, texts in meanings.items() if texts]
        notes += [RESULTS_NOTE, f"Remake with {command}."]
        if later := later_token_note(material.finished):
            notes.append(later)
        table = results_table(material)
        count = count_of(len(material.finished), "run")
        folded.append(Folded(f"Finished: {count}", table, (" ".join(notes),)))
    if (unfinished := unfinished_table(material)) is not None:
        folded.append(Folded("Not finished", unfinished))
    if (failed := failed_runs(material)) is not None:
        folded += [
            Folded(f"Last lines of {name}: {reason}", lines=lines)
            for name, reason, lines in failed.shown
        ]
        if failed.left_out:
            folded.append(
                Folded(
                    f"{count_of(failed.left_out, 'further run')} failed",
                    notes=("Their last lines are in log.txt and error.txt of their folders.",),
                )
            )
    return Section("runs", "Runs", "Runs", folded=tuple(folded))


def sees_later_tokens(run: RunRecord) -> bool:
    """Whether in evaluation the run's router looks at later tokens: by its result, or by its
    configuration where the result does not record it.
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
    """The runs that did not finish, with the reason; None if all finished."""
    others = [run for run in material.runs if run.state is not RunState.FINISHED]
    if not others:
        return None
    others.sort(key=lambda run: run.state is not RunState.FAILED)
    rows = tuple((run.name, run.state.value, run.error) for run in others[:MAX_TABLE_ROWS])
    return Table(("run", "state", "why"), rows, (False, False, False), len(others) - len(rows))


RESULTS_NOTE = (
    "FLOPs are those of training. Loss is the validation loss in nats per token; load CV is over "
    "the real experts, per layer and then averaged."
)


@dataclass(frozen=True)
class Failures:
    """The last lines of failed runs, as (name, reason, lines); ``left_out`` how many further runs
    failed.
    """

    shown: tuple[tuple[str, str, str], ...]
    left_out: int


def failed_runs(material: Material) -> Failures | None:
    """The failed runs that left lines to read; None without any."""
    failed = [run for run in material.runs if run.state is RunState.FAILED]
    shown: list[tuple[str, str, str]] = []
    for seen, run in enumerate(failed, start=1):
        if lines := run.last_lines:
            shown.append((run.name, run.error, lines))
        if len(shown) == MAX_FAILURES:
            return Failures(tuple(shown), len(failed) - seen)
    return Failures(tuple(shown), 0) if shown else None
