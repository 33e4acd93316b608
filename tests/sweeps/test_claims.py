import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from refusals import refused

from moe_lab.errors import RunError
from moe_lab.runs import folder_claims
from moe_lab.runs.folder_claims import acquire, holder
from moe_lab.runs.owners import Owner, process_start, temporary_folder, this_host


def write_claim(folder: Path, owner: Owner | None, *, number: int = 1, age: float = 0.0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f".claim-{number}"
    path.write_text(json.dumps(vars(owner)) if owner else "")
    os.utime(path, (time.time() - age, time.time() - age))
    return path


@pytest.fixture
def dead_owner() -> Owner:
    """A process of this host that was killed, with its true start time."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    owner = Owner(this_host(), process.pid, process_start(process.pid))
    assert owner.started is not None
    process.kill()
    process.wait()
    return owner


def test_a_folder_is_claimed_once(tmp_path: Path):
    with acquire(tmp_path / "run") as claim:  # type: ignore[union-attr]
        assert claim is not None
        assert acquire(tmp_path / "run") is None
        assert str(os.getpid()) in (holder(tmp_path / "run") or "")


def test_a_released_folder_is_free_at_once(tmp_path: Path):
    for _ in range(3):
        claim = acquire(tmp_path)
        assert claim is not None
        claim.release()
        assert holder(tmp_path) is None
    assert len(list(tmp_path.iterdir())) == 1


def test_a_finished_folder_keeps_no_trace_of_its_claim(tmp_path: Path):
    claim = acquire(tmp_path)
    assert claim is not None
    claim.release(forget=True)
    assert list(tmp_path.iterdir()) == []


def test_the_claim_of_a_killed_process_is_taken_over(tmp_path: Path, dead_owner: Owner):
    write_claim(tmp_path, dead_owner)
    assert holder(tmp_path) is None
    assert acquire(tmp_path) is not None


def test_a_zombie_holds_nothing(tmp_path: Path):
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    write_claim(tmp_path, Owner(this_host(), process.pid, process_start(process.pid)))
    assert holder(tmp_path) is not None
    process.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it is dead and not yet reaped
    assert holder(tmp_path) is None
    process.wait()


def test_a_reused_process_id_does_not_keep_a_claim_alive(tmp_path: Path):
    started = process_start(os.getpid())
    assert started is not None
    write_claim(tmp_path, Owner(this_host(), os.getpid(), started - 1))
    assert holder(tmp_path) is None


@pytest.mark.parametrize(("age", "alive"), [(1.0, True), (folder_claims.SILENT_SECONDS + 5, False)])
def test_another_hosts_claim_lives_by_its_heartbeat(tmp_path: Path, age: float, alive: bool):
    write_claim(tmp_path, Owner("elsewhere/0/0", 1, 1), age=age)
    assert (holder(tmp_path) == "process 1 on elsewhere") is alive
    assert (acquire(tmp_path) is None) is alive


@pytest.mark.parametrize(("age", "alive"), [(0.0, True), (905.0, False)])
def test_an_empty_claim_belongs_to_someone_just_starting_or_to_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, age: float, alive: bool
):
    monkeypatch.setattr(folder_claims, "HEARTBEAT_SECONDS", 900.0)
    write_claim(tmp_path, None, age=age)
    assert (acquire(tmp_path) is None) is alive


@pytest.mark.parametrize("owner", [None, Owner("elsewhere/0/0", 1, 1)])
def test_a_claim_dated_in_the_future_holds_nothing(tmp_path: Path, owner: Owner | None):
    write_claim(tmp_path, owner, age=-3600)
    assert holder(tmp_path) is None
    assert acquire(tmp_path) is not None


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "5",
        '{"host": 5, "pid": 1, "started": 1}',
        '{"host": "h", "pid": "x", "started": 1}',
        "\xff",
    ],
)
def test_a_claim_that_is_none_of_ours_holds_nothing(tmp_path: Path, text: str):
    (tmp_path / ".claim-1").write_bytes(text.encode("latin-1"))
    os.utime(tmp_path / ".claim-1", (1000, 1000))
    assert holder(tmp_path) is None
    assert acquire(tmp_path) is not None


def test_odd_names_and_a_folder_are_no_claims(tmp_path: Path):
    for name in (".claim-\u00b2", ".claim-", ".claim-x", ".claim-1"):
        (tmp_path / name).mkdir()
    assert holder(tmp_path) is None
    assert acquire(tmp_path) is not None


def test_a_file_where_the_folder_should_be_is_one_line(tmp_path: Path):
    (tmp_path / "run").write_text("")
    with refused("folder", RunError):
        acquire(tmp_path / "run")


def test_a_holder_keeps_its_claim_fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(folder_claims, "HEARTBEAT_SECONDS", 0.01)
    claim = acquire(tmp_path)
    assert claim is not None
    os.utime(claim.path, (0, 0))
    deadline = time.monotonic() + 600
    while claim.path.stat().st_mtime == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert claim.path.stat().st_mtime > 0
    claim.release()


def test_a_holder_learns_that_it_was_taken_for_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(folder_claims, "HEARTBEAT_SECONDS", 0.01)
    lost = multiprocessing.Event()
    claim = acquire(tmp_path, on_lost=lost.set)
    assert claim is not None
    write_claim(tmp_path, Owner("elsewhere/0/0", 1, 1), number=2)
    assert lost.wait(600)


def test_a_late_comer_who_saw_an_old_claim_backs_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dead_owner: Owner
):
    write_claim(tmp_path, dead_owner, number=1)
    stale_view = os.listdir(tmp_path)
    write_claim(tmp_path, Owner("elsewhere/0/0", 1, 1), number=3)
    (tmp_path / ".claim-1").unlink()
    views = iter([stale_view])
    listdir = os.listdir
    monkeypatch.setattr(
        folder_claims.os, "listdir", lambda path: next(views, None) or listdir(path)
    )
    assert acquire(tmp_path) is None
    assert listdir(tmp_path) == [".claim-3"]


def race(folders: list[Path], barrier, wins) -> None:
    for folder in folders:
        barrier.wait()
        if acquire(folder) is not None:
            wins.put((folder.name, os.getpid()))
    barrier.wait()  # winners stay alive until everyone has tried


def test_of_many_processes_one_takes_an_abandoned_claim_over(tmp_path: Path, dead_owner: Owner):
    context = multiprocessing.get_context("fork")
    folders = [tmp_path / str(index) for index in range(100)]
    for folder in folders:
        write_claim(folder, dead_owner)
    barrier, wins = context.Barrier(4), context.Queue()
    processes = [context.Process(target=race, args=(folders, barrier, wins)) for _ in range(4)]
    for process in processes:
        process.start()
    winners = [wins.get(timeout=600)[0] for _ in folders]
    for process in processes:
        process.join()
    assert sorted(winners) == sorted(folder.name for folder in folders)
    assert wins.empty()


def test_a_folder_that_cannot_be_made_gives_one_clear_line(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        RunError,
        match=r"cannot write .*file/run: Not a directory; try another folder or free some space",
    ):
        acquire(tmp_path / "file" / "run")


def test_a_full_disk_leaves_no_claim_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folder_claims.json, "dump", full)
    with pytest.raises(RunError, match="No space left on device"):
        acquire(tmp_path)
    assert holder(tmp_path) is None


@pytest.mark.parametrize("hours_wrong", [-5, 5])
@pytest.mark.parametrize(("age", "alive"), [(10, True), (200, False)])
def test_a_claim_of_another_host_is_judged_by_the_file_systems_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hours_wrong: int, age: float, alive: bool
):
    write_claim(tmp_path, Owner("elsewhere", 1, 1), age=age)
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 3600 * hours_wrong)
    assert bool(holder(tmp_path)) is alive
    assert [path.name for path in tmp_path.iterdir()] == [".claim-1"]


def test_the_temporary_folder_of_a_killed_process_is_removed_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code = (
        "import sys, tempfile, time\n"
        "from moe_lab.runs.owners import temporary_folder\n"
        f"tempfile.tempdir = {str(tmp_path)!r}\n"
        "with temporary_folder('pieces') as folder:\n"
        "    (folder / 'piece').write_bytes(b'x')\n"
        "    print(folder, flush=True)\n"
        "    time.sleep(60)\n"
    )

    def start() -> tuple["subprocess.Popen[str]", Path]:
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        return process, Path(process.stdout.readline().strip())

    (first, killed), (second, living) = start(), start()
    first.kill()
    first.communicate()
    name = killed.name
    others = [name[:-8] + "00000000", name.replace(name.split("-")[2], "0" * 16), "moe_lab-pieces"]
    for other in others:
        (tmp_path / other).mkdir(mode=0o700)
    (tmp_path / others[0]).chmod(0o755)  # another user may have put files there
    (tmp_path / (name[:-8] + "11111111")).symlink_to(living)
    with temporary_folder("pieces") as own:
        assert not own.stat().st_mode & 0o077
        left = {path.name for path in tmp_path.iterdir()}
        assert left == {own.name, living.name, name[:-8] + "11111111", *others}
        assert (living / "piece").exists()
    assert not own.exists()
    second.kill()
    second.communicate()
