"""A budget of hours or FLOPs stops a sweep between runs, and the same command goes on."""

from pathlib import Path

import pytest
from fake_launcher import FakeLauncher, Times
from refusals import refused
from stub_trainer import STUB, StubRun, stub_grid, stub_sweep

from moe_lab.sweeps import SweepOutcome, describe, run, status


def go(out: Path, max_hours: float | None, **options):
    sweep = stub_sweep(*stub_grid(4, steps=5, step_seconds=0.1))
    return run(sweep, out, workers=1, progress=False, trainer=STUB, max_hours=max_hours, **options)


def test_runs_that_have_begun_end_and_no_other_begins(tmp_path: Path) -> None:
    first = go(tmp_path, max_hours=0.3 / 3600)
    assert len(first.finished) >= 1
    assert len(first.interrupted) >= 1
    assert not first.failed
    assert (
        first.stopped
        == f"{len(first.interrupted)} runs wait: the hours of max_hours are over; the "
        "same command goes on"
    )
    assert go(tmp_path, max_hours=None).complete


@pytest.mark.parametrize("begun", [0, 1, 3])
def test_a_cluster_gives_back_what_waits_in_its_queue(
    tmp_path: Path, fake: FakeLauncher, times: Times, begun: int
) -> None:
    runs = stub_grid(5, steps=5, step_seconds=0)
    fake.begun, times.over = begun, lambda: len(fake.submitted) == 5
    outcome = run(
        stub_sweep(*runs), tmp_path, progress=False, launcher="ray", trainer=STUB, max_hours=1
    )
    assert list(outcome.finished) == fake.submitted[:begun]
    assert sorted(outcome.interrupted) == sorted(fake.submitted[begun:])
    assert (
        outcome.stopped
        == f"{5 - begun} runs wait: the hours of max_hours are over; the same command goes on"
    )
    assert fake.withdrawals == 1
    times.over = lambda: False
    assert run(stub_sweep(*runs), tmp_path, progress=False, workers=2, trainer=STUB).complete


def test_without_a_budget_nothing_is_taken_back(tmp_path: Path, fake: FakeLauncher) -> None:
    fake.begun = 2
    assert run(
        stub_sweep(*stub_grid(2, 5, 0)), tmp_path, progress=False, launcher="ray", trainer=STUB
    ).complete
    assert fake.withdrawals == 0


def test_a_withdrawn_run_is_one_line(
    tmp_path: Path, fake: FakeLauncher, times: Times, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.begun, times.over = 0, lambda: bool(fake.submitted)
    run(stub_sweep(StubRun(name="late")), tmp_path, launcher="ray", trainer=STUB, max_hours=1)
    assert capsys.readouterr().out.splitlines()[-1] == "[0/1] withdrawn late: it had not begun"


def test_no_hours_start_nothing(tmp_path: Path) -> None:
    assert len(go(tmp_path, max_hours=0).interrupted) == 4


def test_a_negative_budget_is_refused(tmp_path: Path) -> None:
    with refused("max_hours"):
        go(tmp_path, max_hours=-1)


def test_options_of_other_launchers_are_refused(tmp_path: Path) -> None:
    with refused("address"):
        go(tmp_path, max_hours=None, launcher_options={"address": "auto"})


LENGTHS = {
    name: StubRun(name=name, tokens_per_step=8 * number)
    for name, number in (("long", 4), ("middle", 2), ("short", 1))
}
FLOPS = {name: describe(run)["flops"] for name, run in LENGTHS.items()}  # type: ignore[arg-type]


def spend(out: Path, flops: float, *runs: StubRun) -> SweepOutcome:
    return run(
        stub_sweep(*(runs or LENGTHS.values())),
        out,
        workers=2,
        progress=False,
        trainer=STUB,
        max_flops=flops,
    )


def finished(out: Path) -> set[str]:
    return set(status(out).filter(state="finished")["name"])


@pytest.mark.parametrize(
    ("share", "names"),
    [
        (0, set()),
        (0.99, {"middle", "short"}),
        (1, {"long"}),
        (1.3, {"long", "short"}),
        (1.5, {"long", "middle"}),
        (1.75, set(LENGTHS)),
    ],
)
def test_what_fits_into_the_flops_is_trained_the_longest_first(
    tmp_path: Path, share: float, names: set[str]
) -> None:
    outcome = spend(tmp_path, share * FLOPS["long"])
    assert finished(tmp_path) == names
    assert len(outcome.interrupted) == 3 - len(names)
    assert not outcome.failed


def test_what_is_left_is_said_in_one_line(tmp_path: Path) -> None:
    outcome = spend(tmp_path, 1.3 * FLOPS["long"])
    left, needed = 1.3 * FLOPS["long"] - FLOPS["long"] - FLOPS["short"], FLOPS["middle"]
    assert (
        outcome.stopped
        == f"1 runs wait: {left:.3g} FLOPs of max_flops are left, the smallest of them "
        f"needs {needed:.3g}"
    )


def test_what_earlier_calls_finished_does_not_count(tmp_path: Path) -> None:
    spend(tmp_path, FLOPS["long"])
    assert spend(tmp_path, FLOPS["middle"] + FLOPS["short"]).complete


def test_a_resumed_run_counts_with_what_it_has_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STUB_FILE", str(tmp_path / "missing"))
    broken = LENGTHS["long"].replace(trouble="needs file")
    assert spend(tmp_path, 1e12, broken).failed
    (tmp_path / broken.hash() / "error.txt").unlink()
    half = describe(broken)["flops"] / 2  # type: ignore[arg-type]
    assert spend(tmp_path, 0.99 * half, broken).interrupted
    assert spend(tmp_path, half, broken).failed  # it was started


def test_a_run_whose_worker_dies_is_charged_once(tmp_path: Path) -> None:
    assert spend(tmp_path, FLOPS["long"], LENGTHS["long"].replace(trouble="killed once")).complete


def test_negative_flops_are_refused(tmp_path: Path) -> None:
    with refused("max_flops"):
        spend(tmp_path, -1)
