"""What the page of a place says, what is sent again, and that a place is only read."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from refusals import refused
from watched_runs import LAYERS, append, finish, log_alarm, log_step, make_run

from moe_lab.errors import RunError
from moe_lab.runs import Progress, RunRecord, RunState, read_runs
from moe_lab.runs.bucket import Bucket
from moe_lab.runs.owners import Owner, process_start, this_host
from moe_lab.watch import Board, open_place, write_page
from moe_lab.watch import board as board_module
from moe_lab.watch import index as index_module
from moe_lab.watch import place as place_module
from moe_lab.watch.board import View
from moe_lab.watch.forecast import seconds_left
from moe_lab.watch.page import live_page


class Reader:
    """A browser: what it has, and what the last answer brought."""

    def __init__(self, place: Path | str) -> None:
        self.board = Board(open_place(place))
        self.mark = self.seen = ""
        self.parts: dict[str, Any] = {}

    def ask(self, **view: Any) -> dict[str, Any]:
        self.board.refresh(None)
        answer = json.loads(self.board.changes(self.mark, self.seen, View(**view)))
        self.mark, self.seen = answer["mark"], answer["seen"]
        self.parts |= answer["parts"]
        return answer["parts"]

    @property
    def sentence(self) -> str:
        return self.parts["answer"]["sentence"]

    @property
    def notes(self) -> str:
        return " ".join(self.parts["answer"]["notes"])


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders count as settled at once; their dates differ in these tests."""
    monkeypatch.setattr(index_module, "SETTLED_SECONDS", 0.0)


def plan_of(folder: Path, names: list[str]) -> None:
    runs = {
        name: {"name": f"run {place}", "arm": "topk", "ratio": 4.0, "seed": place, "config": {}}
        for place, name in enumerate(names)
    }
    sweep = {"hash": "0", "name": "s", "question": "Which?", "preset": "", "runs": names}
    plan = {"schema_version": 1, "sweeps": [sweep], "runs": runs}
    (folder / "sweep.json").write_text(json.dumps(plan))


def claim(folder: Path, pid: int, host: str = "") -> None:
    owner = Owner(host or this_host(), pid, process_start(pid) or 1)
    (folder / ".claim-1").write_text(json.dumps(vars(owner)))


def test_a_sweep_is_one_sentence_its_curves_its_failures_and_what_it_lacks(tmp_path: Path) -> None:
    names = [f"{place:012x}" for place in range(5)]
    make_run(tmp_path / names[0], state=RunState.FINISHED, seed=0, steps=100)
    make_run(tmp_path / names[1], state=RunState.FINISHED, seed=1, steps=100)
    claim(make_run(tmp_path / names[2]), os.getpid())
    make_run(tmp_path / names[3], state=RunState.FAILED)
    plan_of(tmp_path, names)
    log_alarm(tmp_path / names[2], "Layer 1 uses one expert.")
    reader = Reader(tmp_path)
    parts = reader.ask()
    assert reader.sentence == (
        "Of 5 runs, 1 pending, 1 running, 2 finished and 1 failed. The lowest validation loss is "
        "2.0000 nats per token (topk 4:1, seed 0). About 16 s left. 1 alarm."
    )
    assert ["question", "Which?"] in parts["answer"]["facts"]
    assert parts["curves"]["runs"] == names[:4]
    assert [name for name, _ in parts["curves"]["metrics"]][:3] == ["loss", "validation", "load_cv"]
    assert parts["missing"]["rows"] == [
        ["topk 4:1", "2 of 5", "seed 2 running, seed 3 failed and seed 4 pending"]
    ]
    assert parts["frontier"]["spec"]["data"]
    (failure,) = parts["failures"]
    assert failure["reason"] == "the loss is nan"
    assert failure["lines"].endswith("last line of it")
    (alarm,) = parts["alarms"]["rows"]
    assert alarm == [
        "topk 4:1, seed 2", "40", "1", "router collapse", "Layer 1 uses one expert.",
        "raise the loss",
    ]  # fmt: skip
    table = parts["table"]
    assert table["rows"][0][:4] == ["topk 4:1, seed 2", "running", "40/100", "2.791"]
    assert [row[1] for row in table["rows"]] == [
        "running", "failed", "finished", "finished", "pending",
    ]  # fmt: skip


