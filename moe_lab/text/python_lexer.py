"""The Python lexer class of every character of a source, from the standard library's ``tokenize``,
``keyword`` and ``builtins``.

Blanks between tokens, line ends and indentation are ``newline_indent``; blanks inside a string or
comment belong to it. A string is its quotes (with prefix) and its body, and an f-string is one
string however the running Python splits it. Source that stops tokenizing is ``other`` from there
on. ``tokenize`` gives the tokens one by one; what follows from them is computed on whole arrays.
"""

import builtins
import io
import itertools
import keyword
import re
import tokenize
from collections.abc import Container, Iterable, Iterator
from typing import NamedTuple

import numpy as np

PYTHON_CLASSES = (
    "keyword",
    "soft_keyword",
    "name_def",
    "name_attr",
    "name_builtin",
    "name_other",
    "operator",
    "bracket",
    "delimiter",
    "number",
    "string_quote",
    "string_body",
    "docstring",
    "comment",
    "newline_indent",
    "other",
)
CODE = {name: code for code, name in enumerate(PYTHON_CLASSES)}

# Keywords that cannot follow a soft keyword: before them, the word was a name.
INFIX_KEYWORDS = frozenset({"and", "or", "in", "is", "if", "else", "for"})
# What may follow a soft keyword as well as a name; there the colon that ends the line decides.
OPENERS = frozenset({"(", "[", "{", "-", "*", "~"})

# What the module ``site`` adds for interactive use is not the language.
BUILTINS = frozenset(name for name in dir(builtins) if not name.startswith("_")) - {
    "copyright",
    "credits",
    "exit",
    "license",
    "quit",
}

# Words whose class, or whose neighbour's class, depends on more than what they are; ``FINAL`` gives
# the class they have by default. Python 3.11 does not yet list ``type`` as a soft keyword; ``_`` is
# one only as a pattern and is left a name.
DOT, COLON, DEFINE, ASYNC, SOFT, TYPE = range(len(PYTHON_CLASSES), len(PYTHON_CLASSES) + 6)
FINAL = np.array(
    [
        *range(len(PYTHON_CLASSES)),
        *(
            CODE[name]
            for name in (
                "delimiter",
                "delimiter",
                "keyword",
                "keyword",
                "name_other",
                "name_builtin",
            )
        ),
    ],
    dtype=np.uint8,
)
WORDS = (
    dict.fromkeys(BUILTINS, CODE["name_builtin"])
    | dict.fromkeys(keyword.kwlist, CODE["keyword"])
    | {
        ".": DOT,
        ":": COLON,
        "def": DEFINE,
        "class": DEFINE,
        "async": ASYNC,
        "match": SOFT,
        "case": SOFT,
        "type": TYPE,
    }
    | dict.fromkeys("()[]{}", CODE["bracket"])
    | dict.fromkeys((",", ";", "..."), CODE["delimiter"])
    | dict.fromkeys(
        "$?!`", CODE["other"]
    )  # no part of Python, yet operators to ``tokenize`` from 3.12
)
LONE_RETURN = re.compile(r"\r(?!\n)")
LAYOUT_TYPES = frozenset({tokenize.INDENT, tokenize.DEDENT, tokenize.NL, tokenize.ENDMARKER})


class Lexeme(NamedTuple):
    """One token of ``tokenize``: type, text, and place as (row from 1, column) pairs."""

    type: int
    string: str
    start: tuple[int, int]
    end: tuple[int, int]


Lexemes = Iterable[Lexeme | tokenize.TokenInfo]


