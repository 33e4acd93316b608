"""Difficulty of a token without any studied model: its surprisal under n-grams counted in other
documents.

``NgramModel`` is an interpolated trigram with Kneser-Ney discounting (Kneser and Ney 1995;
interpolated as in Chen and Goodman 1998): each order keeps its counts less a discount and hands
what the discount took to the order below; the lower orders count in how many contexts a token was
seen, not how often; below the unigrams lies the uniform distribution. So every token has a
probability, and they sum to one after every context. Cross-fitting scores each document by a model
that has not seen it. All is sorting and searching in whole arrays.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moe_lab.errors import CorpusError, expected, require
from moe_lab.number_format import count_of

if TYPE_CHECKING:
    import polars as pl

    from moe_lab.text.tokenized_text import TokenizedDocument

Documents = Sequence[np.ndarray]
NUM_DECILES = 10


@dataclass(frozen=True, eq=False)
class _Level:
    """The n-grams of one order. An n-gram is a context, given by a number, and a token.

    Attributes:
        keys: sorted ``context * size + token`` of those seen, ``size`` being one more than the
            vocabulary.
        discounted: count of each, less the discount.
        totals: sum of the counts after each context.
        reserved: share that the discount took after each context; 1 after a context never seen.
    """

    size: int
    keys: np.ndarray
    discounted: np.ndarray
    totals: np.ndarray
    reserved: np.ndarray

    @classmethod
    def of(cls, keys: np.ndarray, counts: np.ndarray, size: int, num_contexts: int) -> "_Level":
        discount = _discount(counts)
        context = keys // size
        totals = np.bincount(context, weights=counts, minlength=num_contexts)
        kinds = np.bincount(context, minlength=num_contexts)
        reserved = np.divide(discount * kinds, totals, out=np.ones(num_contexts), where=totals > 0)
        return cls(size, keys, counts - discount, totals, reserved)

    def extend(
        self, context: np.ndarray, token: np.ndarray, lower: np.ndarray | float
    ) -> np.ndarray:
        """Probability of each token after its context, from that of the order below; the same where
        the context (-1) is unknown.
        """
        row = _find(self.keys, context * self.size + token)
        seen = (context >= 0) & (row >= 0)
        own = np.divide(
            self.discounted[row], self.totals[context], out=np.zeros(len(row)), where=seen
        )
        return own + np.where(context >= 0, self.reserved[context], 1.0) * lower


def _discount(counts: np.ndarray) -> float:
    """n1 / (n1 + 2 n2) of the n-grams seen once and twice (Ney, Essen and Kneser 1994); 0.5
    without such n-grams.
    """
    once, twice = int((counts == 1).sum()), int((counts == 2).sum())
    return once / (once + 2 * twice) if once and twice else 0.5


def _find(keys: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Row of each wanted key among the sorted ``keys``, -1 where it is not among them."""
    row = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[row] == wanted, row, -1)


