"""Plain technical English where a person reads: the first paragraph of public docstrings, messages
of errors, help of commands, README and docs. A reader for whom English is a second language knows
the words of the field (docs/glossary.md), but no metaphor and no clipped sentence.
"""

import argparse
import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from markdown_pages import REPOSITORY, SHOWN

from moe_lab.cli import COMMANDS, Parser

PAGES = (*SHOWN, *(REPOSITORY / name for name in ("CONTRIBUTING.md", "SECURITY.md")))
INSTEAD = {
    r"told|tells": "said, states, shows",
    r"mends?|mended": "correct, change",
    r"errands?|blows?|houses?|rooms?|poetry|microscopes?|test bench": "the thing itself",
    r"floors?": "a lower limit, the least",
    r"nobody": "say what is missing",
    r"none the worse": "is not an error",
    r"at one place": "name the place",
    r"honest|witness(es)?|wanders?": "what is measured",
    r"ink": "characters that are not blank",
    r"dealt|vouch(es)?|for ever": "the plain verb",
    r"stands? beside|whoever": "the relation itself; every process that",
    r"where there (?:is|are) none": "the case, as in `None: no trace`",
}
"""Words that must not occur, and what to write instead."""
WORDS = {
    re.compile(rf"\b(?:{pattern})\b", re.IGNORECASE): hint for pattern, hint in INSTEAD.items()
}
BEGINS = re.compile(r"(?:Of|That of|Those|At one|As far)\b")
"""Beginnings that leave out what the sentence is about."""
ENDS = re.compile(r"\b(?:told|found|none where (?:there is none|none is)|or nothing)\.?$")
"""Ends that leave out by whom or what."""
CALLS = ("require", "expected")


def prose(text: str) -> str:
    """A text without code, comments and addresses."""
    for part in (r"^```.*?^```$", r"<!--.*?-->", r"``.*?``", r"`[^`\n]*`", r"\]\([^)]*\)"):
        text = re.sub(part, " ", text, flags=re.S | re.M)
    return text


def wrong_words(text: str) -> list[str]:
    return [
        f"{match[0]!r} (write: {hint})"
        for word, hint in WORDS.items()
        for match in word.finditer(text)
    ]


def documented(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    """(qualified name, first paragraph) of a module and of all that is public in it."""
    assert isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    text = ast.get_docstring(node)
    if text:
        yield name, " ".join(text.split("\n\n")[0].split())
    for child in node.body:
        named = isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if named and not child.name.startswith("_"):
            yield from documented(child, f"{name}.{child.name}")


def messages(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, text) of each piece of text in a call that makes an error."""
    for node in ast.walk(tree):
        called = node.func if isinstance(node, ast.Call) else None
        if isinstance(called, ast.Name) and (called.id in CALLS or called.id.endswith("Error")):
            for part in ast.walk(node):
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    yield part.lineno, part.value


MODULES = sorted((REPOSITORY / "moe_lab").rglob("*.py"))


def test_docstrings_and_messages_are_plain() -> None:
    found = []
    for path in MODULES:
        tree = ast.parse(path.read_text())
        where = str(path.relative_to(REPOSITORY))
        for name, text in documented(tree, where):
            plain = prose(text)
            found += [f"{name}: {wrong}" for wrong in wrong_words(plain)]
            if BEGINS.match(text) or ENDS.search(text):
                found.append(f"{name}: a clipped sentence: {text}")
        for line, text in messages(tree):
            found += [f"{where}:{line}: {wrong}" for wrong in wrong_words(text)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_pages_are_plain(page: Path) -> None:
    assert not wrong_words(prose(page.read_text()))


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_help_is_plain(command: str) -> None:
    module, description = COMMANDS[command]
    parser = Parser(prog=command)
    importlib.import_module(module).add_arguments(parser)
    assert not wrong_words(" ".join([description, *helps(parser)]))


def helps(parser: argparse.ArgumentParser) -> Iterator[str]:
    """All texts of a parser and of its subcommands."""
    yield from (text for text in (parser.description, parser.epilog) if text)
    for group in parser._action_groups:
        yield from (text for text in (group.title, group.description) if text)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from (choice.help or "" for choice in action._choices_actions)
            for sub in set(action.choices.values()):
                yield from helps(sub)
        elif action.help:
            yield action.help
