"""Simulated routers whose answer is known, to test the analysis of difficulty.

A router spends ``Binomial(slots, p)`` experts on a token, where ``logit p`` is a sum of what it
looks at: the frequency of the token, the token id by an arbitrary table, the class of the token,
the token's difficulty beyond what its id makes expected, and a document's own level. Worlds A to E
are the five of the specification (docs/difficulty.md); ``truth`` gives the correlation within token
ids that such a router has, from the binomial itself and not from a sample.
"""

from dataclasses import dataclass, replace

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy.special import expit
from scipy.stats import binom

from moe_lab.analysis.difficulty import difficulty_association
from moe_lab.analysis.document_bootstrap import Floats
from moe_lab.errors import AnalysisError, expected

SLOTS = 12
EFFECTS = (0.0, 0.05, 0.10, -0.10)


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
    ids, _ = codes_of(tokens["token_id"])
    hardness = tokens[difficulty].cast(pl.Float64).fill_nan(None).to_numpy()
    logit = np.full(tokens.height, world.level)
    if world.frequency:
        logit += world.frequency * standard(-np.log(np.bincount(ids))[ids])
    if world.identity:
        logit += world.identity * standard(generator.normal(size=int(ids.max()) + 1)[ids])
    if world.lexer:
        if "lexer" not in tokens.columns:
            raise AnalysisError(
                expected(
                    "a column lexer for a router that looks at classes", ", ".join(tokens.columns)
                )
            )
        classes, number = codes_of(tokens["lexer"])
        logit += world.lexer * standard(generator.normal(size=number)[classes])
    if world.difficulty:
        logit += world.difficulty * standard(beyond_identity(ids, hardness))
    if world.document:
        documents, number = codes_of(tokens["doc"])
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
    share, (ids, _) = used["share"].to_numpy(), codes_of(used["token_id"])
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
    table = standard(-np.log(share)) + np.random.default_rng(corpus.language).normal(
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


def codes_of(column: pl.Series) -> tuple[NDArray[np.int64], int]:
    values = column.cast(pl.String) if column.dtype in (pl.Categorical, pl.Enum) else column
    distinct, code = np.unique(values.to_numpy(), return_inverse=True)
    return code, len(distinct)


def standard(values: Floats) -> Floats:
    spread = values.std()
    return (values - values.mean()) / spread if spread > 0 else np.zeros_like(values)


CALIBRATION = Corpus(documents=260, tokens=300, vocabulary=800, ties=True)


def coverage(corpora: int, seed: int, resamples: int = 1000) -> pl.DataFrame:
    """[draw, rho_token, lo, hi, naive_lo, naive_hi, rho_raw, raw_lo, raw_hi]: one row for each
    simulated corpus of one language.

    Documents differ in their mean difficulty, in the level of compute, and in how strongly compute
    follows difficulty, as documents do.
    """
    # What the language expects of an id: the same for every corpus.
    language = simulate_corpus(replace(CALIBRATION, documents=2000), 987_654)
    means = language.group_by("token_id").agg(expected=pl.col("difficulty").mean())
    rows = []
    for draw in range(corpora):
        tokens = simulate_corpus(CALIBRATION, seed + draw)
        generator = np.random.default_rng([seed, draw])
        slope = 0.08 + 0.12 * generator.normal(size=CALIBRATION.documents)
        level = 0.3 * generator.normal(size=CALIBRATION.documents)
        doc, ids = tokens["doc"].to_numpy(), tokens["token_id"].to_numpy()
        hard = _beyond(tokens, means).to_numpy()
        logit = 0.35 * np.log(1 + ids / 20) - 1 + slope[doc] * hard + level[doc]
        spent = generator.binomial(12, 1 / (1 + np.exp(-logit)))
        frame = tokens.with_columns(layer=pl.lit(0), ffn_count=spent)
        found = difficulty_association(
            frame, "difficulty", seed=draw, resamples=resamples, details=True
        ).row(0, named=True)
        names = {
            "rho_token": "rho_token",
            "lo": "rho_token_lo",
            "hi": "rho_token_hi",
            "naive_lo": "rho_token_naive_lo",
        }
        names |= {
            "naive_hi": "rho_token_naive_hi",
            "rho_raw": "rho_raw",
            "raw_lo": "rho_raw_lo",
            "raw_hi": "rho_raw_hi",
        }
        rows.append({"draw": draw} | {name: found[source] for name, source in names.items()})
    return pl.DataFrame(rows)


def effective_corpus(documents: int, layout: str, seed: int) -> pl.DataFrame:
    """[doc, pos, token_id, difficulty, layer, ffn_count] of about ``documents`` effective ones.

    Args:
        layout: ``equal``; ``giant``, twice as many and one so long that they weigh like
            ``documents``; ``repeated``, each document three times.

    Documents differ in how strongly compute follows difficulty, and in its level.
    """
    generator = np.random.default_rng([documents, len(layout), seed])
    number = 2 * documents if layout == "giant" else documents
    corpus = Corpus(documents=number, tokens=100, vocabulary=200, ties=True)
    tokens = simulate_corpus(corpus, int(generator.integers(2**31)))
    if layout == "giant":
        # (D + g)^2 = n (D + g^2) for D documents beside one of g times their length
        length = (
            2 * number + np.sqrt(4 * number**2 + 4 * (documents - 1) * number * documents)
        ) / (2 * (documents - 1))
        long = simulate_corpus(
            replace(corpus, documents=1, tokens=round(100 * length)), int(generator.integers(2**31))
        )
        tokens = pl.concat([tokens, long.with_columns(doc=pl.lit(number, pl.Int64))])
    doc = tokens["doc"].to_numpy()
    slope = 0.15 + 0.12 * generator.normal(size=doc.max() + 1)
    level = 0.3 * generator.normal(size=doc.max() + 1)
    hard = beyond_identity(tokens["token_id"].to_numpy(), tokens["difficulty"].to_numpy())
    spent = generator.binomial(SLOTS, expit(slope[doc] * hard + level[doc]))
    tokens = tokens.with_columns(layer=pl.lit(0), ffn_count=spent)
    copies = 3 if layout == "repeated" else 1
    return pl.concat([tokens.with_columns(doc=pl.col("doc") + 10_000 * k) for k in range(copies)])


def coverage_by_documents(
    draws: int, seed: int, sizes: tuple[int, ...] = (5, 10, 20, 50, 200)
) -> pl.DataFrame:
    """[documents, layout, draws, n_effective, sd, covered]: how often the 95 % interval of
    ``rho_token`` holds the mean of its cell's draws.
    """
    rows = []
    for documents in sizes:
        for layout in ("equal", "giant", "repeated"):
            found = pl.concat(
                difficulty_association(
                    effective_corpus(documents, layout, seed + draw),
                    "difficulty",
                    seed=draw,
                    resamples=400,
                    min_documents=2,
                    details=True,
                ).filter(pl.col("align") == "input")
                for draw in range(draws)
            )
            true = found["rho_token"].mean()
            covered = found.select(
                (pl.col("rho_token_lo") <= true) & (true <= pl.col("rho_token_hi"))  # type: ignore
            ).to_series()
            rows.append(
                {
                    "documents": documents,
                    "layout": layout,
                    "draws": draws,
                    "n_effective": found["n_effective"].mean(),
                    "sd": found["rho_token"].std(),
                    "covered": covered.mean(),
                }
            )
    return pl.DataFrame(rows)


def _beyond(tokens: pl.DataFrame, means: pl.DataFrame) -> pl.Series:
    joined = tokens.join(means, on="token_id", how="left", maintain_order="left")
    return (joined["difficulty"] - joined["expected"]).fill_null(0.0)


def calibrate(
    draws: int, seed: int, effects: tuple[float, ...] = EFFECTS, resamples: int = 500
) -> pl.DataFrame:
    """[effect, draw, known, rho_token, verdict]: routers that follow difficulty within ids by a
    known correlation.
    """
    rows = []
    for effect in effects:
        for draw in range(draws):
            world = World(
                frequency=0.4, identity=0.3, difficulty=0.64 * effect, document=0.2, level=0.2
            )
            tokens = simulate_router(
                simulate_corpus(CALIBRATION, seed + draw), world, "difficulty", seed + draw + 1
            )
            known = truth(tokens, "difficulty")
            frame = tokens.with_columns(layer=pl.lit(0))
            found = difficulty_association(frame, "difficulty", seed=draw, resamples=resamples).row(
                0, named=True
            )
            rows.append(
                {
                    "effect": effect,
                    "draw": draw,
                    "known": known,
                    "rho_token": found["rho_token"],
                    "verdict": found["verdict"],
                }
            )
    return pl.DataFrame(rows)
