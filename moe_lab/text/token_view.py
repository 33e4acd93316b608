"""``TokenView``: a document's characters and tokens as the arrays that every rule of ``classes``
reads.

Each property of a character is looked up once, in a table over Unicode; each question about a token
is then a difference of two prefix sums. A token is judged by its ink, that is its characters other
than blanks: " the" begins at its "t".
"""

import functools
import unicodedata
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from moe_lab.text.tokenized_text import TokenizedDocument
from moe_lab.text.tokenizer import Tokenizer

CHARACTER_CLASSES = ("letter", "digit", "punct", "symbol", "space", "newline", "control")
LETTER, DIGIT, PUNCT, SYMBOL, SPACE, NEWLINE, CONTROL = range(len(CHARACTER_CLASSES))
UPPER, LOWER, WORD = 8, 16, 32  # flags above the class in one byte
CLASS_MASK = 7
UNKNOWN = 255

# First letter of Unicode's general category; marks belong to the letter they sit on.
CATEGORY_CLASS = {
    "L": LETTER,
    "M": LETTER,
    "N": DIGIT,
    "P": PUNCT,
    "S": SYMBOL,
    "Z": SPACE,
    "C": CONTROL,
}
NEWLINES = frozenset("\n\r\v\f\x85\u2028\u2029")


@functools.cache
def _table() -> np.ndarray:
    """[0x110000] uint8 class and flags of each character, filled in as characters are met."""
    return np.full(0x110000, UNKNOWN, dtype=np.uint8)


def _properties(character: str) -> int:
    category = unicodedata.category(character)
    if character in NEWLINES:
        return NEWLINE
    if character == "\t":
        return SPACE
    value = CATEGORY_CLASS[category[0]]
    value |= UPPER if category in ("Lu", "Lt") else LOWER if category == "Ll" else 0
    return value | (WORD if value & CLASS_MASK in (LETTER, DIGIT) or character == "_" else 0)


def character_properties(codes: np.ndarray) -> np.ndarray:
    """[n] uint8 of [n] code points: index into ``CHARACTER_CLASSES`` (``& CLASS_MASK``) and the
    flags UPPER, LOWER and WORD.
    """
    table = _table()
    found = table[codes]
    missing = np.unique(codes[found == UNKNOWN])
    if len(missing):
        table[missing] = [_properties(chr(code)) for code in missing.tolist()]
        found = table[codes]
    return found


@dataclass(frozen=True, eq=False)
class TokenView:
    """A document of T tokens and n characters.

    Character arrays have n + 1 entries: a final newline stands for the end of the text.
    """

    document: TokenizedDocument
    tokenizer: Tokenizer

    @property
    def ids(self) -> np.ndarray:
        return self.document.ids

    @cached_property
    def starts(self) -> np.ndarray:
        return self.document.starts.astype(np.int64)

    @cached_property
    def ends(self) -> np.ndarray:
        return self.document.ends.astype(np.int64)

    @cached_property
    def special(self) -> np.ndarray:
        """[T] bool: the end-of-document ids, which have no class."""
        return self.ids == self.tokenizer.eos_id

    @cached_property
    def codes(self) -> np.ndarray:
        """[n + 1] code points."""
        return np.frombuffer((self.document.text + "\n").encode("utf-32-le"), dtype=np.uint32)

    @cached_property
    def properties(self) -> np.ndarray:
        return character_properties(self.codes)

    @cached_property
    def character_class(self) -> np.ndarray:
        """[n + 1] index into ``CHARACTER_CLASSES``."""
        return self.properties & CLASS_MASK

    @cached_property
    def is_word(self) -> np.ndarray:
        """[n + 1] bool: letters, digits and the underscore."""
        return (self.properties & WORD) > 0

    @cached_property
    def is_blank(self) -> np.ndarray:
        return (self.character_class == SPACE) | (self.character_class == NEWLINE)

    @cached_property
    def ink(self) -> np.ndarray:
        """Positions of the characters that are not blank, and n after them."""
        return np.append(np.flatnonzero(~self.is_blank), len(self.codes) - 1)

    @cached_property
    def ink_range(self) -> tuple[np.ndarray, np.ndarray]:
        """([T], [T]) begin and end in ``ink`` of each token's characters that are not blank."""
        before = prefix_sum(~self.is_blank)
        return before[self.starts], before[self.ends]

    @cached_property
    def has_ink(self) -> np.ndarray:
        return self.ink_range[1] > self.ink_range[0]

    @cached_property
    def first(self) -> np.ndarray:
        """[T] place of the token's first character that is not blank; of its first character where
        it is all blank.
        """
        return np.where(self.has_ink, self.ink[self.ink_range[0]], self.starts)

    def count(self, member: np.ndarray) -> np.ndarray:
        """[T] how many characters of each token are members of an [n + 1] bool."""
        total = prefix_sum(member)
        return total[self.ends] - total[self.starts]

    def is_mixed(self, values: np.ndarray) -> np.ndarray:
        """[T] bool: whether an [n + 1] array has more than one value over the token's characters
        that are not blank.
        """
        inked = values[self.ink]
        changes = prefix_sum(inked[1:] != inked[:-1])
        begin, end = self.ink_range
        return self.has_ink & (changes[np.maximum(end - 1, 0)] > changes[begin])


def prefix_sum(values: np.ndarray) -> np.ndarray:
    """[n + 1] int32: how many of the first i values are true."""
    total = np.zeros(len(values) + 1, dtype=np.int32)
    np.cumsum(values, out=total[1:])
    return total