def python_classes(text: str) -> np.ndarray:
    """[characters] uint8: index into ``PYTHON_CLASSES`` of each character of ``text``."""
    # A carriage return alone ends a line of Python, which versions of ``tokenize`` disagree on.
    text = LONE_RETURN.sub("\n", text)
    kinds, strings, places, stopped = _lexemes(text)
    kind = np.array(kinds, dtype=np.int64)
    rows = np.array(
        [0, 0, *itertools.accumulate(map(len, io.StringIO(text))), len(text)], dtype=np.int64
    )
    starts, ends = _offsets(rows, np.array(places, dtype=np.int64).reshape(-1, 2, 2))
    statement = np.flatnonzero(kind != tokenize.COMMENT)
    codes = np.full(len(kind), CODE["comment"], dtype=np.uint8)
    codes[statement] = _statement_codes(
        kind[statement], [strings[index] for index in statement.tolist()]
    )
    classes = _fill(*_cut_quotes(starts, ends, codes, strings), len(text))
    if stopped is not None:
        classes[_offsets(rows, np.array([[stopped, stopped]]))[1][0] :] = CODE["other"]
    return classes


def _lexemes(text: str) -> tuple[list[int], list[str], list[int], tuple[int, int] | None]:
    """Type, text and place (first row, column, last row, column: flat) of the tokens that are not
    layout, and the place where ``text`` stopped tokenizing, None where it did not.
    """
    # Flat lists of numbers and strings: the garbage collector would walk over lists of tuples again
    # and again.
    kinds: list[int] = []
    strings: list[str] = []
    places: list[int] = []
    end = (1, 0)
    try:
        for kind, string, start, end, *_ in whole_strings(
            tokenize.generate_tokens(io.StringIO(text).readline)
        ):
            # The blank before a stray character comes as an error of its own.
            if kind in LAYOUT_TYPES or (kind == tokenize.ERRORTOKEN and string.isspace()):
                continue
            kinds.append(kind)
            strings.append(string)
            places += start
            places += end
    except (tokenize.TokenError, SyntaxError, ValueError):
        return kinds, strings, places, end
    return kinds, strings, places, None


def whole_strings(lexemes: Lexemes) -> Lexemes:
    """Join the pieces of f-strings (Python 3.12) and t-strings (3.14) to one STRING each, as older
    versions give them.
    """
    opens = {getattr(tokenize, f"{letter}STRING_START", None) for letter in "FT"} - {None}
    closes = {getattr(tokenize, f"{letter}STRING_END", None) for letter in "FT"} - {None}
    return _joined(lexemes, opens, closes) if opens else lexemes


def _joined(
    lexemes: Lexemes, opens: Container[int | None], closes: Container[int | None]
) -> Iterator[Lexeme | tokenize.TokenInfo]:
    depth, first = 0, None
    for lexeme in lexemes:
        if lexeme[0] in opens:
            first = lexeme if depth == 0 else first
            depth += 1
        elif lexeme[0] in closes:
            depth -= 1
            if depth == 0 and first is not None:
                # The body is not needed: only the opening and closing quotes are looked at.
                yield Lexeme(tokenize.STRING, first[1] + lexeme[1], first[2], lexeme[3])
        elif depth == 0:
            yield lexeme


