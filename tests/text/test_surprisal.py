import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refused

from moe_lab.errors import CorpusError
from moe_lab.text import NgramModel, ngram_surprisal, unigram_surprisal

VOCAB = 5
documents = st.lists(
    st.lists(st.integers(0, VOCAB - 1), max_size=12), min_size=1, max_size=5
).filter(lambda docs: any(len(d) > 1 for d in docs))


def arrays(rows: list[list[int]]) -> list[np.ndarray]:
    return [np.array(row, dtype=np.int32) for row in rows]


def probability_by_definition(rows: list[list[int]], context: tuple, token: int) -> float:
    """Interpolated Kneser-Ney from dictionaries and sets, one token at a time: the oracle."""
    triples = Counter(
        (None if place == 1 else row[place - 2], row[place - 1], row[place])
        for row in rows
        for place in range(1, len(row))
    )
    doubles = Counter((middle, last) for _, middle, last in triples)
    singles = Counter(last for _, last in doubles)

    def discount(counts: Counter) -> float:
        once, twice = list(counts.values()).count(1), list(counts.values()).count(2)
        return once / (once + 2 * twice) if once and twice else 0.5

    def extend(counts: dict, discount: float, lower: float) -> float:
        if not counts:
            return lower
        total = sum(counts.values())
        return (
            max(counts.get(token, 0) - discount, 0) / total + discount * len(counts) / total * lower
        )

    unigram = extend(dict(singles), discount(singles), 1 / VOCAB)
    after_one = {last: count for (middle, last), count in doubles.items() if middle == context[1]}
    bigram = extend(after_one, discount(doubles), unigram)
    after_two = {
        last: count
        for (first, middle, last), count in triples.items()
        if (first, middle) == context
    }
    return extend(after_two, discount(triples), bigram)


@given(rows=documents, scored=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=8))
@settings(max_examples=100, deadline=None)
def test_surprisal_is_kneser_neys_by_definition(rows, scored):
    found = NgramModel.fit(arrays(rows), VOCAB).surprisal(np.array(scored))
    assert math.isnan(found[0])
    for place in range(1, len(scored)):
        context = (None if place == 1 else scored[place - 2], scored[place - 1])
        assert found[place] == pytest.approx(
            -math.log(probability_by_definition(rows, context, scored[place]))
        )


@given(rows=documents)
@settings(max_examples=50, deadline=None)
def test_probabilities_sum_to_one_after_every_context(rows):
    model = NgramModel.fit(arrays(rows), VOCAB)
    for first in range(VOCAB):
        after_start = [model.surprisal(np.array([first, token]))[1] for token in range(VOCAB)]
        assert np.exp(-np.array(after_start)).sum() == pytest.approx(1)
        for second in range(VOCAB):
            after_two = [
                model.surprisal(np.array([first, second, token]))[2] for token in range(VOCAB)
            ]
            assert np.exp(-np.array(after_two)).sum() == pytest.approx(1)
            assert np.isfinite(after_two).all()


def test_probabilities_sum_to_one_over_a_vocabulary_mostly_unseen():
    rng = np.random.default_rng(0)
    vocab_size = 3000
    model = NgramModel.fit([rng.zipf(1.3, 5000) % vocab_size for _ in range(4)], vocab_size)
    for context in ([1, 2], [2999, 2998], [1, 2999]):
        rows = [np.array([*context, token]) for token in range(vocab_size)]
        assert np.exp(-np.array([row[2] for row in model.surprisals(rows)])).sum() == pytest.approx(
            1
        )


def test_what_came_before_is_expected_and_what_did_not_is_not():
    model = NgramModel.fit(arrays([[0, 1, 2] * 50, [0, 1, 2] * 50]), VOCAB)
    surprisal = model.surprisal(np.array([0, 1, 2, 0, 4, 3]))
    assert (surprisal[1:4] < 0.1).all()
    assert (surprisal[4:] > 1.5).all()


