"""Lexer classes of other languages than Python."""

import numpy as np
import pytest

from moe_lab.text import Document, token_classes, tokenize_documents, train_tokenizer
from moe_lab.text.code_lexer import MAPPING, code_classes, lexer_for
from moe_lab.text.python_lexer import CODE, PYTHON_CLASSES

pytest.importorskip("pygments")

C_SOURCE = '#include <stdio.h>\r\n/* say */ int main(void) { return f("a b", x.y + 12); }\n'


def classes_of(source, name):
    lexer = lexer_for(name)
    assert lexer is not None
    return [PYTHON_CLASSES[code] for code in code_classes(source, lexer)]


def class_at(source, name, piece):
    found = set(classes_of(source, name)[source.index(piece) : source.index(piece) + len(piece)])
    assert len(found) == 1, found
    return found.pop()


@pytest.mark.parametrize(
    ("piece", "expected"),
    [
        ("/* say */", "comment"),
        ("return", "keyword"),
        ("12", "number"),
        ("a b", "string_body"),
        ("{", "bracket"),
        ("+", "operator"),
        (";", "delimiter"),
        ("main", "name_def"),
        ("\r\n", "newline_indent"),
    ],
)
def test_c_is_classed_by_its_grammar(piece, expected):
    assert class_at(C_SOURCE, "dir/x.c", piece) == expected


def test_every_character_has_a_class_in_many_languages():
    for name in ("a.js", "a.rs", "a.java", "a.sh", "a.html", "a.go", "a.sql", "a.json"):
        lexer = lexer_for(name)
        assert lexer is not None
        text = "let x = 'a\u00e9\U0001f600' ; // note\r\n  fn main() {}\n\n  "
        codes = code_classes(text, lexer)
        assert len(codes) == len(text)
        assert codes.max() < len(PYTHON_CLASSES)


def test_prose_and_unknown_names_have_no_lexer():
    assert [lexer_for(name) for name in ("README", "a.txt", "a.md", "a.nosuchlanguage")] == [
        None
    ] * 4


def test_the_mapping_names_classes_that_exist():
    assert set(MAPPING.values()) <= set(CODE)


def test_the_class_table_uses_it():
    documents = [Document("x.c", C_SOURCE), Document("x.txt", C_SOURCE)]
    tokenizer = train_tokenizer(documents, 257, "byte")
    code, prose = (
        token_classes(document, tokenizer) for document in tokenize_documents(documents, tokenizer)
    )
    assert code["lexer"].to_list()[1 + C_SOURCE.index("return")] == "keyword"
    assert set(prose["lexer"].to_list()[1:]) == {"text"}
    assert np.array_equal(code["token_id"], prose["token_id"])
