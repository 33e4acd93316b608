"""Lexer classes of every character of source in any language but Python, through Pygments (extra
``lexers``), under the names of Python's.

Pygments sorts text into some eighty token types in a tree; ``MAPPING`` names a class for the
branches, and a type takes that of its nearest ancestor. What a grammar calls plain text, and what
it cannot read, is ``other``.
"""

import functools
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_lab.text.python_lexer import CODE

if TYPE_CHECKING:
    from pygments.lexer import Lexer

MAPPING: dict[str, str] = {
    "Token": "other",
    "Token.Comment": "comment",
    "Token.Comment.Preproc": "keyword",
    "Token.Comment.PreprocFile": "string_body",
    "Token.Keyword": "keyword",
    "Token.Keyword.Pseudo": "soft_keyword",
    "Token.Keyword.Type": "name_builtin",
    "Token.Literal.Number": "number",
    "Token.Literal.String": "string_body",
    "Token.Literal.String.Affix": "string_quote",
    "Token.Literal.String.Delimiter": "string_quote",
    "Token.Literal.String.Doc": "docstring",
    "Token.Name": "name_other",
    "Token.Name.Attribute": "name_attr",
    "Token.Name.Builtin": "name_builtin",
    "Token.Name.Class": "name_def",
    "Token.Name.Function": "name_def",
    "Token.Operator": "operator",
    "Token.Operator.Word": "keyword",
    "Token.Punctuation": "delimiter",
    "Token.Text": "other",
    "Token.Text.Whitespace": "newline_indent",
}
BLANK_IS_LAYOUT = tuple(
    name for name in CODE if name not in ("string_body", "docstring", "comment")
)
BRACKETS = "()[]{}"
QUOTES = "\"'`"


def lexer_for(name: str) -> "Lexer | None":
    """The Pygments lexer for a file of that name; None: no such lexer, the file is prose, or
    Pygments is not installed.
    """
    suffix = name.rsplit("/", 1)[-1].rsplit(".", 1)
    return _lexer_for_suffix(suffix[1]) if len(suffix) == 2 else None


@functools.cache
def _lexer_for_suffix(suffix: str) -> "Lexer | None":
    try:
        from pygments.lexers import get_lexer_for_filename
        from pygments.util import ClassNotFound
    except ImportError:
        return None
    try:
        # Every character must come back, in order: no stripping, no added newline.
        lexer = get_lexer_for_filename(f"file.{suffix}", stripnl=False, ensurenl=False)
    except ClassNotFound:
        return None
    return (
        None if set(lexer.aliases) & {"text", "output", "markdown", "restructuredtext"} else lexer
    )


def code_classes(text: str, lexer: "Lexer") -> np.ndarray:
    """[characters] uint8: index into ``PYTHON_CLASSES`` of each character of ``text``."""
    classes = np.full(len(text), CODE["other"], dtype=np.uint8)
    # Pygments itself turns "\r\n" and "\r" into "\n"; its unprocessed stream keeps the places.
    for start, kind, value in lexer.get_tokens_unprocessed(text):
        classes[start : start + len(value)] = _code(kind)
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    for characters, found, name in (
        (" \t\r\n\f\v", BLANK_IS_LAYOUT, "newline_indent"),
        (BRACKETS, ("delimiter", "operator"), "bracket"),
        (QUOTES, ("delimiter",), "string_quote"),
    ):
        member = np.isin(codes, [ord(character) for character in characters])
        classes[member & np.isin(classes, [CODE[one] for one in found])] = CODE[name]
    return _quoted(classes, codes)


def _quoted(classes: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Quote characters at the edges of a run of string body are ``string_quote``."""
    body = classes == CODE["string_body"]
    edge = body & ~(np.append(False, body[:-1]) & np.append(body[1:], False))
    classes[edge & np.isin(codes, [ord(quote) for quote in QUOTES])] = CODE["string_quote"]
    return classes


@functools.cache
def _code(kind: Any) -> int:
    """The class of a Pygments type, or of its nearest ancestor that has one."""
    while str(kind) not in MAPPING:
        kind = kind.parent
    return CODE[MAPPING[str(kind)]]
