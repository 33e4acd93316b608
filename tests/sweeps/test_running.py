import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from fake_launcher import FakeLauncher
from stub_trainer import STUB, StubRun, expected_loss, stub_grid, stub_sweep

from moe_lab.errors import RunError
from moe_lab.runs.failures import Failure, FailureKind, write_failure
from moe_lab.sweeps import RunState, RunStore, SweepOutcome, run, status
from moe_lab.sweeps.launchers import local


def go(out: Path, *runs: StubRun, workers: int = 2, **options) -> SweepOutcome:
    return run(stub_sweep(*runs), out, workers=workers, progress=False, trainer=STUB, **options)


def losses(out: Path) -> dict[str, float]:
    return {
        row["name"]: row["loss"]
        for row in status(out).rows(named=True)
        if row["state"] == "finished"
    }


def pids(out: Path, *runs: StubRun) -> list[int]:
    """The worker of each step ever trained."""
    return [
        int(line.split()[0])
        for run in runs
        for line in (out / run.hash() / "steps.log").read_text().splitlines()
    ]


def test_every_run_finishes_with_its_own_result(tmp_path: Path):
    runs = stub_grid(5, steps=10, step_seconds=0)
    outcome = go(tmp_path, *runs)
    assert outcome.complete
    assert set(outcome.finished) == {run.hash() for run in runs}
    assert losses(tmp_path) == {run.name: expected_loss(run) for run in runs}


def test_workers_are_few_and_stay_for_many_runs(tmp_path: Path):
    runs = stub_grid(6, steps=5, step_seconds=0.01)
    go(tmp_path, *runs)
    assert len(set(pids(tmp_path, *runs))) == 2


def test_finished_runs_are_not_trained_again_and_new_ones_are_added(tmp_path: Path):
    old, new = StubRun(name="old"), StubRun(name="new", seed=1)
    go(tmp_path, old)
    before = (tmp_path / old.hash() / "steps.log").read_text()
    outcome = go(tmp_path, old, new)
    assert set(outcome.finished) == {old.hash(), new.hash()}
    assert (tmp_path / old.hash() / "steps.log").read_text() == before


def test_a_finished_sweep_starts_no_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    go(tmp_path, StubRun())
    monkeypatch.setattr("moe_lab.sweeps.running.build_launcher", None)
    assert go(tmp_path, StubRun()).complete


def test_long_runs_go_first(tmp_path: Path):
    runs = [
        StubRun(name=str(tokens), tokens_per_step=tokens, steps=2) for tokens in (10, 40, 20, 30)
    ]
    outcome = go(tmp_path, *runs, workers=1)
    names = {run.hash(): run.name for run in runs}
    assert [names[run] for run in outcome.finished] == ["40", "30", "20", "10"]


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [
        ("diverges", "the loss is nan at step 10; try a lower learning rate than 1"),
        ("bug", r"ZeroDivisionError: division by zero \(stub_trainer\.py:\d+\)"),
        ("exit", r"SystemExit: 3 \(stub_trainer\.py:\d+\)"),
        (
            "no space",
            r"cannot write .*: No space left on device; try another folder or free some space",
        ),
    ],
)
def test_a_failed_run_stops_no_other_and_says_why(tmp_path: Path, trouble: str, reason: str):
    bad, good = StubRun(name="bad", trouble=trouble, tokens_per_step=99), StubRun(name="good")
    outcome = go(tmp_path, bad, good, workers=1)
    assert outcome.finished == (good.hash(),)
    (failed,) = outcome.failed
    assert (failed.run, failed.name) == (bad.hash(), "bad")
    row = status(tmp_path).row(by_predicate=pl.col("name") == "bad", named=True)
    assert row["state"] == "failed"
    assert row["error"] == failed.reason
    assert re.search(reason, failed.reason)
    assert "Traceback" in (tmp_path / bad.hash() / "error.txt").read_text()


def test_a_failed_run_stays_failed_until_it_is_to_be_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    bad, good = StubRun(trouble="needs file"), StubRun(name="good")
    monkeypatch.setenv("STUB_FILE", str(tmp_path / "wanted"))
    first = go(tmp_path, bad, good)
    (tmp_path / "wanted").touch()
    again = go(tmp_path, bad, good)
    assert (again.finished, again.failed) == ((good.hash(),), first.failed)
    assert len(pids(tmp_path, bad)) == 11
    assert go(tmp_path, bad, good, retry_failed=True).complete
    assert not (tmp_path / bad.hash() / "error.txt").exists()
    assert losses(tmp_path)[bad.name] == expected_loss(bad)


def test_a_run_that_a_full_disk_failed_is_continued_by_the_same_command(tmp_path: Path):
    victim = StubRun()
    folder = tmp_path / victim.hash()
    write_failure(folder, Failure("cannot write x: No space left", FailureKind.STORAGE))
    assert go(tmp_path, victim).complete


def test_the_kind_of_a_failure_is_no_matter_of_its_words(tmp_path: Path):
    victim = StubRun()
    write_failure(tmp_path / victim.hash(), Failure("cannot write x: No space left"))
    assert [failed.run for failed in go(tmp_path, victim).failed] == [victim.hash()]


