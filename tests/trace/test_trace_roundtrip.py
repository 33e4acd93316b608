"""Routing in, Parquet out, the same decisions back; and the writer's own bookkeeping."""

import json
import threading

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refused

from moe_lab.errors import TraceError
from moe_lab.routing import Routing
from moe_lab.trace import LayerMeta, TraceMeta, TraceWriter, open_trace
from moe_lab.trace.publish import INCOMPLETE_SUFFIX

TWO_TOKENS = pl.DataFrame({"doc": [0, 0], "pos": [0, 1], "token_id": [1, 1]})


def draw_routing(tokens, experts, zero, k, *, unused=0.0, dropped=0.0, padding=0.0, seed=0):
    """A routing whose every number is drawn: distinct experts per token, unused and dropped slots,
    padding.
    """
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(tokens, experts + zero, generator=generator).softmax(dim=1)
    indices = torch.rand(tokens, experts + zero, generator=generator).argsort(dim=1)[:, :k].clone()
    indices[torch.rand(tokens, k, generator=generator) < unused] = -1
    selected = indices.clone()
    indices[torch.rand(tokens, k, generator=generator) < dropped] = -1
    weights = torch.rand(tokens, k, generator=generator).masked_fill(indices < 0, 0)
    valid = torch.rand(tokens, generator=generator) >= padding
    return Routing(indices, weights, scores.log(), scores, experts, zero, selected, valid)


def meta(*layers, **others):
    return TraceMeta(layers=tuple(LayerMeta(number, *sizes) for number, *sizes in layers), **others)


def write(folder, routings, *, tokens=True, step=None, **options):
    """Write {layer: routing} in steps of ``step`` tokens; every token of every layer is token
    ``pos`` of document 0.
    """
    first = next(iter(routings.values()))
    layers = [
        (number, r.num_experts, r.num_zero_experts, max(r.top_k, 1))
        for number, r in routings.items()
    ]
    pos = np.arange(first.num_tokens)
    with TraceWriter(folder, meta(*layers), **options) as writer:
        for start in range(0, max(first.num_tokens, 1), step or max(first.num_tokens, 1)):
            part = slice(start, start + (step or max(first.num_tokens, 1)))
            if tokens:
                kept = pos[part] if first.valid is None else pos[part][first.valid[part].numpy()]
                writer.write_tokens(
                    pl.DataFrame({"doc": np.zeros_like(kept), "pos": kept, "token_id": kept % 7})
                )
            for number, r in routings.items():
                writer.write_routing(number, np.zeros_like(pos[part]), pos[part], cut(r, part))
    return open_trace(folder)


def write_by(folder, layers, *steps, **options):
    """Write a trace of ``layers`` by calling each step with the writer."""
    with TraceWriter(folder, meta(*layers), **options) as writer:
        for step in steps:
            step(writer)


def route(tokens, first=0, layer=0):
    """The step that writes ``tokens`` tokens of document 0, from position ``first``."""
    pos = np.arange(first, first + tokens)
    return lambda writer: writer.write_routing(
        layer, np.zeros_like(pos), pos, draw_routing(tokens, 4, 0, 2)
    )


