"""Classes of tokens: orthogonal columns over a document's tokens, none of which needs a model.

Several columns and never one flat list, since the classes overlap and are confounded: a keyword is
also frequent, whole and often copied. Every rule is a function from a ``TokenView`` to one code a
token; ``CLASSES`` names the codes in order. The end-of-document id is ``special`` throughout.
"""

import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from moe_lab.errors import CorpusError, require
from moe_lab.text.code_lexer import code_classes, lexer_for
from moe_lab.text.function_words import RIGHT_QUOTE, is_function_word
from moe_lab.text.python_lexer import PYTHON_CLASSES, python_classes
from moe_lab.text.token_view import (
    CHARACTER_CLASSES,
    DIGIT,
    LETTER,
    LOWER,
    NEWLINE,
    PUNCT,
    SPACE,
    UPPER,
    TokenView,
    prefix_sum,
)
from moe_lab.text.tokenized_text import TokenizedDocument
from moe_lab.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import polars as pl

PYTHON_SUFFIXES = (".py", ".pyi")
RARE_BELOW = 30
NUM_BANDS = 5
MAX_COPY = 3
SENTENCE_ENDS = (ord("."), ord("!"), ord("?"), ord("…"))


def _log2_names(first: int, last: int) -> tuple[str, ...]:
    """Names of the buckets 2^i .. 2^(i+1) - 1 for i in first..last; the last one is open."""
    names = [str(2**i) if i == 0 else f"{2**i}-{2 ** (i + 1) - 1}" for i in range(first, last)]
    return (*names, f"{2**last}+")


CLASSES: dict[str, tuple[str, ...]] = {
    "lexer": (*PYTHON_CLASSES, "text", "special"),
    "subword": ("word_start", "continuation", "non_word", "special"),
    "freq_band": (
        "most_frequent",
        "frequent",
        "medium",
        "infrequent",
        "least_frequent",
        "rare",
        "special",
    ),
    "unicode": (*CHARACTER_CLASSES, "mixed", "byte_fragment", "special"),
    "case": ("lower", "title", "upper", "camel", "mixed", "none", "special"),
    "copy": ("0", "1", "2", "3+", "special"),
    "copy_distance": ("none", *_log2_names(0, 14), "special"),
    "repeat": ("first", "repeat", "special"),
    "position": ("0", *_log2_names(0, 16)),
    "boundary": (
        "first_in_document",
        "after_newline",
        "sentence_initial",
        "before_punct",
        "inside",
        "special",
    ),
    "function": ("function", "content", "number", "punct", "other", "special"),
}
CODES = {
    column: {name: code for code, name in enumerate(names)} for column, names in CLASSES.items()
}
# Column ``function`` of a character outside words, by its class.
OUTSIDE_WORDS = np.array(
    [
        CODES["function"]["punct" if name in ("punct", "symbol") else "other"]
        for name in CHARACTER_CLASSES
    ]
)


def token_classes(
    document: TokenizedDocument, tokenizer: Tokenizer, reference_counts: np.ndarray | None = None
) -> "pl.DataFrame":
    """One row for each token of ``document``, the opening end-of-document id included.

    Args:
        reference_counts: [V] occurrences of each id in text that neither trains nor is judged
            (``TokenizedText.counts()``); without it ``freq_band`` is null but for ``special``.

    Columns: doc, pos, token_id, start, end (u32; characters of the text), n_bytes (u32, those of
    the token), spans_classes (bool), and as Enum of ``CLASSES[column]``:

        lexer: lexer class of the first character that is not blank, by the document's name:
            Python's own tokenizer for ``.py``, Pygments (extra ``lexers``) for other languages that
            it knows, else ``text``. ``spans_classes`` tells the tokens that hold several.
        subword: ``word_start`` or ``continuation`` of a word (letters, digits, underscore), by that
        character and its left neighbour.
        freq_band: ``rare`` below 30 reference occurrences, unseen ids included; the other ids in
        five bands of about equal mass.
        unicode: class of the characters that are not blank, ``mixed`` where they differ;
        ``byte_fragment`` where the bytes are not UTF-8.
        case: of the letters that have case; ``camel`` has an upper-case letter right after a
        lower-case one.
        copy: longest suffix of 1, 2 or 3 tokens before this one whose most recent earlier
            occurrence in the document was followed by this token, else 0 (the associative-recall
            hits of Arora et al. 2312.04927); ``copy_distance``: tokens back to that follower.
        repeat: whether the id occurred before in the document.
        position: pos in powers of two.
        boundary: the first that applies of first token, follows a token that holds a newline,
            begins a sentence (after ``. ! ?`` and a blank), stands right before punctuation.
        function: English function or content word, by the whole word that the token is part of; a
        number; punctuation or symbol.
    """
    import polars as pl  # slow to import, and text alone does not need it

    view = TokenView(document, tokenizer)
    places = {
        "doc": np.full(len(view.ids), document.index),
        "pos": np.arange(len(view.ids)),
        "token_id": view.ids,
        "start": view.starts,
        "end": view.ends,
        "n_bytes": tokenizer.token_lengths[view.ids],
    }
    lexer, spans_classes = _lexer(view)
    codes = {
        "lexer": lexer,
        **{column: rule(view) for column, rule in RULES.items()},
        **_copy(view),
    }
    bands = frequency_bands(reference_counts, tokenizer) if reference_counts is not None else None
    codes["freq_band"] = (
        np.full(len(view.ids), len(CLASSES["freq_band"])) if bands is None else bands[view.ids]
    )
    columns = {name: pl.Series(name, values.astype(np.uint32)) for name, values in places.items()}
    columns["spans_classes"] = pl.Series(spans_classes)
    for column, names in CLASSES.items():
        code = codes[column].astype(np.uint8)
        if "special" in names:
            code[view.special] = names.index("special")
        columns[column] = _named(column)[code]
    return pl.DataFrame(columns)


