"""The tables that a run writes: the same however often it was interrupted, of bounded size, fresh
while it trains; and validation, which changes nothing.
"""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from rank_worlds import router_of, run_config, write_corpus
from refusals import refused
from registries import registries_as_before

from moe_lab.errors import AlarmError
from moe_lab.runs import read_run
from moe_lab.runs import tables as run_tables
from moe_lab.runs.layout import TABLE_NAMES
from moe_lab.runs.tables import TABLES, Line, read_tables
from moe_lab.training import RunConfig, train
from moe_lab.training import run as run_module
from moe_lab.training.alarms import ALARMS, AlarmRule
from moe_lab.training.readings import LayerReading
from moe_lab.training.run_log import RunLog, thinned

STEPS = 12


def lines_of(steps: range) -> list[Line]:
    return [{"step": step, "layer": [0], "load": [[1.0]]} for step in steps]


def steps_of(lines: list[Line]) -> list[int]:
    return [line["step"] for line in lines]


def test_thinning_keeps_equal_distances_and_the_last_line() -> None:
    assert steps_of(thinned(lines_of(range(5, 25, 5)), 5, 4)) == [5, 10, 15, 20]
    assert steps_of(thinned(lines_of(range(5, 30, 5)), 5, 4)) == [10, 20, 25]
    steps = [*range(5, 100, 5), 98]
    lines = [line for step in steps for line in lines_of(range(step, step + 1))]
    assert steps_of(thinned(lines, 5, 4)) == [20, 40, 60, 80, 98]
    assert thinned([], 5, 4) == []


def test_a_log_is_bounded_fresh_and_the_same_after_any_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(run_tables.TABLES, "loads", replace(TABLES["loads"], snapshots=4))
    written = {}
    for cuts in ((), (7,), (3, 30, 31)):
        folder = tmp_path / str(cuts)
        folder.mkdir()
        log, path = RunLog(folder, 5), folder / "loads.jsonl"
        log.begin({})
        for number in range(1, 41):
            log.add("loads", *lines_of(range(5 * number, 5 * number + 1)))
            log.flush()
            on_disk = [json.loads(line)["step"] for line in path.read_text().splitlines()]
            assert on_disk[-1] == 5 * number
            assert len(set(on_disk)) == len(on_disk) <= 8
            if number in cuts:  # what came after the checkpoint at 5 * (number - 2) is forgotten
                log = RunLog(folder, 5)
                log.begin(log.read(5 * (number - 2)))
                for again in (number - 1, number):
                    log.add("loads", *lines_of(range(5 * again, 5 * again + 1)))
        log.finish()
        written[cuts] = pl.read_parquet(folder / "loads.parquet")["step"].to_list()
    assert written[()] == [80, 160, 200]
    assert set(map(tuple, written.values())) == {(80, 160, 200)}


def test_the_lines_of_a_finished_log_survive_a_power_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = RunLog(tmp_path, 5)
    log.begin({})
    log.add("loads", *lines_of(range(5, 6)))
    log.flush()
    log.add("validation", {"step": 5, "loss": 1.0, "tokens": 2})
    synced: set[int] = set()
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: synced.add(os.fstat(file).st_ino) or sync(file))
    log.finish()
    assert {path.stat().st_ino for path in tmp_path.glob("*.jsonl")} <= synced


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    corpus = write_corpus(tmp_path / "corpus")
    return run_config(corpus, STEPS, validate_every=4, eval_tokens=300, log_every=2)


def interrupt_at(step: int) -> Callable[[dict[str, Any]], None]:
    def on_step(row: dict[str, Any]) -> None:
        if row["step"] == step:
            raise KeyboardInterrupt

    return on_step


def parquets(folder: Path) -> dict[str, pl.DataFrame]:
    return {
        name: pl.read_parquet(folder / f"{name}.parquet").drop("tokens_per_second", strict=False)
        for name in TABLE_NAMES
        if (folder / f"{name}.parquet").exists()
    }


def test_an_interrupted_run_ends_with_the_tables_of_a_whole_one(
    config: RunConfig, tmp_path: Path
) -> None:
    result = train(config, tmp_path / "whole", cache_dir=tmp_path)
    for step in (6, 10):
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "cut", on_step=interrupt_at(step), cache_dir=tmp_path)
    train(config, tmp_path / "cut", cache_dir=tmp_path)
    whole, cut = parquets(tmp_path / "whole"), parquets(tmp_path / "cut")
    assert whole.keys() == cut.keys() >= {"metrics", "layers", "loads", "validation"}
    for name, frame in whole.items():
        assert cut[name].equals(frame), name
    assert whole["validation"]["step"].to_list() == [0, 4, 8, 12]
    assert whole["validation"]["loss"][-1] == result.record["loss"]
    assert whole["validation"]["tokens"].unique().to_list() == [result.record["eval_tokens"]]
    layers = read_tables(tmp_path / "whole").layers
    assert layers.select("step", "layer").rows() == [
        (step, layer) for step in range(2, STEPS + 1, 2) for layer in range(2)
    ]
    measured = layers.filter(pl.col("gradient_ratio").is_not_null())["step"].unique().sort()
    assert measured.to_list() == [4, 8, 12]
    assert (layers["bias_spread"] > 0).any()
    assert layers["ffn_target"].unique().to_list() == [2.0]


