"""What a page is composed of: sections of figures, and what is folded below them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from moe_lab.report.figure_blocks import Block, Table
from moe_lab.report.text_section import ColouredText


@dataclass(frozen=True)
class Folded:
    """Something that a reader opens: a table, sentences, a list, lines as they are, or further
    folded parts, in this order.
    """

    title: str
    table: Table | None = None
    notes: tuple[str, ...] = ()
    items: tuple[str, ...] = ()
    lines: str = ""
    inner: tuple[Folded, ...] = ()
    anchor: str = ""


@dataclass(frozen=True)
class Section:
    """A part of the page with an anchor and an entry in the navigation.

    Attributes:
        anchor: the id of its element.
        nav, heading: in the navigation, and above the section.
        blocks: heading ("" for none) and figure.
        before, after: paragraphs around the figures.
        folded: below them.
        facts: (name, text) pairs.
        coloured: texts of which the reader chooses one.
        sense: of a word with two meanings in the glossary.
    """

    anchor: str
    nav: str
    heading: str
    blocks: tuple[tuple[str, Block], ...] = ()
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    folded: tuple[Folded, ...] = ()
    facts: tuple[tuple[str, str], ...] = ()
    coloured: tuple[ColouredText, ...] = ()
    sense: str = ""

    @property
    def empty(self) -> bool:
        texts = self.before or self.after or self.facts
        return not (self.blocks or texts or self.folded or self.coloured)


@dataclass(frozen=True)
class Card:
    """One finding on the first screen; ``anchor`` is where its evidence stands."""

    title: str
    sentence: str
    anchor: str


@dataclass(frozen=True)
class Answer:
    """The first screen.

    Attributes:
        questions: that the page answers.
        outcome: of a verdict; "" where nothing is judged.
        sentence: the answer, with its interval.
        notes: what belongs beside the answer.
        lead: the figure that shows it.
        cards: at most three.
        facts: (name, text) pairs on what the page is about.
    """

    questions: tuple[str, ...]
    sentence: str
    outcome: str = ""
    notes: tuple[str, ...] = ()
    lead: Block | None = None
    cards: tuple[Card, ...] = ()
    facts: tuple[tuple[str, str], ...] = ()

    def leading_to(self, sections: Iterable[Section]) -> Answer:
        """With cards that lead to ``sections``; one without a section leads to the first figure."""
        known = {section.anchor for section in sections}
        lead = f"figure-{self.lead.name}" if self.lead else "answer"
        cards = (
            card if card.anchor in known else replace(card, anchor=lead) for card in self.cards
        )
        return replace(self, cards=tuple(cards))


def without(sections: Iterable[Section], lead: Block | None) -> tuple[Section, ...]:
    """The sections that hold anything, less the figure that stands on the first screen."""
    kept = [
        replace(section, blocks=tuple(pair for pair in section.blocks if pair[1] is not lead))
        for section in sections
    ]
    return tuple(section for section in kept if not section.empty)
