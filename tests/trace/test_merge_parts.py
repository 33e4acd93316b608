"""Parts of one pass over the same documents: what several ranks recorded becomes the trace that one
would have written.
"""

from itertools import pairwise
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from refusals import refused

from moe_lab.errors import TraceError
from moe_lab.routing import Routing
from moe_lab.trace import LayerMeta, Trace, TraceMeta, TraceWriter, merge_traces, open_trace
from moe_lab.trace.rows import slot_rows

META = TraceMeta(
    model="m",
    layers=(LayerMeta(layer=0, num_experts=5, top_k=2), LayerMeta(layer=3, num_experts=5, top_k=2)),
)
DOC = np.repeat([7, 7, 9], 4)
POS = np.concatenate([np.arange(8), np.arange(4)])


def routing(layer: int) -> Routing:
    logits = torch.randn(len(DOC), 5, generator=torch.Generator().manual_seed(layer))
    weights, indices = logits.softmax(dim=1).topk(2)
    return Routing(
        indices=indices, weights=weights, logits=logits, scores=logits.softmax(dim=1), num_experts=5
    )


def rows_of(found: Routing, rows: slice) -> Routing:
    return Routing(
        found.indices[rows],
        found.weights[rows],
        found.logits[rows],
        found.scores[rows],
        found.num_experts,
    )


TOKENS = pl.DataFrame(
    {"doc": DOC, "pos": POS, "token_id": np.arange(len(DOC)), "loss": np.linspace(0, 3, len(DOC))}
)


def write(folder: Path, rows: slice, tokens: pl.DataFrame | None = None) -> Path:
    with TraceWriter(folder, META) as writer:
        for layer in (0, 3):
            writer.write_routing(layer, DOC[rows], POS[rows], rows_of(routing(layer), rows))
        if tokens is not None:
            writer.write_tokens(tokens)
    return folder


def equal(one: Trace, two: Trace) -> bool:
    same = one.routing.collect().equals(two.routing.collect()) and one.tokens.collect().equals(
        two.tokens.collect()
    )
    return same and one.meta == two.meta


@pytest.mark.parametrize("edges", [[0, 5, 12], [0, 5, 5, 12], [0, 1, 2, 12], [0, 12, 12]])
def test_parts_that_share_a_document_or_are_empty_become_the_trace_of_one(
    tmp_path: Path, edges: list[int]
) -> None:
    whole = open_trace(write(tmp_path / "whole", slice(None), TOKENS))
    parts = [
        write(tmp_path / f"part{start}-{stop}-{n}", slice(start, stop))
        for n, (start, stop) in enumerate(pairwise(edges))
    ]
    merged = merge_traces(parts, tmp_path / "merged", renumber=False, tokens=TOKENS).check()
    assert equal(merged, whole)


def test_a_part_that_is_missing_or_there_twice_is_refused(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a", slice(0, 5)), write(tmp_path / "b", slice(5, 12))
    with refused("tokens", TraceError):
        merge_traces([first], tmp_path / "merged", renumber=False, tokens=TOKENS)
    shifted = write(tmp_path / "c", slice(4, 11))
    with refused("pos", TraceError):
        merge_traces([first, shifted], tmp_path / "merged", renumber=False, tokens=TOKENS)
    with refused("doc", TraceError):
        merge_traces([first, second], tmp_path / "merged", renumber=False)
    assert not (tmp_path / "merged").exists()


def test_document_numbers_that_would_wrap_are_refused(tmp_path: Path) -> None:
    parts = []
    for number, doc in enumerate((2**32 - 2, 5)):
        with TraceWriter(tmp_path / str(number), META) as writer:
            for layer in (0, 3):
                rows = slice(0, 4)
                docs = np.full(4, doc, dtype=np.uint32)
                writer.write_routing(layer, docs, np.arange(4), rows_of(routing(layer), rows))
        parts.append(tmp_path / str(number))
    with refused("doc", TraceError):
        merge_traces(parts, tmp_path / "merged")


@pytest.mark.parametrize("change", [{"vocab_size": 9}, {"tokenizer_hash": "b"}, {"model": "n"}])
def test_traces_of_different_models_do_not_become_one(change, tmp_path: Path) -> None:
    parts = [tmp_path / "a", tmp_path / "b"]
    for part, meta in zip(parts, (META, META.replace(**change)), strict=True):
        with TraceWriter(part, meta) as writer:
            for layer in (0, 3):
                writer.write_routing(layer, DOC, POS, routing(layer))
    with pytest.raises(TraceError, match=f"traces of the same {next(iter(change))}"):
        merge_traces(parts, tmp_path / "merged")


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("missing", [{"has_scores"}, {"has_scores", "has_weights"}])
def test_weights_and_scores_are_kept_where_all_parts_have_them(
    tmp_path: Path, order: tuple[int, int], missing: set[str]
) -> None:
    poor = META.replace(**dict.fromkeys(missing, False))
    write(tmp_path / "0", slice(None))
    with TraceWriter(tmp_path / "1", poor) as writer:
        for layer in META.layers:
            found = routing(layer.layer)
            weights = found.weights.numpy() if poor.has_weights else None
            rows = slot_rows(
                layer,
                DOC.astype("u4"),
                POS.astype("u4"),
                found.indices.numpy(),
                weights,
                None,
                None,
            )
            writer.write_rows(layer.layer, rows, found.counts().numpy())
    merged = merge_traces([tmp_path / str(part) for part in order], tmp_path / "m").check()
    assert (merged.meta.has_weights, merged.meta.has_scores) == (poor.has_weights, False)
    assert merged.routing.collect()["entropy"].is_null().all()
    assert merged.routing.collect()["weights"].is_null().all() == (not poor.has_weights)
    assert merged.counts()["count"].sum() == 2 * 2 * 2 * len(DOC)
    assert "have them: scores." in merged.meta.notes[-1]
