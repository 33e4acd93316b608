import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from stub_trainer import StubRun, stub_sweep

from moe_lab.errors import RunError
from moe_lab.runs.folder_claims import acquire
from moe_lab.sweeps import RunState, RunStore, status

RUNS = tuple(StubRun(name=f"run {seed}", seed=seed) for seed in range(5))


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    store = RunStore(tmp_path / "out")
    store.add(stub_sweep(*RUNS))
    return store


def folder(store: RunStore, index: int) -> Path:
    path = store.path(RUNS[index].hash())
    path.mkdir(exist_ok=True)
    return path


def test_a_run_is_what_its_folder_says(store: RunStore):
    claim = acquire(folder(store, 1))
    for index in (2, 3, 4):
        abandoned = acquire(folder(store, index))
        assert abandoned is not None
        abandoned.release()
    (folder(store, 2) / "done").touch()
    (folder(store, 3) / "error.txt").write_text("it broke\nTraceback\n")
    states = [store.state(run.hash()) for run in RUNS]
    assert states == [
        RunState.PENDING,
        RunState.RUNNING,
        RunState.FINISHED,
        RunState.FAILED,
        RunState.INTERRUPTED,
    ]
    assert status(store.folder)["state"].to_list() == states
    assert status(store.folder)["error"].to_list() == ["", "", "", "it broke", ""]
    assert claim is not None


def test_a_run_that_ends_while_its_state_is_read_is_finished(
    store: RunStore, monkeypatch: pytest.MonkeyPatch
):
    run = next(iter(store.plan()["runs"]))
    claim = acquire(store.path(run))
    assert claim is not None

    def end(folder: Path, names: object) -> None:
        (folder / "done").touch()
        claim.release(forget=True)

    monkeypatch.setattr("moe_lab.runs.record.holder", end)
    assert store.state(run) is RunState.FINISHED


def test_without_done_nothing_makes_a_run_finished(store: RunStore):
    path = folder(store, 0)
    for name in ("result.json", "metrics.parquet", "model.safetensors", "status.json"):
        (path / name).write_text('{"loss": 1.0, "step": 10, "steps": 10}')
    row = status(store.folder).row(0, named=True)
    assert row["state"] != "finished"
    (path / "done").touch()
    row = status(store.folder).row(0, named=True)
    assert (row["state"], row["loss"], row["progress"]) == ("finished", 1.0, 1.0)


def test_status_shows_live_progress_and_survives_a_torn_file(store: RunStore):
    claim = acquire(folder(store, 0))
    (folder(store, 0) / "status.json").write_text(
        json.dumps({"step": 5, "steps": 20, "loss": 3.5, "tokens_per_second": 100.0})
    )
    (folder(store, 1) / "status.json").write_text('{"step": 5, "st')
    first, second = status(store.folder).head(2).rows(named=True)
    assert (first["state"], first["progress"], first["loss"], first["tokens_per_second"]) == (
        "running",
        0.25,
        3.5,
        100.0,
    )
    assert (second["step"], second["progress"], second["loss"]) == (0, 0.0, None)
    assert claim is not None


def test_status_keeps_the_plans_order_and_labels(store: RunStore):
    frame = status(store.folder)
    assert frame["name"].to_list() == [run.name for run in RUNS]
    assert frame["run"].to_list() == [run.hash() for run in RUNS]
    assert frame.select("arm", "ratio", "seed").rows() == [
        (run.arm, run.ratio, run.seed) for run in RUNS
    ]


def test_another_plan_is_added_and_shares_equal_runs(store: RunStore):
    (folder(store, 0) / "done").touch()
    before = store.plan()
    store.add(stub_sweep(RUNS[0], StubRun(name="new", seed=9)))
    plan = store.plan()
    assert [len(sweep["runs"]) for sweep in plan["sweeps"]] == [5, 2]
    assert set(plan["runs"]) == {*before["runs"], StubRun(name="new", seed=9).hash()}
    assert status(store.folder)["state"].to_list() == ["finished", *["pending"] * 5]


def test_the_same_plan_twice_changes_nothing(store: RunStore):
    before = (store.folder / "sweep.json").read_bytes()
    store.add(stub_sweep(*RUNS))
    assert (store.folder / "sweep.json").read_bytes() == before


def test_a_plan_holds_every_configuration(store: RunStore):
    configs = [entry["config"] for entry in store.plan()["runs"].values()]
    assert {StubRun.from_dict(config | {"model": {}}) for config in configs} == set(RUNS)


def test_processes_that_add_plans_at_once_lose_none(tmp_path: Path):
    code = (
        "import sys; from stub_trainer import StubRun, stub_sweep; from moe_lab.sweeps "
        "import RunStore\n"
        "for i in range(10): RunStore(sys.argv[1]).add(stub_sweep(StubRun(seed=100 * "
        "int(sys.argv[2]) + i)))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(index)], env=environment)
        for index in range(3)
    ]
    assert [process.wait() for process in processes] == [0, 0, 0]
    plan = RunStore(tmp_path).plan()
    assert len(plan["runs"]) == len(plan["sweeps"]) == 30


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            None,
            r"expected a sweep folder with sweep\.json, got .* without one; try moe-lab "
            r"sweep run first",
        ),
        ("{", r"expected a readable plan, got .*sweep\.json"),
        ('{"schema_version": 99}', r"expected a plan of version 1, got 99 in .*sweep\.json"),
    ],
)
def test_a_folder_without_a_readable_plan_gives_one_line(
    tmp_path: Path, content: str | None, message: str
):
    if content is not None:
        (tmp_path / "sweep.json").write_text(content)
    with pytest.raises(RunError, match=message):
        status(tmp_path)


def test_an_unwritable_folder_gives_one_line(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        RunError, match=r"cannot write .*Not a directory; try another folder or free some space"
    ):
        RunStore(tmp_path / "file" / "out").check_writable()
