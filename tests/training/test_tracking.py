"""Mirrors of the metrics: they hold what the run's files hold, and none can end a run."""

import importlib
import json
import os
import socket
import sqlite3
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import polars as pl
import pytest
from rank_worlds import run_config, write_corpus
from refusals import refused

from moe_lab import cli
from moe_lab.training import RunConfig, train
from moe_lab.training.tracking import TRACKERS

STEPS = 12


class Kept:
    """A logger in ten lines."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.closed = 0

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        self.rows.append((step, dict(scalars)))

    def close(self) -> None:
        self.closed += 1


class Broken(Kept):
    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        super().log(step, scalars)
        if step == 3:
            raise ConnectionError("the tracker\nis away")


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return run_config(write_corpus(tmp_path / "corpus"), STEPS)


def metrics(folder: Path) -> list[dict[str, Any]]:
    return pl.read_parquet(folder / "metrics.parquet").to_dicts()


def test_a_logger_sees_every_row_of_the_metrics_and_the_validation_loss(
    config: RunConfig, tmp_path: Path
) -> None:
    logger = Kept()
    result = train(config, tmp_path / "run", cache_dir=tmp_path, loggers=[logger])
    *training, (last, validation) = logger.rows
    assert [{"step": step, **scalars} for step, scalars in training] == metrics(result.folder)
    assert [
        json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()
    ] == metrics(result.folder)
    assert (last, validation) == (
        STEPS,
        {f"validation/{name}": result.record[name] for name in ("loss", "bits_per_byte")},
    )
    assert logger.closed == 1


def test_a_logger_that_fails_is_left_out_with_one_line(
    config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken, kept = Broken(), Kept()
    result = train(config, tmp_path / "run", cache_dir=tmp_path, loggers=[broken, kept])
    assert capsys.readouterr().err == (
        "moe-lab: tracking by Broken stopped (ConnectionError: the tracker is away); the "
        "run goes on\n"
    )
    assert [step for step, _ in broken.rows] == [1, 2, 3]
    assert len(kept.rows) == STEPS + 1
    untracked = train(config, tmp_path / "untracked", cache_dir=tmp_path)
    assert untracked.record["loss"] == result.record["loss"]


def test_loggers_are_closed_when_the_run_is_interrupted(config: RunConfig, tmp_path: Path) -> None:
    def interrupt(row: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    logger = Kept()
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "run", on_step=interrupt, cache_dir=tmp_path, loggers=[logger])
    assert logger.closed == 1


def test_an_unknown_or_absent_tracker_is_one_line(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with refused("tracker"):
        train(config, tmp_path / "run", cache_dir=tmp_path, loggers=["papyrus"])
    monkeypatch.setenv("MOE_LAB_TRACK", "papyrus")
    with refused("tracker"):
        train(config, tmp_path / "run", cache_dir=tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with refused("wandb"):
        train(config, tmp_path / "run", cache_dir=tmp_path, loggers=["wandb"])


def event_scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (labelled,) = folder.iterdir()
    events = EventAccumulator(str(labelled))
    events.Reload()
    return {
        name: [(event.step, event.value) for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }


def test_tensorboard_holds_each_step_once_also_after_an_interruption(
    config: RunConfig, tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard", reason="needs the extra track (tensorboard)")

    def stop(row: dict[str, Any]) -> None:
        if row["step"] == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "run", on_step=stop, cache_dir=tmp_path, loggers=["tensorboard"])
    result = train(config, tmp_path / "run", cache_dir=tmp_path, loggers=["tensorboard"])
    found = event_scalars(result.folder / "tensorboard")
    rows = metrics(result.folder)
    assert found.keys() == set(rows[0]) - {"step"} | {"validation/loss", "validation/bits_per_byte"}
    assert [step for step, _ in found["loss"]] == list(range(1, STEPS + 1))
    assert [value for _, value in found["loss"]] == pytest.approx([row["loss"] for row in rows])
    assert found["validation/loss"] == [(STEPS, pytest.approx(result.record["loss"]))]


def test_the_environment_chooses_trackers_for_the_runs_of_a_sweep(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard", reason="needs the extra track (tensorboard)")
    monkeypatch.setenv("MOE_LAB_TRACK", "tensorboard")
    result = train(config, tmp_path / "run", cache_dir=tmp_path)
    assert len(event_scalars(result.folder / "tensorboard")["loss"]) == STEPS


@pytest.mark.parametrize("package", ["wandb", "trackio"])
def test_trackers_name_a_run_by_arm_ratio_and_seed(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setitem(
        sys.modules,
        package,
        SimpleNamespace(init=lambda **named: given.update(named) or MagicMock()),
    )
    TRACKERS[package](config.replace(seed=3), tmp_path / "run", 0)
    assert given["name"].startswith("topk 4:1, seed 3")
    assert given["group"] == "topk 4:1"
    assert config.replace(seed=3).hash() in (given.get("id"), given["name"][-13:-1])


def test_the_command_line_tracks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorboard", reason="needs the extra track (tensorboard)")
    corpus = write_corpus(tmp_path / "corpus")
    arguments = [
        "train",
        "--corpus",
        str(corpus),
        "--tokenizer",
        "byte",
        "--tokens",
        "4096",
        "--set",
        "eval_tokens=500",
    ]
    assert cli.main([*arguments, "--out", str(tmp_path / "run"), "--track", "tensorboard"]) == 0
    assert "loss" in event_scalars(tmp_path / "run" / "tensorboard")


TRACKED = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch; torch.set_num_threads(1)
from rank_worlds import run_config
from moe_lab.training import train
root = Path(sys.argv[2])
folder = root / "project" / "run"
train(run_config(root / "corpus", 12), folder, cache_dir=root, loggers=[sys.argv[3]])
"""


