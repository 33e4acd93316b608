"""Parts of a page that a second process makes: the page is the same, and faults are told here."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from report_fixtures import write_plan

from moe_lab.analysis.map_reduce import mapped
from moe_lab.errors import AnalysisError
from moe_lab.report import second_process as module
from moe_lab.report import write_report
from moe_lab.report.second_process import SecondProcess, second_process
from moe_lab.worker_processes import WorkerProcesses


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Processes that pages start on two cores, where all sources are large."""
    numbers: list[int] = []

    class Counted(WorkerProcesses):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            numbers.append(1)
            super().__init__(*arguments, **options)

    monkeypatch.setattr(module, "WorkerProcesses", Counted)
    monkeypatch.setattr(module, "LEAST_BYTES", 1)
    monkeypatch.setattr(module, "_cores", lambda: 2)
    return numbers


@pytest.fixture
def beside() -> Iterator[SecondProcess]:
    worker = WorkerProcesses(1)
    yield SecondProcess(worker)
    worker.close()


@pytest.mark.slow
def test_the_page_is_the_same_with_and_without_it(
    sweep: Path, tmp_path: Path, started: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_it = write_report(sweep, tmp_path / "page.html").read_bytes()
    assert started == [1]
    monkeypatch.setattr(module, "_cores", lambda: 1)
    assert write_report(sweep, tmp_path / "page.html").read_bytes() == with_it
    assert started == [1]


def test_it_is_started_for_many_runs_and_for_large_traces_alone(
    tmp_path: Path, started: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "sweep"
    folder.mkdir()
    write_plan(folder, ["a"])
    with second_process([folder]):
        assert started == []
    monkeypatch.setattr(module, "LEAST_RUNS", 1)
    with second_process([folder]):
        assert started == [1]
    with second_process([folder], wanted=False):
        assert started == [1]
    (tmp_path / "trace" / "tokens").mkdir(parents=True)
    (tmp_path / "trace" / "tokens" / "0.parquet").write_bytes(b"12")
    with second_process([tmp_path / "trace"]) as beside:
        assert beside.begin(add, 2, 3)() == 5
        assert started == [1, 1]
    monkeypatch.setattr(module, "LEAST_BYTES", 3)
    with second_process([str(tmp_path / "trace")]) as beside:
        assert beside.begin(add, 2, 3)() == 5
        assert started == [1, 1]


def test_none_is_started_where_workers_read_the_trace(
    fixed_trace: Path, tmp_path: Path, started: list[int]
) -> None:
    with mapped(1, cache=tmp_path / "cache"):
        write_report(fixed_trace, tmp_path / "page.html")
    assert started == []


def test_what_it_has_not_begun_is_made_here(beside: SecondProcess) -> None:
    first, second, third = (beside.begin(held, here="here") for _ in range(3))
    assert third() == "here"  # the first is still under way
    assert first() == "there"
    assert second() in ("here", "there")


def test_its_errors_are_raised_here(beside: SecondProcess) -> None:
    with pytest.raises(AnalysisError, match="number 1") as raised:
        beside.begin(refuse, 1)()
    assert raised.value.field == "number"


def add(first: int, second: int) -> int:
    return first + second


def held(here: str = "there") -> str:
    return here


def refuse(number: int) -> None:
    raise AnalysisError(f"number {number} is refused", field="number")