def test_no_ngram_runs_across_documents():
    rows = [[0, 1], [2, 3], [4, 0, 2]]
    model = NgramModel.fit(arrays(rows), VOCAB)
    turned = NgramModel.fit(arrays(rows[::-1]), VOCAB)
    scored = np.array([0, 1, 2, 3, 4, 0, 2])
    assert np.array_equal(model.surprisal(scored), turned.surprisal(scored), equal_nan=True)


def test_each_document_is_scored_by_the_others_alone():
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, VOCAB, rng.integers(2, 40)) for _ in range(6)]
    scored = ngram_surprisal(rows, VOCAB, folds=len(rows))
    for index, found in enumerate(scored):
        others = rows[:index] + rows[index + 1 :]
        assert np.array_equal(
            found, NgramModel.fit(others, VOCAB).surprisal(rows[index]), equal_nan=True
        )


def test_two_folds_cover_every_document_once_and_follow_the_seed():
    rng = np.random.default_rng(1)
    rows = [rng.integers(0, VOCAB, 50) for _ in range(9)]
    first, again, other = (ngram_surprisal(rows, VOCAB, seed=seed) for seed in (0, 0, 1))
    assert [len(found) for found in first] == [50] * 9
    assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip(first, again, strict=True))
    assert not all(np.array_equal(a, b, equal_nan=True) for a, b in zip(first, other, strict=True))


def test_memorised_text_is_not_easy_when_it_is_held_out():
    rng = np.random.default_rng(2)
    rows = [rng.integers(0, 1000, 400) for _ in range(4)]
    seen = NgramModel.fit(rows, 1000).surprisals(rows)
    held_out = ngram_surprisal(rows, 1000)
    assert np.nanmean(np.concatenate(seen)) < 3
    assert np.nanmean(np.concatenate(held_out)) > math.log(1000) - 0.5


def test_short_documents_keep_their_length():
    rows = arrays([[], [1], [1, 2], [1, 2, 3]])
    model = NgramModel.fit(rows, VOCAB)
    assert [len(found) for found in model.surprisals(rows)] == [0, 1, 2, 3]
    assert [int(np.isnan(found).sum()) for found in model.surprisals(rows)] == [0, 1, 1, 1]
    assert model.surprisal(rows[1]).dtype == np.float64


def test_unigram_surprisal_is_the_share_in_the_other_documents():
    rows = arrays([[0, 1, 1, 1], [0, 2, 1]])
    first, second = unigram_surprisal(rows, VOCAB)
    assert first.tolist()[1:] == pytest.approx([-math.log(2 / 7)] * 3)
    assert second.tolist()[1:] == pytest.approx([-math.log(1 / 8), -math.log(4 / 8)])
    assert math.isnan(first[0])
    assert math.isnan(second[0])


@pytest.mark.parametrize("bad", [-1, 5])
def test_ids_outside_the_vocabulary_are_told(bad):
    rows = arrays([[0, 1], [1, bad]])
    with refused("token_ids", CorpusError):
        NgramModel.fit(rows, VOCAB)
    with refused("token_ids", CorpusError):
        NgramModel.fit(arrays([[0, 1]]), VOCAB).surprisal(np.array([0, bad]))


def test_documents_without_pairs_are_told():
    with refused("documents", CorpusError):
        NgramModel.fit(arrays([[], [1]]), VOCAB)


@pytest.mark.parametrize(
    ("documents", "folds", "message"),
    [
        (3, 1, "got 1 fold of 3 documents; try 2 folds"),
        (3, 4, "got 4 folds of 3 documents; try more documents"),
        (1, 2, "got 2 folds of 1 document; try more documents"),
    ],
)
def test_folds_that_cannot_be_are_told(documents, folds, message):
    with pytest.raises(CorpusError, match=message):
        ngram_surprisal(arrays([[0, 1]] * documents), VOCAB, folds=folds)
