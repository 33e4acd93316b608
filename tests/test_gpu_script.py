"""``experiments/gpu.py`` rehearsed on a CPU: each piece writes its table, a second call goes on."""

import errno
import os
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import gpu
import gpu_layer
import gpu_models
import polars as pl
import pytest
import torch
from gpu_session import GRACE, TINY, Session, seconds_of
from gpu_worker import CASES, unlucky
from refusals import refused
from torch.overrides import TorchFunctionMode

from moe_lab.errors import RunError
from moe_lab.trace.publish import lock, unlock

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "experiments" / "gpu.py"
TABLES = {"tests", "layer", "sync", "instrumentation", "training", "capture", "pilot"}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False
    )


@pytest.mark.slow
@pytest.mark.hf
def test_a_rehearsal_writes_every_table_and_goes_on_where_it_was(tmp_path: Path) -> None:
    done = run("--rehearse", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    tables = {path.stem: pl.read_parquet(path) for path in tmp_path.glob("*.parquet")}
    assert set(tables) == TABLES
    assert all(table["device"].unique().to_list() == ["cpu"] for table in tables.values())
    assert tables["tests"]["returncode"].to_list() == [0], tables["tests"]["output"][0]
    assert tables["layer"]["error"].unique().to_list() == [""]
    assert set(tables["layer"]["name"]) == {"matrix product", "dense", "grouped", "HF grouped"}
    assert tables["training"]["tokens_per_second"].min() > 0  # type: ignore[operator]
    assert tables["pilot"]["loss"].is_finite().all()
    assert "passed" in tables["tests"]["summary"][0]

    layer = tables["layer"].filter(pl.col("name") != "grouped")
    layer.write_parquet(tmp_path / "layer.parquet")
    again = run("--rehearse", "--out", str(tmp_path), "--only", "layer")
    assert again.stdout.count("top_k") == 1  # the row that was missing
    assert set(pl.read_parquet(tmp_path / "layer.parquet")["name"]) == set(tables["layer"]["name"])


def test_without_a_device_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert run("--minutes", "1").returncode == 2
    checked = run("--check")
    assert checked.returncode == 1
    assert "no CUDA" in checked.stdout
    assert "quack: 110.0 MB" in checked.stdout or "quack-kernels   0" in checked.stdout


def test_wheels_of_the_pieces_about_a_layer_fit_where_numpy_is_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    there = {"torch": "2.13.0", "numpy": "2.0.0"}
    monkeypatch.setattr(gpu, "_version", there.get)
    assert gpu.check() == 1
    lines = capsys.readouterr().out.splitlines()
    fits = {lines[at - 1].split(":")[0].strip(): "do not" not in line
            for at, line in enumerate(lines) if "with those above" in line}  # fmt: skip
    assert fits == {gpu.EVERY: True, gpu.LIGER: True, gpu.TESTS: True, gpu.MODELS: False,
                    "pilot": False, gpu.QUACK: False}  # fmt: skip
    assert "no polars" in lines[-1]
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    assert gpu.main() == 2
    assert "no polars" in capsys.readouterr().err


def test_a_process_that_dies_or_hangs_costs_its_row_or_piece(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    session = Session(tmp_path, TINY, time.monotonic() + 600, patience=60)
    assert gpu.supervise(session, ["rows", "slow", "last"], unlucky) == 1
    rows = {row["number"]: row for row in session.rows("rows")}
    assert [rows[number]["value"] for number in (0, 3)] == [0.0, 3.0]
    assert rows[1]["error"] == "RuntimeError: an illegal memory access"
    assert "code 9" in rows[2]["error"]
    assert session.table("last").exists()
    assert "slow: did not end in time: given up" in capfd.readouterr().out

    session.write("rows", [row | {"error": "OutOfMemoryError: x"} for row in session.rows("rows")])
    session.forget_errors("rows")
    assert len(session.rows("rows")) == 4  # what lacked memory will lack it again
    session.write("rows", [row | {"error": "ConfigError: x"} for row in session.rows("rows")])
    session.forget_errors("rows")
    assert session.rows("rows") == []


def test_what_is_measured_ends_with_the_minutes_and_with_its_parent(tmp_path: Path) -> None:
    session = Session(tmp_path, TINY, time.monotonic() + 1)
    assert session.until(600) == session.deadline + GRACE
    code = f"""
import gpu_session, gpu, gpu_worker, time
from pathlib import Path
if __name__ == "__main__":
    session = gpu_session.Session(Path({str(tmp_path)!r}), gpu_session.TINY, time.monotonic() + 600)
    gpu.supervise(session, ["forever"], gpu_worker.patient)
"""
    script = tmp_path / "parent.py"
    script.write_text(code)
    paths = os.pathsep.join(map(str, (ROOT / "experiments", ROOT / "tests", ROOT)))
    with subprocess.Popen([sys.executable, str(script)], env=os.environ | {"PYTHONPATH": paths},
                          stdout=subprocess.PIPE, text=True) as parent:  # fmt: skip
        assert parent.stdout is not None
        assert parent.stdout.readline() == "begun\n"
        parent.kill()
        assert parent.stdout.read() == ""  # it ends when no process holds the pipe


def test_rows_keep_the_provenance_of_their_own_measurement(tmp_path: Path) -> None:
    def session(device: str, date: str) -> Session:
        return Session(tmp_path, TINY, time.monotonic() + 600, 0.0,
                       {"device": device, "date": date})  # fmt: skip

    first = session("a", "yesterday")
    first.each("rows", CASES[:2], lambda number: {"value": number})
    session("a", "today").each("rows", CASES, lambda number: {"value": number})
    dates = [row["date"] for row in first.rows("rows")]
    assert dates == ["yesterday", "yesterday", "today", "today"]
    with refused("out", RunError):
        session("b", "today").refuse_other_device()
    first.table("rows").write_bytes(b"PAR1 damaged")
    with refused("out", RunError):
        first.rows("rows")


def test_a_table_that_is_not_written_by_the_row_is_measured_again_as_a_whole(
    tmp_path: Path,
) -> None:
    session = Session(tmp_path, TINY, 0.0)
    session.write("tests", [{"error": "1 failed", "returncode": 1}])
    assert "tests" not in gpu.wanted(session, ["tests"])
    assert session.failed_rows("tests") == 1
    session.forget_errors("tests", by_row=False)
    assert list(gpu.wanted(session, ["tests", "pilot"])) == ["tests"]
    session.write("pilot", [{"run": "none ended in time"}])
    assert list(gpu.wanted(replace(session, pilot=60.0), ["pilot"])) == ["pilot"]


def test_a_folder_in_use_or_out_of_reach_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def errors(*arguments: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", ["gpu.py", "--rehearse", *arguments])
        assert gpu.main() == 2
        return capsys.readouterr().err.splitlines()

    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)  # the pilot's sweep runs in another folder
    (line,) = errors("--out", "file/out")
    assert f"cannot write {tmp_path.resolve()}" in line
    descriptor = lock(tmp_path)
    (line,) = errors("--out", str(tmp_path))
    assert "no other writer" in line
    unlock(tmp_path, descriptor)
    for wrong in (["--minutes", "nan"], ["--pilot", "-1"]):
        monkeypatch.setattr(sys, "argv", ["gpu.py", *wrong])
        with pytest.raises(SystemExit):
            gpu.main()


def test_a_full_disk_costs_its_piece_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Session, "begin", full)
    monkeypatch.setattr(gpu, "end_with_parent", lambda: None)
    with pytest.raises(SystemExit) as ended:
        gpu.work(Session(tmp_path, TINY, time.monotonic() + 600), ["sync", "layer", "capture"])
    assert ended.value.code == 1
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["sync", "layer", "capture"]
    assert all("No space left" in line for line in lines)


def test_no_row_begins_after_the_deadline(tmp_path: Path) -> None:
    session = Session(tmp_path, TINY, time.monotonic() - 1)
    session.each("rows", CASES, lambda number: {"value": number})
    assert not session.table("rows").exists()


def test_the_summary_compares_with_the_peak_and_the_dense_twin(tmp_path: Path) -> None:
    session = Session(tmp_path, TINY, 0.0)
    names = ("tokens", "d_model", "experts", "top_k", "d_expert")
    shape = dict(zip(names, TINY.shapes[0], strict=True)) | {"error": ""}
    rows = [
        {"name": "matrix product", "forward_tflops": 700.0},
        {"name": "dense", "both": 2.0},
        {"name": "quack", "forward_tflops": 350.0, "both_tflops": 280.0, "both": 2.4},
        {"name": "grouped", "forward_tflops": 210.0, "both_tflops": 280.0, "both": 2.4},
        {"name": "liger", "error": "ConfigError: missing"},
    ]
    session.write("layer", [shape | row for row in rows])
    quack, grouped = gpu_layer.summary(session)
    assert quack.endswith("quack: 0.50 of the peak forward, 0.40 with backward, 1.20 of dense: "
                          "targets met")  # fmt: skip
    assert grouped.endswith("1.20 of dense: below the targets")


class Event:
    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: Any) -> float:
        return (end.at - self.at) * 1e3