def test_a_browser_that_has_all_is_sent_what_changed_and_nothing_else(
    tmp_path: Path, settled: None
) -> None:
    for name in ("a", "b", "c"):
        make_run(tmp_path / name)
    reader = Reader(tmp_path)
    assert {"answer", "curves", "curve/a", "curve/b", "curve/c", "table"} <= set(reader.ask())
    assert reader.ask() == {}
    log_step(tmp_path / "b", 41)
    assert set(reader.ask()) == {"curve/b", "table"}
    assert "41/100" in str(reader.parts["table"])
    reader.mark = "another-7"  # that of a server that was started again
    assert {"answer", "curve/a"} <= set(reader.ask())


def test_files_that_did_not_change_are_not_read_again(
    tmp_path: Path, settled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b", "c"):
        make_run(tmp_path / name, state=RunState.FINISHED)
    make_run(tmp_path / "d", state=RunState.FAILED)
    reader = Reader(tmp_path)
    reader.ask()
    read = []
    original = index_module.read_run
    monkeypatch.setattr(
        index_module,
        "read_run",
        lambda folder, *rest: (read.append(folder), original(folder, *rest))[1],
    )
    for _ in range(3):
        reader.ask()
    assert read == []
    (tmp_path / "d" / "error.txt").unlink()
    assert "d" in {path.name for path in (reader.ask(), read)[1]}


def test_a_large_place_is_read_a_part_at_a_time(tmp_path: Path) -> None:
    for number in range(6):
        make_run(tmp_path / f"{number}", steps=1, layers=0)
    board = Board(open_place(tmp_path))
    board.index.waiting.extend(map(str, range(6)))
    board._due = 0.0
    board.refresh(0.0)
    answer = json.loads(board.changes("", "", View()))["parts"]["answer"]
    assert "folders not read yet" in answer["notes"][0]
    board.refresh(None)
    assert json.loads(board.changes("", "", View()))["parts"]["answer"]["notes"] == []


def test_a_link_to_itself_hides_no_run(tmp_path: Path) -> None:
    make_run(tmp_path / "a", steps=1, layers=0, state=RunState.FINISHED)
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "linked").symlink_to("a")
    board = Board(open_place(tmp_path))
    board.refresh(None)
    assert json.loads(board.changes("", "", View()))["parts"]["answer"]["notes"] == []
    assert set(board.index.runs) == set(read_runs(tmp_path)) == {"a", "linked"}


def test_a_killed_worker_is_noticed_though_no_file_changes(tmp_path: Path) -> None:
    worker = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    run = make_run(tmp_path / "a")
    claim(run, worker.pid)
    reader = Reader(tmp_path)
    reader.ask()
    assert "running" in reader.sentence
    worker.kill()
    worker.wait()
    reader.ask()
    assert "interrupted" in reader.sentence


def test_a_run_of_another_host_lives_while_its_claim_is_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "a")
    claim(run, 1, host="elsewhere")
    place = open_place(tmp_path)
    place.clock.see(run.stat().st_mtime)
    names = frozenset(os.listdir(run))
    assert place.held(run, names)
    place.clock.see((run / ".claim-1").stat().st_mtime + 61)  # another file of the place is newer
    assert not place.held(run, names)
    os.utime(run / ".claim-1", (2**33, 2**33))  # dated by a wrong clock
    assert not place.held(run, names)


