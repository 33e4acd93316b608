"""A run called on another machine: what is wrong with the machine ends the sweep, what is wrong
with the run is one line of its own.
"""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from stub_trainer import STUB, StubRun, expected_loss

from moe_lab.errors import RunError
from moe_lab.runs.folder_claims import holder
from moe_lab.sweeps.launchers import Ending, Job, Result, worker
from moe_lab.sweeps.launchers.remote_run import RemoteRun, UnfitMachine, settle
from moe_lab.sweeps.launchers.worker import execute


def job_in(folder: Path, run: StubRun | None = None) -> Job:
    return Job("r", "run", folder / "r", (run or StubRun(steps=4)).to_dict())


def raising(error: BaseException) -> Callable[[dict[str, Any], Path], None]:
    def train(values: dict[str, Any], folder: Path) -> None:
        raise error

    return train


def test_a_remote_run_trains_in_the_drivers_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A configuration with a relative path means the same file on every machine."""
    (tmp_path / "driver").mkdir()
    (tmp_path / "worker").mkdir()
    monkeypatch.chdir(tmp_path / "driver")
    Path("text").touch()
    monkeypatch.setenv("STUB_FILE", "text")
    remote_run = RemoteRun.of(job_in(Path("."), StubRun(steps=4, trouble="needs file")), STUB)
    monkeypatch.chdir(tmp_path / "worker")
    assert settle(remote_run()).result is Result.FINISHED
    assert json.loads((tmp_path / "driver/r/result.json").read_text())["loss"] == expected_loss(
        StubRun(steps=4)
    )
    assert Path.cwd() == tmp_path / "worker"


def test_other_versions_on_a_worker_end_the_sweep_with_both_named(tmp_path: Path) -> None:
    remote_run = RemoteRun.of(job_in(tmp_path), STUB)
    here = remote_run.versions["torch"]
    remote_run.versions["torch"] = "1.0"
    line = (
        rf"expected the same versions on every machine, got torch "
        rf"{here.replace('+', '.')} on the worker, 1.0 at the driver; try one"
    )
    with pytest.raises(RunError, match=line):
        settle(remote_run())
    assert not (tmp_path / "r").exists(), "nothing was begun"


def test_a_folder_that_the_worker_does_not_see_ends_the_sweep(tmp_path: Path) -> None:
    with pytest.raises(
        RunError,
        match=r"expected a folder that every machine sees, got no .*away on the worker; "
        r"try a shared file system",
    ):
        settle(RemoteRun.of(job_in(tmp_path / "away"), STUB)())


def test_a_run_whose_files_go_to_an_object_store_needs_no_folder_of_the_drivers(
    tmp_path: Path,
) -> None:
    job = replace(job_in(tmp_path / "away"), shared=False)
    assert settle(RemoteRun.of(job, STUB)()).result is Result.FINISHED


def test_a_trainer_that_the_worker_cannot_import_ends_the_sweep(tmp_path: Path) -> None:
    assert "expected a trainer as an importable module:function" in _reason(
        RemoteRun.of(job_in(tmp_path), "nowhere:train")()
    )


def _reason(answer: Ending | UnfitMachine) -> str:
    assert isinstance(answer, UnfitMachine)
    return answer.reason


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity "
            "of 139.80 GiB"
        ),
        OSError(12, os.strerror(12)),
    ],
)
def test_a_run_without_memory_says_so_and_what_to_do(error: Exception, tmp_path: Path) -> None:
    ending = execute(raising(error), job_in(tmp_path))
    assert ending.result is Result.FAILED
    assert ending.reason.startswith("out of memory")
    assert ending.reason.endswith("; try fewer workers or a smaller batch")
    assert (tmp_path / "r/error.txt").read_text().splitlines()[0] == ending.reason


def test_so_does_one_whose_tensor_is_too_large(tmp_path: Path) -> None:
    ending = execute(lambda *_: torch.empty(2**55), job_in(tmp_path))
    assert ending.reason.startswith("out of memory: ")
    assert ending.reason.endswith("; try fewer workers or a smaller batch")
    assert "\n" not in ending.reason


def test_a_machine_that_is_taken_away_is_no_failure_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert execute(raising(SystemExit(1)), job_in(tmp_path)).result is Result.FAILED
    monkeypatch.setattr(worker.preempted, "is_set", lambda: True)
    with pytest.raises(SystemExit):
        execute(raising(SystemExit(1)), job_in(tmp_path))
    assert not (tmp_path / "r/error.txt").exists()
    assert holder(tmp_path / "r") is None, "the next process with the job can continue the run"


def test_a_finished_run_is_not_claimed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_in(tmp_path)
    job.folder.mkdir(parents=True)
    (job.folder / "done").touch()
    monkeypatch.setattr(worker, "acquire", lambda *_, **__: pytest.fail("claimed"))
    assert execute(raising(RuntimeError("trained")), job) == Ending(job.run, Result.FINISHED)
