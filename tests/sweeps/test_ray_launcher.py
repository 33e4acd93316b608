"""The Ray launcher on a cluster of this machine."""

import socket
from pathlib import Path

import pytest
from fake_launcher import Times
from refusals import refused
from stub_trainer import HOLD, STUB, StubRun, expected_loss, stub_grid, stub_sweep

from moe_lab.errors import RunError
from moe_lab.sweeps import run, status
from moe_lab.sweeps.launchers import ray as ray_launcher
from moe_lab.sweeps.launchers.local import available_cores

pytest.importorskip("ray", reason="needs the extra ray")


@pytest.fixture(autouse=True)
def _stub_is_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")


def go(
    out: Path, *runs: StubRun, options: dict[str, str] | None = None, workers: int | None = None
):
    return run(
        stub_sweep(*runs),
        out,
        workers=workers,
        progress=False,
        trainer=STUB,
        launcher="ray",
        launcher_options=options,
    )


@pytest.mark.slow
def test_a_sweep_on_ray_equals_one_here_through_failures_and_kills(tmp_path: Path) -> None:
    """One cluster start for the whole story: it takes longer than the runs."""
    long = StubRun(name="long", steps=20, trouble="killed once")
    bad = StubRun(name="bad", steps=4, trouble="diverges")
    greedy = StubRun(name="greedy", steps=4, trouble="killed every time")
    runs = [*stub_grid(3, steps=5, step_seconds=0), long, bad, greedy]

    outcome = go(tmp_path, *runs)
    assert {failure.name: failure.reason for failure in outcome.failed} == {
        "bad": "the loss is nan at step 10; try a lower learning rate than 1",
        "greedy": "its Ray worker was killed or crashed (out of memory? try fewer "
        "workers or a smaller batch), 3 times",
    }
    assert not outcome.interrupted
    found = {
        row["name"]: row["loss"]
        for row in status(tmp_path).rows(named=True)
        if row["state"] == "finished"
    }
    assert found == {one.name: expected_loss(one) for one in runs if one not in (bad, greedy)}
    workers = {
        line.split()[0] for line in (tmp_path / long.hash() / "steps.log").read_text().splitlines()
    }
    assert len(workers) == 2, "the killed run was resumed by another worker"


@pytest.mark.slow
def test_after_the_hours_ray_gives_back_what_has_not_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: Times
) -> None:
    runs = stub_grid(available_cores() + 2, steps=10, step_seconds=0.05)
    (tmp_path / HOLD).touch()
    times.over = lambda: bool(list(tmp_path.glob("*/steps.log")))
    withdraw = ray_launcher.RayLauncher.withdraw

    def then_let_go(launcher: ray_launcher.RayLauncher) -> None:
        withdraw(launcher)
        (tmp_path / HOLD).unlink()

    monkeypatch.setattr(ray_launcher.RayLauncher, "withdraw", then_let_go)
    outcome = go(tmp_path, *runs)
    begun = {path.parent.name for path in tmp_path.glob("*/steps.log")}
    assert begun
    assert set(outcome.finished) == begun, "whatever has begun goes on to its end"
    assert set(outcome.interrupted) == {one.hash() for one in runs} - begun
    assert len(outcome.interrupted) >= 2

    times.over = lambda: False
    assert run(stub_sweep(*runs), tmp_path, progress=False, trainer=STUB).complete
    found = {row["name"]: row["loss"] for row in status(tmp_path).rows(named=True)}
    assert found == {one.name: expected_loss(one) for one in runs}


def test_a_cluster_here_that_does_not_come_up_is_started_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import ray

    calls: list[str] = []

    def init(address: str, **_: object) -> None:
        calls.append(address)
        if len(calls) < good:
            raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(ray, "init", init)
    good = ray_launcher.STARTS
    assert ray_launcher._connect("") is ray
    assert calls == ["local"] * good
    calls.clear()
    good += 1
    with pytest.raises(RunError, match=r"at this machine, got .*timed out.*; try ray status"):
        ray_launcher._connect("")
    assert calls == ["local"] * ray_launcher.STARTS


def test_an_unreachable_cluster_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(
        RunError, match=r"expected a Ray cluster at 127.0.0.1:1, got .*; try ray status"
    ):
        go(tmp_path, StubRun(), options={"address": "127.0.0.1:1"})


def test_a_port_that_takes_connections_and_says_nothing_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray itself would try for minutes, then end the process."""
    monkeypatch.setattr(ray_launcher, "PROBE_SECONDS", 4.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(
            RunError,
            match=rf"expected a Ray cluster at {address}, got no answer within 4 s; try ray status",
        ):
            go(tmp_path, StubRun(), options={"address": address})


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"cpus": "0"}, "cpus"),
        ({"gpus": "half"}, "gpus"),
        ({"head": "x"}, "head"),
    ],
)
def test_bad_options_are_one_line(options: dict[str, str], field: str, tmp_path: Path) -> None:
    with refused(field):
        go(tmp_path, StubRun(), options=options)
