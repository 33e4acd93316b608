"""The committed comparison of planned and measured time (``experiments/ablation/plan_bar.py``)."""

from pathlib import Path

import polars as pl

TABLE = Path(__file__).parents[2] / "experiments" / "ablation" / "plan_bar.parquet"


def test_the_plan_predicts_the_processor_time_of_the_measured_layers_within_a_quarter():
    table = pl.read_parquet(TABLE)
    measured = table.filter(what="measured")
    layers = set(measured["layers"].explode().to_list())
    (planned,) = (
        row for row in table.filter(what="planned").to_dicts() if set(row["layers"]) == layers
    )
    assert len(layers) >= 2
    assert measured["tokens"].unique().to_list() == [49_920]
    assert abs(measured["cpu_minutes"].sum() / planned["cpu_minutes"] - 1) < 0.25
