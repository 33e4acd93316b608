"""Groups of tokens and tables side by side, against plain joins."""

import numpy as np
import polars as pl
import pytest
from refusals import refused

from moe_lab.analysis import expert_load, load_over_windows, load_summary
from moe_lab.analysis.aligned_rows import Cursor, aligned, document_runs
from moe_lab.analysis.token_groups import grouping, windows
from moe_lab.errors import AnalysisError, TraceError
from moe_lab.trace import TraceWriter, open_trace


def reordered(trace, folder, order):
    """The same trace with the rows of its token table in another order."""
    tokens, routing = trace.tokens.collect()[order], trace.routing.collect()
    with TraceWriter(folder, trace.meta, rows_per_part=37) as writer:
        writer.write_tokens(tokens)
        for layer in trace.meta.layers:
            rows = routing.filter(pl.col("layer") == layer.layer)
            writer.write_routing(
                layer.layer, rows["doc"].to_numpy(), rows["pos"].to_numpy(), _routing(layer, rows)
            )
    return open_trace(folder)


def _routing(layer, rows):
    import torch

    from moe_lab.routing import Routing

    ids = torch.tensor(rows["experts"].to_list())
    scores = torch.ones(rows.height, layer.num_choices)
    return Routing(
        ids, torch.ones(ids.shape), scores, scores, layer.num_experts, layer.num_zero_experts
    )


def joined(trace, column):
    """Counts per group by a join and a group-by, the plain way."""
    slots = trace.routing.join(
        trace.tokens.select("doc", "pos", value=column), on=["doc", "pos"]
    ).explode("experts")
    return {
        tuple(row)
        for row in slots.group_by("layer", "value", "experts")
        .agg(pl.len())
        .drop_nulls("value")
        .collect()
        .rows()
    }