def cut(r, part):
    pick = lambda tensor: None if tensor is None else tensor[part]  # noqa: E731
    return Routing(
        r.indices[part],
        r.weights[part],
        r.logits[part],
        r.scores[part],
        r.num_experts,
        r.num_zero_experts,
        pick(r.selected),
        pick(r.valid),
    )


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(0, 60),
    experts=st.integers(1, 12),
    zero=st.integers(0, 5),
    data=st.data(),
    unused=st.sampled_from([0.0, 0.3, 1.0]),
    dropped=st.sampled_from([0.0, 0.2]),
    padding=st.sampled_from([0.0, 0.4]),
    step=st.sampled_from([None, 1, 17]),
)
def test_every_decision_comes_back_as_it_was_made(
    tmp_path_factory, tokens, experts, zero, data, unused, dropped, padding, step
):
    k = data.draw(st.integers(1, experts + zero))
    routing = draw_routing(
        tokens, experts, zero, k, unused=unused, dropped=dropped, padding=padding, seed=tokens
    )
    trace = write(
        tmp_path_factory.mktemp("t") / "trace", {3: routing}, step=step, rows_per_part=16
    ).check()
    rows = trace.routing.sort("pos").collect()
    valid, selected = routing.valid, routing.selected
    assert valid is not None
    assert selected is not None
    row = iter(rows.iter_rows(named=True))
    for t in range(tokens):
        if not bool(valid[t]):
            continue
        got = next(row)
        slots = [
            (int(i), float(w))
            for i, w in zip(routing.indices[t], routing.weights[t], strict=True)
            if i >= 0
        ]
        assert got["experts"] == [i for i, _ in slots]
        assert got["weights"] == [float(np.float16(w)) for _, w in slots]
        assert got["ffn_count"] == sum(i < experts for i, _ in slots)
        assert got["zero_count"] == sum(i >= experts for i, _ in slots)
        assert got["gate_mass_ffn"] == pytest.approx(
            sum(w for i, w in slots if i < experts), abs=1e-6
        )
        assert got["entropy"] == pytest.approx(float(routing.entropy()[t]), abs=1e-6)
        assert got["dropped"] == sum(
            s >= 0 > i for s, i in zip(selected[t], routing.indices[t], strict=True)
        )
        assert (got["margin"] is None) == (k == experts + zero)
        assert (got["layer"], got["doc"], got["pos"]) == (3, 0, t)
    assert next(row, None) is None
    assert trace.counts()["count"].to_list() == routing.counts().tolist()


def test_dead_experts_are_counted_as_zero_and_the_axis_comes_from_the_configuration(tmp_path):
    routing = draw_routing(50, 4, 0, 2)
    wide = Routing(routing.indices, routing.weights, torch.zeros(50, 9), torch.ones(50, 9), 6, 3)
    counts = write(tmp_path / "t", {0: wide}).counts()
    assert counts["expert"].to_list() == list(range(9))
    assert counts["is_zero"].to_list() == [False] * 6 + [True] * 3
    assert counts["count"].to_list()[4:] == [0] * 5
    assert counts["count"].sum() == 100


def test_layers_may_differ_in_size_and_are_read_in_numeric_order(tmp_path):
    trace = write(tmp_path / "t", {10: draw_routing(30, 8, 0, 2), 2: draw_routing(30, 4, 2, 3)})
    assert trace.counts()["layer"].unique(maintain_order=True).to_list() == [2, 10]
    assert dict(trace.routing.group_by("layer").len().collect().iter_rows()) == {2: 30, 10: 30}


def test_tokens_keep_further_columns_and_missing_losses_stay_null(tmp_path):
    frame = pl.DataFrame(
        {
            "doc": [0, 0],
            "pos": [0, 1],
            "token_id": [5, 6],
            "loss": [None, 1.5],
            "lexer": ["keyword", "<script>"],
        }
    )
    with TraceWriter(tmp_path / "t", meta((0, 4, 0, 2))) as writer:
        writer.write_tokens(frame)
        writer.write_routing(
            0, torch.tensor([0, 0]), torch.tensor([0, 1]), draw_routing(2, 4, 0, 2)
        )
    assert open_trace(tmp_path / "t").check().tokens.collect().rows() == frame.rows()


def test_a_trace_without_tokens_has_an_empty_token_table(tmp_path):
    assert (
        write(tmp_path / "t", {0: draw_routing(5, 4, 0, 2)}, tokens=False)
        .check()
        .tokens.collect()
        .height
        == 0
    )