def test_a_damaged_checkpoint_is_set_aside_when_its_run_is_tried_again(tmp_path: Path):
    victim = StubRun()
    folder = tmp_path / victim.hash()
    write_failure(folder, Failure("it is damaged", FailureKind.CHECKPOINT))
    (folder / "checkpoint.safetensors").write_bytes(b"damaged")
    assert not go(tmp_path, victim).complete
    assert (folder / "checkpoint.safetensors").exists()
    assert go(tmp_path, victim, retry_failed=True).complete
    assert (folder / "checkpoint.damaged").read_bytes() == b"damaged"


def test_a_file_in_place_of_a_run_folder_fails_that_run_alone(tmp_path: Path):
    blocked, good = StubRun(name="blocked"), StubRun(name="good", seed=1)
    (tmp_path / blocked.hash()).write_text("")
    outcome = go(tmp_path, blocked, good)
    assert [failed.name for failed in outcome.failed] == ["blocked"]
    assert outcome.failed[0].reason.startswith("expected a folder at ")
    assert outcome.finished == (good.hash(),)


def test_a_worker_that_dies_loses_only_time(tmp_path: Path):
    runs = (StubRun(name="killed", trouble="killed once"), StubRun(name="calm", seed=1))
    assert go(tmp_path, *runs).complete
    assert losses(tmp_path) == {run.name: expected_loss(run) for run in runs}
    steps = [
        int(line.split()[1])
        for line in (tmp_path / runs[0].hash() / "steps.log").read_text().splitlines()
    ]
    assert steps == [*range(11), *range(10, 20)]  # resumed at the step it died in


def test_a_run_that_kills_every_worker_fails_after_three(tmp_path: Path):
    bad, good = StubRun(name="bad", trouble="killed every time"), StubRun(name="good")
    outcome = go(tmp_path, bad, good)
    assert outcome.finished == (good.hash(),)
    assert (
        outcome.failed[0].reason
        == "worker killed by SIGKILL (out of memory? try fewer workers or a smaller batch), 3 times"
    )
    assert len(set(pids(tmp_path, bad))) == 3
    assert RunStore(tmp_path).state(bad.hash()) is RunState.FAILED
    assert RunStore(tmp_path).failure(bad.hash()).reason == outcome.failed[0].reason


@dataclass(frozen=True)
class SparseRun(StubRun):
    checkpoint_every: int = 10


@pytest.mark.parametrize(
    ("deaths", "finishes"),
    [
        ([3, 7, 9], False),  # never a checkpoint
        ([10, 13, 19], False),  # the status goes on, the checkpoint does not
        ([10, 10, 20, 20, 30, 30, 40], True),
        ([5, 5, 10, 10, 10], False),
        ([30, 10, 20], False),  # seen before the run was back where it had been
    ],
)
def test_deaths_count_until_a_newer_checkpoint(
    tmp_path: Path, fake: FakeLauncher, deaths: list[int], finishes: bool
):
    fake.deaths = list(deaths)
    outcome = run(
        stub_sweep(SparseRun(steps=50)), tmp_path, progress=False, launcher="ray", trainer=STUB
    )
    assert outcome.complete == finishes
    assert len(fake.submitted) == len(deaths) + finishes
    assert [failure.reason for failure in outcome.failed] == (
        [] if finishes else ["its node was taken away, 3 times"]
    )


def test_what_a_run_prints_lies_in_its_log(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    noisy = StubRun(trouble="noisy")
    assert go(tmp_path, noisy).complete
    lines = (tmp_path / noisy.hash() / "log.txt").read_text().splitlines()
    assert sorted(lines) == ["hello from a child", "hello from python"]
    assert capfd.readouterr() == ("", "")


def test_a_worker_has_one_thread(tmp_path: Path):
    run = StubRun(trouble="tell environment")
    go(tmp_path, run)
    environment = json.loads((tmp_path / run.hash() / "environment.json").read_text())
    assert environment["OMP_NUM_THREADS"] == environment["MKL_NUM_THREADS"] == "1"


def test_gpus_are_dealt_out_to_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    runs = [
        StubRun(seed=seed, device="cuda", trouble="tell environment", step_seconds=0.02)
        for seed in range(4)
    ]
    assert run(stub_sweep(*runs), tmp_path, progress=False, trainer=STUB).complete
    seen = {
        json.loads((tmp_path / run.hash() / "environment.json").read_text())["CUDA_VISIBLE_DEVICES"]
        for run in runs
    }
    assert seen == {"3", "5"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 0}, "expected at least 1 worker, got 0"),
        (
            {"launcher": "carrier pigeon"},
            r"expected a launcher \(local, ray, slurm\), got 'carrier pigeon'",
        ),
        (
            {"trainer": "no_such_module:train"},
            "expected a trainer as an importable module:function, got 'no_such_module:train'",
        ),
        (
            {"trainer": "stub_trainer:nothing"},
            "expected a trainer as an importable module:function, got 'stub_trainer:nothing'",
        ),
        (
            {"trainer": "dies_on_import:train"},
            "expected workers that start, got 3 that ended before their first run; the "
            "last one said: ",
        ),
    ],
)
def test_a_sweep_that_cannot_start_gives_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
):
    (tmp_path / "dies_on_import.py").write_text(
        "import os\nos.write(2, b'no libc\\n')\nos._exit(7)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(RunError, match=message):
        run(stub_sweep(StubRun()), tmp_path / "out", progress=False, **{"trainer": STUB, **options})


def test_cores_respect_the_control_group(tmp_path: Path):
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert local._quota(tmp_path) == 2
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert local._quota(tmp_path) is None
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("400000\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert local._quota(tmp_path) == 4
