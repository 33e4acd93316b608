"""Simulated routers whose answer is known: what a test of difficulty must get right before it is
believed.

A router spends ``Binomial(slots, p)`` experts on a token, where ``logit p`` is a sum of what it
looks at: the frequency of the token, the token id by an arbitrary table, the class of the token,
the token's difficulty beyond what its id makes expected, and a document's own level. Worlds A to E
are the five of the specification (docs/difficulty.md); ``truth`` gives the correlation within token
ids that such a router has, from the binomial itself and not from a sample.
"""

from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy.special import expit
from scipy.stats import binom

from moe_lab.analysis.document_bootstrap import Floats
from moe_lab.errors import AnalysisError, expected

SLOTS = 12


@dataclass(frozen=True)
class World:
    """Weights of what a router looks at, each on a quantity of standard deviation 1 over tokens.

    Attributes:
        frequency: of -log of the id's count.
        identity: of an arbitrary table over ids.
        lexer: of an arbitrary table over the classes of column ``lexer``.
        difficulty: of difficulty less its mean over the tokens of the id.
        document: of a level drawn for each document.
        level: logit of the mean share of slots.
    """

    frequency: float = 0.0
    identity: float = 0.0
    lexer: float = 0.0
    difficulty: float = 0.0
    document: float = 0.0
    level: float = 0.0


WORLDS: dict[str, World] = {
    "A": World(frequency=0.35),
    "B": World(identity=0.6),
    "C": World(lexer=0.2),
    "D": World(frequency=0.6, difficulty=0.07),
    "E": World(frequency=0.3, difficulty=-0.11),
}
"""A: frequency alone. B: an arbitrary number for each id. C: the class alone. D: frequency, and a
little more on hard tokens.
E: frequency, and less on hard tokens, so that the raw correlation has the wrong sign.
"""


def simulate_router(tokens: pl.DataFrame, world: World, difficulty: str, seed: int) -> pl.DataFrame:
    """``tokens`` [doc, pos, token_id, <difficulty>, ...] with the columns ``ffn_count`` (u8) and
    ``share`` (p of the binomial) added.

    Tokens without a difficulty count as average ones. Raises ``AnalysisError`` where the world
    needs a class and there is no ``lexer``.
    """
    generator = np.random.default_rng(seed)
    ids, _ = _codes(tokens["token_id"])
    hardness = tokens[difficulty].cast(pl.Float64).fill_nan(None).to_numpy()
    logit = np.full(tokens.height, world.level)
    if world.frequency:
        logit += world.frequency * _standard(-np.log(np.bincount(ids))[ids])
    if world.identity:
        logit += world.identity * _standard(generator.normal(size=int(ids.max()) + 1)[ids])
    if world.lexer:
        if "lexer" not in tokens.columns:
            raise AnalysisError(
                expected(
                    "a column lexer for a router that looks at classes", ", ".join(tokens.columns)
                )
            )
        classes, number = _codes(tokens["lexer"])
        logit += world.lexer * _standard(generator.normal(size=number)[classes])
    if world.difficulty:
        logit += world.difficulty * _standard(beyond_identity(ids, hardness))
    if world.document:
        documents, number = _codes(tokens["doc"])
        logit += world.document * generator.normal(size=number)[documents]
    share = expit(logit)
    return tokens.with_columns(
        ffn_count=pl.Series(generator.binomial(SLOTS, share).astype(np.uint8)),
        share=pl.Series(share),
    )


