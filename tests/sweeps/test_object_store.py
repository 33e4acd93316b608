"""A sweep whose store is an object store: same numbers, taken up elsewhere, and one line for every
trouble.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from refusals import refused

pytest.importorskip("fsspec", reason="needs the extra store (fsspec)")

from bucket_files import TROUBLE
from fsspec.registry import _registry
from stub_trainer import HOLD, StubRun, expected_loss, stub_grid, stub_sweep

from moe_lab.cli import main
from moe_lab.errors import BusyError, RunError
from moe_lab.runs import object_leases
from moe_lab.runs.bucket import Bucket
from moe_lab.runs.failures import Failure, FailureKind
from moe_lab.runs.object_leases import living_owner, take
from moe_lab.runs.object_store import ObjectStore, write_failure
from moe_lab.runs.owners import Owner, this_host
from moe_lab.runs.tables import tables_of_logs
from moe_lab.sweeps import (
    RunState,
    RunStore,
    SweepOutcome,
    open_store,
    readable,
    run,
    status,
)
from moe_lab.sweeps.launchers.mirror import _Copies

TRAINER = "bucket_files:train"
GRID = stub_grid(3, steps=8, step_seconds=0.0)
WAITING = [one.replace(trouble="waits for file") for one in stub_grid(4, 8, 0.0)]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The root of bucket://, and a scratch of this test's own."""
    monkeypatch.setenv("BUCKET_ROOT", str(tmp_path / "buckets"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    for name in ("buckets", "scratch"):
        (tmp_path / name).mkdir()
    return tmp_path / "buckets"


def go(url: str, *runs: StubRun, **options) -> SweepOutcome:
    return run(
        stub_sweep(*(runs or GRID)), url, workers=2, progress=False, trainer=TRAINER, **options
    )


def trained_steps(root: Path, one: StubRun) -> list[int]:
    return [
        int(line.split()[1])
        for line in (root / "b/sweep/files" / one.hash() / "steps.log").read_text().splitlines()
    ]


def test_a_store_gives_the_tables_of_a_run_that_trains() -> None:
    store = ObjectStore("memory://test_object_store/tables")
    line = '{"step": 5, "layer": [0, 2], "load_cv": [0.5, 0.25]}\n'
    store.bucket.write("files/a/layers.jsonl", line.encode())
    store.bucket.write("state/a/status.json", b"{}")
    tables = tables_of_logs(lambda name: store.read("a", name))
    assert tables.layers.select("step", "layer", "load_cv").rows() == [(5, 0, 0.5), (5, 2, 0.25)]
    assert tables.metrics.is_empty()
    assert store.read("a", "status.json") == b"{}"


def test_a_sweep_on_a_url_has_the_numbers_of_one_in_a_folder(root: Path, tmp_path: Path):
    assert go("bucket://b/sweep").complete
    frame = status("bucket://b/sweep")
    assert frame["state"].to_list() == ["finished"] * 3
    assert dict(frame.select("name", "loss").rows()) == {
        one.name: expected_loss(one) for one in GRID
    }
    run(stub_sweep(*GRID), tmp_path / "folder", progress=False, trainer="stub_trainer:train")
    assert frame.equals(status(tmp_path / "folder"))


def test_the_store_holds_every_file_and_the_machine_none(root: Path, tmp_path: Path):
    go("bucket://b/sweep")
    for one in GRID:
        assert (root / "b/sweep/files" / one.hash() / "trace/part.txt").read_text() == "routes"
        assert {path.name for path in (root / "b/sweep/state" / one.hash()).iterdir()} == {
            "status.json",
            "result.json",
            "done",
            "log.txt",
        }
        assert not list((root / "b/sweep/files" / one.hash()).glob("checkpoint*"))
    left = [path for path in (tmp_path / "scratch").rglob("*") if path.is_file()]
    assert not left
    assert not list((root / "b/sweep/clock").iterdir())


def test_another_call_trains_nothing_again_and_adds_new_runs(root: Path):
    go("bucket://b/sweep")
    before = trained_steps(root, GRID[0])
    new = StubRun(name="new", seed=9, steps=3)
    assert go("bucket://b/sweep", GRID[0], new).complete
    assert trained_steps(root, GRID[0]) == before
    plan = open_store("bucket://b/sweep").plan()
    assert [len(sweep["runs"]) for sweep in plan["sweeps"]] == [3, 2]
    assert len(plan["runs"]) == 4


def test_a_run_goes_on_where_a_worker_of_another_machine_left_it(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    broken = StubRun(name="broken", trouble="needs file")
    monkeypatch.setenv("STUB_FILE", str(tmp_path / "wanted"))
    assert go("bucket://b/sweep", broken).failed[0].reason == "the file is missing"
    row = status("bucket://b/sweep").row(0, named=True)
    assert (row["state"], row["error"], row["step"]) == ("failed", "the file is missing", 10)
    assert "the file is missing" in row["last_lines"]
    assert go("bucket://b/sweep", broken).failed
    shutil.rmtree(tmp_path / "scratch")  # another machine
    (tmp_path / "scratch").mkdir()
    (tmp_path / "wanted").touch()
    assert go("bucket://b/sweep", broken, retry_failed=True).complete
    assert trained_steps(root, broken) == [*range(11), *range(10, 20)]
    assert status("bucket://b/sweep")["loss"].item() == expected_loss(broken)


def test_a_worker_that_is_killed_loses_what_came_after_its_last_copy(
    root: Path, monkeypatch: pytest.MonkeyPatch
):
    """It is killed after the first copy of its checkpoint, for which it waits in its middle."""
    killed = StubRun(name="killed", steps=20, trouble="waits for file")
    monkeypatch.setenv("STUB_FILE", str(root / "killed"))
    assert run(
        stub_sweep(killed),
        "bucket://b/sweep",
        progress=False,
        trainer="bucket_files:train_and_die_once",
    ).complete
    assert (root / "killed").exists()
    assert status("bucket://b/sweep")["loss"].item() == expected_loss(killed)
    steps = trained_steps(root, killed)
    assert steps[-1] == 19
    assert steps.count(0) == 1, "it began again"


def test_two_sweeps_on_one_url_share_the_work(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Each holds two of the runs in their middle, until all are held."""
    code = (
        "from test_object_store import WAITING, go\n"
        "outcome = go('bucket://b/sweep', *WAITING)\n"
        "print('outcome', len(outcome.finished), len(outcome.failed))"
    )
    monkeypatch.setenv("STUB_FILE", str(tmp_path / "go on"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    processes, deadline = [], time.monotonic() + 600
    for number in (2, 4):
        words = [sys.executable, "-c", code]
        processes.append(subprocess.Popen(words, stdout=subprocess.PIPE, text=True))
        while len(list((tmp_path / "scratch").rglob("steps.log"))) < number:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    (tmp_path / "go on").touch()
    assert [process.communicate(timeout=600)[0].split() for process in processes] == [
        ["outcome", "4", "0"]
    ] * 2
    for one in WAITING:
        assert trained_steps(root, one) == list(range(one.steps)), f"{one.name} was trained by both"


def test_a_lease_is_taken_once_and_given_back(root: Path):
    bucket = Bucket("bucket://b/sweep")
    with take(bucket, "lease") as lease:  # type: ignore[union-attr]
        assert lease is not None
        assert take(bucket, "lease") is None
        assert str(os.getpid()) in (living_owner(bucket, "lease") or "")
    assert bucket.read("lease") is None


def test_of_two_who_take_a_lease_at_the_same_moment_one_goes_on(
    root: Path, monkeypatch: pytest.MonkeyPatch
):
    bucket = Bucket("bucket://b/sweep")

    def rival_writes(_: float) -> None:
        bucket.write("lease", json.dumps({"key": "rival"}).encode())

    monkeypatch.setattr(object_leases.time, "sleep", rival_writes)
    assert take(bucket, "lease") is None


def test_a_holder_hears_that_it_was_overtaken(root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(object_leases, "RENEW_SECONDS", 0.05)
    bucket, lost = Bucket("bucket://b/sweep"), []
    with take(bucket, "lease", on_lost=lambda: lost.append(1)):  # type: ignore[union-attr]
        bucket.write("lease", json.dumps({"key": "rival"}).encode())
        deadline = time.monotonic() + 600
        while not lost and time.monotonic() < deadline:
            time.sleep(0.01)
    assert lost == [1]
    assert bucket.read("lease") is not None  # the rival's, which is not ours to give back


def test_a_worker_that_was_overtaken_copies_nothing_more(root: Path, tmp_path: Path):
    """Its result may differ in its seconds from that of the worker that took the run over."""
    bucket, one = Bucket("bucket://b/sweep"), GRID[0].hash()
    scratch = tmp_path / "copies"
    with take(bucket, "lease") as lease:  # type: ignore[union-attr]
        copies = _Copies(bucket, one, scratch, tmp_path / "log.txt", lease.confirm)
        copies.fetch()
        for name in ("result.json", "done"):
            (scratch / name).write_text("ours")
        bucket.write("lease", json.dumps({"key": "rival"}).encode())
        with pytest.raises(BusyError):
            copies.finish()
        with copies:  # which copies once more at its end
            pass
    assert [path for path in (root / "b/sweep").rglob("*") if path.is_file()] == [
        root / "b/sweep/lease"
    ]


def test_a_file_that_was_replaced_at_the_same_moment_is_copied_again(root: Path, tmp_path: Path):
    bucket, one = Bucket("bucket://b/sweep"), GRID[0].hash()
    status = tmp_path / "copies" / "status.json"
    with take(bucket, "lease") as lease:  # type: ignore[union-attr]
        copies = _Copies(bucket, one, status.parent, tmp_path / "log.txt", lease.confirm)
        copies.fetch()
        for step in (b"1", b"2"):
            (tmp_path / "newer").write_bytes(step)
            os.utime(tmp_path / "newer", (1000, 1000))
            (tmp_path / "newer").replace(status)
            copies._copy()
            assert bucket.read(f"state/{one}/status.json") == step


@pytest.mark.parametrize("hours_wrong", [-5, 0, 5])
@pytest.mark.parametrize(("silent", "alive"), [(10, True), (200, False)])
def test_a_lease_of_another_host_is_judged_by_the_stores_clock_alone(
    root: Path, monkeypatch: pytest.MonkeyPatch, hours_wrong: int, silent: float, alive: bool
):
    bucket = Bucket("bucket://b/sweep")
    bucket.write(
        "lease", json.dumps({"key": "k", "where": vars(Owner("elsewhere", 1, 1))}).encode()
    )
    then = time.time() - silent
    os.utime(root / "b/sweep/lease", (then, then))
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 3600 * hours_wrong)
    assert bool(living_owner(bucket, "lease")) is alive


def test_a_lease_of_a_dead_process_of_this_host_is_free_at_once(root: Path):
    bucket = Bucket("bucket://b/sweep")
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    bucket.write(
        "lease", json.dumps({"key": "k", "where": vars(Owner(this_host(), dead.pid, 1))}).encode()
    )
    assert living_owner(bucket, "lease") is None


def test_memory_stores_hold_states_too():
    store = ObjectStore("memory://test_object_store/sweep")
    store.add(stub_sweep(*GRID))
    first, second, third = (one.hash() for one in GRID)
    store.bucket.write(f"state/{first}/done", b"")
    store.record_failure(second, Failure("it broke"))
    assert list(store.states([first, second, third]).values()) == [
        RunState.FINISHED,
        RunState.FAILED,
        RunState.PENDING,
    ]
    assert store.failure(second).reason == "it broke"
    store.record_failure(first, Failure("too late"))
    assert store.state(first) is RunState.FINISHED


def test_a_store_in_this_processs_memory_is_no_place_for_workers():
    with refused("store"):
        go("memory://b/sweep")


def test_a_file_url_is_a_folder(tmp_path: Path):
    store = open_store(f"file://{tmp_path}/my%20sweep")
    assert isinstance(store, RunStore)
    assert store.folder == tmp_path / "my sweep"


def test_a_report_can_be_made_of_a_url(root: Path):
    go("bucket://b/sweep")
    with readable("bucket://b/sweep") as folder:
        assert len(json.loads((folder / "sweep.json").read_text())["runs"]) == 3
        for one in GRID:
            assert (folder / one.hash() / "done").exists()
            assert json.loads((folder / one.hash() / "result.json").read_text())[
                "loss"
            ] == expected_loss(one)
        assert [path.read_text() for path in folder.glob("*/trace/part.txt")] == [
            "routes"
        ]  # one arm, one ratio
    assert not folder.exists()


def test_the_command_line_takes_urls(root: Path, capsys: pytest.CaptureFixture[str]):
    go("bucket://b/sweep")
    assert main(["sweep", "status", "bucket://b/sweep"]) == 0
    assert "3 runs: 3 finished" in capsys.readouterr().out


def test_a_full_store_stops_the_sweep_with_one_line_and_can_be_resumed(root: Path):
    (root / "b").mkdir()
    slow = StubRun(name="slow", steps=10, step_seconds=0.1)
    out = stub_sweep(slow)
    (root / "b" / HOLD).touch()
    (root / TROUBLE).write_text("full")
    with pytest.raises(
        RunError,
        match=r"^cannot write bucket://b/sweep: No space left on device; try another "
        r"store or free some space$",
    ):
        run(out, "bucket://b/sweep", progress=False, trainer=TRAINER)
    (root / TROUBLE).unlink()
    assert run(out, "bucket://b/sweep", progress=False, trainer=TRAINER).complete


def test_a_store_that_fills_while_a_run_trains_keeps_its_work(root: Path):
    (root / TROUBLE).write_text("no checkpoints")
    assert go("bucket://b/sweep").complete  # nobody resumed, so nobody missed them


@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        (
            "denied",
            r"^cannot (read|write) bucket://b/sweep: The AWS Access Key Id you .*; try "
            r"other credentials \(these may be wrong or have expired\), or ask for the right",
        ),
        (
            "gone",
            r"^cannot (read|write) bucket://b/sweep: Could not connect to the endpoint "
            r"URL: .*; check the network and the endpoint",
        ),
    ],
)
def test_credentials_and_networks_give_one_line(root: Path, trouble: str, message: str):
    (root / TROUBLE).write_text(trouble)
    with pytest.raises(RunError, match=message) as caught:
        go("bucket://b/sweep")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (
            "nonsense://b/sweep",
            "expected a folder or a URL that fsspec knows .*, got nonsense://b/sweep",
        ),
        (
            "bucket://b/empty",
            "expected a sweep's store with sweeps/, got bucket://b/empty without one; "
            "try the URL of a sweep or of a trace, or moe-lab sweep run first",
        ),
    ],
)
def test_a_url_without_a_sweep_gives_one_line(root: Path, url: str, message: str):
    with pytest.raises(RunError, match=message):
        status(url)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with refused("fsspec", RunError):
        open_store("s3://bucket/sweep")


def test_a_missing_client_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(_registry, "s3", raising=False)
    with refused("store", RunError):
        open_store("s3://bucket/sweep")


HOSTILE_NAMES = [
    "state//{outside}/written",
    "state/../../written",
    "state/{run}/../../../written",
    "state/{run}/..",
    "state/{run}/./result.json",
    "state/{run}//result.json",
    "state/{run}/\\..\\..\\written",
    "state/{run}/C:\\written",
    "state/{run}/a\nb",
    "state/{run}/a\x1b[2Jb",
    "state/{run}/a\x00b",
    "state/{run}/a b",
    "state/{run}/~/.bashrc",
    "state/{run}/$HOME",
    "state/{run}/%2e%2e/written",
    "state/{run}/\u202ereversed",
    "state/{run}/\ud800",
    "state/{run}/" + "é" * 10_000,
    "files/{run}/trace/../../../written",
    "files/{run}/trace//{outside}/written",
]


@pytest.mark.parametrize("name", HOSTILE_NAMES, ids=range(len(HOSTILE_NAMES)))
def test_no_object_name_leads_out_of_the_folder_it_is_copied_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    outside = tmp_path / "outside"
    outside.mkdir()
    url = f"memory://hostile/{tmp_path.name}"
    store = ObjectStore(url)
    store.add(stub_sweep(GRID[0]))
    hash_ = GRID[0].hash()
    store.bucket.write(f"state/{hash_}/done", b"")
    hostile = name.format(outside=outside, run=hash_)
    find, cat, get = (
        getattr(store.bucket._files, method) for method in ("find", "cat_ranges", "get_file")
    )
    root = store.bucket._path("")

    def find_more(path: str, **options):
        more = [root + hostile] if hostile.startswith(path.removeprefix(root)) else []
        return find(path, **options) | {path: {"size": 2} for path in more}

    def cat_more(paths, *bounds):
        contents = zip(paths, cat(paths, *bounds), strict=True)
        return [b"{}" if path == root + hostile else content for path, content in contents]

    def get_more(path: str, target: str):
        return Path(target).write_bytes(b"x") if path == root + hostile else get(path, target)

    monkeypatch.setattr(type(store.bucket._files), "find", staticmethod(find_more))
    monkeypatch.setattr(type(store.bucket._files), "cat_ranges", staticmethod(cat_more))
    monkeypatch.setattr(type(store.bucket._files), "get_file", staticmethod(get_more))
    monkeypatch.setattr(tempfile, "tempdir", str(outside / "deep" / "down"))
    Path(tempfile.tempdir).mkdir(parents=True)  # type: ignore[arg-type]
    with pytest.raises(RunError, match="expected file names of letters") as caught, readable(url):
        pass
    assert len(str(caught.value)) < 400
    assert str(caught.value).isascii()
    assert str(caught.value).isprintable()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    "run", ["../../../x", "/abs", "0123456789ab/..", "0123456789AB", "", "0123456789abc"]
)
def test_a_plan_names_runs_by_their_hash_alone(tmp_path: Path, run: str):
    plan = {"schema_version": 1, "sweeps": [], "runs": {run: {}}}
    (tmp_path / "sweep.json").write_text(json.dumps(plan))
    with refused("runs", RunError):
        status(tmp_path)


def test_a_damaged_checkpoint_is_set_aside_in_the_store(root: Path, tmp_path: Path):
    victim = StubRun(name="victim")
    store = ObjectStore("bucket://b/sweep")
    place = root / "b/sweep/files" / victim.hash()
    place.mkdir(parents=True)
    (place / "checkpoint.safetensors").write_bytes(b"damaged")
    write_failure(store.bucket, victim.hash(), Failure("damaged", FailureKind.CHECKPOINT))
    assert not go("bucket://b/sweep", victim).complete
    assert (place / "checkpoint.safetensors").exists()
    store.set_checkpoint_aside(victim.hash())
    assert [path.name for path in place.iterdir()] == ["checkpoint.damaged"]
    store.set_checkpoint_aside(victim.hash())  # once more: nothing to do
    scratch = tmp_path / "copies"
    _Copies(store.bucket, victim.hash(), scratch, scratch / "log.txt", lambda: None).fetch()
    assert not list(scratch.iterdir())  # nobody reads the damaged one
    write_failure(store.bucket, victim.hash(), Failure("damaged", FailureKind.CHECKPOINT))
    assert go("bucket://b/sweep", victim, retry_failed=True).complete


def test_an_object_beside_the_runs_is_no_run(root: Path):
    (root / "b/sweep/state").mkdir(parents=True)
    (root / "b/sweep/state/stray").write_text("x")
    assert go("bucket://b/sweep").complete


def test_a_worker_killed_after_done_leaves_no_checkpoint_for_ever(root: Path):
    assert go("bucket://b/sweep").complete
    first, second = (one.hash() for one in GRID[:2])
    place = root / "b/sweep"
    for name in (first, second):
        (place / "files" / name / "checkpoint.safetensors").write_bytes(b"left")
    (place / "state" / first / "lease.json").write_text("{}")  # a worker that ends gives it back
    assert go("bucket://b/sweep").complete
    assert not (place / "files" / first / "checkpoint.safetensors").exists()
    assert not (place / "state" / first / "lease.json").exists()
    assert (place / "files" / second / "checkpoint.safetensors").exists()
