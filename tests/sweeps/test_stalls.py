"""Runs that stand still are taken up again by another worker, where the sweep was told when to give
up on one.
"""

from pathlib import Path

import pytest
from refusals import refused
from stub_trainer import STUB, StubRun, expected_loss, stub_sweep

from moe_lab.runs.owners import process_start
from moe_lab.sweeps import run, status
from moe_lab.sweeps.launchers import Job
from moe_lab.sweeps.launchers.local import LocalLauncher, _Worker

HUNG = StubRun(name="hung", trouble="hangs once")
OPTIONS = {"stall_minutes": "30"}


def workers(out: Path, one: StubRun) -> set[str]:
    return {line.split()[0] for line in (out / one.hash() / "steps.log").read_text().splitlines()}


def test_a_run_that_hangs_is_killed_and_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ten minutes pass with each look while the run hangs in a process that lives."""
    minutes = 0

    def clock() -> float:
        nonlocal minutes
        if (tmp_path / HUNG.hash() / "has-hung").exists():
            first, *others = workers(tmp_path, HUNG)
            if not others and process_start(int(first)) is not None:
                minutes += 10
        return 60.0 * minutes

    monkeypatch.setattr("moe_lab.sweeps.launchers.local.monotonic", clock)
    assert run(
        stub_sweep(HUNG), tmp_path, workers=1, trainer=STUB, launcher_options=OPTIONS
    ).complete
    line = (
        "again     hung: worker killed because its run's status stood still for 30 "
        "minutes; resuming from its checkpoint"
    )
    assert line in capsys.readouterr().out
    assert len(workers(tmp_path, HUNG)) == 2
    assert status(tmp_path)["loss"].item() == expected_loss(HUNG)


def test_a_slow_run_that_gets_on_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step takes 20 of the 30 minutes, by the steps that are seen before a look."""
    slow = StubRun(name="slow", steps=10, step_seconds=0.02)
    steps, now = tmp_path / slow.hash() / "steps.log", 0.0
    look = _Worker.stop_if_stalled

    def then_look(worker: _Worker, seconds: float) -> None:
        nonlocal now
        now = 1200.0 * (steps.read_text().count("\n") if steps.exists() else 0)
        look(worker, seconds)

    monkeypatch.setattr(_Worker, "stop_if_stalled", then_look)
    monkeypatch.setattr("moe_lab.sweeps.launchers.local.monotonic", lambda: now)
    assert run(
        stub_sweep(slow),
        tmp_path,
        workers=1,
        progress=False,
        trainer=STUB,
        launcher_options=OPTIONS,
    ).complete
    assert len(workers(tmp_path, slow)) == 1


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("-1", "stall_minutes"),
        ("long", "stall_minutes"),
    ],
)
def test_bad_minutes_are_one_line(tmp_path: Path, text: str, field: str) -> None:
    with refused(field):
        run(
            stub_sweep(HUNG),
            tmp_path,
            progress=False,
            trainer=STUB,
            launcher_options={"stall_minutes": text},
        )


def test_on_an_object_store_nobody_could_see_a_run_stand_still(tmp_path: Path) -> None:
    with refused("stall_minutes"):
        LocalLauncher([Job("run", "run", tmp_path, {}, shared=False)], 1, STUB, OPTIONS)
