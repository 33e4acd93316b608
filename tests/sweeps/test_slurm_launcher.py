"""The SLURM launcher through submitit's own executor of local processes: every path but sbatch itself."""

from pathlib import Path

import pytest
from stub_trainer import STUB, StubRun, expected_loss, stub_grid, stub_sweep

from moe_lab.errors import ConfigError, RunError
from moe_lab.sweeps import run, status

pytest.importorskip("submitit", reason="needs the extra slurm (submitit)")
LOCAL = {"cluster": "local", "minutes": "5"}


@pytest.fixture(autouse=True)
def _stub_is_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


def go(out: Path, *runs: StubRun, options: dict[str, str] = LOCAL, workers: int | None = 2):
    return run(stub_sweep(*runs), out, workers=workers, progress=False, trainer=STUB, launcher="slurm", launcher_options=options)


@pytest.mark.slow
def test_runs_end_as_they_do_on_this_machine(tmp_path: Path) -> None:
    runs = stub_grid(3, steps=5, step_seconds=0)
    outcome = go(tmp_path, *runs)
    assert outcome.complete
    found = {row["name"]: row["loss"] for row in status(tmp_path).rows(named=True)}
    assert found == {one.name: expected_loss(one) for one in runs}


@pytest.mark.slow
def test_a_failed_run_says_why_and_stops_no_other(tmp_path: Path) -> None:
    good, bad = StubRun(name="good", steps=4), StubRun(name="bad", steps=4, trouble="diverges")
    outcome = go(tmp_path, good, bad)
    assert set(outcome.finished) == {good.hash()}
    assert [failure.name for failure in outcome.failed] == ["bad"]


@pytest.mark.slow
def test_a_killed_job_is_taken_up_again_and_resumes(tmp_path: Path) -> None:
    one = StubRun(name="long", steps=20, trouble="killed once")
    assert go(tmp_path, one).complete
    workers = {line.split()[0] for line in (tmp_path / one.hash() / "steps.log").read_text().splitlines()}
    assert len(workers) == 2
    assert status(tmp_path)["loss"].item() == expected_loss(one)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cluster": "cloud"}, "expected cluster=slurm or cluster=local, got cloud"),
        ({"cluster": "local", "minutes": "soon"}, "expected the launcher option minutes as a number, got 'soon'"),
        ({"walltime": "3"}, "expected fields of SlurmOptions"),
    ],
)
def test_bad_options_are_one_line(options: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        go(tmp_path, StubRun(), options=options)


def test_a_machine_without_slurm_is_told_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RunError, match=r"expected SLURM on this machine \(sbatch\).*try the launcher option cluster=local"):
        go(tmp_path / "sweep", StubRun(), options={})
