"""The SLURM launcher through submitit's own executor of local processes: every path but sbatch
itself.
"""

import re
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
from fake_launcher import Times
from refusals import refused
from stub_trainer import HOLD, STUB, StubRun, expected_loss, stub_grid, stub_sweep

from moe_lab.errors import RunError
from moe_lab.runs.store import open_store
from moe_lab.runs.waits import Wait, Waits
from moe_lab.sweeps import Ending, Job, Result, run, status, status_lines
from moe_lab.sweeps.launchers import remote_run as remote_run_module
from moe_lab.sweeps.launchers import slurm
from moe_lab.sweeps.launchers.remote_run import RemoteRun
from moe_lab.versions import versions

submitit = pytest.importorskip("submitit", reason="needs the extra slurm (submitit)")
LOCAL = {"cluster": "local", "minutes": "5"}


@pytest.fixture(autouse=True)
def _stub_is_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


def go(out: Path, *runs: StubRun, options: dict[str, str] = LOCAL, workers: int | None = 2):
    return run(
        stub_sweep(*runs),
        out,
        workers=workers,
        progress=False,
        trainer=STUB,
        launcher="slurm",
        launcher_options=options,
    )


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
    greedy = StubRun(name="greedy", steps=4, trouble="killed every time")
    outcome = go(tmp_path, good, bad, greedy)
    assert set(outcome.finished) == {good.hash()}
    reasons = {failure.name: failure.reason for failure in outcome.failed}
    assert reasons.pop("bad") == "the loss is nan at step 10; try a lower learning rate than 1"
    killed = (
        r"its job \d+ was killed or crashed \(out of memory\? try fewer workers or a "
        r"smaller batch\).*, 3 times"
    )
    assert re.fullmatch(killed, reasons.pop("greedy"))
    assert not reasons


@pytest.mark.slow
def test_a_run_is_put_back_after_its_time_limit_as_often_as_allowed(tmp_path: Path) -> None:
    """Its first process stands still: the shortest limit is a minute, and a run hears of it
    halfway, which on a busy machine may be before it has begun.
    """
    long = StubRun(name="long", trouble="hangs once")
    with ThreadPoolExecutor() as pool:
        options = [LOCAL | {"minutes": "1", "requeues": times} for times in ("9", "0")]
        often, once = pool.map(
            lambda index: go(tmp_path / f"{index}", long, options=options[index]), range(2)
        )
    assert often.complete
    assert "Requeued job" in (tmp_path / "0" / long.hash() / "log.txt").read_text()
    assert status(tmp_path / "0")["loss"].item() == expected_loss(long)
    assert "timed-out too many times" in once.failed[0].reason


@pytest.mark.slow
def test_a_job_with_other_versions_ends_the_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_run_module, "versions", lambda: versions() | {"moe_lab": "0.0"})
    with pytest.raises(
        RunError,
        match=r"expected the same versions on every machine, got moe_lab .* on the "
        r"worker, 0.0 at the driver",
    ):
        go(tmp_path, StubRun())


def test_more_runs_than_an_array_may_hold_are_several_arrays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm, "ARRAY_RUNS", 2)
    sizes = []
    batch = submitit.LocalExecutor._internal_process_submissions

    def counted(self, submissions):
        sizes.append(len(submissions))
        return batch(self, submissions)

    monkeypatch.setattr(submitit.LocalExecutor, "_internal_process_submissions", counted)
    assert go(tmp_path, *stub_grid(3, steps=2, step_seconds=0), workers=3).complete
    assert sizes == [2, 1]


@pytest.mark.slow
def test_a_killed_job_is_taken_up_again_and_resumes(tmp_path: Path) -> None:
    one = StubRun(name="long", steps=20, trouble="killed once")
    assert go(tmp_path, one).complete
    workers = {
        line.split()[0] for line in (tmp_path / one.hash() / "steps.log").read_text().splitlines()
    }
    assert len(workers) == 2
    assert status(tmp_path)["loss"].item() == expected_loss(one)


