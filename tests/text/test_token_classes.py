from collections.abc import Sequence

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refused

from moe_lab.errors import CorpusError
from moe_lab.text import (
    CLASSES,
    Document,
    TokenizedDocument,
    Tokenizer,
    token_classes,
    tokenize_documents,
)
from moe_lab.text.token_classes import frequency_bands


def cut(*pieces: str | bytes, name: str = "a.txt") -> tuple[TokenizedDocument, Tokenizer]:
    """A document cut into exactly these pieces, with a tokenizer that has them as tokens."""
    spelled = [piece.encode() if isinstance(piece, str) else piece for piece in pieces]
    ids = {bytes([value]): value for value in range(256)}
    merges = []
    for piece in spelled:
        for end in range(2, len(piece) + 1):
            if piece[:end] not in ids:
                merges.append((ids[piece[: end - 1]], piece[end - 1]))
                ids[piece[:end]] = len(ids)
    tokenizer = Tokenizer(merges)
    sequence = np.array([tokenizer.eos_id, *(ids[piece] for piece in spelled)], dtype=np.int32)
    text = b"".join(spelled).decode()
    starts, ends = tokenizer.spans(text, sequence)
    return TokenizedDocument(
        index=7, name=name, text=text, ids=sequence, starts=starts, ends=ends
    ), tokenizer


def classes(column: str, *pieces: str | bytes, name: str = "a.txt") -> list[str]:
    """The class of each piece; the opening end-of-document id left out."""
    return token_classes(*cut(*pieces, name=name))[column].to_list()[1:]


def of_ids(ids: Sequence[int]) -> pl.DataFrame:
    """Classes of a document made of the bytes ``ids``."""
    document, tokenizer = cut(*(bytes([value]) for value in ids))
    return token_classes(document, tokenizer)


def test_frame_has_one_row_a_token_and_named_classes():
    document, tokenizer = cut("def", " f", "(", "é", ")", name="x.py")
    frame = token_classes(document, tokenizer, np.zeros(tokenizer.vocab_size, dtype=np.int64))
    assert frame.columns == [
        "doc",
        "pos",
        "token_id",
        "start",
        "end",
        "n_bytes",
        "spans_classes",
        *CLASSES,
    ]
    assert frame["doc"].to_list() == [7] * 6
    assert frame["pos"].to_list() == list(range(6))
    assert frame["token_id"].to_list() == document.ids.tolist()
    assert frame.select("start", "end").rows() == [(0, 0), (0, 3), (3, 5), (5, 6), (6, 7), (7, 8)]
    assert frame["n_bytes"].to_list() == [0, 3, 2, 1, 2, 1]
    assert all(frame.schema[column] == pl.Enum(names) for column, names in CLASSES.items())


def test_end_of_document_is_special_in_every_class_and_never_anything_else():
    frame = token_classes(*cut("a", " b"))
    for column in set(CLASSES) - {"position"}:
        assert (frame[column] == "special").to_list() == [
            True,
            False,
            False,
        ] or column == "freq_band"
    assert frame["freq_band"].to_list() == ["special", None, None]


@pytest.mark.parametrize("name", ["a.py", "a.txt"])
@pytest.mark.parametrize("text", ["", "a", "\n", "👍", "'"])
def test_smallest_documents_have_classes(text, name):
    tokenizer = Tokenizer()
    [document] = tokenize_documents([Document(name, text)], tokenizer)
    frame = token_classes(document, tokenizer, np.ones(257, dtype=np.int64))
    assert len(frame) == 1 + len(text.encode())
    assert frame.null_count().sum_horizontal().item() == 0


def test_lexer_class_is_that_of_the_first_character_that_is_not_blank():
    pieces = ("def", " f", "(a", "):", "\n   ", " return", " '", "b c", "' ", " # ", "d")
    assert classes("lexer", *pieces, name="x.py") == [
        "keyword",
        "name_def",
        "bracket",
        "bracket",
        "newline_indent",
        "keyword",
        "string_quote",
        "string_body",
        "string_quote",
        "comment",
        "comment",
    ]


