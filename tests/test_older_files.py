"""Files of an older version open unchanged: configurations, run folders, a sweep, traces.

``tests/fixtures`` was written by the version at fa9dbb4 (``tests/fixtures/make.py``).
"""

import importlib.util
import json
import os
import shutil
from pathlib import Path
from types import ModuleType

import polars as pl
import pytest

from moe_lab.cli import main
from moe_lab.report import write_report
from moe_lab.runs.record import read_runs
from moe_lab.scaling import read_runs as read_results
from moe_lab.sweeps import RunStore, SweepConfig, status
from moe_lab.text import Split, load_tokens
from moe_lab.trace import open_trace
from moe_lab.training import RunConfig, evaluate, excerpts_of, load_run, train

FIXTURES = Path(__file__).parent / "fixtures"
STATES = {
    "topk": "finished",
    "zero": "finished",
    "interrupted": "interrupted",
    "failed": "failed",
}


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The sweep's folder, with its corpus where its configurations name it."""
    for name in ("corpus", "sweep"):
        shutil.copytree(FIXTURES / name, tmp_path / name)
    for claim in tmp_path.rglob(".claim-*"):  # a released claim is dated 1970; git keeps no dates
        os.utime(claim, (0, 0))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "sweep"


def run_named(sweep: Path, name: str) -> Path:
    plan = RunStore(sweep).plan()
    return sweep / next(run for run, entry in plan["runs"].items() if entry["name"] == name)


@pytest.fixture(scope="module")
def make() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_fixtures", FIXTURES / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_recipes_and_minis_have_the_hashes_that_they_had(make: ModuleType) -> None:
    before = json.loads((FIXTURES / "config_hashes.json").read_text())
    now = make.hashes(FIXTURES.parents[1])
    assert {name: now.get(name) for name in before} == before


def test_every_configuration_has_the_hash_that_names_its_folder(sweep: Path) -> None:
    for run, entry in RunStore(sweep).plan()["runs"].items():
        assert RunConfig.from_dict(entry["config"]).hash() == run
        assert json.loads((sweep / run / "config.json").read_text()) == entry["config"]


def test_the_status_of_the_sweep_is_what_it_was(sweep: Path) -> None:
    frame = status(sweep)
    assert dict(frame.select("name", "state").rows()) == STATES
    failed = frame.row(by_predicate=pl.col("state") == "failed", named=True)
    assert failed["error"] == "expected a finite loss, got nan"
    assert failed["last_lines"].endswith("line 3")


def test_a_finished_run_scores_what_it_scored(sweep: Path) -> None:
    for name in ("topk", "zero"):
        run = load_run(run_named(sweep, name))
        text = load_tokens(run.config.text)
        documents = text.documents(Split.VALIDATION)
        scored = evaluate(
            run.model,
            documents,
            run.tokenizer,
            seq_length=run.config.seq_length,
            excerpts=excerpts_of([len(document.ids) for document in documents], 50, 100),
        )
        result = json.loads((run.folder / "result.json").read_text())
        assert scored.loss == pytest.approx(result["loss"], abs=1e-6)
        assert (scored.num_tokens, run.config.ratio) == (result["eval_tokens"], result["ratio"])


def test_a_trace_of_a_run_is_replaced_only_on_request(sweep: Path, capsys) -> None:
    run, text = run_named(sweep, "zero"), sweep.parent / "corpus"
    command = ["trace", str(run), "--text", str(text), "--max-tokens", "9"]
    assert main(command) == 0
    assert main(command) == 2
    assert "got a finished trace at" in capsys.readouterr().err
    assert main([*command[:-1], "8"]) == 2
    assert "got a finished trace of another cut at" in capsys.readouterr().err
    assert main([*command[:-1], "8", "--overwrite"]) == 0
    assert open_trace(run / "trace-corpus").check().meta.max_tokens == 8


def test_a_trace_opens_and_its_counts_add_up(sweep: Path) -> None:
    trace = open_trace(run_named(sweep, "zero") / "trace").check()
    tokens = trace.tokens.collect().height
    assert trace.counts().group_by("layer").agg(pl.col("count").sum()).sort("layer").rows() == [
        (0, 2 * tokens),
        (1, 2 * tokens),
    ]
    assert trace.meta.layers[0].num_zero_experts == 2


def test_reports_and_verdicts_read_the_sweep(sweep: Path, tmp_path: Path) -> None:
    page = write_report(sweep, tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Does it open?" in page
    assert "expected a finite loss, got nan" in page
    assert sorted(read_results(sweep)["arm"]) == ["topk", "zero"]
    assert {run.name for run in read_runs(sweep).values()} == set(STATES)


def test_an_interrupted_run_goes_on_from_its_checkpoint(sweep: Path, tmp_path: Path) -> None:
    folder = run_named(sweep, "interrupted")
    config = RunConfig.from_dict(json.loads((folder / "config.json").read_text()))
    steps: list[int] = []
    train(config, folder, on_step=lambda row: steps.append(row["step"]))
    assert steps == [6, 7, 8]
    train(config, tmp_path / "fresh")
    resumed, fresh = (
        pl.read_parquet(path / "metrics.parquet")["loss"] for path in (folder, tmp_path / "fresh")
    )
    assert resumed.to_list() == pytest.approx(fresh.to_list(), abs=1e-5)


def test_the_same_sweep_finds_its_runs_done(sweep: Path) -> None:
    store = RunStore(sweep)
    before = (sweep / "sweep.json").read_bytes()
    runs = [RunConfig.from_dict(entry["config"]) for entry in store.plan()["runs"].values()]
    by_name = {run.name: run for run in runs}
    order = tuple(by_name[name] for name in STATES)
    store.add(SweepConfig(name="fixture", question="Does it open?", runs=order))
    assert (sweep / "sweep.json").read_bytes() == before