@dataclass
class Queue:
    """A controller: state by job, "element of an array" included.

    Jobs that ``begin_first`` names begin before ``scancel`` gets there.
    """

    states: dict[str, str] = field(default_factory=dict)
    begin_first: tuple[str, ...] = ()
    reasons: dict[str, str] = field(default_factory=dict)
    answers: bool = True
    folder: Path = Path()

    def run(self, command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        if not self.answers:
            raise subprocess.CalledProcessError(1, command)
        if command[0] == "scancel":
            self.states |= dict.fromkeys(self.begin_first, "RUNNING")
            wanted = next(
                (word.removeprefix("--state=") for word in command if word.startswith("--state=")),
                None,
            )
            for job in command[1:]:
                if job in self.states and wanted in (None, self.states[job]):
                    self.states[job] = "CANCELLED"
        told = (f"{job} {state} {self.reasons.get(job)}\n" for job, state in self.states.items())
        return subprocess.CompletedProcess(command, 0, "".join(told), "")

    def batch(self) -> AbstractContextManager[None]:
        return nullcontext()

    def submit(self, remote_run: RemoteRun) -> SimpleNamespace:
        job = f"7_{len(self.states)}"
        self.states[job] = "PENDING"
        return SimpleNamespace(
            job_id=job,
            paths=SimpleNamespace(result_pickle=self.folder / f"{job}_0_result.pkl"),
            stderr=lambda: "",
        )

    def finish(self, job: str, ending: Ending) -> None:
        """A job ends with a result."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{job}_0_result.pkl"
        submitit.core.utils.cloudpickle_dump(("success", ending), path)
        self.states[job] = "COMPLETED"


@pytest.fixture
def controller(monkeypatch: pytest.MonkeyPatch) -> Queue:
    queue = Queue()
    monkeypatch.setattr(slurm.subprocess, "run", queue.run)
    monkeypatch.setattr(slurm, "_executor", lambda *_: queue)
    monkeypatch.setitem(slurm.LOOK_SECONDS, "slurm", 0.0)
    return queue


def launch(folder: Path, names: str) -> slurm.SlurmLauncher:
    jobs = [Job(name, name, folder / name, {}) for name in names]
    launcher = slurm.SlurmLauncher(jobs, None, STUB, {})
    for job in jobs:
        launcher.submit(job)
    return launcher


def heard(launcher: slurm.SlurmLauncher) -> dict[str, Result]:
    return {ending.run: ending.result for _ in range(3) for ending in launcher.poll(0)}


def test_only_queued_jobs_are_taken_back(tmp_path: Path, controller: Queue) -> None:
    launcher = launch(tmp_path, "abcd")
    assert heard(launcher) == {}
    controller.states |= {"7_1": "RUNNING", "7_2": "COMPLETING"}
    launcher.withdraw()
    assert heard(launcher) == {"a": Result.WITHDRAWN, "d": Result.WITHDRAWN}
    assert controller.states == {
        "7_0": "CANCELLED",
        "7_1": "RUNNING",
        "7_2": "COMPLETING",
        "7_3": "CANCELLED",
    }

    controller.states["7_1"] = "PENDING"  # preempted, and put back by SLURM
    assert heard(launcher) == {"b": Result.WITHDRAWN}


def test_a_job_that_begins_as_it_is_taken_back_goes_on(tmp_path: Path, controller: Queue) -> None:
    launcher = launch(tmp_path, "ab")
    assert heard(launcher) == {}
    controller.begin_first = ("7_1",)
    launcher.withdraw()
    assert heard(launcher) == {"a": Result.WITHDRAWN}
    assert controller.states["7_1"] == "RUNNING"
    controller.begin_first = ()
    controller.finish("7_1", Ending("b", Result.FINISHED))
    assert heard(launcher) == {"b": Result.FINISHED}


def test_a_job_with_the_number_of_an_older_one_does_not_end_with_its_result(
    tmp_path: Path, controller: Queue
) -> None:
    launcher = launch(tmp_path, "a")
    assert heard(launcher) == {}
    controller.finish("7_0", Ending("a", Result.FINISHED))
    assert heard(launcher) == {"a": Result.FINISHED}
    controller.states.clear()  # as those of a controller that lost its state
    launcher.submit(Job("b", "b", tmp_path / "b", {}))
    assert heard(launcher) == {}
    del controller.states["7_0"]
    assert heard(launcher) == {}, "it is gone, and its result may still be under way"
    controller.finish("7_0", Ending("b", Result.FINISHED))
    assert heard(launcher) == {"b": Result.FINISHED}


def test_a_job_that_began_as_it_was_taken_back_is_taken_back_when_it_is_preempted(
    tmp_path: Path, controller: Queue
) -> None:
    launcher = launch(tmp_path, "a")
    assert heard(launcher) == {}
    controller.begin_first = ("7_0",)
    launcher.withdraw()
    assert heard(launcher) == {}
    controller.begin_first, controller.states["7_0"] = (), "PENDING"
    assert heard(launcher) == {"a": Result.WITHDRAWN}


def test_jobs_are_taken_back_once_the_controller_answers(tmp_path: Path, controller: Queue) -> None:
    launcher = launch(tmp_path, "a")
    assert heard(launcher) == {}
    controller.answers = False
    launcher.withdraw()
    assert heard(launcher) == {}
    controller.answers = True
    assert heard(launcher) == {"a": Result.WITHDRAWN}


def test_what_was_not_yet_sent_is_taken_back_without_a_job(
    tmp_path: Path, controller: Queue
) -> None:
    launcher = launch(tmp_path, "ab")
    launcher.withdraw()
    assert heard(launcher) == {"a": Result.WITHDRAWN, "b": Result.WITHDRAWN}
    assert not controller.states


def test_a_reason_that_stays_is_told_with_its_job(
    tmp_path: Path, controller: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(slurm, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=None))
    launcher = launch(tmp_path, "abcd")
    down = "ReqNodeNotAvail, UnavailableNodes:node[1-4]"
    controller.reasons = {"7_0": "JobHeldUser", "7_1": down, "7_2": "Priority"}
    assert heard(launcher) == {}
    assert launcher.waits() == {}, "the scheduler may only just have looked"
    now[0] += slurm.WAIT_SECONDS
    controller.reasons |= {"7_1": down.replace("4", "5"), "7_3": "PartitionDown"}
    assert heard(launcher) == {}
    told = {
        "a": Wait("7_0", "SLURM says JobHeldUser; try scontrol release"),
        "b": Wait("7_1", "SLURM says ReqNodeNotAvail; try scontrol show job"),
    }
    assert launcher.waits() == told
    controller.answers = False
    assert heard(launcher) == {}
    assert launcher.waits() == told
    now[0] += slurm.WAIT_SECONDS
    assert heard(launcher) == {}
    assert launcher.waits()["c"] == Wait("7_2", slurm.SILENT), "whether it waits or runs"
    controller.answers = True
    controller.states |= {"7_0": "RUNNING", "7_1": "CONFIGURING"}
    controller.reasons["7_3"] = "PartitionTimeLimit"
    assert heard(launcher) == {}
    assert launcher.waits() == {}
    now[0] += slurm.WAIT_SECONDS
    assert heard(launcher) == {}
    late = "SLURM says PartitionTimeLimit; try the launcher option minutes="
    assert launcher.waits() == {"d": Wait("7_3", late)}


def test_a_job_that_slurm_could_not_launch_is_submitted_again_and_fails_for_this_call_alone(
    tmp_path: Path, controller: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = StubRun(name="long", steps=3)
    submitted = controller.submit

    def submit(remote_run: RemoteRun) -> SimpleNamespace:
        job = submitted(remote_run)
        controller.reasons[job.job_id] = "launch failed requeued held"
        return job

    monkeypatch.setattr(controller, "submit", submit)
    (failed,) = go(tmp_path, one, options={}).failed
    assert failed.reason == (
        "its job 7_2 could not be launched (SLURM says launch failed requeued held), 3 times; "
        "the same command tries again"
    )
    assert controller.states == dict.fromkeys(("7_0", "7_1", "7_2"), "CANCELLED")
    assert status(tmp_path)["error"].to_list() == [failed.reason]
    again = run(stub_sweep(one), tmp_path, trainer=STUB, max_hours=0, progress=False)
    assert again.interrupted == (one.hash(),), "not failed: the same command goes on"


def test_what_a_sweep_waits_for_is_said_once_and_shown_by_its_status(
    tmp_path: Path, controller: Queue, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    runs = stub_grid(3, steps=2, step_seconds=0)
    monkeypatch.setattr(slurm, "WAIT_SECONDS", 0.0)
    controller.reasons = {"7_0": "PartitionDown", "7_1": "PartitionDown", "7_2": "Priority"}
    shown: list[str] = []

    def look(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        if (tmp_path / "waits.json").exists() and not shown:
            shown.extend(status_lines(status(tmp_path)))
            raise KeyboardInterrupt
        return controller.run(command, **options)

    monkeypatch.setattr(slurm.subprocess, "run", look)
    with pytest.raises(KeyboardInterrupt):
        run(stub_sweep(*runs), tmp_path, trainer=STUB, launcher="slurm")
    why = "and 1 more wait: SLURM says PartitionDown; try scontrol show job"
    assert f"waiting: job 7_1 of run 1 {why}" in shown  # in the order of the plan
    assert capsys.readouterr().out.count(f"waiting   job 7_0 of run 2 {why}\n") == 1
    assert not (tmp_path / "waits.json").exists(), "its jobs were cancelled"


@pytest.mark.parametrize("place", ["sweep", "memory://waits/sweep"])
def test_waits_that_a_killed_driver_left_are_dated(tmp_path: Path, place: str) -> None:
    if "://" in place:
        pytest.importorskip("fsspec", reason="needs the extra store (fsspec)")
    store = open_store(place if "://" in place else tmp_path)
    left = Waits({"a": Wait("7_0", "SLURM says JobHeldUser")}, time.time() - 7200)
    store.record_waits(left)
    assert store.waits() == left
    assert left.age() == " (seen 2.0 h ago)"
    for _ in range(2):
        store.record_waits(Waits())
        assert store.waits() == Waits()
    for odd in (None, b"", b"[]", b'{"runs": {"a": 1}, "seen": 0}', b'{"runs": {}, "seen": "x"}'):
        assert Waits.of(odd) == Waits()


def test_processes_of_this_machine_have_all_begun(tmp_path: Path, times: Times) -> None:
    """The hours are over once two have begun, of which none ends before: the third never begins."""
    runs = stub_grid(3, steps=5, step_seconds=0)
    (tmp_path / HOLD).touch()

    def over() -> bool:
        begun = len(list(tmp_path.glob("*/steps.log"))) == 2
        if begun:
            (tmp_path / HOLD).unlink(missing_ok=True)
        return begun

    times.over = over
    outcome = go(tmp_path, *runs)
    assert len(outcome.finished) == 2
    assert len(outcome.interrupted) == 1


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"cluster": "cloud"}, "cluster"),
        (
            {"cluster": "local", "minutes": "soon"},
            "minutes",
        ),
        ({"walltime": "3"}, "walltime"),
    ],
)
def test_bad_options_are_one_line(options: dict[str, str], field: str, tmp_path: Path) -> None:
    with refused(field):
        go(tmp_path, StubRun(), options=options)


def test_a_machine_without_slurm_is_told_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with refused("cluster", RunError):
        go(tmp_path / "sweep", StubRun(), options={})