def test_token_across_two_lexer_classes_is_flagged_whatever_blanks_it_holds():
    document, tokenizer = cut("x", " = ", "y", "[i", "]\n", "if z", name="x.py")
    assert token_classes(document, tokenizer)["spans_classes"].to_list() == [
        False,
        False,
        False,
        False,
        True,
        False,
        True,
    ]


def test_document_that_is_not_python_has_the_lexer_class_text():
    assert classes("lexer", "def", " f", "():", name="notes.md") == ["text"] * 3
    assert classes("lexer", "def", " f", "():", name="stub.pyi") == [
        "keyword",
        "name_def",
        "bracket",
    ]


def test_broken_python_is_other_and_no_error():
    assert classes("lexer", "a", " = ", "'''", "b", name="x.py") == [
        "name_other",
        "operator",
        "other",
        "other",
    ]


def test_token_that_cuts_a_character_has_the_class_of_that_character():
    pieces = (
        "x = '",
        "👍".encode()[:2],
        "👍".encode()[2:],
        "é".encode()[:1],
        "é".encode()[1:],
        "'",
    )
    assert classes("lexer", *pieces, name="x.py") == [
        "name_other",
        *["string_body"] * 4,
        "string_quote",
    ]
    assert classes("unicode", *pieces, name="x.py") == ["mixed", *["byte_fragment"] * 4, "punct"]
    # é is a letter after a symbol: its first byte begins a word and its second continues it.
    assert classes("subword", *pieces, name="x.py") == [
        "word_start",
        "non_word",
        "non_word",
        "word_start",
        "continuation",
        "non_word",
    ]


@pytest.mark.parametrize(
    ("pieces", "found"),
    [
        (("The", " cat", "s", " sat"), "word_start word_start continuation word_start"),
        (("un", "do", "_it", "2"), "word_start continuation continuation continuation"),
        (("  ", "\n", ".", " (", "x"), "non_word non_word non_word non_word word_start"),
        (("don", "'t", "é", "te"), "word_start non_word continuation continuation"),
        (("e", "\u0301", "x"), "word_start continuation continuation"),
        (("日", "本"), "word_start continuation"),
    ],
)
def test_subword_goes_by_the_first_inked_character_and_its_left_neighbour(pieces, found):
    assert classes("subword", *pieces) == found.split()


@pytest.mark.parametrize(
    ("piece", "found"),
    [
        (" the", "letter"),
        (" 42", "digit"),
        ("...", "punct"),
        (" +=", "symbol"),
        ("€", "symbol"),
        ("  ", "space"),
        ("\t", "space"),
        ("\u00a0", "space"),
        ("\n  ", "newline"),
        ("\r\n", "newline"),
        ("\u2028", "newline"),
        ("\x07", "control"),
        ("a1", "mixed"),
        ("x.", "mixed"),
        ("e\u0301", "letter"),
        ("日本", "letter"),
        ("👍", "symbol"),
    ],
)
def test_unicode_class_of_a_token(piece, found):
    assert classes("unicode", piece) == [found]


@pytest.mark.parametrize(
    ("piece", "found"),
    [
        (" the", "lower"),
        (" The", "title"),
        (" THE", "upper"),
        (" I", "upper"),
        ("getItem", "camel"),
        ("HttpServer", "camel"),
        ("HTTPd", "mixed"),
        ("iI", "camel"),
        ("a_Bc", "mixed"),
        ("_Private", "title"),
        ("42", "none"),
        ("日本", "none"),
        (" ", "none"),
        ("élan", "lower"),
        ("Élan", "title"),
    ],
)
def test_case_of_a_token(piece, found):
    assert classes("case", piece) == [found]


def test_case_does_not_look_at_the_neighbours():
    assert classes("case", "a", "B", "c", "D") == ["lower", "upper", "lower", "upper"]


