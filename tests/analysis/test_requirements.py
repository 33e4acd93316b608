"""An analysis of what a trace did not record is refused, by name."""

from pathlib import Path

import numpy as np
import pytest
from refusals import refused

from moe_lab import analysis
from moe_lab.errors import AnalysisError
from moe_lab.report import write_report
from moe_lab.trace import LayerMeta, Trace, TraceMeta, TraceWriter, open_trace
from moe_lab.trace.rows import slot_rows

LAYERS = tuple(
    LayerMeta(layer=layer, num_experts=4, num_zero_experts=2, top_k=2) for layer in range(2)
)


def trace_of(folder: Path, **meta: bool) -> Trace:
    ids = np.stack([np.arange(30) % 4, 4 + np.arange(30) % 2], axis=1)
    doc, pos = (
        np.repeat(np.arange(3), 10).astype(np.uint32),
        np.tile(np.arange(10), 3).astype(np.uint32),
    )
    notes = ("rows were made up",)
    with TraceWriter(
        folder,
        TraceMeta(layers=LAYERS, has_weights=False, has_scores=False, notes=notes).replace(**meta),
    ) as writer:
        for layer in LAYERS:
            rows = slot_rows(layer, doc, pos, ids, None, None, None)
            writer.write_rows(layer.layer, rows, np.bincount(ids.ravel(), minlength=6))
    return open_trace(folder)


@pytest.mark.parametrize(
    "name",
    [
        "coactivation",
        "transitions",
        "repetition",
        "router_entropy",
        "zero_compute",
        "ffn_spread",
        "vocabulary_specialisation",
    ],
)
def test_counts_are_no_tokens(name: str, tmp_path: Path) -> None:
    trace = trace_of(tmp_path / "counts", per_token=False)
    with refused("per_token", AnalysisError):
        getattr(analysis, name)(trace)
    assert analysis.load_summary(trace).height == 2


def test_the_second_trace_of_a_comparison_is_looked_at_too(tmp_path: Path) -> None:
    whole, counts = trace_of(tmp_path / "whole"), trace_of(tmp_path / "counts", per_token=False)
    with refused("per_token", AnalysisError):
        analysis.compare(whole, counts)


@pytest.mark.parametrize("name", ["zero_compute", "ffn_spread"])
def test_aliased_zero_experts_are_not_believed(name: str, tmp_path: Path) -> None:
    trace = trace_of(tmp_path / "aliased", zero_experts_known=False)
    with refused("zero_experts_known", AnalysisError):
        getattr(analysis, name)(trace)


@pytest.mark.parametrize("meta", [{"per_token": False}, {"zero_experts_known": False}])
def test_the_report_shows_what_there_is_and_the_notes(
    meta: dict[str, bool], tmp_path: Path
) -> None:
    trace_of(tmp_path / "trace", **meta)
    page = write_report([tmp_path / "trace"], tmp_path / "page.html").read_text()
    assert "rows were made up" in page
    assert "Standard deviation of ffn_count over tokens" not in page
