"""The tables of a run's folder: a log that grows, is replaced, is cut off or is hostile; and the
Parquet files of a finished run.
"""

import json
import os
from pathlib import Path

import polars as pl
import pytest
from refusals import refused

from moe_lab.errors import RunError
from moe_lab.files import write_parquet, write_text
from moe_lab.runs import RunStore
from moe_lab.runs.done_file import seal
from moe_lab.runs.tables import LAYERS, LOADS, TABLES, Follower, read_tables, tables_of_logs


def append(path: Path, *lines: object) -> None:
    with open(path, "a") as log:
        log.writelines(json.dumps(line) + "\n" for line in lines)


def layers_line(step: int) -> dict[str, object]:
    return {"step": step, "layer": [1, 3], "load_cv": [0.5, 0.25 * step], "dead_experts": [0, 2]}


def test_a_line_of_a_log_is_one_row_per_layer(tmp_path: Path) -> None:
    append(tmp_path / LAYERS.log, layers_line(5), layers_line(10))
    append(tmp_path / LOADS.log, {"step": 5, "layer": [1, 3], "load": [[0.5, 0.5], [1, 0]]})
    tables = read_tables(tmp_path)
    assert tables.layers.columns == list(TABLES["layers"].columns or ())
    assert tables.layers.select("step", "layer", "load_cv", "bias_spread").rows() == [
        (5, 1, 0.5, None),
        (5, 3, 1.25, None),
        (10, 1, 0.5, None),
        (10, 3, 2.5, None),
    ]
    assert tables.loads.rows() == [(5, 1, [0.5, 0.5]), (5, 3, [1.0, 0.0])]
    assert tables.metrics.is_empty()
    assert tables.alarms.columns[:3] == ["step", "kind", "layer"]


def test_what_is_no_number_is_null_and_what_is_no_line_is_left_out(tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"step": 1, "loss": "x"}\n[2]\nnothing\n{"step": 2, "loss": 1e400}\n{"step": 3')
    frame = read_tables(tmp_path).metrics
    assert frame.rows() == [(1.0, None), (2.0, float("inf"))]
    hostile = {"step": "1", "layer": [[0], "<b>"], "load_cv": [{}, True], "dead_experts": [1]}
    append(tmp_path / LAYERS.log, hostile, {"step": 2, "layer": 3})
    assert read_tables(tmp_path).layers.rows() == [(None,) * 11] * 2
    append(tmp_path / LOADS.log, {"step": 2**70, "layer": [1], "load": [["x", 0.5]]})
    assert read_tables(tmp_path).loads.rows() == [(None, 1, [None, 0.5])]


def test_a_follower_reads_what_is_new_and_a_replaced_log_again(tmp_path: Path) -> None:
    run, log = Follower(tmp_path / "run", ["metrics", "layers"]), tmp_path / "run" / "metrics.jsonl"
    assert not run.update()
    log.parent.mkdir()
    append(log, {"step": 1, "loss": 4.0})
    assert run.update() == {"metrics"}
    with open(log, "a") as file:
        file.write('{"step": 2, "lo')
    assert not run.update()
    with open(log, "a") as file:
        file.write('ss": 3.0}\n')
    assert run.update() == {"metrics"}
    assert run.tables["metrics"].rows() == [(1.0, 4.0), (2.0, 3.0)]
    write_text(log, '{"step": 1, "loss": 4.0}\n{"step": 2, "loss": 2.5}\n{"step": 3, "loss": 2}\n')
    assert run.update() == {"metrics"}
    assert run.tables["metrics"]["loss"].to_list() == [4.0, 2.5, 2.0]
    with open(log, "r+") as file:  # in the same file, as some stores replace it
        file.write('{"step": 1, "loss": 9.0}\n{"step": 2, "loss": 9.5}\n{"step": 3, "loss": 9}\n')
    assert run.update() == {"metrics"}
    assert run.tables["metrics"]["loss"].to_list() == [9.0, 9.5, 9.0]


def finish(folder: Path) -> None:
    frame = LAYERS.frame([layers_line(10)])
    write_parquet(folder / LAYERS.parquet, frame.drop("load_cv").with_columns(layer=pl.lit("x")))
    write_text(folder / "done", seal(folder))


def test_a_finished_run_is_read_from_its_parquet(tmp_path: Path) -> None:
    run = Follower(tmp_path)
    append(tmp_path / LAYERS.log, layers_line(5))
    assert run.update() == {"layers"}
    finish(tmp_path)
    assert run.update() == {"layers"}
    assert run.finished
    assert run.tables["layers"].select("step", "layer", "load_cv", "dead_experts").rows() == [
        (10, None, None, 0.0),
        (10, None, None, 2.0),
    ]
    assert not run.update()
    finish(tmp_path)
    write_parquet(tmp_path / LAYERS.parquet, LAYERS.frame([layers_line(11)]))
    with refused("layers.parquet", RunError):
        read_tables(tmp_path)


def test_a_store_gives_the_logs_of_a_run(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    append(tmp_path / "run" / LAYERS.log, layers_line(5))
    store = RunStore(tmp_path)
    tables = tables_of_logs(lambda name: store.read("run", name))
    assert tables.layers.equals(read_tables(tmp_path / "run").layers)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs on this system")
def test_a_fifo_in_place_of_a_log_is_refused_and_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "metrics.jsonl")
    with refused("metrics.jsonl", RunError):
        read_tables(tmp_path)
