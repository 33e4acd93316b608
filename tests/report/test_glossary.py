"""The glossary on the page: one owner, marked text, names of runs that link to their rows."""

import tomllib
from pathlib import Path

from moe_lab.report.glossary import Marker, Term, glossary, parse_glossary

ROOT = Path(__file__).parents[2]
LOAD = Term("load", "the share of slots that <b>", ("load",))
MARGINS = parse_glossary("""
| term | meaning |
|---|---|
| margin (of a token) | between *scores* |
| margin (of a verdict) | what `pays` |
| K_e, `ffn_count` | real experts |
| W1 to W3 | tests |
| E, `num_experts`, X | all experts |
""")


def test_the_page_of_the_documentation_is_the_one_owner_and_a_wheel_carries_it() -> None:
    assert glossary() == parse_glossary((ROOT / "docs/glossary.md").read_text(encoding="utf-8"))
    assert len(glossary()) > 40
    carried = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    assert carried["targets"]["wheel"]["force-include"]["docs/glossary.md"] == "moe_lab/glossary.md"
    assert not (ROOT / "moe_lab/glossary.md").exists()


def test_rows_give_spellings_senses_and_plain_meanings() -> None:
    spellings = [term.spellings for term in MARGINS]
    assert spellings[2:] == [("K_e", "ffn_count"), ("W1", "W2", "W3"), ("E", "num_experts")]
    assert [term.sense for term in MARGINS[:3]] == ["token", "verdict", ""]
    assert [term.meaning for term in MARGINS[:2]] == ["between scores", "what pays"]
    assert MARGINS[0].anchor == "word-margin-of-a-token"


def test_the_first_use_of_a_term_in_a_text_is_marked_and_all_else_is_escaped() -> None:
    marked = Marker([LOAD], {})
    assert marked("<i>Loads</i> and load, workload, payload/load") == (
        '&lt;i&gt;<abbr title="the share of slots that &lt;b&gt;">Loads</abbr>&lt;/i&gt; and load, '
        "workload, payload/load"
    )
    assert marked.used() == [LOAD]


def test_a_word_of_two_meanings_is_marked_only_in_the_sense_that_is_asked_for() -> None:
    marked = Marker(MARGINS, {})
    assert marked("the margin") == "the margin"
    assert 'title="what pays"' in marked("the margin", "verdict")
    assert 'title="between scores"' in marked("the margin", "token")
    assert [term.sense for term in marked.used()] == ["token", "verdict"]


def test_single_letters_keep_their_case_and_names_match_with_a_space() -> None:
    marked = Marker(MARGINS, {})
    assert marked("e") == "e"
    assert "<abbr" in marked("E")
    assert marked("mean ffn count").endswith(">ffn count</abbr>")


def test_the_name_of_a_run_leads_to_its_row_before_any_term_in_it() -> None:
    marked = Marker([LOAD], {"load <8:1>, seed 0": "run-a", "load": "run-b"})
    assert marked("load <8:1>, seed 0 beside load") == (
        '<a class="run" href="#run-a">load &lt;8:1&gt;, seed 0</a> beside '
        '<a class="run" href="#run-b">load</a>'
    )
    assert not marked.used()
    assert marked.linked("load") == '<a class="run" href="#run-b">load</a>'
    assert marked.linked("load and more") == "load and more"