def test_bfloat16_weights_with_a_gradient_are_written(tmp_path):
    routing = draw_routing(9, 4, 0, 2)
    routing = Routing(
        routing.indices,
        routing.weights.bfloat16().requires_grad_(),
        routing.logits,
        routing.scores.bfloat16(),
        4,
    )
    trace = write(tmp_path / "t", {0: routing}).check()
    assert trace.routing.sort("pos").collect()["weights"].to_list() == routing.weights.tolist()


def test_metadata_round_trips(tmp_path):
    written = meta(
        (0, 4, 0, 2),
        model="a<b>",
        seed=3,
        phase="prefill",
        vocab_size=9,
        created_from="moe-lab train",
    )
    with TraceWriter(tmp_path / "t", written) as writer:
        writer.write_routing(0, np.zeros(2, int), np.arange(2), draw_routing(2, 4, 0, 2))
    assert open_trace(tmp_path / "t").meta == written
    assert written.versions["polars"] == pl.__version__


def test_many_small_writes_make_parts_of_the_asked_size(tmp_path):
    trace = write(tmp_path / "t", {0: draw_routing(100, 4, 0, 2)}, step=7, rows_per_part=32)
    sizes = trace.files().filter(pl.col("layer") == 0)["rows"].to_list()
    assert sum(sizes) == 100
    assert max(sizes) <= 32
    assert len(sizes) < 100 / 7 + 4


def test_the_buffer_over_all_layers_is_bounded(tmp_path):
    layers = [(number, 4, 0, 2) for number in range(6)]
    with TraceWriter(tmp_path / "t", meta(*layers), buffer_bytes=20_000) as writer:
        for start in range(0, 1500, 100):
            for number, *_ in layers:
                writer.write_routing(
                    number,
                    np.zeros(100, int),
                    np.arange(start, start + 100),
                    draw_routing(100, 4, 0, 2),
                )
                assert sum(table.pending_bytes for table in writer._layers.values()) <= 20_000
    assert open_trace(tmp_path / "t").check().num_tokens == 1500


def test_an_error_leaves_a_readable_incomplete_trace_and_no_complete_one(tmp_path):
    def interrupt(_writer):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_by(tmp_path / "t", [(0, 4, 0, 2), (1, 4, 0, 2)], route(9), interrupt)
    with refused("path", TraceError):
        open_trace(tmp_path / "t")
    rest = tmp_path / ("t" + INCOMPLETE_SUFFIX)
    assert json.loads((rest / "meta.json").read_text())["complete"] is False
    with refused("complete", TraceError):
        open_trace(rest)
    trace = open_trace(rest, allow_incomplete=True).check()
    assert not trace.complete
    assert trace.routing.collect().height == 9
    assert [path.name for path in tmp_path.iterdir()] == [rest.name]


def test_a_later_success_replaces_the_old_trace_and_removes_the_incomplete_one(tmp_path):
    write(tmp_path / "t", {0: draw_routing(5, 4, 0, 2)})
    with pytest.raises(TraceError):
        write_by(tmp_path / "t", [(0, 4, 0, 2)], route(3), route(3, layer=1), overwrite=True)
    assert open_trace(tmp_path / "t").num_tokens == 5
    trace = write(tmp_path / "t", {0: draw_routing(8, 4, 0, 2)}, overwrite=True)
    assert trace.check().num_tokens == 8
    assert [path.name for path in tmp_path.iterdir()] == ["t"]


def test_a_reader_always_finds_a_whole_trace_while_it_is_replaced(tmp_path):
    write(tmp_path / "t", {0: draw_routing(5, 4, 0, 2)})
    failures, done = [], threading.Event()

    def read():
        while not done.is_set():
            try:
                json.loads((tmp_path / "t" / "meta.json").read_text())
            except FileNotFoundError as error:
                failures.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(10):
        write(tmp_path / "t", {0: draw_routing(5, 4, 0, 2)}, tokens=False, overwrite=True)
    done.set()
    reader.join()
    assert not failures


