"""The difficulty columns of a trace, and cross-fitting over excerpts."""

import numpy as np
import pytest

from moe_lab.errors import CorpusError
from moe_lab.text import TokenizedDocument, difficulty_columns, ngram_surprisal
from moe_lab.text.surprisal import NgramModel, surprisal_decile


def documents_of(*rows):
    def document(index, row):
        zeros = np.zeros(len(row), dtype=np.int32)
        return TokenizedDocument(3 * index, "x", "", np.array(row, dtype=np.int32), zeros, zeros)

    return [document(index, row) for index, row in enumerate(rows)]


def test_probabilities_sum_to_one_over_the_vocabulary_after_every_context():
    generator = np.random.default_rng(0)
    vocabulary = 7
    model = NgramModel.fit([generator.integers(0, vocabulary, 40) for _ in range(3)], vocabulary)
    for context in ([0], [6], [1, 2], [5, 5], [2, 6]):
        surprisals = [
            model.surprisal(np.array([*context, token]))[-1] for token in range(vocabulary)
        ]
        assert np.exp(-np.array(surprisals)).sum() == pytest.approx(1, abs=1e-12)


def test_one_row_a_token_with_nulls_where_nothing_came_before():
    documents = documents_of([0, 1, 2, 1, 2], [0, 2, 1], [0, 1, 1, 2], [0, 2, 2])
    frame = difficulty_columns(documents, 3)
    assert frame.columns == ["doc", "pos", "ngram_loss", "frequency", "surprisal_q"]
    assert frame["doc"].unique().sort().to_list() == [0, 3, 6, 9]
    assert frame.filter(frame["pos"] == 0)["ngram_loss"].null_count() == 4
    assert (
        frame["ngram_loss"].null_count()
        == frame["surprisal_q"].null_count()
        == frame["frequency"].null_count()
        == 4
    )
    rest = np.concatenate(
        [row[1:] for row in ngram_surprisal([document.ids for document in documents], 3)]
    )
    assert frame["ngram_loss"].drop_nulls().to_numpy() == pytest.approx(rest, rel=1e-6)


def test_excerpts_of_one_document_never_score_each_other():
    """The excerpts of group 0 hold a pair that nothing else holds: had one of them helped to score
    the other, it would be easy.
    """
    generator = np.random.default_rng(1)
    odd = np.array([5, 6] * 20)
    others = [generator.integers(0, 5, 60) for _ in range(6)]
    apart = ngram_surprisal([odd, odd, *others], 7, seed=0, groups=[0, 0, 1, 2, 3, 4, 5, 6])
    model = NgramModel.fit(others, 7)
    assert apart[0][1:].mean() > 0.8 * model.surprisal(odd)[1:].mean()
    assert np.array_equal(apart[0][1:], apart[1][1:])
    with pytest.raises(CorpusError, match="got 2 folds of 1 document; try more documents"):
        ngram_surprisal([odd, odd], 7, groups=[4, 4])


def test_deciles_are_even_and_ties_share_one():
    assert np.bincount(surprisal_decile(np.arange(100.0))).tolist() == [10] * 10
    assert len(set(surprisal_decile(np.array([1.0] * 30 + [2.0] * 10))[:30])) == 1
    assert surprisal_decile(np.array([np.nan, 1.0]))[0] == 10
