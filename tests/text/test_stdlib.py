"""The default corpus against shares and surprisals measured once on another interpreter's library
(CPython 3.11, BPE of 4096, 504 files).

Versions differ by files that came and went, hence the wide tolerances.
"""

import numpy as np
import polars as pl
import pytest

from moe_lab.text import (
    Split,
    TextConfig,
    TokenizedText,
    load_tokens,
    ngram_surprisal,
    token_classes,
    unigram_surprisal,
)

pytestmark = pytest.mark.slow

# class of at least 2 % of tokens: (share of tokens, trigram nats per token, share that continues a
# word)
MEASURED = {
    "docstring": (0.190, 5.30, 0.21),
    "name_other": (0.171, 5.70, 0.44),
    "comment": (0.130, 5.25, 0.26),
    "string_body": (0.091, 5.75, 0.38),
    "newline_indent": (0.076, 2.86, 0.0),
    "name_attr": (0.067, 5.14, 0.66),
    "delimiter": (0.061, 1.91, 0.0),
    "bracket": (0.061, 3.17, 0.0),
    "keyword": (0.046, 2.73, 0.0),
    "operator": (0.030, 3.64, 0.0),
    "name_def": (0.024, 4.72, 0.73),
}
MEASURED_SPREAD = {
    "token_id": 0.474,
    "freq_band": 0.285,
    "lexer": 0.108,
    "subword": 0.077,
    "copy": 0.029,
}


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> TokenizedText:
    return load_tokens(TextConfig(vocab_size=4096), tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def frame(text) -> pl.DataFrame:
    documents = [document for split in Split for document in text.documents(split)]
    ids = [document.ids for document in documents]
    trigram, unigram = (
        score(ids, text.tokenizer.vocab_size) for score in (ngram_surprisal, unigram_surprisal)
    )
    counts = text.counts()
    columns = ["pos", "token_id", *MEASURED_SPREAD.keys() - {"token_id"}]
    return pl.concat(
        token_classes(document, text.tokenizer, counts)
        .select(columns)
        .with_columns(trigram=pl.Series(three), unigram=pl.Series(one))
        for document, three, one in list(zip(documents, trigram, unigram, strict=True))[::3]
    ).filter(pl.col("pos") > 0)


def test_a_token_holds_between_three_and_four_bytes(text):
    assert text.tokenizer.token_lengths[text.train].mean() == pytest.approx(3.6, abs=0.3)


def test_surprisal_is_what_was_measured(frame):
    assert frame["unigram"].mean() == pytest.approx(6.64, abs=0.3)
    assert frame["trigram"].mean() == pytest.approx(4.66, abs=0.5)


def test_lexer_classes_have_the_shares_surprisals_and_continuations_measured(frame):
    found = frame.group_by("lexer").agg(
        share=pl.len() / len(frame),
        nats=pl.col("trigram").mean(),
        continued=(pl.col("subword") == "continuation").mean(),
    )
    rows = {name: values for name, *values in found.rows()}
    for name, (share, nats, continued) in MEASURED.items():
        assert rows[name][0] == pytest.approx(share, abs=0.04), name
        assert rows[name][1] == pytest.approx(nats, abs=0.7), name
        assert rows[name][2] == pytest.approx(continued, abs=0.12), name


def test_token_identity_explains_most_of_what_classes_explain(frame):
    """Correlation ratio: variance of the class means over the variance of the surprisal."""
    mean, variance = frame["trigram"].mean(), np.var(frame["trigram"].to_numpy())
    for column, measured in MEASURED_SPREAD.items():
        groups = frame.group_by(column).agg(size=pl.len(), mean=pl.col("trigram").mean())
        between = ((groups["mean"] - mean) ** 2 * groups["size"]).sum() / len(frame)
        assert between / variance == pytest.approx(measured, abs=0.06), column
