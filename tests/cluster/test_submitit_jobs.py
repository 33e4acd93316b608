"""Real runs as submitit's local jobs: taken away by signal, cancelled, and left alone by a killed
driver.
"""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from grid_process import Driver, hold, trainers
from tiny_grid import results

pytest.importorskip("submitit", reason="needs the extra slurm (submitit)")
pytestmark = pytest.mark.slow

Results = dict[str, dict[str, Any]]


def test_taken_away_cancelled_and_orphaned_runs_end_as_undisturbed_ones(
    start: Callable[..., Driver], local_results: Results, tmp_path: Path
) -> None:
    command = (hold(tmp_path / "out"), "slurm", "cluster=local", "seeds=1", "workers=2")
    driver = start(*command)
    pid, taken = next(iter(driver.wait_for("a run on its way", driver.held).items()))
    os.kill(pid, signal.SIGUSR2)  # what submitit asks SLURM to send before it takes a node away
    driver.wait_for(
        "the run in another process",
        lambda: taken in {run for other, run in trainers(driver.out).items() if other != pid},
    )
    assert "again" not in driver.said(), "the job came back by itself"

    driver.process.send_signal(signal.SIGTERM)
    assert driver.end() == 0
    assert not trainers(driver.out), "cancelled jobs leave no process"

    driver = start(*command)
    orphans = driver.wait_for(
        "both runs on their way", lambda: len(found := driver.held()) == 2 and found
    )
    driver.kill()
    driver.release()
    driver = start(*command)
    while driver.process.poll() is None:
        now = trainers(driver.out)
        assert all(orphans.get(pid) == run for pid, run in now.items()), (
            "no run is taken from a living job"
        )
        driver.wait_for(
            "a change",
            lambda now=now: driver.process.poll() is not None or trainers(driver.out) != now,
        )
    assert driver.end() == 0
    found = results(driver.out)
    assert len(found) == 2
    assert found == {run: local_results[run] for run in found}
