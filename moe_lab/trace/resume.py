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
from moe_lab.trace.clean_copies import CleanCopies
from moe_lab.trace.data_files import files_on_disk
from moe_lab.trace.manifest import file_name
from moe_lab.trace.opened_trace import Trace
from moe_lab.trace.part_files import Listing, count_slots, write_part
from moe_lab.trace.reader import open_trace
from moe_lab.trace.rows import key_checksum
from moe_lab.trace.schema import ROUTED, TraceMeta

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
    """The kept part of an interrupted trace: finished documents, its manifest, totals by table
    name, and the columns of ``tokens``.
    """

    documents: set[int]
    listing: Listing
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
    if isinstance(trace.storage, CleanCopies):  # of another user or version: go on with the copies
        for name in trace.manifest.names():
            shutil.copyfile(trace.path(name), folder / name)
    interrupted = InterruptedTrace(_finished(folder / DOCUMENTS_FILE), Listing(folder))
    finished = pl.Series(sorted(interrupted.documents), dtype=pl.UInt32)
    kept = set()
    for layer in (None, *(one.layer for one in meta.layers)):
        kept |= _keep_finished(trace, folder, layer, finished, interrupted)
    interrupted.listing.write(meta, complete=False)  # the old files go when the new ones are listed
    for name in files_on_disk(folder) - kept:
        (folder / name).unlink(missing_ok=True)
    for path in folder.rglob(TEMPORARY_PREFIX + "*"):
        path.unlink(missing_ok=True)
    return interrupted


def _keep_finished(
    trace: Trace,
    folder: Path,
    number: int | None,
    finished: pl.Series,
    interrupted: InterruptedTrace,
) -> set[str]:
    """List the files of one table (None: ``tokens``) without rows of unfinished documents, and
    return their names; a file that has such rows is replaced by a new one.
    """
    entries = trace.manifest.of_layer(number)
    layer = None if number is None else trace.meta.layer(number)
    highest = entries["part"].max()
    totals = TableTotals(
        counts=np.zeros(0 if layer is None else layer.num_choices, np.int64),
        next_part=int(highest) + 1 if isinstance(highest, int) else 0,
    )
    interrupted.tables["tokens" if number is None else f"routing/layer={number}"] = totals
    names = set()
    for entry in entries.iter_rows(named=True):
        part, name = entry["part"], file_name(number, entry["part"])
        frame = trace.read(name)
        kept = frame.filter(pl.col("doc").is_in(finished.implode()))
        counts = None if layer is None else count_slots(kept, layer.num_choices)
        if kept.height == frame.height:
            interrupted.listing.add(number, part, kept.height, counts)
            names.add(name)
        elif kept.height:
            part, totals.next_part = totals.next_part, totals.next_part + 1
            name = file_name(number, part)
            write_part(folder / name, kept)
            interrupted.listing.add(number, part, kept.height, counts)
            names.add(name)
        if counts is None:
            interrupted.token_schema = interrupted.token_schema or kept.schema
            kept = kept.filter(ROUTED) if ROUTED in kept.columns else kept
        else:
            totals.counts += counts
        totals.rows += kept.height
        totals.keys = (
            totals.keys + key_checksum(kept["doc"].to_numpy(), kept["pos"].to_numpy())
        ) % 2**64
    return names


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
