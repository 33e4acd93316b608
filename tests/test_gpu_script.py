"""``experiments/gpu.py`` rehearsed on a CPU: each piece writes its table, a second call goes on."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gpu
import gpu_layer
import polars as pl
import pytest
import torch
from gpu_session import TINY, Session, seconds_of
from gpu_worker import CASES, unlucky

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
    assert "fit in 64 MB" in checked.stdout


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


def test_no_row_begins_after_the_deadline(tmp_path: Path) -> None:
    session = Session(tmp_path, TINY, time.monotonic() - 1)
    session.each("rows", CASES, lambda number: {"value": number})
    assert not session.table("rows").exists()


class FakeCuda:
    """What the pieces call of ``torch.cuda``, on a CPU; a lost device raises at each call."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.mode = "default"

    def set_sync_debug_mode(self, mode: str) -> None:
        import warnings

        warnings.warn("Synchronization debug mode ... synchronizing operations", stacklevel=1)
        self.mode = mode

    def synchronize(self) -> None:
        self.calls.append("synchronize")

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = time.perf_counter()

        def elapsed_time(self, end: Any) -> float:
            return (end.at - self.at) * 1e3


def test_waits_are_those_of_the_step_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Switching the mode on warns of itself, and the profiler waits at its own end."""
    import warnings

    fake = FakeCuda()
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", fake.set_sync_debug_mode)
    counts = {"cudaDeviceSynchronize": 2, "aten::mm": 5}
    monkeypatch.setattr(
        gpu_layer,
        "_calls_of",
        lambda step, cuda: counts | ({} if step.__name__ == "<lambda>" else extra),
    )

    def step() -> None:
        if fake.mode == "warn" and extra:
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)

    extra: dict[str, int] = {}
    nothing = [{"seen_by": "both", "what": "no wait", "count": 0}]
    assert gpu_layer.waits(step, "cuda") == nothing
    extra |= {"cudaStreamSynchronize": 3}
    found = gpu_layer.waits(step, "cuda")
    assert [(row["seen_by"], row["count"]) for row in found] == [("torch", 1), ("profiler", 3)]
    assert fake.mode == "default"


def test_events_give_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", FakeCuda.Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    times = seconds_of(lambda: time.sleep(0.002), "cuda", 3)
    assert len(times) == 3
    assert all(0.002 <= value < 0.2 for value in times)
