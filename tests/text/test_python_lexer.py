import ast
import itertools
import keyword
import tokenize

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lab.text import load_corpus
from moe_lab.text.python_lexer import CODE, PYTHON_CLASSES, Lexeme, python_classes, whole_strings


def runs(source: str) -> list[tuple[str, str]]:
    """The source cut where its class changes, layout left out."""
    names = [PYTHON_CLASSES[code] for code in python_classes(source)]
    groups = itertools.groupby(zip(source, names, strict=True), key=lambda pair: pair[1])
    cut = [("".join(character for character, _ in group), name) for name, group in groups]
    return [(text, name) for text, name in cut if name != "newline_indent"]


def class_of(source: str, word: str) -> str:
    return PYTHON_CLASSES[python_classes(source)[source.index(word)]]


def test_each_class_of_a_small_function():
    source = 'async def area(r):\n    """Doc."""\n    return 3.14 * self.r ** 2  # why\n'
    assert runs(source) == [
        ("async", "keyword"),
        ("def", "keyword"),
        ("area", "name_def"),
        ("(", "bracket"),
        ("r", "name_other"),
        (")", "bracket"),
        (":", "delimiter"),
        ('"""', "string_quote"),
        ("Doc.", "docstring"),
        ('"""', "string_quote"),
        ("return", "keyword"),
        ("3.14", "number"),
        ("*", "operator"),
        ("self", "name_other"),
        (".", "delimiter"),
        ("r", "name_attr"),
        ("**", "operator"),
        ("2", "number"),
        ("# why", "comment"),
    ]


@pytest.mark.parametrize(
    ("source", "word", "name"),
    [
        ("len(x)", "len", "name_builtin"),
        ("x.len", "len", "name_attr"),
        ("def len(): pass", "len", "name_def"),
        ("class Thing: pass", "Thing", "name_def"),
        ("from . import name", "import", "keyword"),
        ("x = None", "None", "keyword"),
        ("exit()", "exit", "name_other"),
        ("x = y[0]", "[", "bracket"),
        ("x: int = 0", ":", "delimiter"),
        ("x = 0", "=", "operator"),
        ("x := 0", ":=", "operator"),
        ("x = ...", "...", "delimiter"),
        ("@cache\ndef f(): pass", "@", "operator"),
        ("x = 1_000j", "1_000j", "number"),
        ("x = $", "$", "other"),
    ],
)
def test_class_of_a_word(source, word, name):
    assert class_of(source, word) == name


@pytest.mark.parametrize(
    ("source", "soft"),
    [
        ("match x:\n  case 1: pass\n", {"match", "case"}),
        ("match (x):\n  case [a, *_]:\n    pass\n", {"match", "case"}),
        ("match -x:\n  case 'a': pass\n", {"match", "case"}),
        ("type X = int\n", {"type"}),
        ("match = re.match(x)\nmatch.group(0)\nmatch(x)\nmatch[0]: int\n", set()),
        ("case = 1\nx = match\ntype(x)\nmatch in y\n", set()),
        ("match", set()),
    ],
)
def test_soft_keywords_are_told_from_names(source, soft):
    assert {text for text, name in runs(source) if name == "soft_keyword"} == soft


@pytest.mark.parametrize(
    ("source", "is_docstring"),
    [
        ('"""x"""\n', True),
        ("# first\n\n'x'\n", True),
        ("def f():\n    'x'\n", True),
        ("def f():\n    'Bxf'\n", True),
        ("class A(B):\n    # note\n    r'''x'''\n", True),
        ("def f(a,\n      b):\n    'x'\n", True),
        ("async def f():\n    'x'\n", True),
        ("if a:\n    'x'\n", False),
        ("a = 1\n'x'\n", False),
        ("def f():\n    'x'.join(a)\n", False),
        ("def f():\n    f'x'\n", False),
        ("def f():\n    b'x'\n", False),
        ("def f(): pass\n'x'\n", False),
        ("class A: a = 1\n'x'\n", False),
    ],
)
def test_docstring_is_the_string_that_stands_first(source, is_docstring):
    assert class_of(source, "x") == ("docstring" if is_docstring else "string_body")


@pytest.mark.parametrize(
    ("literal", "opening", "closing"),
    [
        ("'b d'", "'", "'"),
        ('rb"b d"', 'rb"', '"'),
        ("'''b\nd'''", "'''", "'''"),
        ('F"""b {d!r:>{w}} e"""', 'F"""', '"""'),
    ],
)
def test_string_is_cut_into_quotes_and_body_with_its_blanks(literal, opening, closing):
    body = literal[len(opening) : -len(closing)]
    assert runs(f"a = {literal}")[2:] == [
        (opening, "string_quote"),
        (body, "string_body"),
        (closing, "string_quote"),
    ]


def test_empty_string_is_quotes_alone():
    assert runs("a = ''")[2:] == [("''", "string_quote")]
    assert runs('a = """"""')[2:] == [('""""""', "string_quote")]