def run_tracked(tmp_path: Path, tracker: str, environment: dict[str, str]) -> tuple[str, list[str]]:
    """What a tracked run of 12 steps says, and the requests that it or its helpers send to the
    proxy that all of them are told to use.
    """
    write_corpus(tmp_path / "corpus")
    requests: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as proxy:

        def listen() -> None:
            with suppress(OSError):
                while True:
                    requests.append(proxy.accept()[0].recv(200).decode(errors="replace"))

        threading.Thread(target=listen, daemon=True).start()
        address = f"http://127.0.0.1:{proxy.getsockname()[1]}"
        proxies = dict.fromkeys(
            ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"),
            address,
        )
        result = subprocess.run(
            [sys.executable, "-c", TRACKED, str(Path(__file__).parent), str(tmp_path), tracker],
            env=os.environ | proxies | environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr, requests


def leveldb_records(path: Path) -> Iterator[bytes]:
    """Records of a LevelDB log, the format of W&B's files, after W&B's own header of 7 bytes."""
    content, place, record = path.read_bytes(), 7, b""
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:  # no header fits into the rest of a block
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        record += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield record
            record = b""


@pytest.mark.slow
def test_wandb_offline_keeps_the_metrics_and_reaches_out_to_nobody(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="needs the extra track (wandb)")
    wandb_internal_pb2 = importlib.import_module("wandb.proto.wandb_internal_pb2")

    said, requests = run_tracked(tmp_path, "wandb", {"WANDB_MODE": "offline"})
    assert requests == []
    assert "tracking by wandb stopped" not in said
    (written,) = (tmp_path / "project" / "run" / "wandb").glob("offline-run-*/*.wandb")
    losses = {}
    for content in leveldb_records(written):
        items = wandb_internal_pb2.Record.FromString(content).history.item
        values = {
            "/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items
        }
        if "loss" in values:
            losses[values["step"]] = values["loss"]
    assert losses == {row["step"]: row["loss"] for row in metrics(tmp_path / "project" / "run")}


@pytest.mark.slow
def test_trackio_keeps_the_metrics_on_this_machine(tmp_path: Path) -> None:
    pytest.importorskip("trackio", reason="needs the extra track (trackio)")
    said, requests = run_tracked(tmp_path, "trackio", {"TRACKIO_DIR": str(tmp_path / "trackio")})
    assert requests == []
    assert "tracking by trackio stopped" not in said
    databases = list((tmp_path / "trackio").glob("*.db"))
    assert [path.stem for path in databases] == ["project"]
    with sqlite3.connect(databases[0]) as database:
        found = [
            (step, json.loads(values))
            for step, values in database.execute("select step, metrics from metrics order by step")
        ]
    rows = metrics(tmp_path / "project" / "run")
    assert [(step, values["loss"]) for step, values in found if "loss" in values] == [
        (row["step"], row["loss"]) for row in rows
    ]