def test_a_run_shows_its_tables_while_it_trains(
    config: RunConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(run_module, "STATUS_SECONDS", -1.0)
    seen: list[dict[str, list[float]]] = []

    def look(row: dict[str, Any]) -> None:
        """What lies there just before the rows of this step are written."""
        tables = read_tables(tmp_path / "run")
        names = ("metrics", "layers", "loads", "validation")
        seen.append({name: _steps(getattr(tables, name)) for name in names})

    train(config, tmp_path / "run", on_step=look, cache_dir=tmp_path)
    for number, tables in enumerate(seen):
        logged = [2 * step for step in range(1, number + 1)]
        assert all(tables[name] == logged for name in ("metrics", "layers", "loads"))
    assert seen[-1]["validation"] == [0, 4, 8]
    assert "moe-lab: step 8: validation loss " in capsys.readouterr().err


def _steps(table: pl.DataFrame) -> list[float]:
    return table["step"].unique().sort().to_list() if "step" in table.columns else []


@pytest.mark.parametrize("kind", ["noisy_topk", "longcat"])
def test_validation_changes_no_loss_by_a_bit(tmp_path: Path, kind: str) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    router = router_of(kind)
    plain = run_config(corpus, 6, router, eval_tokens=200)
    watched = plain.replace(validate_every=1)
    losses = []
    for config, name in ((plain, "plain"), (watched, "watched")):
        folder = train(config, tmp_path / name, cache_dir=tmp_path).folder
        losses.append(pl.read_parquet(folder / "metrics.parquet")["loss"].to_list())
    assert losses[0] == losses[1]
    assert plain.hash() == replace(watched, validate_every=None).hash() != watched.hash()


class ThirdObservation(AlarmRule):
    """Raised once, by the third observation of layer 1."""

    threshold = 2.5
    advice = "Look at the clock."

    def measure(self, reading: LayerReading) -> float:
        self.memory["seen"] = self.memory.get("seen", 0) + reading.layer
        return float(self.memory["seen"])

    def seen(self, reading: LayerReading, value: float) -> str:
        return f"{value:.0f} observations"


@pytest.fixture
def third_observation() -> Iterator[None]:
    """An alarm of layer 1 at the third logged step."""
    with registries_as_before():
        ALARMS.register("third_observation")(ThirdObservation)
        yield


RAISED = (6, "third_observation", 1, 3.0, 2.5)


@pytest.mark.usefixtures("third_observation")
def test_an_alarm_is_recorded_once_however_often_the_run_is_interrupted(
    config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (4, 6, 8):
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "run", on_step=interrupt_at(step), cache_dir=tmp_path)
    result = train(config, tmp_path / "run", cache_dir=tmp_path)
    alarms = read_tables(result.folder).alarms.filter(kind="third_observation")
    assert alarms.select("step", "kind", "layer", "value", "threshold").rows() == [RAISED]
    sentence = "Step 6, layer 1: 3 observations."
    assert alarms.select("sentence", "advice").row(0) == (sentence, "Look at the clock.")
    assert result.record["alarms"]["third_observation"] == 1
    assert f"moe-lab: {sentence} Look at the clock.\n" in capsys.readouterr().err
    progress = read_run(result.folder).progress
    assert progress.alarms == sum(result.record["alarms"].values())
    assert progress.alarm.startswith("Step ")


@pytest.mark.usefixtures("third_observation")
def test_an_alarm_can_end_the_run(config: RunConfig, tmp_path: Path) -> None:
    stopping = config.replace(on_alarm="stop")
    with refused("third_observation", AlarmError) as caught:
        train(stopping, tmp_path / "run", cache_dir=tmp_path)
    assert "Step 6, layer 1: 3 observations; try another configuration" in str(caught.value)
    progress = read_run(tmp_path / "run").progress
    assert (progress.step, progress.alarms) == (6, 1)
    tables = read_tables(tmp_path / "run")
    assert tables.alarms.select("step", "kind").rows() == [(6, "third_observation")]
    assert tables.metrics["step"].to_list() == [2, 4, 6]
    assert tables.layers["step"].max() == 6
    assert not (tmp_path / "run" / "done").exists()
    assert config.hash() == config.replace(on_alarm="record").hash() != stopping.hash()
