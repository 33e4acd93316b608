"""A real SLURM controller and node on loopback (``slurm.sh``): requeued, cancelled and timed-out
jobs, and a driver that dies.
"""

import json
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from grid_process import Driver, hold
from tiny_grid import results

from moe_lab.errors import RunError
from moe_lab.runs.layout import WAITS
from moe_lab.sweeps import run, status, status_lines
from moe_lab.sweeps.launchers import slurm

pytest.importorskip("submitit", reason="needs the extra slurm (submitit)")
pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parent / "slurm.sh"


@pytest.fixture(scope="module")
def controller(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of ``slurm.sh``."""
    folder = tmp_path_factory.mktemp("slurm")
    begun = subprocess.run(
        ["bash", str(SCRIPT), "start", str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if begun.returncode:
        pytest.skip(
            f"no SLURM could be brought up: {' / '.join(begun.stdout.strip().splitlines())}"
        )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        yield folder
        subprocess.run(["bash", str(SCRIPT), "stop", str(folder)], check=True)


def job_of(pid: int) -> str:
    """The job that a process belongs to, as an element of its array."""
    words = Path(f"/proc/{pid}/environ").read_text()
    found = [re.search(rf"\0SLURM_ARRAY_{name}_ID=(\d+)\0", words) for name in ("JOB", "TASK")]
    return "_".join(match[1] for match in found if match)


def test_requeued_and_cancelled_jobs_and_a_killed_driver_end_as_undisturbed_ones(
    controller: Path,
    start: Callable[..., Driver],
    local_results: dict[str, dict[str, Any]],
    tmp_path: Path,
) -> None:
    command = (hold(tmp_path / "out"), "slurm", "minutes=9")
    driver = start(*command)
    pid, requeued = next(iter(driver.wait_for("a run on its way", driver.held).items()))
    subprocess.run(["scontrol", "requeue", job_of(pid)], check=True)

    def another() -> dict[int, str]:
        return {pid: run for pid, run in driver.held().items() if run != requeued}

    pid, cancelled = next(iter(driver.wait_for("another run on its way", another).items()))
    subprocess.run(["scancel", job_of(pid)], check=True)
    driver.wait_for(
        "the cancelled job's end",
        lambda: "ended as CANCELLED; resuming from its checkpoint" in driver.said(),
    )
    driver.kill()
    assert not results(driver.out), f"{cancelled} and the others were on their way"

    driver.release()
    driver = start(*command)
    assert driver.end() == 0
    assert "outcome 4 0 0" in driver.said()
    assert results(driver.out) == local_results


def test_a_run_resumes_after_its_time_limit(
    controller: Path, stubs: ModuleType, tmp_path: Path
) -> None:
    """Its first process stands still until the limit."""
    long = stubs.StubRun(name="long", trouble="hangs once")
    outcome = run(
        stubs.stub_sweep(long),
        tmp_path / "comes back",
        trainer=stubs.STUB,
        launcher="slurm",
        launcher_options={"minutes": "1", "requeues": "9"},
        progress=False,
    )
    assert outcome.complete
    folder = tmp_path / "comes back" / long.hash()
    lines = (folder / "steps.log").read_text().splitlines()
    assert len({line.split()[0] for line in lines}) == 2, "another process took it up"
    assert [int(line.split()[1]) for line in lines] == [*range(11), *range(10, 20)]
    assert json.loads((folder / "result.json").read_text())["loss"] == stubs.expected_loss(long)


def test_a_job_that_cannot_be_launched_is_submitted_again_and_waits_for_its_node(
    controller: Path,
    stubs: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """SLURM drains a node whose prolog fails, and holds the job."""
    monkeypatch.setattr(slurm, "WAIT_SECONDS", 1.0)
    monkeypatch.setitem(slurm.LOOK_SECONDS, "slurm", 0.5)
    (controller / "no-launch").touch()
    waits = r"job \d+(_0)? of alone waits: SLURM says .*DOWN, DRAINED.*; try scontrol show job"
    shown: list[str] = []

    def found(lines: list[str]) -> bool:
        return any(re.fullmatch(f"waiting: {waits}", line) for line in lines)

    def mend() -> None:
        deadline = time.monotonic() + 600
        while time.monotonic() < deadline and not found(shown):
            if (tmp_path / WAITS).exists():
                shown[:] = status_lines(status(tmp_path))
            time.sleep(0.2)
        (controller / "no-launch").unlink()
        node = subprocess.run(["sinfo", "-h", "-o", "%n"], capture_output=True, text=True).stdout
        words = ["scontrol", "update", f"NodeName={node.strip()}", "State=RESUME"]
        subprocess.run(words, check=True)

    mender = threading.Thread(target=mend)
    mender.start()
    one = stubs.StubRun(name="alone", steps=3)
    outcome = run(stubs.stub_sweep(one), tmp_path, trainer=stubs.STUB, launcher="slurm")
    mender.join()
    assert outcome.complete
    said = capsys.readouterr().out
    held = (
        r"again .* its job \d+(_0)? could not be launched \(SLURM says launch failed requeued held"
    )
    assert re.search(held + r"\); submitting it again", said)
    assert re.search(f"waiting   {waits}", said)
    assert found(shown), shown


def test_what_sbatch_refuses_is_one_line(
    controller: Path, stubs: ModuleType, tmp_path: Path
) -> None:
    sweep, options = stubs.stub_sweep(stubs.StubRun()), {"partition": "nowhere"}
    with pytest.raises(
        RunError,
        match=r"expected sbatch to accept the runs, got .*partition.*; try the launcher "
        r"options partition=",
    ):
        run(
            sweep,
            tmp_path,
            trainer=stubs.STUB,
            launcher="slurm",
            launcher_options=options,
            progress=False,
        )