@functools.cache
def _named(column: str) -> "pl.Series":
    """The classes of a column in order, and null after them."""
    import polars as pl

    return pl.Series([*CLASSES[column], None], dtype=pl.Enum(CLASSES[column]))


def frequency_bands(counts: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """[V] uint8 index into ``CLASSES["freq_band"]`` from [V] counts.

    The ids seen at least 30 times, most frequent first, are cut where each fifth of their
    occurrences ends; an id that lies across a cut goes where its middle lies.
    """
    require(
        counts.shape == (tokenizer.vocab_size,),
        f"reference counts of {tokenizer.vocab_size} ids",
        f"shape {counts.shape}",
        "TokenizedText.counts()",
        error=CorpusError,
        field="reference_counts",
    )
    bands = np.full(len(counts), CODES["freq_band"]["rare"], dtype=np.uint8)
    common = np.flatnonzero(counts >= RARE_BELOW)
    bands[common] = equal_mass_bands(counts[common], NUM_BANDS)
    return bands


def equal_mass_bands(counts: np.ndarray, bands: int) -> np.ndarray:
    """[V] int64 band of each id, 0 the most frequent: ids in order of [V] counts, cut where each
    part of their occurrences ends.

    An id that lies across a cut goes where its middle lies.
    """
    order = np.argsort(-counts, kind="stable")
    mass = counts[order].astype(np.float64)
    middle = (np.cumsum(mass) - mass / 2) / max(mass.sum(), 1.0)
    band = np.empty(len(counts), dtype=np.int64)
    band[order] = np.minimum(middle * bands, bands - 1).astype(np.int64)
    return band


def _lexer(view: TokenView) -> tuple[np.ndarray, np.ndarray]:
    """([T] class, [T] whether the token holds several)."""
    text, name = view.document.text, view.document.name
    lexer = None if name.endswith(PYTHON_SUFFIXES) else lexer_for(name)
    if lexer is None and not name.endswith(PYTHON_SUFFIXES):
        return np.full(len(view.ids), CODES["lexer"]["text"]), np.zeros(len(view.ids), dtype=bool)
    found = python_classes(text) if lexer is None else code_classes(text, lexer)
    classes = np.append(found, np.uint8(CODES["lexer"]["other"]))
    return classes[view.first], view.is_mixed(classes)


def _subword(view: TokenView) -> np.ndarray:
    word = view.is_word[view.first]
    # A token that begins inside a character continues it.
    inside = np.append(False, view.starts[1:] < view.ends[:-1])
    left = np.where(view.first > 0, view.is_word[view.first - 1], False)
    codes = CODES["subword"]
    return np.where(
        ~word,
        codes["non_word"],
        np.where(left | inside, codes["continuation"], codes["word_start"]),
    )


def _unicode(view: TokenView) -> np.ndarray:
    codes = CODES["unicode"]
    inked = np.where(
        view.is_mixed(view.character_class), codes["mixed"], view.character_class[view.first]
    )
    blank = np.where(view.count(view.character_class == NEWLINE) > 0, NEWLINE, SPACE)
    return np.where(
        view.tokenizer.is_fragment[view.ids],
        codes["byte_fragment"],
        np.where(view.has_ink, inked, blank),
    )


def _case(view: TokenView) -> np.ndarray:
    upper, lower = (view.properties & UPPER) > 0, (view.properties & LOWER) > 0
    num_upper, num_lower = view.count(upper), view.count(lower)
    # A hump is an upper-case letter right after a lower-case one of the same token.
    humps = prefix_sum(upper & np.append(False, lower[:-1]))
    num_humps = humps[view.ends] - humps[np.minimum(view.starts + 1, view.ends)]
    first_upper = prefix_sum(upper | lower)
    cased = np.append(np.flatnonzero(upper | lower), len(upper) - 1)
    leads = upper[cased[first_upper[view.starts]]]
    codes = CODES["case"]
    rules = {
        "none": num_upper + num_lower == 0,
        "lower": num_upper == 0,
        "upper": num_lower == 0,
        "camel": num_humps > 0,
        "title": leads & (num_upper == 1),
    }
    return np.select(list(rules.values()), [codes[name] for name in rules], codes["mixed"])


def _boundary(view: TokenView) -> np.ndarray:
    after_newline = np.append(False, view.count(view.character_class == NEWLINE)[:-1] > 0)
    # The last ink before the token's own, with at least one blank between.
    begin = view.ink_range[0]
    previous_ink = np.where(begin > 0, view.ink[begin - 1], -1)
    ends_sentence = np.isin(view.codes[previous_ink], SENTENCE_ENDS)
    sentence_initial = view.has_ink & (begin > 0) & ends_sentence & (view.first - previous_ink > 1)
    codes = CODES["boundary"]
    rules = {
        "first_in_document": np.arange(len(view.ids)) == np.argmin(view.special),
        "after_newline": after_newline,
        "sentence_initial": sentence_initial,
        "before_punct": view.character_class[view.ends] == PUNCT,
    }
    return np.select(list(rules.values()), [codes[name] for name in rules], codes["inside"])


def _function(view: TokenView) -> np.ndarray:
    codes = CODES["function"]
    letter = view.character_class == LETTER
    between = np.append(letter[1:], False) & np.append(False, letter[:-1])
    in_word = view.is_word | (((view.codes == ord("'")) | (view.codes == RIGHT_QUOTE)) & between)
    edges = np.flatnonzero(in_word[1:] != in_word[:-1]) + 1
    edges = np.append(0, edges) if in_word[0] else edges
    # The text's end is a newline, so every word that begins also ends.
    begins, ends = edges[::2], edges[1::2]
    is_function = is_function_word(view.codes, begins, ends)
    is_number = view.character_class[begins] == DIGIT
    word_codes = np.where(
        is_number, codes["number"], np.where(is_function, codes["function"], codes["content"])
    )
    characters = OUTSIDE_WORDS[view.character_class]
    characters[in_word] = np.repeat(word_codes, ends - begins)
    return characters[view.first]


def _position(view: TokenView) -> np.ndarray:
    return _log2_code(np.arange(len(view.ids)), len(CLASSES["position"]) - 1)


def _log2_code(values: np.ndarray, last: int) -> np.ndarray:
    """0 for 0, and i + 1 for 2^i .. 2^(i+1) - 1, up to ``last``."""
    return np.minimum(np.frexp(values)[1], last)


def _copy(view: TokenView) -> dict[str, np.ndarray]:
    """The columns copy, copy_distance and repeat."""
    # Numpy sorts 16-bit numbers in linear time.
    ids = view.ids.astype(np.uint16 if view.tokenizer.vocab_size <= 1 << 16 else np.int32)
    places = np.arange(len(ids))
    longest, distance = np.zeros(len(ids), dtype=np.int64), np.zeros(len(ids), dtype=np.int64)
    suffixes = list(_earlier_suffixes(ids))
    for length, earlier in enumerate(suffixes, start=1):
        follower = np.append(-1, np.where(earlier[:-1] >= 0, earlier[:-1] + 1, -1))
        hit = (follower >= 0) & (ids[follower] == ids)
        longest[hit], distance[hit] = length, (places - follower)[hit]
    repeat = np.where(suffixes[0] >= 0, CODES["repeat"]["repeat"], CODES["repeat"]["first"])
    return {
        "copy": longest,
        "copy_distance": _log2_code(distance, len(CLASSES["copy_distance"]) - 2),
        "repeat": repeat,
    }


def _earlier_suffixes(ids: np.ndarray) -> Iterator[np.ndarray]:
    """For suffixes of 1, 2, ... tokens: [T] the last earlier place where the suffix that ends at
    each place ended too, else -1.

    Places are sorted by suffix, earlier ones first. Those sorted by their last n - 1 tokens, moved
    on by one place and sorted once more by their own token, are sorted by their last n.
    """
    order, group = np.arange(len(ids)), np.zeros(len(ids) + 1, dtype=np.int64)
    for length in range(1, MAX_COPY + 1):
        moved = order if length == 1 else order[order < len(ids) - 1] + 1
        order = moved[np.argsort(ids[moved], kind="stable")]
        sorted_ids, before = ids[order], group[order - 1]
        same = (sorted_ids[1:] == sorted_ids[:-1]) & (before[1:] == before[:-1])
        group = np.zeros(len(ids) + 1, dtype=np.int64)
        group[order[1:]] = np.cumsum(~same)
        earlier = np.full(len(ids), -1)
        earlier[order[1:][same]] = order[:-1][same]
        yield earlier


RULES: dict[str, Callable[[TokenView], np.ndarray]] = {
    "subword": _subword,
    "unicode": _unicode,
    "case": _case,
    "position": _position,
    "boundary": _boundary,
    "function": _function,
}
