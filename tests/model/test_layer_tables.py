"""The ratios of ``docs/layer.md`` are those of the committed benchmark, and within its bars."""

import re
from pathlib import Path

import polars as pl
import pytest

ROOT = Path(__file__).parents[2]
BARS = {8: 1.1, 64: 1.1, 256: 1.3}


@pytest.mark.parametrize("experts", BARS)
def test_the_page_says_what_the_benchmark_measured(experts: int) -> None:
    table = pl.read_parquet(ROOT / "experiments/benchmarks/results/moe_layer_2t.parquet")
    row = table.filter(pl.col("name") == "native", pl.col("shape").str.contains(f"E{experts} "))
    page = (ROOT / "docs/layer.md").read_text(encoding="utf-8")
    written = re.search(rf"\| E {experts}, .*?\*\*(.*?)\*\* \((.*?) to (.*?)\)", page)
    assert written is not None
    measured = row.select("ratio", "ratio_q1", "ratio_q3").row(0)
    assert [float(value) for value in written.groups()] == pytest.approx(measured, abs=0.006)
    assert measured[0] <= BARS[experts]
    assert row["peak_mb"][0] <= row["bound_mb"][0]
