"""Every symbol and coined word that a page shows is defined in docs/glossary.md."""

import html
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from report_fixtures import PAGES

from moe_lab.report import figures
from moe_lab.report.glossary import glossary
from moe_lab.report.sources import RESULT_COLUMNS

COINED = """
    active parameters, adjusted mean, aligned, arm, balancedness, bits per byte, capacity,
    clairvoyant, co-activation, confound, convention A, cross-fitted, dead expert, decile,
    document bootstrap, effective documents, elasticity, fair share, gain, gate, gate mass,
    gate weight, hash router, held out, hinge, hit rate, hypergeometric, inverted, lift, load,
    logits, margin, marginal gain, nats, nats per token, null, plateau, polarisation, power law,
    reallocation regret, router entropy, r*, seed effect, selection bias, shared expert, slot,
    sparsity, sparsity wall, specialisation, surprisal, token class, wall, below margin, no wall,
    cannot tell, zero-computation expert, zero-compute expert
"""
"""Words with a meaning of their own here, or that a reader from outside the field does not know."""
SYMBOL = re.compile(
    r"(?<![\w/.\-\u2026])(?:[A-Za-z]\w*_\w+|[A-Z]{2,}[a-z]?|[A-Z][a-z]+[A-Z]\w*|[A-Za-z]\d{1,2}"
    r"|[A-Za-z]\*|d\w+/d\w+|\w*[\u0391-\u03c9]\w*)(?![\w/])"
)
"""What looks like a symbol: underscores, capitals, a letter with a number, derivatives, Greek."""
NAMES = """
    moe_lab JavaScript Parquet JSON HTML SVG CSV CPU GPU GB MB FLOPs MoE RUN K2 K20 BASE LongCat
    OLMoE DeepSeek sees_later_tokens freq_band position_band
"""
"""Names of programs, models, units and columns of the data."""
COLUMNS = frozenset(RESULT_COLUMNS) | frozenset(figures.__all__) | {"coloured_text"}


def shown(page: Path) -> str:
    """The text of a page without its commands, its documents and its own glossary."""
    text = page.read_text(encoding="utf-8")
    text = re.sub(r"<(script|style|code|pre|svg)\b.*?</\1>", " ", text, flags=re.S)
    text = re.sub(r'<div class="text".*?</div>', " ", text, flags=re.S)
    text = re.sub(r'<section id="glossary".*?</section>', " ", text, flags=re.S)
    text = re.sub(r"</?(?:abbr|a|em|strong|b|i)\b[^>]*>", "", text)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", text)).split())


def key(word: str) -> str:
    return word.lower().replace("_", " ")


DEFINED = {key(spelling) for term in glossary() for spelling in term.spellings}


def coined_in(text: str) -> set[str]:
    """The words of ``COINED`` in ``text``, in the singular or the plural."""
    words = [word.strip() for word in COINED.replace("\n", " ").split(",")]
    found = (rf"(?<!\w){re.escape(word)}s?(?!\w)" for word in words)
    return {
        word
        for word, here in zip(words, found, strict=True)
        if re.search(here, text, re.IGNORECASE)
    }


@pytest.mark.parametrize("kind", ["failures", *PAGES])
def test_every_coined_word_and_symbol_of_a_page_is_in_the_glossary(
    page_of: Callable[[str], Path], kind: str
) -> None:
    text = shown(page_of(kind))
    symbols = set(SYMBOL.findall(text)) - set(NAMES.split()) - COLUMNS
    undefined = {word for word in symbols | coined_in(text) if key(word) not in DEFINED}
    assert undefined == set()


def test_words_that_are_not_defined_are_found() -> None:
    text = "Arms differ in K_e, dL/dlnC, MaxVio, W4, \u0394AICc and r*; workload is one word."
    assert set(SYMBOL.findall(text)) == {"K_e", "dL/dlnC", "MaxVio", "W4", "\u0394AICc", "r*"}
    assert coined_in(text) == {"arm", "r*"}