@pytest.mark.parametrize(
    ("pieces", "found"),
    [
        (("It", " is", " on", "."), "first_in_document inside before_punct inside"),
        (
            ("One", ".", " Two", "?\n", "Three", "…", " x"),
            "first_in_document inside sentence_initial inside after_newline inside "
            "sentence_initial",
        ),
        (("a", "\n", "    ", "b"), "first_in_document inside after_newline inside"),
        (("x", ".", "y", " ", "z"), "first_in_document inside inside inside inside"),
        (("a", " b", " (", "c", ")"), "first_in_document inside inside before_punct inside"),
        (("a", " ", ")"), "first_in_document before_punct inside"),
    ],
)
def test_boundary_of_a_token(pieces, found):
    assert classes("boundary", *pieces) == found.split()


def test_function_words_are_told_from_content_words_by_the_whole_word():
    pieces = (
        "The",
        " cat",
        " do",
        "es",
        "n't",
        " s",
        "it",
        ",",
        " O",
        "F",
        " 20",
        "th",
        " b_of",
        " + ",
        "\n",
    )
    assert classes("function", *pieces) == [
        "function",
        "content",
        "function",
        "function",
        "function",
        "content",
        "content",
        "punct",
        "function",
        "function",
        "number",
        "number",
        "content",
        "punct",
        "other",
    ]


def test_function_words_stand_with_either_apostrophe_and_words_are_compared_whole():
    assert classes(
        "function",
        "don\u2019t",
        " don't",
        " offing",
        " themselves",
        " themselvesx",
        " ofé",
        " 'of'",
    ) == [
        "function",
        "function",
        "content",
        "function",
        "content",
        "content",
        "punct",
    ]


def test_copy_is_the_longest_suffix_whose_last_continuation_comes_again():
    frame = of_ids(b"abcabcabd")
    assert frame["copy"].to_list()[1:] == ["0", "0", "0", "0", "1", "2", "3+", "3+", "0"]
    assert frame["copy_distance"].to_list()[1:] == ["none"] * 4 + ["2-3"] * 4 + ["none"]
    assert frame["repeat"].to_list()[1:] == ["first"] * 3 + ["repeat"] * 5 + ["first"]


def test_copy_looks_at_the_most_recent_occurrence_alone():
    # The last "a" was followed by "c", an earlier one by "b".
    assert of_ids(b"abacab")["copy"].to_list()[-1] == "0"
    # "xa" was followed by "b", a later lone "a" by "c": two tokens of suffix find what one does
    # not.
    assert of_ids(b"xabacxab")["copy"].to_list()[-1] == "2"


def test_a_token_may_copy_the_one_right_before_it():
    frame = of_ids(b"aaa")
    assert frame["copy"].to_list()[1:] == ["0", "0", "1"]
    assert frame["copy_distance"].to_list()[1:] == ["none", "none", "1"]


@given(ids=st.lists(st.sampled_from(b"abc"), min_size=1, max_size=60))
@settings(max_examples=150, deadline=None)
def test_copy_and_repeat_agree_with_a_search_through_the_document(ids):
    document, tokenizer = cut(*(bytes([value]) for value in ids))
    sequence = document.ids.tolist()
    frame = token_classes(document, tokenizer)
    for t in range(1, len(sequence)):
        longest, distance = 0, 0
        for length in (1, 2, 3):
            suffix = sequence[t - length : t] if t >= length else None
            earlier = [j for j in range(length, t) if sequence[j - length : j] == suffix]
            if suffix is not None and earlier and sequence[earlier[-1]] == sequence[t]:
                longest, distance = length, t - earlier[-1]
        assert frame["copy"][t] == ("0", "1", "2", "3+")[longest]
        low, _, high = frame["copy_distance"][t].partition("-")
        assert (low == "none") if not longest else int(low) <= distance <= int(high or low)
        assert (frame["repeat"][t] == "repeat") == (sequence[t] in sequence[:t])