@pytest.fixture
def trace(make_trace, draw):
    count = np.arange(400)
    kind = pl.Series(np.array(["a", "b", None, "c"], dtype=object)[count % 4], dtype=pl.String)
    columns = {"doc": count // 60, "pos": count % 60, "token_id": count * 7 % 31, "kind": kind}
    return make_trace(
        {0: draw(0, 400, 9, 3), 2: draw(1, 400, 9, 3)}, 7, 2, rows_per_part=64, **columns
    )


@pytest.mark.parametrize("shuffled", [False, True])
def test_counts_by_group_equal_those_of_a_join_in_any_order_of_rows(trace, tmp_path, shuffled):
    if shuffled:
        trace = reordered(
            trace, tmp_path / "shuffled", np.random.default_rng(0).permutation(400).tolist()
        )
    counts = expert_load(trace, by="kind").filter(pl.col("count") > 0)
    assert set(counts.select("layer", "kind", "expert", "count").rows()) == joined(trace, "kind")


@pytest.mark.parametrize("shuffled", [False, True])
def test_true_ids_are_those_that_follow_in_the_document(trace, tmp_path, shuffled):
    tokens = trace.tokens.collect()
    follows = {
        (doc, pos - 1): token for doc, pos, token in tokens.select("doc", "pos", "token_id").rows()
    }
    if shuffled:
        trace = reordered(
            trace, tmp_path / "shuffled", np.random.default_rng(0).permutation(400).tolist()
        )
    groups = grouping(trace, "true_id")
    found = pl.concat(groups.codes(trace))
    assert {(doc, pos): groups.values[code] for doc, pos, code in found.drop_nulls().rows()} == {
        key: token for key, token in follows.items() if key[1] >= 0
    }
    assert found.height == 400
    assert found["code"].null_count() == 7  # the last token of each document
    assert groups.sizes.sum() == 393


def test_position_bands_double(make_trace):
    trace = make_trace(np.zeros((40, 1), int), 2, pos=np.arange(40))
    bands = load_summary(trace, by="position_band")
    assert bands["position_band"].to_list() == [0, 1, 2, 3, 4, 5, 6]
    assert bands["slots"].to_list() == [1, 1, 2, 4, 8, 16, 8]


def test_documents_can_be_counted_apart(trace):
    assert load_summary(trace, by="doc").filter(pl.col("layer") == 2)["slots"].to_list() == [
        180
    ] * 6 + [120]


@pytest.mark.parametrize("cells", [1, 20, 2**20])
def test_tables_too_large_to_hold_are_counted_in_passes(trace, monkeypatch, cells):
    monkeypatch.setattr("moe_lab.analysis.slot_counts.MAX_CELLS", cells)
    counts = expert_load(trace, by="token_id").filter(pl.col("count") > 0)
    assert set(counts.select("layer", "token_id", "expert", "count").rows()) == joined(
        trace, "token_id"
    )


def test_windows_can_follow_a_step_column_and_be_averaged(make_trace):
    """Steps of one token each, all on one of two experts but for the last, which is even over its
    two tokens.
    """
    trace = make_trace([[0], [1], [0], [1]], 2, step=[5, 6, 9, 9])
    table = load_over_windows(trace, column="step", averages=[1, 2, 10])
    assert table["window"].to_list() == [5, 6, 9]
    assert table["tokens"].to_list() == [1, 1, 2]
    assert table["balancedness"].to_list() == table["balancedness_1"].to_list() == [0.5, 0.5, 1.0]
    assert table["balancedness_2"].to_list() == [0.5, 0.5, 0.75]
    assert table["balancedness_10"].to_list() == pytest.approx([0.5, 0.5, 2 / 3])


def test_windows_count_in_order_of_document_and_position(trace, tmp_path):
    order = np.random.default_rng(0).permutation(400).tolist()
    shuffled = reordered(trace, tmp_path / "shuffled", order)
    assert load_over_windows(shuffled, window=90).equals(load_over_windows(trace, window=90))
    assert windows(trace, 90).sizes.tolist() == [90, 90, 90, 90, 40]


def test_a_key_without_its_partner_is_refused():
    left = pl.DataFrame({"doc": [0, 0], "pos": [0, 1]}, schema={"doc": pl.UInt32, "pos": pl.UInt32})
    right = left.with_columns(pos=pl.Series([0, 5], dtype=pl.UInt32))
    with refused("tokens", TraceError):
        list(aligned(iter([left]), lambda: iter([right]), "the other"))


def test_a_cursor_gives_any_number_of_rows_across_frames():
    frames = [pl.DataFrame({"n": [0, 1]}), pl.DataFrame({"n": [2]}), pl.DataFrame({"n": [3, 4, 5]})]
    cursor = Cursor(iter(frames))
    taken = [cursor.take(size) for size in (1, 3, 0, 2)]
    assert [part["n"].to_list() for part in taken if part is not None] == [
        [0],
        [1, 2, 3],
        [],
        [4, 5],
    ]
    assert cursor.take(1) is None


@pytest.mark.parametrize(
    ("doc", "pos", "runs"),
    [
        ([3, 3, 1], [0, 4, 0], True),
        ([3, 3, 1], [4, 0, 0], False),
        ([3, 1, 3], [0, 0, 1], False),
        ([], [], True),
        ([1, 1], [2, 2], False),
    ],
)
def test_runs_of_documents_are_told_across_batches(doc, pos, runs):
    frame = pl.DataFrame({"doc": doc, "pos": pos}, schema={"doc": pl.UInt32, "pos": pl.UInt32})
    assert document_runs(iter([frame])) is runs
    assert document_runs(frame[i : i + 1] for i in range(frame.height)) is runs


def test_a_trace_without_a_token_table_says_so(tmp_path):
    import torch

    from moe_lab.routing import Routing
    from moe_lab.trace import LayerMeta, TraceMeta

    scores = torch.ones(4, 2)
    with TraceWriter(tmp_path / "bare", TraceMeta(layers=(LayerMeta(0, 2),))) as writer:
        writer.write_routing(
            0,
            np.zeros(4, int),
            np.arange(4),
            Routing(torch.zeros(4, 1, dtype=torch.long), scores[:, :1], scores, scores, 2, 0),
        )
    with refused("tokens", AnalysisError):
        expert_load(open_trace(tmp_path / "bare"), by="doc")
