"""``moe-lab difficulty`` on a tiny trained run and on its trace, and the section of the report."""

import json
import re

import numpy as np
import polars as pl
import pytest

from moe_lab.analysis.difficulty.difficulty_verdict import study_verdict
from moe_lab.cli import main
from moe_lab.model import DecoderConfig, MoEConfig
from moe_lab.report import write_report
from moe_lab.routing import RouterConfig
from moe_lab.runs.done_file import digests_of
from moe_lab.text import TextConfig, tokenize_documents
from moe_lab.training import RunConfig, train
from moe_lab.training.reference import dense_twins

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "while",
    "42",
    "dogs",
    "ran",
    "(fast)",
    "=",
    "home",
    ".",
    ",",
    "def",
    "return",
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    generator = np.random.default_rng(0)
    for number in range(40):
        text = " ".join(generator.choice(WORDS, 60)) + f" {number}\n"
        (folder / f"d{number:02}.py").write_text(text)
    return folder


def config_of(corpus, kind="longcat", **router):
    fields = {"kind": kind, "num_experts": 4, "top_k": 2} | router
    moe = MoEConfig(d_model=16, d_expert=16, router=RouterConfig.from_dict(fields))
    return RunConfig(
        name="tiny",
        model=DecoderConfig(
            vocab_size=257, num_layers=2, d_model=16, num_heads=1, context_length=32, moe=moe
        ),
        text=TextConfig(corpus=str(corpus), tokenizer="byte"),  # type: ignore[arg-type]
        batch_size=2,
        seq_length=32,
        train_tokens=640,
        eval_excerpt_tokens=128,
    )


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "zero"
    train(config_of(corpus, num_zero_experts=2), folder, cache_dir=tmp_path_factory.mktemp("cache"))
    return folder


@pytest.fixture(scope="module")
def studied(run):
    """The run after ``moe-lab difficulty``."""
    assert main(["difficulty", str(run), "--resamples", "200", "--max-tokens", "100"]) == 0
    return run / "difficulty"


def test_a_run_gets_every_table_and_a_sentence(studied):
    names = {path.stem for path in studied.glob("*.parquet")}
    assert names == {
        "association", "baselines", "budget", "curves", "gain", "gains", "information", "nulls",
        "regret", "variance",
    }  # fmt: skip
    verdict = json.loads((studied / "verdict.json").read_text())
    assert verdict["verdict"] == "inconclusive"
    assert "effective documents of 12; at least 30 are needed" in verdict["sentence"]


def test_only_documents_that_the_run_never_saw_are_judged(studied):
    assert (
        pl.read_parquet(studied / "association.parquet")["n_docs"].max() == 12
    )  # 20 % validation and 10 % reference of 40


def test_the_report_says_why_it_draws_nothing(studied, tmp_path):
    page = write_report(studied.parent, tmp_path / "page.html").read_text()
    assert "Does compute follow difficulty?" in page
    assert "at least 30 are needed" in page
    assert 'id="figure-difficulty_map"' not in page
    assert "would save" in page


def test_with_enough_documents_the_section_is_drawn_in_order(studied, tmp_path, monkeypatch):
    association = pl.read_parquet(studied / "association.parquet")
    judged = association.with_columns(
        verdict=pl.lit("no material association"), note=pl.lit("within the band"), n_docs=200
    )
    judged.write_parquet(studied / "association.parquet")
    ended = (studied / "verdict.json").read_text()
    sealed = json.loads(ended)
    sealed["digests"] = digests_of(studied, sealed["digests"])
    (studied / "verdict.json").write_text(json.dumps(sealed))
    try:
        page = write_report(studied.parent, tmp_path / "page.html").read_text()
    finally:
        association.write_parquet(studied / "association.parquet")
        (studied / "verdict.json").write_text(ended)
    places = [
        page.index(f'id="figure-{name}"')
        for name in ("difficulty_map", "difficulty_curves", "marginal_gain")
    ]
    assert places == sorted(places)
    section = page[page.index('<section id="difficulty"') : places[0]]
    words = re.sub("<[^>]+>", "", section)
    assert "Verdict: no material association. " in words
    assert "no material association in 4" in words


def test_a_bare_trace_is_studied_without_a_model(run, tmp_path, capsys):
    assert (
        main(
            [
                "difficulty",
                str(run / "trace"),
                "--resamples",
                "200",
                "--out",
                str(tmp_path / "out"),
                "--json",
            ]
        )
        == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert found["verdict"] == "inconclusive"
    assert "gains" not in found["tables"]
    assert (tmp_path / "out" / "association.parquet").is_file()


def test_a_fixed_k_is_said_in_words(corpus, tmp_path, capsys):
    train(config_of(corpus, kind="softmax_topk"), tmp_path / "fixed", cache_dir=tmp_path / "cache")
    assert main(["difficulty", str(tmp_path / "fixed"), "--resamples", "200"]) == 0
    text = capsys.readouterr().out
    assert "verdict: static layer" in text
    assert "compute cannot follow difficulty. Which experts a token runs" in text
    assert (
        "Does compute follow difficulty?"
        not in write_report(tmp_path / "fixed", tmp_path / "page.html").read_text()
    )


def test_a_folder_that_is_neither_is_refused_in_one_line(tmp_path, capsys):
    assert main(["difficulty", str(tmp_path)]) == 2
    assert "expected a finished run" in capsys.readouterr().err


def test_the_sentence_names_the_strongest_layer():
    rows = {
        "layer": [0, 1],
        "align": ["input", "target"],
        "rho_raw": [0.3, 0.2],
        "rho_token": [0.01, -0.05],
    }
    rows |= {
        "rho_token_lo": [0.0, -0.06],
        "rho_token_hi": [0.02, -0.04],
        "verdict": ["frequency-driven", "inverted"],
    }
    verdict, sentence = study_verdict(
        pl.DataFrame(rows | {"n_tokens": [10, 2000], "n_docs": [250, 250], "note": ["", "less"]})
    )
    assert verdict == "mixed"
    assert (
        "-0.050 (95 % interval -0.060 to -0.040), at layer 1, the token to be predicted, where the "
        "raw one is +0.200" in sentence
    )


def test_dense_twins_judge_what_they_did_not_read(corpus):
    """A word that one document repeats is hard for the twin that did not train on it, whichever
    fold it fell into.
    """
    from moe_lab.text import load_corpus, train_tokenizer

    documents = load_corpus(str(corpus)).documents
    tokenizer = train_tokenizer(documents, 257, "byte")
    tokenized = tokenize_documents(documents[:8], tokenizer)
    dense = config_of(corpus).replace(
        model=DecoderConfig(
            vocab_size=257, num_layers=1, d_model=16, num_heads=1, context_length=32, d_dense=32
        ),
        train_tokens=4000,
    )
    frame = dense_twins(tokenized, dense, checkpoints=2)
    assert frame["ref_loss"].null_count() == 8
    losses = np.stack(frame["ref_losses"].to_list())
    assert losses.shape[1] == 2
    scored = np.isfinite(losses[:, 0])
    assert losses[scored, 1].mean() < losses[scored, 0].mean() < np.log(257) + 0.5
    assert losses[scored, 1] == pytest.approx(frame["ref_loss"].drop_nulls().to_numpy())
    again = dense_twins(tokenized, dense, checkpoints=2)
    assert again.equals(frame)
