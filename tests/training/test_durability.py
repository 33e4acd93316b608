"""What a run keeps over kills, power cuts, full disks and edited files."""

import errno
import json
import os
import stat
from pathlib import Path

import polars as pl
import pytest
import torch
from refusals import refused
from safetensors import safe_open
from test_run import config_of, corpus, losses  # noqa: F401  (corpus is a fixture)

from moe_lab.errors import CheckpointError, RunError, StorageError
from moe_lab.runs import RunState, read_run
from moe_lab.runs.failures import FailureKind
from moe_lab.scaling import read_runs as read_results
from moe_lab.sweeps import SweepConfig
from moe_lab.sweeps import run as run_sweep
from moe_lab.sweeps.launchers.worker import failure_of
from moe_lab.training import RunConfig, load_run, train
from moe_lab.training import run as run_module
from moe_lab.training.checkpoint import load_tensors, save_tensors


@pytest.fixture
def config(corpus: Path) -> RunConfig:  # noqa: F811
    return config_of(corpus)


def stop_after(step: int):
    def stop(row):
        if row["step"] == step:
            raise KeyboardInterrupt

    return stop


def interrupted(config: RunConfig, folder: Path, cache: Path, step: int = 7) -> None:
    """A run that was killed after ``step``; its checkpoint is of step 5."""
    with pytest.raises(KeyboardInterrupt):
        train(config, folder, cache_dir=cache, on_step=stop_after(step))


def test_tensors_of_every_type_come_back_from_the_library(tmp_path: Path) -> None:
    tensors = {
        "b": torch.tensor([True, False, True]),
        "h": torch.randn(3, 2).bfloat16(),
        "i": torch.arange(5),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "none": torch.empty(0, 4),
        "turned": torch.randn(2, 3).T,
    }
    digest = save_tensors(tmp_path / "x", tensors, {"step": "3"})
    with safe_open(tmp_path / "x", framework="pt") as file:
        assert file.metadata() == {"step": "3", "digest": digest}
        for name, tensor in tensors.items():
            assert torch.equal(file.get_tensor(name), tensor)
    assert set(load_tensors(tmp_path / "x")[0]) == set(tensors)