def test_pieces_of_an_f_string_are_one_string(monkeypatch):
    """The token stream of Python 3.12 for ``x = f'a{g(f"b")}' + y``, with its own type numbers."""
    start, middle, end = 61, 62, 63
    monkeypatch.setattr(tokenize, "FSTRING_START", start, raising=False)
    monkeypatch.setattr(tokenize, "FSTRING_END", end, raising=False)
    stream = [
        (tokenize.NAME, "x", 0),
        (tokenize.OP, "=", 2),
        (start, "f'", 4),
        (middle, "a", 6),
        (tokenize.OP, "{", 7),
        (tokenize.NAME, "g", 8),
        (tokenize.OP, "(", 9),
        (start, 'f"', 10),
        (middle, "b", 12),
        (end, '"', 13),
        (tokenize.OP, ")", 14),
        (tokenize.OP, "}", 15),
        (end, "'", 16),
        (tokenize.OP, "+", 18),
        (tokenize.NAME, "y", 20),
    ]
    lexemes = [
        Lexeme(kind, text, (1, column), (1, column + len(text))) for kind, text, column in stream
    ]
    found = [(lexeme[0], lexeme[2], lexeme[3]) for lexeme in whole_strings(lexemes)]
    assert found == [
        (tokenize.NAME, (1, 0), (1, 1)),
        (tokenize.OP, (1, 2), (1, 3)),
        (tokenize.STRING, (1, 4), (1, 17)),
        (tokenize.OP, (1, 18), (1, 19)),
        (tokenize.NAME, (1, 20), (1, 21)),
    ]


@pytest.mark.parametrize(
    ("source", "last_good"),
    [("a = 1\nb = '''never closed\n", "="), ("if a:\n    b\n  c = 1\n", "b\n"), ("a = '''x", "=")],
)
def test_source_that_stops_tokenizing_is_other_from_there_on(source, last_good):
    classes = [PYTHON_CLASSES[code] for code in python_classes(source)]
    rest = source.rindex(last_good) + len(last_good)
    assert set(classes[rest:]) == {"other"}
    assert "other" not in classes[:rest]


def test_unclosed_bracket_keeps_its_classes():
    assert [name for _, name in runs("a = (1,\n")] == [
        "name_other",
        "operator",
        "bracket",
        "number",
        "delimiter",
    ]


def test_carriage_returns_alone_end_lines():
    assert runs("def f():\r    'x'\r    return 1") == runs("def f():\n    'x'\n    return 1")


@pytest.mark.parametrize(
    "source",
    [
        "",
        "\n",
        "\r\n",
        "a = 1\r\nb = 2\r\n",
        "x = 1\ry = 2",
        "\f\ndef f():\n\tpass",
        "x = \\\n  3",
        "é = '日本'",
    ],
)
def test_odd_line_ends_keep_characters_and_classes_together(source):
    assert len(python_classes(source)) == len(source)
    assert all(text.strip() == text for text, name in runs(source) if name != "other")


@given(
    text=st.one_of(
        st.text(),
        st.text(alphabet="def f(x):\n\t '\"\\#{}[]0.1@\r\f\0é👍fb"),
        st.binary().map(lambda data: data.decode("latin-1")),
    )
)
@settings(max_examples=300, deadline=None)
def test_any_text_has_one_class_a_character(text):
    classes = python_classes(text)
    assert len(classes) == len(text)
    assert not len(classes) or classes.max() < len(PYTHON_CLASSES)


DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def test_standard_library_agrees_with_the_parser():
    """Oracle: ``ast`` knows docstrings, definitions and attributes by the grammar, not by their
    neighbours.
    """
    checked = 0
    for document in load_corpus().documents[::25]:
        if not document.text.isascii() or "\f" in document.text:
            continue  # the parser counts columns in bytes
        tree = ast.parse(document.text)
        nodes = list(ast.walk(tree))
        classes = python_classes(document.text)
        line_starts = list(
            itertools.accumulate(
                (len(line) for line in document.text.splitlines(keepends=True)), initial=0
            )
        )

        expected_docstring = np.zeros(len(document.text), dtype=bool)
        for node in nodes:
            if isinstance(node, (ast.Module, *DEFINITIONS)) and ast.get_docstring(
                node, clean=False
            ):
                string = node.body[0]
                begin = line_starts[string.lineno - 1] + string.col_offset
                end = line_starts[(string.end_lineno or 0) - 1] + (string.end_col_offset or 0)
                expected_docstring[begin:end] = True
        expected_docstring &= classes != CODE["string_quote"]
        assert np.array_equal(classes == CODE["docstring"], expected_docstring), document.name

        found = runs(document.text)
        names = [text for text, name in found if name == "name_def"]
        assert sorted(names) == sorted(
            node.name for node in nodes if isinstance(node, DEFINITIONS)
        ), document.name
        attributes = {text for text, name in found if name == "name_attr"}
        formatted = {
            inner for node in nodes if isinstance(node, ast.JoinedStr) for inner in ast.walk(node)
        }
        assert {
            node.attr for node in nodes if isinstance(node, ast.Attribute) and node not in formatted
        } <= attributes
        assert {text for text, name in found if name == "keyword"} <= set(keyword.kwlist)
        assert not any(name == "other" for _, name in found)
        checked += 1
    assert checked > 15
