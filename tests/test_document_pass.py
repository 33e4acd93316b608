"""Excerpts are a fair sample of the text, and every token of theirs is scored once."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from moe_lab.document_pass import IGNORE, Excerpt, excerpts_of, windows


@given(st.lists(st.integers(1, 60), min_size=1, max_size=8), st.integers(2, 20), st.integers(2, 15))
def test_windows_cover_each_excerpt_and_predict_every_token_but_its_first(
    lengths: list[int], excerpt: int, seq_length: int
) -> None:
    documents = [1000 * index + np.arange(length) for index, length in enumerate(lengths)]
    excerpts = excerpts_of(lengths, excerpt)
    inputs, targets = [], []
    for batch in windows(documents, excerpts, seq_length, batch_size=3):
        inputs += batch.ids[batch.valid].tolist()
        assert [
            documents[d][p]
            for d, p in zip(
                batch.doc[batch.valid.numpy()], batch.pos[batch.valid.numpy()], strict=True
            )
        ] == (batch.ids[batch.valid].tolist())
        targets += batch.targets[batch.targets != IGNORE].tolist()
        assert (batch.targets[~batch.valid] == IGNORE).all()
    covered = [
        int(token)
        for item in excerpts
        for token in documents[item.document][item.start : item.stop]
    ]
    assert inputs == covered
    assert sorted(targets) == sorted(
        int(token)
        for item in excerpts
        for token in documents[item.document][item.start + 1 : item.stop]
    )


def test_a_budget_keeps_evenly_spaced_excerpts_in_proportion_to_length() -> None:
    lengths = [100, 10_000, 1000, 20_000, 500]
    kept = excerpts_of(lengths, 100, budget=6000)
    assert sum(item.stop - item.start for item in kept) <= 6000
    share = [sum(item.document == index for item in kept) / len(kept) for index in range(5)]
    np.testing.assert_allclose(share, np.array(lengths) / sum(lengths), atol=1 / len(kept))
    long = [item.start for item in kept if item.document == 3]
    assert max(np.diff(long)) - min(np.diff(long)) <= 100


def test_whole_documents_are_one_excerpt_each_and_single_tokens_none() -> None:
    assert excerpts_of([5, 1, 3]) == [Excerpt(0, 0, 5), Excerpt(2, 0, 3)]
    assert excerpts_of([7], 3, budget=None) == [Excerpt(0, 0, 3), Excerpt(0, 3, 6)]