def test_weights_have_the_mode_of_the_other_files(config: RunConfig, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        train(config, tmp_path / "run", cache_dir=tmp_path)
    finally:
        os.umask(before)
    modes = {
        path.name: stat.S_IMODE(path.stat().st_mode)
        for path in (tmp_path / "run").iterdir()
        if path.is_file()
    }
    assert set(modes.values()) == {0o640}, modes


def test_a_full_disk_is_a_storage_error_whatever_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("moe_lab.files.os.fsync", full)
    with pytest.raises(StorageError, match="No space left on device"):
        save_tensors(tmp_path / "x", {"a": torch.zeros(2)}, {})
    assert list(tmp_path.iterdir()) == []


def test_what_a_kill_left_half_written_goes_with_the_next_start(
    config: RunConfig, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    interrupted(config, folder, tmp_path)
    for name in (".tmp-0123abcd-checkpoint.safetensors", ".tmpX1y2Z3"):
        (folder / name).write_bytes(b"half")
    train(config, folder, cache_dir=tmp_path)
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("kept", [0, 1, 4])
def test_metrics_that_a_power_cut_took_are_trained_again(
    config: RunConfig, tmp_path: Path, kept: int, capfd: pytest.CaptureFixture[str]
) -> None:
    train(config, tmp_path / "whole", cache_dir=tmp_path)
    folder = tmp_path / "run"
    interrupted(config, folder, tmp_path)
    log = folder / "metrics.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:kept]) + '{"step": 5, "lo')
    train(config, folder, cache_dir=tmp_path)
    assert f"lost the metrics of step {kept + 1}" in capfd.readouterr().err
    assert losses(folder) == losses(tmp_path / "whole")


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_an_edited_result_is_refused_wherever_it_is_read(config: RunConfig, tmp_path: Path) -> None:
    folder = tmp_path / "sweep" / config.hash()
    train(config, folder, cache_dir=tmp_path)
    assert read_run(folder).error == ""
    edit(folder / "result.json", loss=0.5)
    record = read_run(folder)
    assert (record.state, record.result) == (RunState.FINISHED, {})
    assert "expected the result.json that the run ended with" in record.error
    for read in (load_run, lambda path: train(config, path, cache_dir=tmp_path)):
        with refused("result.json", RunError):
            read(folder)
    with pytest.raises(Exception, match=r"expected the result\.json that the run ended with"):
        read_results(folder.parent)


def test_an_edited_configuration_and_foreign_weights_are_refused(
    config: RunConfig, tmp_path: Path
) -> None:
    other = config.replace(seed=config.seed + 1)
    for one in (config, other):
        train(one, tmp_path / one.name / one.hash(), cache_dir=tmp_path)
    folder, foreign = (tmp_path / one.name / one.hash() for one in (config, other))
    mine = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes((foreign / "model.safetensors").read_bytes())
    with refused("weights", CheckpointError):
        load_run(folder)
    (folder / "model.safetensors").write_bytes(mine)
    load_run(folder)
    edit(folder / "config.json", seed=other.seed)
    with refused("config.json", RunError):
        load_run(folder)


def test_a_run_that_continues_under_another_version_says_so(
    config: RunConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "run"
    interrupted(config, folder, tmp_path)
    now = run_module.versions()
    monkeypatch.setattr(run_module, "versions", lambda: now | {"torch": "9.9"})
    record = train(config, folder, cache_dir=tmp_path).record
    assert record["continued"] == [{"step": 5, "changed": {"torch": [now["torch"], "9.9"]}}]
    assert f"torch {now['torch']} -> 9.9" in capfd.readouterr().err
    assert "continued" not in train(config, tmp_path / "other", cache_dir=tmp_path).record
    assert pl.read_parquet(folder / "metrics.parquet").height == config.steps


@pytest.mark.parametrize("damage", [lambda data: data[:1000], lambda data: data[:-9] + b"x" * 9])
def test_a_damaged_checkpoint_is_a_failure_of_its_own_kind(
    config: RunConfig, tmp_path: Path, damage
) -> None:
    folder = tmp_path / "run"
    interrupted(config, folder, tmp_path)
    checkpoint = folder / "checkpoint.safetensors"
    checkpoint.write_bytes(damage(checkpoint.read_bytes()))
    with pytest.raises(CheckpointError) as raised:
        train(config, folder, cache_dir=tmp_path)
    assert failure_of(raised.value, folder).kind is FailureKind.CHECKPOINT


def test_a_device_that_is_not_there_is_refused_before_the_first_run(
    config: RunConfig, tmp_path: Path
) -> None:
    sweep = SweepConfig("s", "q", (config.replace(device="cuda:99"),))
    with refused("device"):
        run_sweep(sweep, tmp_path / "out", progress=False)
    assert not [path for path in (tmp_path / "out").iterdir() if path.is_dir()]


def test_a_vocabulary_that_fits_no_run_is_refused_before_the_first(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOE_LAB_CACHE", str(tmp_path / "cache"))
    wrong = config.replace(model=config.model.replace(vocab_size=300))
    with refused("model.vocab_size"):
        run_sweep(SweepConfig("s", "q", (wrong,)), tmp_path / "out", progress=False)
    assert not [path for path in (tmp_path / "out").iterdir() if path.is_dir()]


def test_a_kill_after_done_leaves_no_checkpoint_for_ever(config: RunConfig, tmp_path: Path) -> None:
    sweep = SweepConfig("s", "q", (config,))
    run_sweep(sweep, tmp_path / "out", progress=False, workers=1)
    folder = tmp_path / "out" / config.hash()
    left = [folder / name for name in ("checkpoint.safetensors", "checkpoint.damaged")]
    for again in (lambda: train(config, folder), lambda: run_sweep(sweep, tmp_path / "out")):
        for path in left:
            path.write_bytes(b"left")
        again()
        assert not [path for path in left if path.exists()]
