"""The tables of a run's folder, read while the run trains and after it.

While a run trains, each table is a log ``<name>.jsonl``, one line per logged step: a line is
whole or it is not there, so that a step has all its layers or none. A column of a table with
layers is a list in that line, one value per layer. When the run is done, each is
``<name>.parquet``. ``read_tables`` gives either as frames of the same columns, and ``Follower`` the
frames of a run that grows, of which it reads only what is new.

Nothing in these files is trusted: a value of another type than its column's is null, a line that
is no JSON is left out, and Parquet is decoded by a child process.
"""

import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from moe_lab.errors import RunError
from moe_lab.files import open_regular, parse_json
from moe_lab.runs.done_file import check_seal
from moe_lab.runs.layout import DONE
from moe_lab.runs.record import number
from moe_lab.sandbox import read_parquet, read_parquets

MAX_LOG_BYTES = 64_000_000
"""Of a log, what is read at most."""

_REMEMBERED = 64
"""Bytes before the end of what was read, by which a log is recognised."""

Line = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """A table of a run's folder.

    Attributes:
        name: of its two files, without their ending.
        columns: name -> type; None: every number of a line is a column.
        snapshots: steps that the finished table holds at most, at equal distances; its log holds at
            most twice as many. None: all logged steps.
    """

    name: str
    columns: Mapping[str, pl.DataType] | None
    snapshots: int | None = None

    @property
    def log(self) -> str:
        """The file while the run trains."""
        return f"{self.name}.jsonl"

    @property
    def parquet(self) -> str:
        """The file of a finished run."""
        return f"{self.name}.parquet"

    @property
    def by_layer(self) -> bool:
        """Whether a line holds lists, one value per layer."""
        return self.snapshots is not None

    def frame(self, lines: Iterable[Line]) -> pl.DataFrame:
        """The rows of lines of the log."""
        rows = [row for line in lines for row in (_of_layers(line) if self.by_layer else (line,))]
        if self.columns is not None:
            values = {
                name: [_value(row.get(name), dtype) for row in rows]
                for name, dtype in self.columns.items()
            }
            return pl.DataFrame(values, schema=dict(self.columns))
        names = dict.fromkeys(name for row in rows for name in row)
        return pl.DataFrame(
            {name: [number(row.get(name)) for row in rows] for name in names},
            schema=dict.fromkeys(names, pl.Float64),
        )

    def of_parquet(self, frame: pl.DataFrame) -> pl.DataFrame:
        """A decoded Parquet file in the columns and types of this table; null where one is missing
        or is of another type.
        """
        if self.columns is None:
            return frame.select(pl.selectors.numeric().cast(pl.Float64))
        return frame.select(
            pl.col(name).cast(dtype, strict=False)
            if frame.schema.get(name, pl.Null).is_nested() == dtype.is_nested()
            and name in frame.columns
            else pl.lit(None, dtype).alias(name)
            for name, dtype in self.columns.items()
        )


def _of_layers(line: Line) -> list[Line]:
    """One row for each layer of a line, whose lists are as long as its list of layers."""
    layers = line.get("layer")
    if not isinstance(layers, list):
        return []
    lists = {
        name: value
        for name, value in line.items()
        if isinstance(value, list) and len(value) == len(layers)
    }
    return [
        {"step": line.get("step"), **{name: values[place] for name, values in lists.items()}}
        for place in range(len(layers))
    ]


def _value(value: Any, dtype: pl.DataType) -> Any:
    if dtype == pl.String:
        return value if isinstance(value, str) else None
    if dtype.is_nested():
        return [number(item) for item in value] if isinstance(value, list) else None
    found = number(value)
    if found is None or not dtype.is_integer():
        return found
    return int(found) if abs(found) < 2**53 else None  # NaN compares false


_STEP = {"step": pl.Int64()}
_LAYER = _STEP | {"layer": pl.Int64()}
METRICS_TABLE = Table("metrics", None)
LAYERS = Table(
    "layers",
    _LAYER
    | dict.fromkeys(
        (
            "load_cv",
            "max_violation",
            "dead_experts",
            "router_entropy",
            "entropy_max",
            "mean_ffn_count",
            "ffn_target",
            "bias_spread",
            "gradient_ratio",
        ),
        pl.Float64(),
    ),
    snapshots=1024,
)
LOADS = Table("loads", _LAYER | {"load": pl.List(pl.Float32())}, snapshots=128)
VALIDATION = Table("validation", _STEP | {"loss": pl.Float64(), "tokens": pl.Int64()})
ALARMS = Table(
    "alarms",
    _STEP
    | {"kind": pl.String(), "layer": pl.Int64(), "value": pl.Float64(), "threshold": pl.Float64()}
    | {"sentence": pl.String(), "advice": pl.String()},
)
TABLES = {table.name: table for table in (METRICS_TABLE, LAYERS, LOADS, VALIDATION, ALARMS)}
"""By name; docs/training.md explains the columns."""


@dataclass(frozen=True)
class RunTables:
    """The tables of one run; empty frames with their columns where nothing is recorded.

    Attributes:
        metrics: one row per logged step.
        layers: one row per recorded step and MoE layer.
        loads: share of the slots of real experts by expert, [E] per recorded step and layer.
        validation: loss in nats per token, one row per validation.
        alarms: one row per alarm.
    """

    metrics: pl.DataFrame
    layers: pl.DataFrame
    loads: pl.DataFrame
    validation: pl.DataFrame
    alarms: pl.DataFrame