@dataclass(frozen=True, eq=False)
class NgramModel:
    """Trigram probabilities over one vocabulary; ``fit`` makes it.

    The place before a document's first token is a token of its own in contexts, one that is never
    predicted.
    """

    vocab_size: int
    pairs: (
        np.ndarray
    )  # sorted keys of the two-token contexts seen; their rows number the contexts of trigrams
    unigrams: _Level
    bigrams: _Level
    trigrams: _Level

    @classmethod
    def fit(cls, documents: Documents, vocab_size: int) -> "NgramModel":
        """Count [n] arrays of ids, one a document; no n-gram runs across documents.

        Raises ``CorpusError`` for ids outside 0..vocab_size - 1, and where no document has two
        tokens.
        """
        size = vocab_size + 1
        padded, places = _padded(documents, vocab_size)
        require(
            len(places),
            "a document of at least two tokens to count n-grams in",
            f"{len(documents)} documents without",
            error=CorpusError,
            field="documents",
        )
        pairs, pair = np.unique(padded[places - 2] * size + padded[places - 1], return_inverse=True)
        triples, triple_counts = np.unique(pair * size + padded[places], return_counts=True)
        doubles, double_counts = np.unique(
            pairs[triples // size] % size * size + triples % size, return_counts=True
        )
        singles, single_counts = np.unique(doubles % size, return_counts=True)
        return cls(
            vocab_size=vocab_size,
            pairs=pairs,
            unigrams=_Level.of(singles, single_counts, size, 1),
            bigrams=_Level.of(doubles, double_counts, size, size),
            trigrams=_Level.of(triples, triple_counts, size, len(pairs)),
        )

    def surprisal(self, ids: np.ndarray) -> np.ndarray:
        """[n] float64: -ln p(token | the two before it), in nats; NaN for the first token, which
        nothing comes before.
        """
        return self.surprisals([ids])[0]

    def surprisals(self, documents: Documents) -> list[np.ndarray]:
        """``surprisal`` of each document, all at once."""
        padded, places = _padded(documents, self.vocab_size)
        before, last, token = padded[places - 2], padded[places - 1], padded[places]
        pair = _find(self.pairs, before * (self.vocab_size + 1) + last)
        unigram = self.unigrams.extend(np.zeros_like(token), token, 1 / self.vocab_size)
        trigram = self.trigrams.extend(pair, token, self.bigrams.extend(last, token, unigram))
        return _unpadded(-np.log(trigram), places, documents)


def ngram_surprisal(
    documents: Documents,
    vocab_size: int,
    folds: int = 2,
    seed: int = 0,
    groups: Sequence[int] | np.ndarray | None = None,
) -> list[np.ndarray]:
    """Cross-fitted trigram surprisal of each token, in nats.

    Args:
        documents: [n] arrays of ids, as ``TokenizedDocument.ids``.
        folds: the documents are divided at random into so many parts; each is scored by the n-grams
            of all the others.
        groups: one number for each entry of ``documents``; entries with the same number (excerpts
            of one document) stay in one part.

    Returns [n] float64 arrays, NaN at the first token of each. Raises ``CorpusError`` for fewer
    documents than folds.
    """
    return _cross_fit(
        documents, folds, seed, lambda others: NgramModel.fit(others, vocab_size).surprisals, groups
    )


def ngram_halves(
    documents: Documents,
    vocab_size: int,
    folds: int = 2,
    seed: int = 0,
    groups: Sequence[int] | np.ndarray | None = None,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Two measurements of ``ngram_surprisal`` with independent errors: each by one half of the
    documents whose n-grams score a token. Their correlation shows how reliable it is.

    Arguments as of ``ngram_surprisal``; where only one document scores, it is both halves.
    """

    def half(first: int) -> list[np.ndarray]:
        return _cross_fit(
            documents,
            folds,
            seed,
            lambda others: NgramModel.fit(others[first::2] or others, vocab_size).surprisals,
            groups,
        )

    return half(0), half(1)


def unigram_surprisal(
    documents: Documents, vocab_size: int, folds: int = 2, seed: int = 0
) -> list[np.ndarray]:
    """Cross-fitted -ln of each token's share of the other documents, each id counted once more than
    it was seen; as ``ngram_surprisal``.
    """

    def fit(others: Documents) -> Callable[[Documents], list[np.ndarray]]:
        padded, places = _padded(others, vocab_size)
        counts = np.bincount(padded[places], minlength=vocab_size) + 1
        surprisal = -np.log(counts / counts.sum())

        def score(held_out: Documents) -> list[np.ndarray]:
            padded, places = _padded(held_out, vocab_size)
            return _unpadded(surprisal[padded[places]], places, held_out)

        return score

    return _cross_fit(documents, folds, seed, fit)


def difficulty_columns(
    documents: "Sequence[TokenizedDocument]", vocab_size: int, folds: int = 2, seed: int = 0
) -> "pl.DataFrame":
    """The difficulties of tokens that need no model, one row a token.

    Returns:
        [doc, pos, ngram_loss, frequency, surprisal_q]: cross-fitted trigram surprisal and -ln of
            the cross-fitted share of the id, in
        nats, both null for the first token of a document; and the decile of ``ngram_loss`` over all
        tokens, 0 the easiest.
    """
    import polars as pl  # slow to import, and text alone does not need it

    ids = [document.ids for document in documents]
    surprisal = np.concatenate(ngram_surprisal(ids, vocab_size, folds, seed))
    frame = pl.DataFrame(
        {
            "doc": np.repeat(
                [document.index for document in documents], [len(row) for row in ids]
            ).astype(np.uint32),
            "pos": np.concatenate([np.arange(len(row), dtype=np.uint32) for row in ids]),
            "ngram_loss": surprisal.astype(np.float32),
            "frequency": np.concatenate(unigram_surprisal(ids, vocab_size, folds, seed)).astype(
                np.float32
            ),
            "surprisal_q": surprisal_decile(surprisal),
        }
    )
    return frame.with_columns(
        pl.col(pl.Float32).fill_nan(None),
        pl.when(pl.col("surprisal_q") < NUM_DECILES).then("surprisal_q"),
    )


def surprisal_decile(surprisal: np.ndarray) -> np.ndarray:
    """[n] uint8: tenth of the known values that each belongs to, 0 the lowest; equal values share
    one; 10 where it is NaN.
    """
    decile = np.full(len(surprisal), NUM_DECILES, dtype=np.uint8)
    known = np.isfinite(surprisal)
    ordered = np.sort(surprisal[known])
    middle = np.searchsorted(ordered, surprisal[known], "left") + np.searchsorted(
        ordered, surprisal[known], "right"
    )
    decile[known] = np.minimum(middle * NUM_DECILES / (2 * max(len(ordered), 1)), NUM_DECILES - 1)
    return decile


def fold_of_each(documents: int, folds: int, seed: int) -> np.ndarray:
    """[documents] fold 0 to ``folds - 1`` of each, even in size and drawn by ``seed``.

    Raises ``CorpusError`` for fewer than two folds, and for fewer documents than folds.
    """
    require(
        2 <= folds <= documents,
        "at least 2 folds, and a document for each",
        f"{count_of(folds, 'fold')} of {count_of(documents, 'document')}",
        "more documents" if folds > 1 else "2 folds",
        error=CorpusError,
        field="folds",
    )
    return np.random.default_rng(seed).permutation(documents) % folds


def _cross_fit(
    documents: Documents,
    folds: int,
    seed: int,
    fit: Callable[[Documents], Callable[[Documents], list[np.ndarray]]],
    groups: Sequence[int] | np.ndarray | None = None,
) -> list[np.ndarray]:
    member = (
        np.arange(len(documents))
        if groups is None
        else np.unique(np.asarray(groups), return_inverse=True)[1]
    )
    number = int(member.max(initial=-1)) + 1
    part = fold_of_each(number, folds, seed)[member]
    scored: dict[int, np.ndarray] = {}
    for fold in range(folds):
        inside = np.flatnonzero(part == fold).tolist()
        score = fit([documents[index] for index in np.flatnonzero(part != fold).tolist()])
        scored |= zip(inside, score([documents[index] for index in inside]), strict=True)
    return [scored[index] for index in range(len(documents))]


def _padded(documents: Documents, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """All ids in one int64 row, the id ``vocab_size`` before each document, and the places in it
    that are predicted.
    """
    lengths = np.array([len(document) for document in documents], dtype=np.int64)
    pads = np.cumsum(lengths + 1) - lengths - 1
    padded = np.full(int(lengths.sum()) + len(lengths), vocab_size, dtype=np.int64)
    is_token = np.ones(len(padded), dtype=bool)
    is_token[pads] = False
    if len(padded) > len(lengths):
        ids = np.concatenate(documents)
        if ids.min() < 0 or ids.max() >= vocab_size:
            raise CorpusError(
                expected(
                    f"token ids in 0..{vocab_size - 1}",
                    f"{ids.min()}..{ids.max()}",
                    "the vocab_size of the tokenizer",
                ),
                field="token_ids",
            )
        padded[is_token] = ids
    is_predicted = is_token.copy()
    is_predicted[pads[lengths > 0] + 1] = False
    return padded, np.flatnonzero(is_predicted)


def _unpadded(values: np.ndarray, places: np.ndarray, documents: Documents) -> list[np.ndarray]:
    """The values at the predicted places, as one array a document with NaN at its first token."""
    lengths = [len(document) for document in documents]
    row = np.full(sum(lengths) + len(lengths), np.nan)
    row[places] = values
    ends = np.cumsum(np.array(lengths, dtype=np.int64) + 1)
    return [row[end - length : end] for end, length in zip(ends.tolist(), lengths, strict=True)]