def truth(tokens: pl.DataFrame, difficulty: str) -> float:
    """The correlation within token ids that ``share`` implies at these tokens, for
    ``align="input"`` without position 0.

    Both rank transforms and the mean over an id are taken in expectation over the binomial, so no
    draw of ``ffn_count`` enters.
    """
    used = tokens.filter(
        (pl.col("pos") > 0) & pl.col(difficulty).is_not_null() & pl.col(difficulty).is_not_nan()
    )
    share, (ids, _) = used["share"].to_numpy(), _codes(used["token_id"])
    levels = np.arange(SLOTS + 1)
    marginal = np.zeros(SLOTS + 1)
    chances = [binom.pmf(level, SLOTS, share) for level in levels]
    marginal[:] = [chance.mean() for chance in chances]
    midrank = np.cumsum(marginal) - marginal / 2
    mean, square = (np.einsum("k,kn->n", midrank**power, np.stack(chances)) for power in (1, 2))
    counts = np.bincount(ids)[ids]
    ranks = used[difficulty].rank("average").to_numpy() / used.height
    hard, spent = beyond_identity(ids, ranks), beyond_identity(ids, mean)
    # The variance of a token's own draw, less what the mean over its id takes of it.
    noise = ((square - mean**2) * (1 - 1 / counts)).sum()
    return float((hard @ spent) / np.sqrt((hard @ hard) * (spent @ spent + noise)))


@dataclass(frozen=True)
class Corpus:
    """Sizes of a synthetic corpus: Zipf ids, difficulty from id, document and a
    neighbour-to-neighbour memory.

    Attributes:
        documents, tokens: how many, and their mean length (lengths vary by about a half).
        vocabulary: number of ids; an id's share is proportional to 1 / rank.
        by_id, by_document: standard deviations of the parts of difficulty that the id and the
            document make, beside 1 for the token.
        memory: correlation of a token's own part with its neighbour's.
        ties: whether difficulty is rounded to one decimal.
        language: seed of what every corpus of the language shares: how hard each id is.
    """

    documents: int = 300
    tokens: int = 300
    vocabulary: int = 1000
    by_id: float = 1.0
    by_document: float = 0.3
    memory: float = 0.3
    ties: bool = False
    language: int = 0


def simulate_corpus(corpus: Corpus, seed: int) -> pl.DataFrame:
    """[doc, pos, token_id, difficulty]; rare ids are harder, as in text."""
    generator = np.random.default_rng(seed)
    lengths = np.maximum(
        generator.gamma(4.0, corpus.tokens / 4, size=corpus.documents).astype(np.int64), 70
    )
    doc = np.repeat(np.arange(corpus.documents), lengths)
    pos = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    share = 1 / np.arange(1, corpus.vocabulary + 1)
    ids = generator.choice(corpus.vocabulary, size=len(doc), p=share / share.sum())
    table = _standard(-np.log(share)) + np.random.default_rng(corpus.language).normal(
        size=corpus.vocabulary
    )
    own = generator.normal(size=len(doc))
    remembered = corpus.memory * np.append(0, own[:-1]) + np.sqrt(1 - corpus.memory**2) * own
    level = corpus.by_document * generator.normal(size=corpus.documents)
    difficulty = corpus.by_id * table[ids] / np.sqrt(2) + remembered + level[doc]
    return pl.DataFrame(
        {
            "doc": doc,
            "pos": pos,
            "token_id": ids,
            "difficulty": np.round(difficulty, 1) if corpus.ties else difficulty,
        }
    )


def beyond_identity(ids: NDArray, values: Floats) -> Floats:
    """Values less the mean over the tokens of the same id; 0 where there is no value."""
    known = np.isfinite(values)
    counts = np.maximum(np.bincount(ids, weights=known), 1)
    means = np.bincount(ids, weights=np.where(known, values, 0)) / counts
    return np.where(known, values - means[ids], 0)


def _codes(column: pl.Series) -> tuple[NDArray[np.int64], int]:
    values = column.cast(pl.String) if column.dtype in (pl.Categorical, pl.Enum) else column
    distinct, code = np.unique(values.to_numpy(), return_inverse=True)
    return code, len(distinct)


def _standard(values: Floats) -> Floats:
    spread = values.std()
    return (values - values.mean()) / spread if spread > 0 else np.zeros_like(values)
