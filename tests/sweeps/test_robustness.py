"""Kills, signals, full disks and rivals: afterwards the same command finishes with the same
results.
"""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from stub_trainer import HOLD, STUB, StubRun, expected_loss, stub_grid, stub_sweep

from moe_lab.errors import RunError
from moe_lab.runs.owners import process_start
from moe_lab.sweeps import RunStore, run, status

RUNS, STEPS, STEP_SECONDS = 4, 20, 0.03
GRID = stub_grid(RUNS, STEPS, STEP_SECONDS)


def start(out: Path, workers: int = 2) -> subprocess.Popen[str]:
    """The sweep as a process group of its own."""
    script = Path(__file__).parent / "stub_trainer.py"
    command = [sys.executable, str(script), *map(str, (out, RUNS, STEPS, STEP_SECONDS, workers))]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def wait_until(condition: Callable[[], bool], seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def worker_pids(out: Path) -> set[int]:
    """Every process that ever trained a step here."""
    return {
        int(line.split()[0])
        for log in out.glob("*/steps.log")
        for line in log.read_text().splitlines()
        if line.count(" ") == 1
    }


def alive(pids: set[int]) -> set[int]:
    return {pid for pid in pids if process_start(pid) is not None}


def finish(out: Path) -> None:
    """The same command to its end: every run whole, with the numbers of an undisturbed sweep."""
    output, _ = start(out).communicate(timeout=600)
    assert f"outcome {RUNS} 0 0" in output, output
    frame = status(out)
    assert set(frame["state"]) == {"finished"}
    assert dict(frame.select("name", "loss").rows()) == {
        run.name: expected_loss(run) for run in GRID
    }


def check_no_half_run_looks_whole(out: Path) -> None:
    if not (out / "sweep.json").exists():
        return
    for row in status(out).rows(named=True):
        if row["state"] == "finished":
            assert row["loss"] == expected_loss(
                next(run for run in GRID if run.name == row["name"])
            )


@pytest.mark.parametrize("seed", [0, 1])
def test_kill_9_of_the_whole_sweep_at_random_moments(tmp_path: Path, seed: int):
    chance = random.Random(seed)
    for _ in range(3):
        process = start(tmp_path)
        time.sleep(chance.uniform(0.2, 1.6))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        wait_until(lambda: not alive(worker_pids(tmp_path)))
        check_no_half_run_looks_whole(tmp_path)
    finish(tmp_path)


def test_kill_9_of_workers_at_random_moments_needs_no_second_command(tmp_path: Path):
    """No run ends before the last kill, however late that comes."""
    (tmp_path / HOLD).write_text(str(STEPS // 2))
    chance = random.Random(3)
    process = start(tmp_path)
    for _ in range(2):
        known = worker_pids(tmp_path)
        wait_until(lambda known=known: bool(alive(worker_pids(tmp_path) - known)))
        time.sleep(chance.uniform(0, 0.3))
        for pid in alive(worker_pids(tmp_path)):
            os.kill(pid, signal.SIGKILL)
    (tmp_path / HOLD).unlink()
    output, _ = process.communicate(timeout=600)
    assert f"outcome {RUNS} 0 0" in output, output
    assert (
        "worker killed by SIGKILL (out of memory? try fewer workers or a smaller batch); "
        "resuming from its checkpoint" in output
    )
    finish(tmp_path)


def test_workers_end_when_the_sweep_is_killed_alone(tmp_path: Path):
    (tmp_path / HOLD).touch()
    process = start(tmp_path)
    wait_until(lambda: len(alive(worker_pids(tmp_path))) == 2)
    process.kill()
    process.wait()
    wait_until(lambda: not alive(worker_pids(tmp_path)))
    (tmp_path / HOLD).unlink()
    finish(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("whole_group", [True, False])
def test_a_signal_stops_cleanly_and_leaves_no_orphan(
    tmp_path: Path, number: signal.Signals, whole_group: bool
):
    (tmp_path / HOLD).touch()
    process = start(tmp_path)
    wait_until(lambda: len(alive(worker_pids(tmp_path))) == 2)
    (os.killpg if whole_group else os.kill)(process.pid, number)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0
    finished, failed, interrupted = map(int, output.rpartition("outcome ")[2].split())
    assert (finished + interrupted, failed) == (RUNS, 0)
    assert interrupted == RUNS
    assert "Traceback" not in output
    assert not alive(worker_pids(tmp_path))
    assert "running" not in status(tmp_path)["state"].to_list()


def test_two_sweeps_on_one_folder_share_the_work(tmp_path: Path):
    (tmp_path / HOLD).touch()
    first, second = start(tmp_path, workers=1), start(tmp_path, workers=1)
    wait_until(lambda: len(alive(worker_pids(tmp_path))) == 2)
    (tmp_path / HOLD).unlink()
    outputs = [process.communicate(timeout=600)[0] for process in (first, second)]
    assert all(f"outcome {RUNS} 0 0" in output for output in outputs), outputs
    for run_ in GRID:
        steps = [
            int(line.split()[1])
            for line in (tmp_path / run_.hash() / "steps.log").read_text().splitlines()
        ]
        assert steps == list(range(run_.steps)), f"{run_.name} was trained by both"
    assert len(worker_pids(tmp_path)) == 2
    assert status(tmp_path).filter(state="finished").height == RUNS


def test_a_sweep_takes_over_what_a_killed_rival_was_training(tmp_path: Path):
    (tmp_path / HOLD).touch()
    rival = start(tmp_path, workers=2)
    wait_until(lambda: len(alive(worker_pids(tmp_path))) == 2)
    mine = start(tmp_path, workers=1)
    wait_until(lambda: len(alive(worker_pids(tmp_path))) == 3)
    os.killpg(rival.pid, signal.SIGKILL)
    rival.wait()
    (tmp_path / HOLD).unlink()
    output, _ = mine.communicate(timeout=600)
    assert f"outcome {RUNS} 0 0" in output
    finish(tmp_path)


def test_an_unwritable_output_folder_gives_one_line(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        RunError, match=r"^cannot write .*: Not a directory; try another folder or free some space$"
    ):
        run(stub_sweep(StubRun()), tmp_path / "file" / "out", progress=False, trainer=STUB)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "moe_lab_test", str(disk)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode != 0:
        pytest.skip("mounting a small tmpfs is not allowed here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_disk_that_fills_up_stops_the_sweep_with_one_line_and_can_be_resumed(small_disk: Path):
    runs = [StubRun(name=str(seed), seed=seed, trouble="fills the disk") for seed in range(5)]
    with pytest.raises(
        RunError,
        match=r"^cannot write .*: No space left on device; try another folder or free some space$",
    ):
        run(stub_sweep(*runs), small_disk / "out", workers=2, progress=False, trainer=STUB)
    for ballast in small_disk.glob("out/*/ballast"):
        ballast.unlink()
    assert run(
        stub_sweep(*[r.replace(trouble="") for r in runs]),
        small_disk / "out",
        progress=False,
        trainer=STUB,
    ).complete


def test_a_disk_that_fills_up_is_told_from_a_run_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    checks = iter(
        [
            None,
            RunError(
                "cannot write out: No space left on device; try another folder or free some space"
            ),
        ]
    )

    def check(_: object) -> None:
        if error := next(checks):
            raise error

    monkeypatch.setattr(RunStore, "check_writable", check)
    with pytest.raises(RunError, match="No space left on device"):
        run(
            stub_sweep(StubRun(trouble="no space"), StubRun()),
            tmp_path,
            workers=1,
            progress=False,
            trainer=STUB,
        )
