"""Parts of a page that a second process makes: the page is the same, and faults are told here."""

from pathlib import Path
from typing import Any

import pytest

from moe_lab.analysis import map_reduce
from moe_lab.errors import AnalysisError
from moe_lab.report import second_process as module
from moe_lab.report import write_report
from moe_lab.report.frames import Frames
from moe_lab.report.second_process import SecondProcess, second_process
from moe_lab.report.sources import gather


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Processes that pages start, which are large here whatever they show."""
    started: list[int] = []

    class Counted(module.WorkerProcesses):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            started.append(1)
            super().__init__(*arguments, **options)

    monkeypatch.setattr(module, "WorkerProcesses", Counted)
    monkeypatch.setattr(module, "LEAST_RUNS", 1)
    monkeypatch.setattr(module, "LEAST_ROWS", 1)
    monkeypatch.setattr(module, "_cores", lambda: 2)
    return started


@pytest.mark.slow
def test_the_page_is_the_same_with_and_without_it(
    sweep: Path, tmp_path: Path, counted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_it = write_report(sweep, tmp_path / "page.html").read_bytes()
    assert counted == [1]
    monkeypatch.setattr(module, "_cores", lambda: 1)
    assert write_report(sweep, tmp_path / "page.html").read_bytes() == with_it
    assert counted == [1]


def test_none_is_started_for_a_small_page_or_beside_workers(
    sweep: Path, counted: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    material = gather(sweep)
    with (
        map_reduce.mapped(1, cache=tmp_path),
        second_process(material, Frames()) as beside,
    ):
        assert beside.begin(add, 2, 3)() == 5
    monkeypatch.setattr(module, "LEAST_RUNS", len(material.runs) + 1)
    monkeypatch.setattr(module, "LEAST_ROWS", 10**9)
    with second_process(material, Frames()) as beside:
        assert beside.begin(add, 2, 3)() == 5
    assert counted == []


def test_what_it_has_not_begun_is_made_here_and_its_errors_are_raised_here(sweep: Path) -> None:
    frames = Frames()
    worker = module.WorkerProcesses(1)
    try:
        beside = SecondProcess(frames, worker)
        first, second, third = (beside.begin(where, number) for number in range(3))
        assert third() is frames  # made here: the first is still under way
        assert first() is not frames
        with pytest.raises(AnalysisError, match="number 1"):
            beside.begin(refuse, 1)()
        assert second() is not None
    finally:
        worker.close()


def add(first: int, second: int, frames: Frames) -> int:
    return first + second


def where(number: int, frames: Frames) -> Frames:
    return frames


def refuse(number: int, frames: Frames) -> None:
    raise AnalysisError(f"number {number} is refused")
