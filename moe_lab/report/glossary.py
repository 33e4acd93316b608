"""The terms of ``docs/glossary.md``, their definitions at hover in the texts of a page, and links
from names of runs to their rows.

The glossary of the documentation is the only owner of a definition; a wheel carries that file as
``moe_lab/glossary.md``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from markupsafe import Markup, escape

from moe_lab.plain_text import on_page

SENSE = re.compile(r" \(of a (\w+)\)$")
"""What tells two meanings of one word apart, as in "margin (of a token)"."""
RANGE = re.compile(r"^(\w)(\d) to \1(\d)$")


@dataclass(frozen=True)
class Term:
    """One row of the glossary.

    Attributes:
        name: as the glossary writes it.
        meaning: its definition.
        spellings: what a text may call it.
        sense: "" or the word that it is said of; such a term is marked only where it is asked for.
    """

    name: str
    meaning: str
    spellings: tuple[str, ...]
    sense: str = ""

    @property
    def anchor(self) -> str:
        """The anchor of its row in the glossary of a page."""
        return "word-" + re.sub(r"\W+", "-", self.name).strip("-").lower()


class Marker:
    """Texts of a page as markup: each term of the glossary has its definition at its first use in a
    text, each name of a run leads to its row.

    >>> Marker([Term("load", "the share of slots", ("load",))], {})("even load")
    Markup('even <abbr title="the share of slots">load</abbr>')
    """

    def __init__(self, terms: Iterable[Term], rows: Mapping[str, str]) -> None:
        self._terms = tuple(terms)
        self._rows = {on_page(name): anchor for name, anchor in rows.items()}
        self._used: set[Term] = set()
        self._patterns: dict[str, tuple[re.Pattern[str], dict[str, Term]]] = {}

    def __call__(self, text: str, sense: str = "") -> Markup:
        """``text``, whatever it holds, as markup; ``sense`` chooses among two meanings."""
        if isinstance(text, Markup):
            return text
        pattern, terms = self._pattern(sense)
        parts, end, seen = [], 0, set[Term]()
        text = on_page(text)
        for match in pattern.finditer(text):
            term = None if match["run"] else terms[_key(match["term"])]
            if term in seen:
                continue
            parts.append(escape(text[end : match.start()]))
            parts.append(self._marked(match[0], term))
            end = match.end()
            if term is not None:
                seen.add(term)
        self._used |= seen
        return Markup("").join([*parts, escape(text[end:])])

    def linked(self, text: str) -> str:
        """``text`` as a link to its row where it is the name of a run, else as it is."""
        return self._marked(shown, None) if (shown := on_page(text)) in self._rows else text

    def used(self) -> list[Term]:
        """The terms that were marked so far, in the order of the glossary."""
        return [term for term in self._terms if term in self._used]

    def _marked(self, text: str, term: Term | None) -> Markup:
        if term is None:
            return Markup('<a class="run" href="#{}">{}</a>').format(self._rows[text], text)
        return Markup('<abbr title="{}">{}</abbr>').format(term.meaning, text)

    def _pattern(self, sense: str) -> tuple[re.Pattern[str], dict[str, Term]]:
        if sense not in self._patterns:
            terms = {
                _key(spelling): term
                for term in self._terms
                if term.sense in ("", sense)
                for spelling in term.spellings
            }
            runs = "|".join(map(re.escape, sorted(self._rows, key=len, reverse=True)))
            words = "|".join(map(_spelled, sorted(terms, key=len, reverse=True)))
            pattern = rf"(?<![\w/.])(?:(?P<run>{runs or '(?!)'})|(?P<term>{words or '(?!)'}))(?!\w)"
            self._patterns[sense] = re.compile(pattern), terms
        return self._patterns[sense]


@cache
def glossary() -> tuple[Term, ...]:
    """The terms of ``docs/glossary.md`` in its order."""
    package = Path(__file__).resolve().parents[1]
    carried = package / "glossary.md"
    source = carried if carried.is_file() else package.parent / "docs" / "glossary.md"
    return parse_glossary(source.read_text(encoding="utf-8"))


def parse_glossary(text: str) -> tuple[Term, ...]:
    """The rows of the tables in ``text`` that have two columns, below their headings."""
    rows = [
        [cell.strip() for cell in line.strip().strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("| ")
    ]
    return tuple(
        _term(*(re.sub(r"\*(\w[^*]*)\*", r"\1", cell).replace("`", "") for cell in row))
        for row in rows
        if len(row) == 2 and row[0] != "term"
    )


def _term(name: str, meaning: str) -> Term:
    sense = SENSE.search(name)
    plain = SENSE.sub("", name)
    if ends := RANGE.match(plain):
        letter, first, last = ends.groups()
        spellings = [f"{letter}{number}" for number in range(int(first), int(last) + 1)]
    else:
        first, *others = plain.split(", ")
        spellings = [first, *(other for other in others if len(other) > 1)]
    return Term(name, meaning, tuple(spellings), sense[1] if sense else "")


def _key(text: str) -> str:
    """One spelling of a word: a single letter keeps its case, longer words lose it and their
    plural.
    """
    if len(text) == 1:
        return text
    word = text.lower().replace("_", " ")
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word


def _spelled(key: str) -> str:
    """The pattern of a word that ``_key`` made."""
    if len(key) == 1:
        return re.escape(key)
    return "(?i:" + "[ _]".join(map(re.escape, key.split(" "))) + "s?)"