def _offsets(rows: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First and last character of [lexemes, 2, 2] places (row from 1, column), from where each row
    begins.
    """
    offsets = np.minimum(
        rows[np.minimum(places[:, :, 0], len(rows) - 1)] + places[:, :, 1], rows[-1]
    )
    return offsets[:, 0], offsets[:, 1]


def _statement_codes(kind: np.ndarray, strings: list[str]) -> np.ndarray:
    """[lexemes] uint8 class of each lexeme that is not a comment, from what it is and what stands
    beside it. Strings are taken whole: ``docstring`` or ``string_body``.
    """
    name, string, end_of_line = (
        kind == tokenize.NAME,
        kind == tokenize.STRING,
        kind == tokenize.NEWLINE,
    )
    word = np.fromiter(
        (WORDS.get(text, CODE["operator"]) for text in strings), dtype=np.uint8, count=len(strings)
    )
    word[name & (word == CODE["operator"])] = CODE["name_other"]
    word[string] = CODE["string_body"]
    word[kind == tokenize.NUMBER] = CODE["number"]
    word[end_of_line] = CODE["newline_indent"]
    word[~(name | string | end_of_line | (kind == tokenize.NUMBER) | (kind == tokenize.OP))] = CODE[
        "other"
    ]

    before = np.append(CODE["newline_indent"], word[:-1])[: len(word)]
    after = np.append(word[1:], CODE["newline_indent"])[: len(word)]
    first = before == CODE["newline_indent"]
    keyword_like = (word == CODE["keyword"]) | (word == DEFINE) | (word == ASYNC)
    codes = FINAL[word]
    codes[name & ~keyword_like & (before == DOT)] = CODE["name_attr"]
    codes[name & ~keyword_like & (before == DEFINE)] = CODE["name_def"]

    # A docstring stands alone on the logical line after the header of a def or class, or on the
    # first line.
    line = np.cumsum(first) - 1
    header = np.zeros(len(word) + 1, dtype=bool)
    header[line[(word == DEFINE) & (first | (before == ASYNC))]] = True
    opened = np.zeros(len(word) + 1, dtype=bool)
    opened[line[(word == COLON) & (after == CODE["newline_indent"])]] = True
    for index in np.flatnonzero(string & first & (after == CODE["newline_indent"])).tolist():
        above = line[index] - 1
        if (above < 0 or (header[above] and opened[above])) and not set(
            _prefix(strings[index])
        ) & set("bBfFtT"):
            codes[index] = CODE["docstring"]

    for index in np.flatnonzero(((word == SOFT) | (word == TYPE)) & first).tolist():
        if index + 1 < len(strings) and _is_soft_keyword(
            int(kind[index + 1]), strings[index + 1], bool(opened[line[index]])
        ):
            codes[index] = CODE["soft_keyword"]
    return codes


def _is_soft_keyword(kind: int, string: str, colon_ends_line: bool) -> bool:
    """Whether a soft keyword that begins a line is one, from the lexeme after it."""
    operand = kind in (tokenize.NUMBER, tokenize.STRING) or (
        kind == tokenize.NAME and string not in INFIX_KEYWORDS
    )
    return operand or (string in OPENERS and colon_ends_line)


def _cut_quotes(
    starts: np.ndarray, ends: np.ndarray, codes: np.ndarray, strings: list[str]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Character segments (starts, ends, codes) in order: each string as its opening quotes, its
    body and its closing quotes.
    """
    is_string = (codes == CODE["string_body"]) | (codes == CODE["docstring"])
    where = np.flatnonzero(is_string)
    widths = [_quote_widths(strings[index]) for index in where.tolist()]
    head, tail = np.array(widths, dtype=np.int64).reshape(-1, 2).T
    quote = np.full(len(where), CODE["string_quote"], dtype=np.uint8)
    body_starts, body_ends = starts[where] + head, ends[where] - tail
    all_starts = np.concatenate([starts[~is_string], starts[where], body_starts, body_ends])
    all_ends = np.concatenate([ends[~is_string], body_starts, body_ends, ends[where]])
    all_codes = np.concatenate([codes[~is_string], quote, codes[where], quote])
    order = np.lexsort(
        (all_ends, all_starts)
    )  # an empty body comes before the quotes that close it
    return all_starts[order], all_ends[order], all_codes[order]


def _quote_widths(string: str) -> tuple[int, int]:
    """Characters of the opening quotes, with the prefix, and of the closing ones."""
    quotes = string[len(_prefix(string)) :]
    width = 3 if quotes[:3] == 3 * quotes[0] else 1
    return len(string) - len(quotes) + width, width


def _prefix(string: str) -> str:
    """What stands before the quotes: ``r``, ``b``, ``f`` and so on."""
    return string[: next(index for index, character in enumerate(string) if character in "\"'")]


def _fill(starts: np.ndarray, ends: np.ndarray, codes: np.ndarray, length: int) -> np.ndarray:
    """[length] uint8: the code of the segment over each character, and layout between them."""
    bounds = np.empty(2 * len(codes) + 2, dtype=np.int64)
    bounds[0], bounds[1:-1:2], bounds[2:-1:2], bounds[-1] = 0, starts, ends, length
    values = np.full(len(bounds) - 1, CODE["newline_indent"], dtype=np.uint8)
    values[1::2] = codes
    return np.repeat(values, np.diff(bounds))