class OnCpu(TorchFunctionMode):
    """Tensors that would be made on CUDA are made on the CPU."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        def here(value: Any) -> Any:
            wrong = isinstance(value, str | torch.device) and str(value).startswith("cuda")
            return torch.device("cpu") if wrong else value

        return func(*map(here, args), **{key: here(value) for key, value in (kwargs or {}).items()})


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stands in for what the pieces call of ``torch.cuda``; returns the modes that were set."""
    modes: list[str] = []

    def set_mode(mode: str) -> None:
        warnings.warn("Synchronization debug mode ... synchronizing operations", stacklevel=1)
        modes.append(mode)

    fakes = {
        "Event": Event,
        "set_sync_debug_mode": set_mode,
        "get_device_capability": lambda device: (9, 0),
        "mem_get_info": lambda: (80 * 10**9, 80 * 10**9),
        "memory_allocated": lambda: 5,
        "max_memory_allocated": lambda: 9,
    }
    nothing = dict.fromkeys(("synchronize", "reset_peak_memory_stats", "empty_cache"), lambda: None)
    for name, value in (fakes | nothing).items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.syspath_prepend(str(ROOT / "experiments" / "benchmarks"))
    return modes


@pytest.mark.slow
@pytest.mark.hf
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("fake_cuda")
def test_the_branches_for_cuda_run(tmp_path: Path) -> None:
    """On a CPU in disguise, where ``liger`` and ``quack`` name what they lack."""
    sizes = replace(TINY, device="cuda", packed=())
    session = Session(tmp_path, sizes, time.monotonic() + 600)
    with OnCpu():
        for piece in ("target", "sync", "instrumentation", "training"):
            gpu.PIECES[piece](session)
    rows = {row["name"]: row for row in session.rows("layer")}
    assert tuple(rows) == gpu_layer.CONTESTANTS
    assert [name for name, row in rows.items() if row["error"]] == ["liger", "quack"]
    assert rows["grouped"]["peak_bytes"] == 4
    assert session.rows("training")[0]["error"] == ""
    assert len({row["step"] for row in session.rows("sync")}) == 5

    with pytest.raises(MemoryError, match="GB of 80"):
        gpu_models.stepper(sizes, 16, 4096, 4096, 64)


def test_waits_are_those_of_the_step_alone(
    fake_cuda: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Switching the mode on warns of itself, and the profiler waits at its own end."""
    counts = {"cudaDeviceSynchronize": 2, "aten::mm": 5}
    monkeypatch.setattr(
        gpu_layer,
        "_calls_of",
        lambda step, cuda: counts | ({} if step.__name__ == "<lambda>" else extra),
    )

    def step() -> None:
        if fake_cuda[-1:] == ["warn"] and extra:
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)

    extra: dict[str, int] = {}
    nothing = [{"seen_by": "both", "what": "no wait", "count": 0}]
    assert gpu_layer.waits(step, "cuda") == nothing
    extra |= {"cudaStreamSynchronize": 3}
    found = gpu_layer.waits(step, "cuda")
    assert [(row["seen_by"], row["count"]) for row in found] == [("torch", 1), ("profiler", 3)]
    assert fake_cuda[-1] == "default"


@pytest.mark.usefixtures("fake_cuda")
def test_events_give_seconds() -> None:
    times = seconds_of(lambda: time.sleep(0.002), "cuda", 3)
    assert len(times) == 3
    assert all(0.002 <= value < 60 for value in times)  # seconds, not milliseconds
