"""``experiments/gpu.py`` rehearsed on a CPU: each piece writes its table, a second call goes on."""

import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "experiments" / "gpu.py"
PIECES = {"tests", "layer", "sync", "instrumentation", "training", "capture", "pilot"}


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
    assert set(tables) == PIECES
    assert all(table["device"].unique().to_list() == ["cpu"] for table in tables.values())
    assert tables["tests"]["returncode"].to_list() == [0], tables["tests"]["output"][0]
    assert tables["layer"]["error"].unique().to_list() == [""]
    assert set(tables["layer"]["name"]) == {"matrix product", "dense", "grouped", "HF grouped"}
    assert tables["training"]["tokens_per_second"].min() > 0  # type: ignore[operator]
    assert tables["pilot"]["loss"].is_finite().all()

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
