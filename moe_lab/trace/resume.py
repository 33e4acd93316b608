"""The finished documents of an interrupted trace, from which it can go on.

Rows of the others are taken out, so that they can be done again.
"""

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from moe_lab.errors import TraceError, expected
from moe_lab.files import TEMPORARY_PREFIX, read_regular
from moe_lab.trace.part_files import count_slots, part_of, write_meta, write_part
from moe_lab.trace.reader import open_trace
from moe_lab.trace.rows import key_checksum
from moe_lab.trace.schema import ROUTED, PartMeta, TraceMeta

DOCUMENTS_FILE = "documents.json"
MAY_DIFFER = ("versions", "created_from", "notes", "phase", "has_weights", "has_scores")
"""Fields of the metadata that may change between an interrupted trace and its continuation."""


@dataclass
class TableTotals:
    """Totals of one table on disk: rows that take part in conservation, their key checksum, slots
    per expert, and the next part's number.
    """

    rows: int = 0
    keys: int = 0
    counts: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    next_part: int = 0


@dataclass
class InterruptedTrace:
    """The kept part of an interrupted trace: finished documents, its files, totals by table name,
    and the columns of ``tokens``.
    """

    documents: set[int] = field(default_factory=set)
    parts: dict[str, PartMeta] = field(default_factory=dict)
    tables: dict[str, TableTotals] = field(default_factory=dict)
    token_schema: pl.Schema | None = None


def ranges(documents: Iterable[int]) -> list[list[int]]:
    """Sorted ``[first, last]`` runs of consecutive numbers: millions of documents stay a short
    list.
    """
    runs: list[list[int]] = []
    for number in sorted(documents):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return runs


def recover(folder: Path, meta: TraceMeta) -> InterruptedTrace:
    """Reduce the interrupted trace in ``folder`` to its finished documents.

    Raises ``TraceError`` where it is damaged or of another model, text or setting.
    """
    trace = open_trace(folder, allow_incomplete=True)
    if differing := _differences(trace.meta.to_dict(), meta.to_dict()):
        what = f"an interrupted trace of the same {', '.join(differing)} at {folder}"
        raise TraceError(expected(what, "another", "removing it, or another folder"), differing[0])
    if trace.data is not None:  # written by another user or version: go on with the clean copy
        for name in trace.parts:
            shutil.copyfile(trace.data / name, folder / name)
    interrupted = InterruptedTrace(
        documents=_finished(folder / DOCUMENTS_FILE), parts=dict(trace.parts)
    )
    finished = pl.Series(sorted(interrupted.documents), dtype=pl.UInt32)
    for name in sorted(trace.parts):
        _keep_finished(folder, name, finished, interrupted, meta)
    for path in [*folder.rglob("*.parquet"), *folder.rglob(TEMPORARY_PREFIX + "*")]:
        if path.relative_to(folder).as_posix() not in interrupted.parts:
            path.unlink(missing_ok=True)
    return interrupted


def _keep_finished(
    folder: Path, name: str, finished: pl.Series, interrupted: InterruptedTrace, meta: TraceMeta
) -> None:
    """Take the rows of unfinished documents out of one part; the old file goes only when the new
    one is listed.
    """
    table, number = name.rsplit("/part-", 1)
    totals = interrupted.tables.setdefault(table, TableTotals())
    totals.next_part = max(totals.next_part, int(number.removesuffix(".parquet")) + 1)
    frame = pl.read_parquet(folder / name, hive_partitioning=False)
    kept = frame.filter(pl.col("doc").is_in(finished.implode()))
    if kept.height < frame.height:
        part = interrupted.parts.pop(name)
        if kept.height:
            name = f"{table}/part-{totals.next_part:05d}.parquet"
            totals.next_part += 1
            write_part(folder / name, kept)
            slots = (
                int(kept["experts"].list.len().sum()) if "experts" in kept.columns else part.slots
            )
            interrupted.parts[name] = part_of(folder / name, kept, slots)
        write_meta(folder, meta, interrupted.parts, complete=False)
    if table == "tokens":
        interrupted.token_schema = interrupted.token_schema or kept.schema
        kept = kept.filter(ROUTED) if ROUTED in kept.columns else kept
    else:
        layer = meta.layer(int(table.rsplit("=", 1)[1]))
        assert layer is not None  # open_trace compared the layers
        counts = count_slots(kept, layer.num_choices)
        totals.counts = counts if not len(totals.counts) else totals.counts + counts
    totals.rows += kept.height
    totals.keys = (
        totals.keys + key_checksum(kept["doc"].to_numpy(), kept["pos"].to_numpy())
    ) % 2**64


def _differences(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    for values in (first, second):  # inferred from the first pass
        values["layers"] = [
            {name: value for name, value in layer.items() if name != "score_func"}
            for layer in values["layers"]
        ]
    names = (first.keys() | second.keys()) - set(MAY_DIFFER)
    return sorted(name for name in names if first.get(name) != second.get(name))


def _finished(path: Path) -> set[int]:
    try:
        runs = json.loads(read_regular(path))["documents"]
        return {number for first, last in runs for number in range(int(first), int(last) + 1)}
    except FileNotFoundError:
        return set()
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise TraceError(
            f"expected {path} to list finished documents, "
            f"got {type(error).__name__}; try removing the folder"
        ) from error
