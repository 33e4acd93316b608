"""Acceptance of drafts: against a plain loop over positions, on a sequence that a model has
learned, along its own continuation.
"""

import numpy as np
import pytest
import torch
from refusals import refused

from moe_lab.errors import CorpusError
from moe_lab.model import Decoder, DecoderConfig, MTPConfig
from moe_lab.text import TokenizedDocument
from moe_lab.training.acceptance import acceptance_rate

CONFIG = DecoderConfig(
    vocab_size=11,
    num_layers=1,
    d_model=16,
    num_heads=2,
    context_length=24,
    d_dense=24,
    mtp=MTPConfig(num_modules=2),
)


def document(ids: list[int], index: int) -> TokenizedDocument:
    array = np.array(ids, dtype=np.int32)
    return TokenizedDocument(
        index=index,
        name=f"{index}",
        text="",
        ids=array,
        starts=np.zeros_like(array),
        ends=np.zeros_like(array),
    )


def by_hand(model: Decoder, ids: list[int]) -> list[tuple[int, int]]:
    """(drafts, accepted) of both modules on one window, position by position."""
    row = torch.tensor([ids])
    output = model(row)
    drafts = [logits.argmax(dim=2)[0].tolist() for logits in model.drafts(output.hidden, row)]
    own = output.logits.argmax(dim=2)[0].tolist()
    first = [own[i + 1] == drafts[0][i] for i in range(len(ids) - 1)]
    second = [own[i + 2] == drafts[1][i] for i in range(len(ids) - 2) if first[i]]
    return [(len(first), sum(first)), (len(second), sum(second))]


def test_drafts_are_counted_as_a_loop_over_positions_counts_them():
    torch.manual_seed(3)
    model = Decoder(CONFIG.replace(init_std=0.6)).eval()
    rows = [torch.randint(0, 11, (length,)).tolist() for length in (24, 24, 15, 24)]
    found = acceptance_rate(
        model,
        [document(row, 5 + index) for index, row in enumerate(rows)],
        seq_length=20,
        batch_size=3,
    )
    for index, row in enumerate(rows):
        if len(row) < 20:
            assert found.filter(doc=5 + index).is_empty()  # no whole window
            continue
        counts = found.filter(doc=5 + index).sort("module")
        assert list(zip(counts["drafts"], counts["accepted"], strict=True)) == by_hand(
            model, row[:20]
        )
    assert found["accepted"].sum() > 0


def test_a_learned_sequence_is_drafted_right_and_a_prompt_is_continued_by_the_model_itself():
    torch.manual_seed(0)
    model = Decoder(CONFIG)
    cycle = [3, 1, 4, 1, 5, 9, 2, 6]
    ids = torch.tensor([(cycle * 4)[start : start + 25] for start in range(8)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(150):
        output = model(ids[:, :-1], ids[:, 1:])
        assert output.loss is not None
        (output.loss + output.losses["mtp"]).backward()
        optimizer.step()
        optimizer.zero_grad()
    documents = [document((cycle * 4)[start : start + 24], start) for start in range(4)]
    for prompt in (None, 8):
        found = acceptance_rate(model, documents, seq_length=24, prompt_tokens=prompt)
        per_module = found.group_by("module").sum().sort("module")
        # Without a position before it the first token of the text says nothing of where in the
        # cycle "1" stands.
        assert (per_module["accepted"] / per_module["drafts"]).to_list() == pytest.approx(
            [1.0, 1.0], abs=0.06
        )
    assert per_module["drafts"].to_list()[0] == 4 * (24 - 1 - 7)
    assert model.training


def test_what_cannot_be_counted_is_said():
    with refused("mtp"):
        acceptance_rate(Decoder(CONFIG.replace(mtp=None)), [document([1, 2], 0)], seq_length=2)
    with refused("documents", CorpusError):
        acceptance_rate(Decoder(CONFIG), [document([1, 2, 3], 0)], seq_length=12)
    with refused("prompt_tokens"):
        acceptance_rate(Decoder(CONFIG), [document([1, 2, 3], 0)], seq_length=12, prompt_tokens=30)