def test_copy_agrees_for_vocabularies_of_more_than_16_bits():
    document, tokenizer = cut(*(bytes([value]) for value in b"abcabd"))
    merges = [(left, right) for left in range(256) for right in range(256)]
    large = Tokenizer(merges)
    assert large.vocab_size > 1 << 16
    ids = np.where(document.ids == tokenizer.eos_id, large.eos_id, document.ids).astype(np.int32)
    moved = TokenizedDocument(
        index=0,
        name="a.txt",
        text=document.text,
        ids=ids,
        starts=document.starts,
        ends=document.ends,
    )
    assert (
        token_classes(moved, large)["copy"].to_list()
        == token_classes(document, tokenizer)["copy"].to_list()
    )


def test_position_is_in_powers_of_two():
    found = of_ids(b"x" * 70)["position"].to_list()
    for pos, name in enumerate(found):
        low, _, high = name.partition("-")
        assert int(low) <= pos <= int(high or low)
    assert of_ids(b"x" * 70_000)["position"].to_list()[-1] == "65536+"


def test_frequency_bands_hold_equal_mass_and_rare_ids_are_apart():
    tokenizer = Tokenizer()
    counts = np.zeros(257, dtype=np.int64)
    counts[:10] = 100
    counts[10:13] = [30, 29, 1]
    bands = np.array(CLASSES["freq_band"])[frequency_bands(counts, tokenizer)].tolist()
    assert (
        bands[:10]
        == ["most_frequent"] * 2
        + ["frequent"] * 2
        + ["medium"] * 2
        + ["infrequent"] * 2
        + ["least_frequent"] * 2
    )
    assert bands[10:14] == ["least_frequent", "rare", "rare", "rare"]


def test_one_id_that_holds_most_of_the_mass_leaves_bands_empty_but_in_order():
    counts = np.zeros(257, dtype=np.int64)
    counts[:3] = [9000, 500, 500]
    bands = np.array(CLASSES["freq_band"])[frequency_bands(counts, Tokenizer())].tolist()
    assert bands[:3] == ["medium", "least_frequent", "least_frequent"]


def test_frequency_band_follows_the_reference_counts_given():
    document, tokenizer = cut("a", "b")
    counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    counts[ord("a")] = 50
    assert token_classes(document, tokenizer, counts)["freq_band"].to_list() == [
        "special",
        "medium",
        "rare",
    ]


def test_counts_of_another_vocabulary_are_told():
    document, tokenizer = cut("a", "b")
    with refused("reference_counts", CorpusError):
        token_classes(document, tokenizer, np.zeros(5, dtype=np.int64))


@given(text=st.text(alphabet="ab B_9 .\n'é日👍\t\u0301", max_size=40), data=st.data())
@settings(max_examples=150, deadline=None)
def test_any_cut_of_any_text_has_classes_that_follow_from_its_characters(text, data):
    raw = text.encode()
    cuts = (
        sorted(data.draw(st.sets(st.integers(1, max(1, len(raw) - 1)), max_size=8)))
        if len(raw) > 1
        else []
    )
    pieces = [
        raw[begin:end]
        for begin, end in zip([0, *cuts], [*cuts, len(raw)], strict=True)
        if end > begin
    ]
    document, tokenizer = cut(*pieces, name="a.py")
    frame = token_classes(document, tokenizer)
    assert len(frame) == len(pieces) + 1
    for row, piece in zip(frame.iter_rows(named=True), [b"", *pieces], strict=True):
        if not piece:
            continue
        span = text[row["start"] : row["end"]]
        assert (row["unicode"] == "byte_fragment") == (piece != span.encode())
        ink = span.strip(" \n\t")
        word = bool(ink) and (ink[0].isalnum() or ink[0] in "_\u0301")
        assert (row["subword"] == "non_word") == (not word)
        assert (row["case"] == "none") == (
            not any(character.isupper() or character.islower() for character in span)
        )
        assert (row["unicode"] in ("space", "newline")) == (not ink)
