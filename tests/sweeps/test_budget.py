"""A budget of hours stops a sweep between runs, and the same command goes on."""

from pathlib import Path

import pytest
from stub_trainer import STUB, stub_grid, stub_sweep

from moe_lab.errors import ConfigError
from moe_lab.sweeps import run


def go(out: Path, max_hours: float | None, **options):
    sweep = stub_sweep(*stub_grid(4, steps=5, step_seconds=0.1))
    return run(sweep, out, workers=1, progress=False, trainer=STUB, max_hours=max_hours, **options)


def test_runs_that_have_begun_end_and_no_other_begins(tmp_path: Path) -> None:
    first = go(tmp_path, max_hours=0.3 / 3600)
    assert len(first.finished) >= 1
    assert len(first.interrupted) >= 1
    assert not first.failed
    assert go(tmp_path, max_hours=None).complete


def test_no_hours_start_nothing(tmp_path: Path) -> None:
    assert len(go(tmp_path, max_hours=0).interrupted) == 4


def test_a_negative_budget_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected max_hours of at least 0, got -1"):
        go(tmp_path, max_hours=-1)


def test_the_local_launcher_has_no_options(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected no launcher options for local, got address"):
        go(tmp_path, max_hours=None, launcher_options={"address": "auto"})
