"""English function words: the closed classes, which are few, frequent and predictable, against the
open classes of content words.
"""

from string import ascii_lowercase, ascii_uppercase

import numpy as np

RIGHT_QUOTE = 0x2019

_CLOSED_CLASSES = {
    "articles and determiners": "a an the this that these those each every either neither both "
    "all any some no another such enough",
    "quantifiers": "many much more most few fewer less least several",
    "personal pronouns": "i me you he him she her it we us they them",
    "possessives": "my mine your yours his hers its our ours their theirs",
    "reflexives": "myself yourself himself herself itself ourselves yourselves themselves oneself",
    "indefinite pronouns": "one none nobody nothing someone somebody something anyone anybody "
    "anything everyone everybody everything",
    "question and relative words": "who whom whose which what when where why how whether",
    "auxiliaries": "be am is are was were been being have has had having do does did doing done",
    "modals": "can could may might must shall should will would ought",
    "contractions of auxiliaries": "i'm i've i'd i'll you're you've you'd you'll he's he'd he'll "
    "she's she'd she'll it's it'd it'll "
    "we're we've we'd we'll they're they've they'd they'll that's there's what's who's let's",
    "negation": "not never nor cannot isn't aren't wasn't weren't don't doesn't didn't haven't "
    "hasn't hadn't can't couldn't won't wouldn't "
    "shouldn't mustn't ain't",
    "prepositions": "of in on at to from by with without within into onto upon for about above "
    "below under over between among against "
    "across after before behind beside besides beyond during except inside outside near off out "
    "since through throughout toward towards "
    "until till up down via per as like than",
    "conjunctions": "and or but so yet if because although though unless while whereas once lest",
    "adverbs of place and time that stand for a phrase": "there here then",
}

FUNCTION_WORDS = frozenset(word for words in _CLOSED_CLASSES.values() for word in words.split())

# A word of up to ten letters, lower case, is one number of six bits a letter, so that a text's
# words are looked up all at once.
MAX_LETTERS = 10
_OTHER = 63
_LETTERS = np.full(128, _OTHER, dtype=np.uint64)
_LETTERS[[ord(letter) for letter in ascii_lowercase]] = np.arange(1, 27)
_LETTERS[[ord(letter) for letter in ascii_uppercase]] = np.arange(1, 27)
_LETTERS[ord("'")] = 27


def _keys(codes: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """[words] uint64 of the words ``codes[begin:end]``, of which only the first ten characters
    count.
    """
    letters = _LETTERS[np.where(codes == RIGHT_QUOTE, ord("'"), np.minimum(codes, 127))]
    keys = np.zeros(len(begins), dtype=np.uint64)
    for offset in range(MAX_LETTERS):
        inside = begins + offset < ends
        place = np.minimum(begins + offset, len(codes) - 1)
        keys |= np.where(inside, letters[place], 0) << np.uint64(6 * offset)
    return keys


def _vocabulary_keys() -> np.ndarray:
    words = sorted(FUNCTION_WORDS)
    ends = np.cumsum([len(word) for word in words])
    return np.sort(
        _keys(
            np.array([ord(letter) for letter in "".join(words)], dtype=np.uint32),
            np.append(0, ends[:-1]),
            ends,
        )
    )


_FUNCTION_KEYS = _vocabulary_keys()


def is_function_word(codes: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """[words] bool for the words ``codes[begin:end]`` of a text's code points, in any case and with
    either apostrophe.
    """
    keys = _keys(codes, begins, ends)
    found = _FUNCTION_KEYS[
        np.minimum(np.searchsorted(_FUNCTION_KEYS, keys), len(_FUNCTION_KEYS) - 1)
    ]
    return (found == keys) & (ends - begins <= MAX_LETTERS)