def test_a_folder_of_other_files_is_not_replaced(tmp_path):
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "thesis.tex").write_text("years of work")
    with (
        pytest.raises(
            TraceError,
            match=r"expected a new folder or an older trace at .*, got something else",
        ),
        TraceWriter(tmp_path / "t", meta((0, 4, 0, 2))),
    ):
        pass
    assert (tmp_path / "t" / "thesis.tex").exists()


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (
            {"indices": torch.tensor([[0, 4]])},
            "experts",
        ),
        (
            {"indices": torch.tensor([[0, -2]])},
            "experts",
        ),
        (
            {"indices": torch.tensor([[1, 1]])},
            "experts",
        ),
        ({"weights": torch.tensor([[0.5, float("nan")]])}, "weights"),
        (
            {"weights": torch.tensor([[0.5, 1e6]])},
            "weights",
        ),
        ({"scores": torch.full((1, 4), float("nan"))}, "scores"),
        ({"num_experts": 5}, "num_experts"),
        (
            {"indices": torch.tensor([[0, 1, 2]]), "weights": torch.ones(1, 3)},
            "experts",
        ),
    ],
)
def test_a_routing_that_does_not_fit_is_refused(tmp_path, change, field):
    good = {
        "indices": torch.tensor([[0, 1]]),
        "weights": torch.ones(1, 2),
        "logits": torch.zeros(1, 4),
        "scores": torch.ones(1, 4),
    }
    writer = TraceWriter(tmp_path / "t", meta((0, 4, 0, 2)))
    with refused(field, TraceError), writer:
        writer.write_routing(
            0, np.zeros(1, int), np.zeros(1, int), Routing(**{**good, "num_experts": 4, **change})
        )


def test_padding_may_hold_anything(tmp_path):
    routing = draw_routing(6, 4, 0, 2)
    routing.weights[4:] = float("nan")
    routing.scores[4:] = float("nan")
    valid = torch.tensor([True] * 4 + [False] * 2)
    padded = Routing(
        routing.indices, routing.weights, routing.logits, routing.scores, 4, valid=valid
    )
    assert write(tmp_path / "t", {0: padded}).check().num_tokens == 4


@pytest.mark.parametrize(
    ("doc", "field"),
    [
        (np.zeros(3, int), "doc"),
        (
            np.zeros(2),
            "doc",
        ),
        (np.array([0, -1]), "doc"),
    ],
)
def test_keys_that_are_not_integers_for_each_token_are_refused(tmp_path, doc, field):
    with (
        refused(field, TraceError),
        TraceWriter(tmp_path / "t", meta((0, 4, 0, 2))) as writer,
    ):
        writer.write_routing(0, doc, np.arange(2), draw_routing(2, 4, 0, 2))


def test_layers_that_saw_different_numbers_of_tokens_are_refused(tmp_path):
    with refused("tokens", TraceError):
        write_by(tmp_path / "t", [(0, 4, 0, 2), (1, 4, 0, 2)], route(9), route(8, layer=1))


def test_layers_that_saw_other_tokens_are_refused(tmp_path):
    with refused("pos", TraceError):
        write_by(
            tmp_path / "t",
            [(0, 4, 0, 2)],
            lambda writer: writer.write_tokens(TWO_TOKENS),
            route(2, first=1),
        )


