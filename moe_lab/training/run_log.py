"""``RunLog``: the tables of a run folder (``moe_lab.runs.tables``) while they are written.

Lines are appended to logs while a run trains and become Parquet at its end. A table of bounded
size is thinned in time: when its log holds twice the steps that it may, every second (fourth, ...)
recorded step stays. What stays at the end depends on the last step only, so it is the same however
often the run was interrupted.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import polars as pl

from moe_lab.errors import StorageError
from moe_lab.files import cannot_write, read_regular, write_parquet, write_text
from moe_lab.runs.tables import METRICS_TABLE, TABLES, Line, Table, parse_lines

Lines = dict[str, list[Line]]
"""Name of a table -> lines of its log."""


class RunLog:
    """The tables of one run.

    Args:
        folder: of the run.
        every: recorded steps are multiples of it (and the last step).
        write: False on ranks that only take part: nothing is kept.

    Attributes:
        lines: what the logs hold, with what ``flush`` has yet to write.
    """

    def __init__(self, folder: Path, every: int, *, write: bool = True) -> None:
        self.folder, self.every, self.write = folder, every, write
        self.lines: Lines = {name: [] for name in TABLES}
        self._pending: Lines = {name: [] for name in TABLES}
        self._thinned: set[str] = set()

    def begin(self, lines: Mapping[str, Sequence[Line]]) -> None:
        """Replace all logs by ``lines``, those of an earlier attempt that this one continues."""
        if not self.write:
            return
        for name, table in TABLES.items():
            self.lines[name] = list(lines.get(name, ()))
            self._pending[name] = []
            if self.lines[name] or (self.folder / table.log).exists() or table is METRICS_TABLE:
                write_text(self.folder / table.log, _text(self.lines[name]))

    def add(self, name: str, line: Line) -> None:
        """Add a line to the table ``name``."""
        if not self.write:
            return
        table = TABLES[name]
        self.lines[name].append(line)
        self._pending[name].append(line)
        if table.snapshots is not None and len(self.lines[name]) >= 2 * table.snapshots:
            self.lines[name] = thinned(self.lines[name], self.every, table.snapshots)
            self._thinned.add(name)

    def flush(self, *, lasting: bool = False) -> None:
        """Write what was added. ``lasting`` lines survive a power cut: no checkpoint may be newer
        than its metrics.
        """
        for name, pending in self._pending.items():
            log = self.folder / TABLES[name].log
            if name in self._thinned:
                write_text(log, _text(self.lines[name]))
                self._thinned.discard(name)
            elif pending or (lasting and log.exists()):
                self._append(log, pending, lasting)
            pending.clear()

    def _append(self, path: Path, lines: Iterable[Line], lasting: bool) -> None:
        try:
            with open(path, "a", encoding="utf-8") as log:
                log.write(_text(lines))
                if lasting:
                    log.flush()
                    os.fsync(log.fileno())
        except OSError as error:
            raise StorageError(cannot_write(self.folder, error)) from error

    def finish(self) -> pl.DataFrame:
        """Write the Parquet files; returns the metrics."""
        self.flush(lasting=True)
        for name, table in TABLES.items():
            lines = self.lines[name]
            if table.snapshots is not None:
                lines = thinned(lines, self.every, table.snapshots)
            if lines or table is METRICS_TABLE:
                write_parquet(self.folder / table.parquet, _frame(table, lines))
        return _frame(METRICS_TABLE, self.lines["metrics"])

    def read(self, last_step: int) -> Lines:
        """The lines of an earlier attempt up to ``last_step``."""
        kept = {}
        for name, table in TABLES.items():
            log = self.folder / table.log
            lines = parse_lines(read_regular(log))[0] if log.exists() else []
            kept[name] = [
                line
                for line in lines
                if isinstance(line.get("step"), int) and line["step"] <= last_step
            ]
        return kept


def thinned(lines: list[Line], every: int, most: int) -> list[Line]:
    """Lines of at most ``most`` steps at equal distances, a power of two times ``every``, and the
    last line.

    Lines that an earlier call has left out would be left out here too: the longer a run, the
    larger the distance.
    """
    if not lines:
        return lines
    distance = every
    while lines[-1]["step"] // distance > most:
        distance *= 2
    return [line for line in lines[:-1] if line["step"] % distance == 0] + lines[-1:]


def _frame(table: Table, lines: list[Line]) -> pl.DataFrame:
    if table is METRICS_TABLE:  # whole numbers stay whole
        return pl.DataFrame(lines, infer_schema_length=None)
    return table.frame(lines)


def _text(lines: Iterable[Line]) -> str:
    return "".join(json.dumps(line) + "\n" for line in lines)
