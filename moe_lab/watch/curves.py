"""The curves of runs: what their tables hold, thinned to what a figure shows.

The tables of a run are read by ``runs.tables.Follower``, which reads only what is new. Of a run
that nothing writes any more the thinned curve is kept, and not the tables.
"""

import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from moe_lab.errors import MoELabError
from moe_lab.files import read_regular
from moe_lab.report.canvas import evenly
from moe_lab.runs import RunRecord, RunState
from moe_lab.runs.tables import (
    ALARMS,
    LAYERS,
    LOADS,
    METRICS_TABLE,
    TABLES,
    VALIDATION,
    Follower,
    tables_of_logs,
)

POINTS = 150
"""Of a curve of the figure of all runs, at most."""
SMALL_LOGS = 4_000_000
"""Bytes of the logs of a finished run that are read in place of its Parquet files."""
MAX_ALARMS = 200
"""Of one run."""
MAX_DETAILS = 3
"""Runs whose tables by layer are kept, those asked for last."""
OF_A_RUN = (METRICS_TABLE.name, VALIDATION.name, ALARMS.name)
BY_LAYER = (LAYERS.name, LOADS.name)


@dataclass(frozen=True)
class Curve:
    """What a figure shows of one run.

    Attributes:
        x: training tokens of the points; steps, where tokens are not recorded.
        y: metric -> [n] values.
        validation: training tokens and loss, [n] each.
        alarms: rows of the table of alarms.
        tokens_per_step: 0: not known.
        unit: of ``x``.
    """

    x: NDArray[np.float32]
    y: dict[str, NDArray[np.float32]]
    validation: tuple[NDArray[np.float32], NDArray[np.float32]]
    alarms: tuple[dict[str, Any], ...] = ()
    tokens_per_step: float = 0.0
    unit: str = "training tokens"


EMPTY = Curve(np.empty(0, np.float32), {}, (np.empty(0, np.float32), np.empty(0, np.float32)))


@dataclass
class Curves:
    """The curves of the runs that are drawn.

    Attributes:
        of: run -> curve.
        notes: run -> why its tables cannot be read.
    """

    of: dict[str, Curve] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    _followers: dict[str, Follower] = field(default_factory=dict)
    _details: OrderedDict[str, tuple[Follower, int]] = field(default_factory=OrderedDict)

    def update(self, run: str, record: RunRecord) -> bool:
        """Read what is new of a run; whether its curve changed."""
        follower = self._followers.pop(run, None)
        if record.state is RunState.FINISHED and (logs := _small_logs(record.folder)) is not None:
            self.notes.pop(run, None)
            self.of[run] = curve_of(vars(tables_of_logs(logs.get)))
            return True
        follower = follower or Follower(record.folder, OF_A_RUN)
        changed = self._follow(run, follower) or run not in self.of
        if changed:
            self.of[run] = curve_of(follower.tables)
        if record.state is RunState.RUNNING:
            self._followers[run] = follower
        return bool(changed)

    def details(self, run: str, record: RunRecord) -> tuple[dict[str, pl.DataFrame], int]:
        """The tables by layer of a run that is looked into, as they are now, and a number that is
        another after a change.
        """
        follower, changes = self._details.pop(run, None) or (Follower(record.folder, BY_LAYER), 0)
        changes += bool(self._follow(run, follower))
        self._details[run] = follower, changes
        while len(self._details) > MAX_DETAILS:
            self._details.popitem(last=False)
        return follower.tables, changes

    def _follow(self, run: str, follower: Follower) -> frozenset[str]:
        self.notes.pop(run, None)
        try:
            return follower.update()
        except (MoELabError, OSError) as error:
            self.notes[run] = str(error)
            return frozenset(follower.tables)  # others may have changed


def _small_logs(folder: Path) -> dict[str, bytes] | None:
    """The logs that a finished run left, where they are small; None: its Parquet files are read, by
    a child process.
    """
    names = [TABLES[name].log for name in OF_A_RUN]
    found = {}
    try:
        sizes = {name: (folder / name).stat().st_size for name in names if (folder / name).exists()}
        if METRICS_TABLE.log in sizes and sum(sizes.values()) <= SMALL_LOGS:
            found = {name: read_regular(folder / name, SMALL_LOGS) for name in sizes}
    except OSError:
        return None
    return found or None


def curve_of(tables: Mapping[str, pl.DataFrame]) -> Curve:
    """The curve of the tables of a run."""
    metrics, validation = tables[METRICS_TABLE.name], tables[VALIDATION.name]
    values = _columns(metrics)
    steps, tokens = values.pop("step", EMPTY.x), values.pop("tokens", EMPTY.x)
    per_step = float(tokens[-1] / steps[-1]) if tokens.size and steps.size and steps[-1] else 0.0
    x = tokens if tokens.size else steps
    shown = evenly(x.size, POINTS) if x.size else []
    with np.errstate(over="ignore"):  # beyond the range of float32 is infinite
        y = {name: column[shown].astype(np.float32) for name, column in values.items() if x.size}
    judged = _columns(validation)
    at = judged["step"] * (per_step if tokens.size else 1.0)
    shown_too = evenly(at.size, POINTS) if at.size else []
    losses = at[shown_too].astype(np.float32), judged["loss"][shown_too].astype(np.float32)
    alarms = tables[ALARMS.name].tail(MAX_ALARMS)
    rows = tuple(alarms.to_dicts()) if alarms.height else ()
    known = per_step if math.isfinite(per_step) else 0.0
    unit = "steps" if steps.size and not tokens.size else Curve.unit
    return Curve(x[shown].astype(np.float32), y, losses, rows, known, unit)


def _columns(frame: pl.DataFrame) -> dict[str, NDArray[np.float64]]:
    """The columns of a frame of numbers, in one call of polars; null is NaN."""
    if not frame.height:
        return {name: np.empty(0) for name in frame.columns}
    return dict(zip(frame.columns, frame.to_numpy().astype(np.float64).T, strict=True))