def test_the_place_is_only_read(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    claim(run, 1, host="elsewhere")
    make_run(tmp_path / "b", state=RunState.FINISHED)

    def state() -> list[tuple[str, int, int]]:
        found = [(path, path.stat()) for path in sorted(tmp_path.rglob("*"))]
        return [(str(path), stat.st_mtime_ns, stat.st_size) for path, stat in found]

    before = state()
    reader = Reader(tmp_path)
    for _ in range(3):
        reader.ask(run="a")
    assert state() == before


def test_one_run_is_looked_into_by_layer_and_step(tmp_path: Path) -> None:
    reader = Reader(make_run(tmp_path / "a"))
    parts = reader.ask(run="a", metric="mean_ffn_count", step=12)
    assert reader.sentence.startswith("topk 4 is running at step 40 of 100; its training loss is ")
    run, layers, load = (parts[name] for name in ("run", "layers", "load"))
    assert dict(run["facts"])["dead experts"] == "0 to 1"
    assert dict(run["facts"])["target of ffn_count"] == "2"
    assert run["steps"] == [5, 10, 15, 20, 25, 30, 35, 40]
    assert [line["name"] for line in layers["spec"]["data"]] == [
        f"layer {layer}" for layer in range(LAYERS)
    ]
    assert layers["spec"]["data"][0]["mode"] == "lines+markers"  # eight points
    assert layers["spec"]["layout"]["annotations"][0]["text"] == "target 2"
    assert load["step"] == 10
    assert reader.ask(run="a", metric="mean_ffn_count", step=12) == {}
    assert reader.ask(run="a", metric="mean_ffn_count")["load"]["step"] == 40
    log_step(tmp_path / "a", 45)
    assert reader.ask(run="a", metric="mean_ffn_count")["load"]["step"] == 45


def test_a_search_finds_runs_by_name_and_state(tmp_path: Path) -> None:
    make_run(tmp_path / "one", arm="zero", state=RunState.FINISHED)
    make_run(tmp_path / "two", state=RunState.FAILED)
    reader = Reader(tmp_path)
    assert [row[-1] for row in reader.ask(search="FAILED")["table"]["rows"]] == ["two"]
    assert [row[-1] for row in reader.ask(search="zero")["table"]["rows"]] == ["one"]


DAMAGES = {
    "a half line": ("metrics.jsonl", b'{"step": 41, "loss": 2.', ""),
    "no JSON": ("metrics.jsonl", b"\xff\xfe not a line\n", ""),
    "other types": ("metrics.jsonl", b'{"step": [], "loss": {"a": 1}, "tokens": "x"}\n', ""),
    "numbers without an end": ("metrics.jsonl", b'{"step": 41, "loss": 1e308, "lr": NaN}\n', ""),
    "half a status": ("status.json", b'{"step": 4', ""),
    "layers of another length": ("layers.jsonl", b'{"step": 50, "layer": [0], "load_cv": 3}\n', ""),
    "a plan": ("../sweep.json", b"[1, 2", "The plan cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_left_out_or_one_sentence(tmp_path: Path, damage: str) -> None:
    name, content, sentence = DAMAGES[damage]
    run = make_run(tmp_path / "a")
    with open(run / name, "wb" if name.endswith(".json") else "ab") as file:
        file.write(content)
    reader = Reader(tmp_path)
    reader.ask(run="a")
    assert sentence in reader.notes
    assert "\n" not in reader.notes
    assert reader.parts["curve/a"]["y"]["loss"]


def test_the_folder_where_one_is_can_be_watched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(make_run(tmp_path / "a"))
    reader = Reader(".")
    assert reader.ask(run="a")["table"]["rows"][0][-1] == "a"
    assert "its last validation loss" in reader.sentence


def test_a_folder_and_a_log_that_cannot_be_read_are_notes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b", "c"):
        make_run(tmp_path / name)
    (tmp_path / "b" / "validation.jsonl").unlink()
    (tmp_path / "b" / "validation.jsonl").mkdir()
    names = index_module.file_names
    closed = {"c": True}

    def some(folder: Path) -> frozenset[str]:
        if closed.get(folder.name):
            raise PermissionError(13, "Permission denied", str(folder))
        return names(folder)

    monkeypatch.setattr(index_module, "file_names", some)
    reader = Reader(tmp_path)
    reader.ask()
    assert set(reader.board.runs) == {"a", "b"}
    assert "Folders that cannot be read: c (Permission denied)." in reader.notes
    assert "cannot be read: validation.jsonl: not a regular file." in reader.notes
    assert reader.parts["curve/b"]["y"]["loss"]
    closed.clear()
    reader.board.index.update()
    assert set(reader.board.runs) == {"a", "b", "c"}
    assert "folders" not in reader.board.index.notes


def test_a_finished_run_with_a_damaged_table_or_result_says_so(tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_run(tmp_path / name, state=RunState.FINISHED)
    for log in (tmp_path / "a").glob("*.jsonl"):
        log.unlink()
    (tmp_path / "a" / "metrics.parquet").write_bytes(b"PAR1 no table PAR1")
    (tmp_path / "b" / "result.json").write_text("{")
    reader = Reader(tmp_path)
    reader.ask()
    assert "The tables of topk 4:1, seed 0 cannot be read" in reader.notes
    assert "Traceback" not in reader.notes
    assert "result.json cannot be read" in reader.parts["failures"][0]["reason"]


def test_the_parquet_of_a_finished_run_without_logs_is_drawn(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", state=RunState.FINISHED, steps=50)
    reader = Reader(tmp_path)
    with_logs = reader.ask()["curve/a"]
    for log in run.glob("*.jsonl"):
        log.unlink()
    assert Reader(tmp_path).ask()["curve/a"] == with_logs


def test_a_place_that_goes_away_is_a_note_and_comes_back(tmp_path: Path) -> None:
    make_run(tmp_path / "runs" / "a")
    reader = Reader(tmp_path / "runs")
    reader.ask()
    (tmp_path / "runs").rename(tmp_path / "away")
    reader.ask()
    assert "cannot be read" in reader.notes
    assert "1 running" in reader.sentence or "is running" in reader.sentence
    (tmp_path / "away").rename(tmp_path / "runs")
    reader.ask()
    assert reader.notes == ""


def test_a_place_without_runs_is_refused_in_one_line(tmp_path: Path) -> None:
    with refused("place", RunError):
        open_place(tmp_path / "nowhere")
    with refused("place", RunError):
        Board(open_place(tmp_path))
    (tmp_path / "a file").touch()
    with refused("place", RunError):
        open_place(tmp_path / "a file")


@pytest.fixture
def store(tmp_path: Path) -> str:
    """An object store with a plan of two runs, of which one runs."""
    url = f"memory://watched/{tmp_path.name}"
    bucket = Bucket(url)
    names = [f"{place:012x}" for place in range(2)]
    plan_of(tmp_path, names)
    plan = json.loads((tmp_path / "sweep.json").read_text())
    entry = {"schema_version": 1, "added": 0, **plan["sweeps"][0], "entries": plan["runs"]}
    bucket.write("sweeps/0.json", json.dumps(entry).encode())
    run = make_run(tmp_path / "scratch")
    upload(bucket, run, names[0])
    lease = {"key": "k", "where": vars(Owner("elsewhere", 1, 1)), "renewals": 0}
    bucket.write(f"state/{names[0]}/lease.json", json.dumps(lease).encode())
    return url


def upload(bucket: Bucket, run: Path, name: str) -> None:
    for path in run.iterdir():
        state = path.name in ("config.json", "status.json", "result.json", "done")
        bucket.write(f"{'state' if state else 'files'}/{name}/{path.name}", path.read_bytes())


def test_an_object_store_is_watched_by_its_url(store: str, tmp_path: Path) -> None:
    reader = Reader(store)
    reader.ask(run="000000000000")
    assert reader.sentence.startswith("Of 2 runs, 1 pending and 1 running.")
    assert reader.parts["layers"]["spec"]["data"]
    bucket, reads = Bucket(store), []
    original = place_module.Bucket.read
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            place_module.Bucket,
            "read",
            lambda self, name: (reads.append(name), original(self, name))[1],
        )
        reader.ask()
        assert reads == []
        finish(tmp_path / "scratch")
        upload(bucket, tmp_path / "scratch", "000000000000")
        bucket.delete(["state/000000000000/lease.json"])
        reader.ask()
    assert reads[-1].endswith("done")
    assert reader.sentence.startswith("Of 2 runs, 1 pending and 1 finished.")
    assert sorted(bucket.names("state")) == [
        f"state/000000000000/{name}"
        for name in ("config.json", "done", "result.json", "status.json")
    ]


def test_the_time_left_is_that_of_the_runs_that_train_and_wait() -> None:
    def record(name: str, state: RunState, ratio: float, **result: Any) -> RunRecord:
        progress = Progress(50, 100, 3.0, 10.0) if state is RunState.RUNNING else Progress()
        result |= {"arm": "topk", "ratio": ratio}
        return RunRecord(Path(name), state, result, planned=name, progress=progress)

    runs = [
        record("done", RunState.FINISHED, 2.0, seconds=30.0),
        record("now", RunState.RUNNING, 8.0),
        record("near 2", RunState.PENDING, 1.0),
        record("near 8", RunState.PENDING, 16.0),
    ]
    # 50 steps of 4 tokens at 10 tokens a second: 20 s, so that such a run takes 40 s.
    assert seconds_left(runs, {"now": 4.0}) == pytest.approx(20 + 30 + 40)
    assert seconds_left(runs, {}) is None
    assert seconds_left(runs[:1], {}) is None


HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\u202e"


def test_hostile_texts_are_escaped_in_a_page_of_one_file(tmp_path: Path) -> None:
    make_run(tmp_path / "sweep" / "<b>run", arm=HOSTILE, state=RunState.FINISHED)
    failed = make_run(tmp_path / "sweep" / "failed", state=RunState.FAILED)
    (failed / "error.txt").write_text(HOSTILE)
    run = make_run(tmp_path / "sweep" / "now")
    append(run / "alarms.jsonl", {"step": 1, "kind": HOSTILE, "sentence": HOSTILE})
    page = write_page(Board(open_place(tmp_path / "sweep")), tmp_path / "now.html").read_text()
    body = page.partition("<body>")[2]
    assert "<script>alert" not in page
    assert "<img src" not in body.partition("<script>")[0]
    assert "\u202e" not in page
    assert "connect-src 'none'" in page
    initial = page.partition('id="initial">')[2].partition("</script>")[0]
    assert json.loads(initial)["parts"]["failures"][0]["reason"].startswith("</script>")


def test_the_page_that_is_served_asks_its_own_server_alone() -> None:
    page, policy = live_page("runs")
    assert "connect-src 'self'" in policy
    assert "default-src 'none'" in policy
    assert "unsafe-eval" not in policy
    assert "script-src 'sha256-" in policy
    assert page.decode().count("<script>") == 3


def test_more_runs_than_a_figure_holds_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(board_module, "MAX_CURVES", 3)
    for number in range(6):
        make_run(tmp_path / f"{number}", state=RunState.FINISHED, steps=2, seed=number)
    log_alarm(tmp_path / "5", "Look at this.")
    status = json.loads((tmp_path / "5" / "status.json").read_text()) | {"alarms": 1}
    (tmp_path / "5" / "status.json").write_text(json.dumps(status))
    parts = Reader(tmp_path).ask()
    assert len(parts["curves"]["runs"]) == 3
    assert "5" in parts["curves"]["runs"]
    assert parts["curves"]["note"] == "3 runs more are not drawn."