def read_table(folder: Path | str, name: str) -> pl.DataFrame:
    """One of the tables of ``read_tables``."""
    folder = Path(folder)
    return _read(folder, TABLES[name], (folder / DONE).is_file())


def read_table_of_runs(folders: Sequence[Path], name: str) -> list[pl.DataFrame]:
    """``read_table`` of several runs, whose files are decoded together."""
    table, done = TABLES[name], [(folder / DONE).is_file() for folder in folders]
    whole = [
        folder
        for folder, finished in zip(folders, done, strict=True)
        if finished and (folder / table.parquet).is_file()
    ]
    for folder in whole:
        check_seal(folder, (table.parquet,))
    decoded = read_parquets([folder / table.parquet for folder in whole], RunError)
    frames = dict(zip(whole, map(table.of_parquet, decoded), strict=True))
    return [
        frames[folder] if folder in frames else _read(folder, table, finished)
        for folder, finished in zip(folders, done, strict=True)
    ]


def read_tables(folder: Path | str) -> RunTables:
    """The tables of the run in ``folder``, from its Parquet files if it is finished and from its
    logs if it is not. Raises ``RunError`` for a Parquet file that was changed since or is damaged,
    and for a log that may not be read.
    """
    return RunTables(**{name: read_table(folder, name) for name in TABLES})


def tables_of_logs(read: Callable[[str], bytes | None]) -> RunTables:
    """The tables from their logs, wherever they lie; a finished run keeps them.

    Args:
        read: file name in the run's folder -> its bytes, None if there is no such file.

    Example::

        tables_of_logs(lambda name: store.read(run, name))
    """
    return RunTables(
        **{
            name: table.frame(parse_lines(read(table.log) or b"")[0])
            for name, table in TABLES.items()
        }
    )


def _read(folder: Path, table: Table, finished: bool) -> pl.DataFrame:
    if not finished:
        return table.frame(_Tail(folder / table.log).new_lines()[1])
    if not (folder / table.parquet).is_file():  # of an older version, or nothing was recorded
        return table.frame(())
    check_seal(folder, (table.parquet,))
    return table.of_parquet(read_parquet(folder / table.parquet, RunError))


def parse_lines(content: bytes) -> tuple[list[Line], int]:
    """The lines of a log, and how many bytes they are: what a run that still writes has cut off is
    left out, and so is a line that is no JSON object.
    """
    whole = content.rfind(b"\n") + 1
    lines = []
    for text in content[:whole].splitlines():
        try:
            line = parse_json(text)
        except ValueError:
            continue
        if isinstance(line, dict):
            lines.append(line)
    return lines, whole


class _Tail:
    """The end of a log that grows. A log that was replaced (a run that resumes, or that thins a
    table) is read again from its beginning.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._place, self._file, self._last = path, 0, -1, b""

    def new_lines(self) -> tuple[bool, list[Line]]:
        """Whether the log was replaced, and the lines since the last call (of the new log).

        Raises ``RunError`` for a log that is there and cannot be read.
        """
        try:
            with open_regular(self._path) as file:
                found = os.fstat(file.fileno())
                file.seek(self._place - len(self._last))
                # A number of a file is given again when a file is gone: the bytes decide too.
                replaced = found.st_ino != self._file or file.read(len(self._last)) != self._last
                if replaced:
                    self._file, self._place, self._last = found.st_ino, 0, b""
                    file.seek(0)
                content = file.read(MAX_LOG_BYTES)
        except FileNotFoundError:
            return False, []
        except OSError as error:
            name = self._path.name
            raise RunError(f"{name}: {error.strerror or error}", name) from error
        lines, size = parse_lines(content)
        self._place += size
        self._last = (self._last + content[:size])[-_REMEMBERED:]
        return replaced, lines


class Follower:
    """The tables of a run that grows.

    Example::

        run = Follower(folder, ["metrics"])
        while run.update() or not run.finished:
            draw(run.tables["metrics"])

    Args:
        folder: of the run; it need not be there yet.
        names: of the tables; the others are not read.

    Attributes:
        tables: name -> frame, as of the last ``update``.
        finished: whether the frames are those of the finished run, which change no more.
    """

    def __init__(self, folder: Path | str, names: Collection[str] = tuple(TABLES)) -> None:
        self.folder, self.finished = Path(folder), False
        self.tables = {name: TABLES[name].frame(()) for name in names}
        self._tails = {name: _Tail(self.folder / TABLES[name].log) for name in names}

    def update(self) -> frozenset[str]:
        """Read what is new; the names of the tables that changed. Raises as ``read_tables``, when
        the other tables have been read.
        """
        if self.finished:
            return frozenset()
        if (self.folder / DONE).is_file():
            new = {name: _read(self.folder, TABLES[name], True) for name in self.tables}
            changed = {name for name in new if not new[name].equals(self.tables[name])}
            self.tables, self.finished = new, True
            return frozenset(changed)
        changed, failed = [], None
        for name in self.tables:
            try:
                changed += [name] * self._grow(name)
            except RunError as error:
                failed = failed or error
        if failed is not None:
            raise failed
        return frozenset(changed)

    def _grow(self, name: str) -> bool:
        replaced, lines = self._tails[name].new_lines()
        if not lines and not replaced:
            return False
        new = TABLES[name].frame(lines)
        old = self.tables[name]
        whole = new if replaced else pl.concat([old, new], how="diagonal")
        self.tables[name] = whole
        return not whole.equals(old)
