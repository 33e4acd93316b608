"""Routers whose answer is known, on the default corpus and on synthetic ones: the estimator must
find the answer and the words.
"""

from collections import Counter

import numpy as np
import polars as pl
import pytest
from simulated_routers import (
    WORLDS,
    Corpus,
    World,
    simulate_corpus,
    simulate_router,
    truth,
)

from moe_lab.analysis import difficulty_association
from moe_lab.errors import AnalysisError
from moe_lab.text import TextConfig, load_tokens, ngram_surprisal, token_classes


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """The default corpus: every other document, with cross-fitted trigram surprisal and lexer
    classes.
    """
    text = load_tokens(TextConfig(vocab_size=4096), tmp_path_factory.mktemp("cache"))
    documents = [
        document
        for split in ("train", "validation", "reference")
        for document in text.documents(split)
    ]
    surprisal = ngram_surprisal([document.ids for document in documents], 4096)
    kept = range(0, len(documents), 2)
    classes = [
        token_classes(documents[index], text.tokenizer).select("doc", "pos", "token_id", "lexer")
        for index in kept
    ]
    return pl.concat(classes).with_columns(
        difficulty=pl.Series(np.concatenate([surprisal[index] for index in kept]))
    )


SEED = 20_261


def found_in(corpus, name, seed):
    tokens = simulate_router(corpus, WORLDS[name], "difficulty", seed)
    frame = tokens.drop("share").with_columns(layer=pl.lit(0))
    row = (
        difficulty_association(frame, "difficulty", seed=seed, resamples=500)
        .filter(pl.col("align") == "input")
        .row(0, named=True)
    )
    return row, truth(tokens, "difficulty")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["A", "B", "C", "D", "E"])
def test_the_five_worlds_on_the_default_corpus(corpus, name):
    row, known = found_in(corpus, name, SEED)
    assert row["rho_token"] == pytest.approx(known, abs=0.01)
    if name in "AB":
        assert abs(row["rho_token"]) < 0.01
        assert row["verdict"] in ("frequency-driven", "identity-driven", "no material association")
    if name == "A":
        assert row["rho_raw"] > 0.1
        assert row["verdict"] == "frequency-driven"
    if name == "C":
        assert abs(row["rho_token"]) < 0.03
        assert abs(row["rho_strata"]) < 0.01
        assert row["verdict"] not in ("difficulty-aligned", "inverted")
    if name == "D":
        assert row["rho_raw"] > 3 * row["rho_token"] > 0
        assert row["verdict"] == "difficulty-aligned"
    if name == "E":
        assert row["rho_token"] < -0.12 < 0 < row["rho_raw"]
        assert row["verdict"] == "inverted"


def verdict_of(world, seed, corpus):
    tokens = simulate_router(simulate_corpus(corpus, seed), world, "difficulty", seed + 1)
    frame = tokens.with_columns(layer=pl.lit(0))
    return difficulty_association(frame, "difficulty", seed=seed, resamples=300).filter(
        pl.col("align") == "input"
    )["verdict"][0]


NEITHER = {"frequency-driven", "identity-driven", "no material association"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("effect", "right"),
    [
        (0.0, NEITHER),
        (0.05, {"difficulty-aligned"}),
        (0.10, {"difficulty-aligned"}),
        (-0.10, {"inverted"}),
    ],
)
def test_verdicts_on_synthetic_corpora_are_right(effect, right):
    """The reduced form of ``python experiments/difficulty.py calibrate``: effects are correlations
    within token ids.
    """
    world = World(frequency=0.4, identity=0.3, difficulty=0.64 * effect, document=0.2, level=0.2)
    corpus = Corpus(documents=260, tokens=300, vocabulary=800, ties=True)
    found = Counter(verdict_of(world, SEED + 7 * draw, corpus) for draw in range(8))
    assert sum(found[verdict] for verdict in right) >= 7, found
    assert effect > 0 or not found["difficulty-aligned"], found


def test_the_known_answer_does_not_depend_on_a_draw():
    """The formula of ``truth`` against the mean of many draws."""
    tokens = simulate_corpus(Corpus(documents=100, tokens=100, vocabulary=50), seed=1)
    world = World(frequency=0.5, difficulty=0.2)
    drawn = [
        simulate_router(tokens, world, "difficulty", seed).with_columns(layer=pl.lit(0))
        for seed in range(20)
    ]
    rhos = [
        difficulty_association(one, "difficulty", min_documents=2, resamples=100)["rho_token"][0]
        for one in drawn
    ]
    assert truth(drawn[0], "difficulty") == pytest.approx(truth(drawn[5], "difficulty"), abs=1e-12)
    assert np.mean(rhos) == pytest.approx(
        truth(drawn[0], "difficulty"), abs=4 * float(np.std(rhos)) / 20**0.5
    )


def test_a_world_of_classes_needs_classes():
    tokens = simulate_corpus(Corpus(documents=3, tokens=80), seed=0)
    with pytest.raises(
        AnalysisError,
        match=r"expected a column lexer for a router that looks at classes, "
        r"got doc, pos, token_id, difficulty",
    ):
        simulate_router(tokens, WORLDS["C"], "difficulty", 0)
