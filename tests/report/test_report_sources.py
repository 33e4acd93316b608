"""Reading folders: what counts as finished, what is listed, and what the errors say."""

import json
import re
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
from moe_lab.report import sources, write_report
from moe_lab.report.sources import RunState, gather, run_table, training_metrics
from moe_lab.runs import RunRecord
from moe_lab.runs.done_file import check_seal, digests_of, seal
from moe_lab.runs.layout import DONE, METRICS, TRACE
from moe_lab.runs.tables import read_table, read_table_of_runs
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
        match=r"^expected at least one finished run, got 1 run, none finished",
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


def log_steps(folder: Path, steps: int = 30) -> Path:
    """What a run that still trains has written, its last line cut off."""
    rows = [
        json.dumps({"step": step, "tokens": 100 * step, "loss": 4 - step / 30, "note": "x"})
        for step in range(1, steps + 1)
    ]
    (folder / "metrics.jsonl").write_text("\n".join(rows) + '\n{"step": 31, "lo')
    return folder


def test_a_sweep_in_progress_shows_what_is_finished_and_the_curves_of_what_runs(
    tmp_path: Path,
) -> None:
    make_run(tmp_path / run_name(0), "topk", 2, 0, None)
    log_steps(make_unfinished_run(tmp_path / run_name(1)))
    write_plan(tmp_path, ["topk-2", "topk-128", "later"], question="Is there a wall?")
    material = gather(tmp_path)
    assert material.about == "sweep"
    assert [run.name for run in material.trained] == ["topk-2", "topk-128"]
    curves = training_metrics(material.trained)
    last = curves.filter(pl.col("run") == "topk-128").row(-1, named=True)
    assert (last["step"], last["tokens"], last["loss"]) == (30, 3000, pytest.approx(3.0))
    page = write_report(tmp_path, tmp_path / "page.html").read_text(encoding="utf-8")
    assert "Finished are 1 of 3 runs (1 interrupted and 1 pending)" in page
    assert 'data-series="topk-128"' in page


def test_a_run_that_has_only_begun_makes_a_page_of_its_curves(tmp_path: Path) -> None:
    run = log_steps(make_unfinished_run(tmp_path / "run"))
    material = gather(run)
    assert material.about == "run"
    page = write_report(run, tmp_path / "page.html").read_text(encoding="utf-8")
    assert "This run is interrupted at step 40 of 600" in page
    assert 'id="figure-training_curves"' in page


def test_a_run_of_a_sweep_has_the_question_of_its_sweep_and_its_router_s_name(
    tmp_path: Path,
) -> None:
    run = make_run(tmp_path / run_name(0), "topk", 2, 0, SMALL)
    config = {"name": "x", "model": {"moe": {"router": {"kind": "expert_choice"}}}}
    (run / "config.json").write_text(json.dumps(config))
    write_plan(tmp_path, ["x"], question="Is there a <b>wall</b>?")
    material = gather(run)
    assert (material.about, material.questions) == ("run", ("Is there a <b>wall</b>?",))
    page = write_report(run, tmp_path / "page.html").read_text(encoding="utf-8")
    first = page.partition('<section id="answer"')[2].partition("</section>")[0]
    assert "Is there a &lt;b&gt;wall&lt;/b&gt;?" in first
    assert "<dd>expert_choice</dd>" in first
    assert first.index("figure-training_curves") < page.index('<section id="load"')
    assert 'id="frontier"' not in page


def test_two_traces_are_compared_and_each_figure_lets_choose_between_them(tmp_path: Path) -> None:
    shape = Shape(layers=2, experts=8, documents=6, tokens=60)
    first = make_trace(tmp_path / "before", shape)
    second = make_trace(tmp_path / "after", replace(shape, documents=5))
    page = write_report([first, second], tmp_path / "page.html").read_text(encoding="utf-8")
    answer, compared = (
        page.partition(f'<section id="{name}"')[2].partition("</section>")[0]
        for name in ("answer", "compare")
    )
    assert 'id="figure-compare"' in answer
    assert "of its slots went to other experts" in answer
    assert 'id="figure-load_shift"' in compared
    for name in ("coactivation", "class_profile", "expert_cache"):
        figure = page.partition(f'<figure id="figure-{name}"')[2].partition("</figure>")[0]
        assert re.findall(r'<optgroup label="(.*?)">', figure) == ["before", "after"], name
    load = page.partition('<figure id="figure-expert_load"')[2].partition("</figure>")[0]
    assert re.findall(r'<p class="legend-title">(.*?)</p>', load) == ["before", "after"]
    assert re.findall(r'data-end="(.*?)"', page) == ["", "-2"]


def test_traces_of_other_experts_stand_beside_each_other_without_a_comparison(
    tmp_path: Path,
) -> None:
    shape = Shape(layers=1, experts=4, documents=2, tokens=30)
    traces = [
        make_trace(tmp_path / "four", shape),
        make_trace(tmp_path / "six", replace(shape, experts=6)),
    ]
    page = write_report(traces, tmp_path / "page.html").read_text(encoding="utf-8")
    assert "six has other layers or numbers of " in page
    assert 'id="figure-load_shift"' not in page
    assert 'id="figure-load_interval"' in page


ODD = (None, True, 3, 2**53 + 1, 2**70, -0.5, 1e101, float("nan"), "text", [1])


@pytest.mark.parametrize("name", ["arm", "seed", "loss"])
def test_a_column_of_results_is_cast_value_by_value_where_any_needs_it(
    name: str, tmp_path: Path
) -> None:
    """The plain rule beside the fast path of columns that need no cast."""
    good = {"arm": ["a", None], "seed": [1, None, -4], "loss": [1.5, None, float("nan")]}[name]
    for values in (good, *([*good, odd] for odd in ODD)):
        runs = [
            RunRecord(tmp_path / str(place), RunState.FINISHED, {name: value})
            for place, value in enumerate(values)
        ]
        cast = sources._CASTS[type(sources.RESULT_COLUMNS[name])]
        expected = pl.Series(name, list(map(cast, values)), sources.RESULT_COLUMNS[name])
        assert sources.run_table(runs)[name].equals(expected)


def test_tables_of_many_runs_are_those_of_each(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / name, "topk", 2, 0, SMALL) for name in "ab"]
    folders.append(make_unfinished_run(tmp_path / "c"))
    each = [read_table(folder, "metrics") for folder in folders]
    together = read_table_of_runs(folders, "metrics")
    assert all(map(pl.DataFrame.equals, together, each))
    (folders[1] / METRICS).write_bytes(b"PAR1 but no more")
    with pytest.raises(RunError, match=re.escape(str(folders[1] / METRICS))):
        read_table_of_runs(folders, "metrics")


@pytest.mark.parametrize("varies", [False, True])
def test_the_real_experts_of_a_trace_are_counted_as_polars_does(
    varies: bool, tmp_path: Path
) -> None:
    from moe_lab.report.compute_section import distinct_counts

    shape = Shape(layers=2, experts=8, zero_experts=4 if varies else 0, top_k=3, documents=2)
    trace = open_trace(make_trace(tmp_path / "trace", shape))
    ends = trace.routing.select(pl.col("ffn_count").min(), high=pl.col("ffn_count").max())
    low, high = ends.collect().row(0)
    assert (low < high) == varies
    expected = [low, high] if varies else [low]
    assert distinct_counts(sources.NamedTrace("trace", trace)) == expected