def test_a_replayed_forward_pass_is_refused(tmp_path):
    """Activation checkpointing runs the forward pass twice: every count would double."""
    with refused("tokens", TraceError):
        write_by(
            tmp_path / "t",
            [(0, 4, 0, 2)],
            lambda writer: writer.write_tokens(TWO_TOKENS),
            route(2),
            route(2),
        )


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        ({"doc": [0], "pos": [0]}, "expected token columns doc, pos and token_id, got no token_id"),
        (
            {"doc": [0], "pos": [0], "token_id": [0], "experts": [1]},
            "not named as routing columns are, got experts Int64",
        ),
        (
            {"doc": [0], "pos": [0], "token_id": [[0]]},
            "expected doc, pos and token_id as integers from 0",
        ),
        (
            {"doc": [0], "pos": [0], "token_id": [0], "x": [[0]]},
            "expected further token columns of plain types .*, got x List",
        ),
        (
            {"doc": [0], "pos": [0], "token_id": [0], "x": [None]},
            "expected further token columns of plain types .*, got x Null",
        ),
        (
            {"doc": [0], "pos": [-1], "token_id": [0]},
            "expected doc, pos and token_id as integers from 0",
        ),
        ({"doc": [0], "pos": [None], "token_id": [0]}, "expected"),
        ({"doc": [0], "pos": [0], "token_id": [5]}, "expected token ids below vocab_size 5, got 5"),
        (
            {"doc": [0], "pos": [0], "token_id": [1], "loss": [float("nan")]},
            "expected finite losses, got NaN or infinity; try null",
        ),
    ],
)
def test_tokens_that_do_not_fit_are_refused(tmp_path, frame, message):
    with (
        pytest.raises(TraceError, match=message),
        TraceWriter(tmp_path / "t", meta((0, 4, 0, 2), vocab_size=5)) as writer,
    ):
        writer.write_tokens(pl.DataFrame(frame))


def test_a_token_table_that_changes_its_columns_is_refused(tmp_path):
    wider = TWO_TOKENS.with_columns(lexer=pl.lit("name"))
    with refused("columns", TraceError):
        write_by(
            tmp_path / "t",
            [(0, 4, 0, 2)],
            lambda writer: writer.write_tokens(TWO_TOKENS),
            lambda writer: writer.write_tokens(wider),
        )


def test_a_layer_that_was_not_named_is_refused(tmp_path):
    with (
        refused("layer", TraceError),
        TraceWriter(tmp_path / "t", meta((0, 4, 0, 2))) as writer,
    ):
        writer.write_routing(7, np.zeros(2, int), np.arange(2), draw_routing(2, 4, 0, 2))


@pytest.mark.parametrize(
    ("layers", "field"),
    [
        ([(0, 0, 0, 1)], "num_experts"),
        ([(0, 65_000, 65_000, 1)], "num_experts"),
        ([(0, 4, 0, 5)], "top_k"),
        ([(0, 4, 0, 1), (0, 4, 0, 1)], "layers"),
        ([], "layers"),
    ],
)
def test_absurd_layers_are_refused(layers, field):
    with refused(field):
        meta(*layers)


def test_a_full_disk_is_one_clear_line(tmp_path, monkeypatch):
    def full(*_args, **_kwargs):
        raise pl.exceptions.ComputeError(
            "parquet: underlying IO error: No space left on device (os error 28)"
        )

    fill_up = lambda _writer: monkeypatch.setattr(pl.DataFrame, "write_parquet", full)  # noqa: E731
    with pytest.raises(
        TraceError,
        match=r"cannot write .*/t: .*No space left on device.*",
    ):
        write_by(tmp_path / "t", [(0, 4, 0, 2)], route(2), fill_up)
    assert not (tmp_path / "t").exists()


def test_files_are_listed_with_their_rows_in_reading_order(tmp_path):
    trace = write(
        tmp_path / "t",
        {3: draw_routing(40, 4, 0, 2), 12: draw_routing(40, 4, 0, 2)},
        rows_per_part=32,
    )
    files = trace.files()
    assert trace.has_tokens
    for layer in (None, 3, 12):
        mine = files.filter(pl.col("layer").eq_missing(layer))
        assert mine["rows"].to_list() == [32, 8]
        for name, batch in zip(mine["name"], trace.batches(layer, ["pos"]), strict=True):
            assert pl.read_parquet(trace.folder / name)["pos"].equals(batch["pos"])
    assert not write(tmp_path / "u", {0: draw_routing(5, 4, 0, 2)}, tokens=False).has_tokens
