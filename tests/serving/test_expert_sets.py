"""Sets of a trace against a plain loop over its tokens, in any order and split of files."""

from importlib import import_module

import numpy as np
import pytest
from refusals import refused

from moe_lab.errors import AnalysisError
from moe_lab.serving import expert_sets
from moe_lab.serving.expert_sets import ExpertSets


def plain_sets(ids, doc, decode, num_experts):
    """[(doc, decode, layer, experts in order)] by a loop."""
    tokens, layers, _ = ids.shape
    found, row = [], 0
    while row < tokens:
        end = row + 1
        while not decode[row] and end < tokens and doc[end] == doc[row] and not decode[end]:
            end += 1
        for layer in range(layers):
            used = [e for e in ids[row:end, layer].ravel().tolist() if 0 <= e < num_experts]
            last = {expert: place for place, expert in enumerate(used)}
            found.append(
                (doc[row], bool(decode[row]), layer, end - row, sorted(last, key=last.get))  # type: ignore
            )
        row = end
    return found


def read(sets: ExpertSets):
    found = []
    for block in sets.blocks():
        for place, (start, end) in enumerate(zip(block.starts[:-1], block.starts[1:], strict=True)):
            found.append(
                (
                    int(block.doc[place]),
                    bool(block.decode[place]),
                    int(block.place[place]),
                    int(block.tokens[place]),
                    block.experts[start:end].tolist(),
                )
            )
    return found


@pytest.mark.parametrize("block_slots", [2**20, 24])
def test_sets_are_those_of_a_plain_loop(write_trace, random_ids, monkeypatch, block_slots):
    module = import_module("moe_lab.serving.expert_sets")
    monkeypatch.setattr(module, "BLOCK_SLOTS", block_slots)
    ids = random_ids(40, 3, 2, 6)  # experts 4 and 5 are zero-compute ones
    ids[5, 1] = -1  # no slot used
    doc = np.repeat([0, 1, 2, 3], 10)
    decode = np.tile(np.arange(10) >= 4, 4)
    decode[30:] = False  # the last document is a prompt alone
    for order in (np.arange(40), np.argsort(np.tile(np.arange(10), 4), kind="stable")):
        trace = write_trace(ids, doc, 4, num_zero=2, decode=decode, rows_per_part=7, order=order)
        assert read(expert_sets(trace)) == plain_sets(ids, doc, decode, 4)


def test_a_text_that_was_not_generated_is_read_as_decoded(write_trace, random_ids):
    ids = random_ids(6, 2, 2, 5)
    decoded = plain_sets(ids, np.zeros(6, int), np.ones(6, bool), 5)
    assert read(expert_sets(write_trace(ids, None, 5))) == decoded
    # capture() marks a whole text "prefill"
    marked = write_trace(ids, None, 5, columns={"phase": ["prefill"] * 6})
    assert read(expert_sets(marked)) == decoded


def test_traces_without_order_or_with_aliased_experts_are_refused(write_trace, random_ids):
    ids = random_ids(4, 1, 2, 4)
    with refused("per_token", AnalysisError):
        expert_sets(write_trace(ids, None, 4, per_token=False))
    with refused("zero_experts_known", AnalysisError):
        expert_sets(write_trace(ids, None, 4, zero_experts_known=False))
