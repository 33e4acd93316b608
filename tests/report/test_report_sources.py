"""Reading folders: what counts as finished, what is listed, and what the errors say."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
from refusals import refused
from report_fixtures import (
    Shape,
    make_failed_run,
    make_run,
    make_trace,
    make_unfinished_run,
    run_name,
    write_plan,
)

from moe_lab.errors import RunError, TraceError
from moe_lab.files import write_json, write_parquet
from moe_lab.report import write_report
from moe_lab.report.sources import RunState, gather, run_table, training_metrics
from moe_lab.runs.done_file import check_seal, digests_of, seal
from moe_lab.runs.layout import DONE, METRICS, TRACE
from moe_lab.trace import open_trace

SMALL = Shape(layers=1, experts=4, documents=2, tokens=30)


def test_only_runs_with_done_are_finished(tmp_path: Path) -> None:
    make_run(tmp_path / "a", "topk", 2, 0, SMALL)
    (make_run(tmp_path / "b", "topk", 4, 0, SMALL) / "done").unlink()
    make_failed_run(tmp_path / "c", "out of disk")
    make_unfinished_run(tmp_path / "d")
    material = gather(tmp_path)
    assert [run.folder.name for run in material.finished] == ["a"]
    assert [named.label for named in material.traces] == ["topk 2:1, seed 0"]
    states = {run.folder.name: (run.state, run.error) for run in material.runs}
    assert states["b"] == (RunState.PENDING, "not started")
    assert states["c"] == (RunState.FAILED, "out of disk")
    assert states["d"] == (RunState.INTERRUPTED, "stopped at step 40 of 600")


def test_runs_of_the_plan_that_never_began_are_listed(tmp_path: Path) -> None:
    make_run(tmp_path / run_name(0), "topk", 2, 0, SMALL)
    write_plan(tmp_path, ["x", "later"], question="Is there a wall?")
    material = gather(tmp_path)
    assert material.questions == ("Is there a wall?",)
    assert [(run.label, run.error) for run in material.runs if run.state is RunState.PENDING] == [
        ("later", "not started")
    ]


def test_a_damaged_result_is_a_failed_run_and_not_an_exception(tmp_path: Path) -> None:
    make_run(tmp_path / "a", "topk", 2, 0, SMALL)
    (make_run(tmp_path / "b", "topk", 4, 0, SMALL) / "result.json").write_text('{"loss": ')
    material = gather(tmp_path)
    assert [run.folder.name for run in material.finished] == ["a"]
    assert material.runs[1].error.startswith("result.json cannot be read")


def test_a_list_of_run_folders_and_an_open_trace_are_sources(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", "topk", 2, 0, SMALL)
    trace = open_trace(make_trace(tmp_path / "bare", SMALL, model="other"))
    material = gather([run, trace, str(tmp_path / "bare")])
    assert [named.label for named in material.traces] == ["other", "bare", "topk 2:1, seed 0"]


def test_results_with_missing_or_odd_values_are_null(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", "topk", 2, 0, None)
    result = json.loads((run / "result.json").read_text())
    (run / "result.json").write_text(json.dumps(result | {"loss": "high", "seed": None}))
    assert run_table(gather(run).runs).select("loss", "seed", "load_cv").row(0) == (
        None,
        None,
        None,
    )


@pytest.mark.parametrize("value", ["x", 5, [1], {"a": [1]}, [[]], None, True, 1e308])
def test_a_page_is_made_of_results_of_any_types(tmp_path: Path, value: object) -> None:
    run = make_run(tmp_path / "a", "topk", 2, 0, SMALL)
    result = json.loads((run / "result.json").read_text())
    # The state of a run and what decides it are checked elsewhere; every other value may be forged.
    (run / "result.json").write_text(json.dumps(dict.fromkeys(result, value)))
    page = write_report(run, tmp_path / "page.html").read_text()
    assert page.rstrip().endswith("</html>")


def test_metrics_of_all_runs_are_one_frame(tmp_path: Path) -> None:
    make_run(tmp_path / "a", "topk", 2, 0, SMALL)
    make_run(tmp_path / "b", "dense", 1, 0, None)
    metrics = training_metrics(gather(tmp_path).finished)
    assert set(metrics["group"]) == {"topk 2:1", "dense 1:1"}
    assert metrics.height == 1200


@pytest.mark.parametrize(
    "make", [make_unfinished_run, lambda folder: make_failed_run(folder, "the loss is nan")]
)
def test_a_folder_without_finished_runs_says_so_in_one_line(tmp_path: Path, make) -> None:
    make(tmp_path / "a")
    with pytest.raises(
        RunError,
        match=r"^expected at least one finished run, got 1 runs? of which none is finished",
    ) as error:
        gather(tmp_path)
    assert "\n" not in str(error.value)


def test_a_missing_folder_says_so(tmp_path: Path) -> None:
    with refused("source", RunError):
        gather(tmp_path / "nowhere")


def test_an_empty_folder_says_so(tmp_path: Path) -> None:
    with refused("source", RunError):
        gather(tmp_path)


def test_a_damaged_trace_is_a_trace_error(tmp_path: Path) -> None:
    trace = make_trace(tmp_path / "bare", SMALL)
    (trace / "meta.json").write_text("{}")
    with pytest.raises(TraceError):
        gather(trace)


def test_of_the_seeds_of_a_point_one_trace_is_opened(tmp_path: Path) -> None:
    for seed in range(3):
        for ratio in (2, 4):
            make_run(
                tmp_path / f"r{ratio}s{seed}",
                "topk",
                ratio,
                seed,
                Shape(layers=1, experts=4, documents=2, tokens=30),
            )
    material = gather(tmp_path)
    assert len(material.finished) == 6
    assert [named.label for named in material.traces] == ["topk 2:1, seed 0", "topk 4:1, seed 0"]


@pytest.mark.parametrize("name", [METRICS, f"{TRACE}/meta.json"])
def test_a_file_of_another_run_beside_a_finished_one_is_refused(tmp_path: Path, name: str) -> None:
    shapes = {"a": SMALL, "b": replace(SMALL, tokens=31)}
    run, other = (make_run(tmp_path / n, "topk", 2, ord(n), shape) for n, shape in shapes.items())
    (run / DONE).write_text(seal(run))
    write_report(run, tmp_path / "page.html")
    part = name.partition("/")[0]
    shutil.rmtree(run / part) if (run / part).is_dir() else (run / part).unlink()
    (other / part).rename(run / part)
    with pytest.raises(RunError, match=f"expected the {name} that the run ended with") as caught:
        write_report(run, tmp_path / "page.html")
    assert "\n" not in str(caught.value)


def test_tables_of_another_study_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "difficulty"
    write_parquet(folder / "gain.parquet", pl.DataFrame({"gain": [1.0]}))
    digests = digests_of(folder, ["gain.parquet"])
    write_json(folder / "verdict.json", {"verdict": "yes", "digests": digests})
    check_seal(folder, ["gain.parquet"], folder / "verdict.json")
    write_parquet(folder / "regret.parquet", pl.DataFrame({"gain": [1.0]}))
    with refused("regret.parquet", RunError):
        check_seal(folder, ["gain.parquet", "regret.parquet"], folder / "verdict.json")
    write_parquet(folder / "gain.parquet", pl.DataFrame({"gain": [9.0]}))
    with refused("gain.parquet", RunError):
        check_seal(folder, ["gain.parquet"], folder / "verdict.json")


@pytest.mark.parametrize(
    "tables",
    [{}, {"association": {"x": [1]}}, {"association": {"verdict": ["x"]}, "curves": {"x": [1]}}],
    ids=["none", "other columns", "other types"],
)
def test_tables_of_no_study_of_ours_are_one_line(tmp_path: Path, tables: dict) -> None:
    shape = Shape(layers=1, experts=4, zero_experts=2, documents=2, tokens=30)
    run = make_run(tmp_path / "run", "zero", 2, 0, shape)
    for name, columns in tables.items():
        write_parquet(run / "difficulty" / f"{name}.parquet", pl.DataFrame(columns))
    write_json(run / "difficulty" / "verdict.json", {"verdict": 5})
    with pytest.raises(RunError, match="expected the tables of moe-lab difficulty, got others"):
        write_report(run, tmp_path / "page.html")
