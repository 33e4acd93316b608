"""Byte and byte-level BPE tokenizers. Documents in, a ``Tokenizer`` out; text in, ids and character
spans out.

A tokenizer is its list of merges and nothing else: ids 0..255 are the bytes, then one id per merge
(Sennrich et al. 1508.07909, over bytes as in GPT-2), and the last id ends a document. No text can
spell that last id, and ``decode(encode(text)) == text`` for every text.
"""

import functools
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_lab.errors import CorpusError, expected, require
from moe_lab.files import content_hash, parse_json, read_regular, write_json
from moe_lab.text.corpus import Document

if TYPE_CHECKING:
    import tokenizers

FORMAT = "moe_lab.tokenizer/1"
NUM_BYTES = 256
BYTE_VOCAB_SIZE = NUM_BYTES + 1


class TokenizerKind(StrEnum):
    BPE = "bpe"
    BYTE = "byte"


class Tokenizer:
    """Text to ids and back.

    Args:
        merges: pairs of ids, in the order they were learnt. A pair whose bytes are already a token
            adds no id, and is still merged.

    Attributes:
        tokens: the bytes of each id; empty for ``eos_id``.
        vocab_size: number of ids, the end of document included.
        eos_id: the last id. It opens every document of a stream; ``decode`` leaves it out.
        hash: changes with any merge.
    """

    def __init__(self, merges: Iterable[tuple[int, int]] = ()):
        self.merges = tuple((int(left), int(right)) for left, right in merges)
        tokens = {bytes([value]): value for value in range(NUM_BYTES)}
        spelled = list(tokens)
        for left, right in self.merges:
            require(
                0 <= left < len(spelled) and 0 <= right < len(spelled),
                "merges of ids already made",
                f"({left}, {right}) with {len(spelled)} ids",
                error=CorpusError,
            )
            merged = spelled[left] + spelled[right]
            if merged not in tokens:
                tokens[merged] = len(spelled)
                spelled.append(merged)
        self.eos_id = len(spelled)
        self.tokens = (*spelled, b"")
        self.vocab_size = len(self.tokens)
        self.hash = content_hash({"format": FORMAT, "merges": self.merges})

    @cached_property
    def token_lengths(self) -> np.ndarray:
        """[V] int64: bytes of each id, 0 for the end of document."""
        return np.array([len(token) for token in self.tokens], dtype=np.int64)

    @cached_property
    def is_fragment(self) -> np.ndarray:
        """[V] bool: ids whose bytes are not UTF-8 on their own, since they cut a character."""
        return np.array([not _is_utf8(token) for token in self.tokens], dtype=bool)

    def encode(self, text: str) -> np.ndarray:
        """[n] int32 ids of ``text``, without the end of document."""
        data = _utf8(text)
        if not self.merges:
            return np.frombuffer(data, dtype=np.uint8).astype(np.int32)
        return np.array(
            self._bpe.encode_batch_fast([text], add_special_tokens=False)[0].ids, dtype=np.int32
        )

    def spans(self, text: str, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """([n] starts, [n] ends), int32, of ids that spell ``text``: token i covers
        ``text[starts[i]:ends[i]]``, in characters; an end of document covers nothing.

        Tokens that share a character, each holding some of its bytes, all get the span of that
        character.
        """
        lengths = self.token_lengths[ids]
        last_byte = np.cumsum(lengths)
        data = np.frombuffer(_utf8(text), dtype=np.uint8)
        # The character that each byte belongs to: a byte 10xxxxxx continues the character before
        # it.
        character = np.cumsum((data & 0xC0) != 0x80, dtype=np.int32) - 1
        require(
            lengths.sum() == len(data),
            "ids that spell the text",
            f"{lengths.sum()} bytes of tokens for {len(data)} bytes of text",
            error=CorpusError,
            field="ids",
        )
        character = np.append(character, np.int32(len(text)))
        starts = character[last_byte - lengths]
        ends = np.where(lengths > 0, character[last_byte - 1] + 1, starts)
        return starts.astype(np.int32), ends.astype(np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of ``ids``; bytes that are not UTF-8 (a cut character) become U+FFFD.

        Raises ``CorpusError`` for unknown ids.
        """
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """The bytes of ``ids``, exact even where they cut a character."""
        ids = np.asarray(ids, dtype=np.int64).reshape(-1)
        if len(ids):
            self._check(int(ids.min()))
            self._check(int(ids.max()))
        return b"".join(map(self.tokens.__getitem__, ids.tolist()))

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one id; ``b""`` for the end of document.

        Those of a document's ids add up to its UTF-8 bytes.
        """
        self._check(token_id)
        return self.tokens[token_id]

    def _check(self, token_id: int) -> None:
        require(
            0 <= token_id < self.vocab_size,
            f"token ids in 0..{self.vocab_size - 1}",
            token_id,
            "the tokenizer that made these ids",
            error=CorpusError,
            field="ids",
        )

    def save(self, path: Path | str) -> None:
        write_json(path, {"format": FORMAT, "hash": self.hash, "merges": self.merges})

    @classmethod
    def load(cls, path: Path | str) -> "Tokenizer":
        """Read what ``save`` wrote.

        Raises ``CorpusError`` for a file that is missing, damaged or of another format.
        """
        try:
            values = parse_json(read_regular(path))
            tokenizer = cls(values["merges"])
            intact = values["format"] == FORMAT and values["hash"] == tokenizer.hash
        except OSError as error:
            raise CorpusError(expected("a saved tokenizer", f"{path}: {error.strerror}")) from error
        except (ValueError, KeyError, TypeError, CorpusError) as error:
            raise CorpusError(
                expected("a saved tokenizer", f"{path}, which is damaged", "training it again")
            ) from error
        require(
            intact,
            f"a saved tokenizer of format {FORMAT}",
            f"{path}, whose hash or format differs",
            "training it again",
            error=CorpusError,
        )
        return tokenizer

    @cached_property
    def _bpe(self) -> "tokenizers.Tokenizer":
        library = _library()
        spelled = [_to_characters(token) for token in self.tokens[:-1]]
        tokenizer = library.Tokenizer(
            library.models.BPE(
                vocab={token: index for index, token in enumerate(spelled)},
                merges=[(spelled[left], spelled[right]) for left, right in self.merges],
            )
        )
        tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
        return tokenizer


def train_tokenizer(
    documents: Sequence[Document],
    vocab_size: int = 2048,
    kind: TokenizerKind | str = TokenizerKind.BPE,
    cache_dir: Path | str | None = None,
) -> Tokenizer:
    """Learn a tokenizer from ``documents`` alone: give it the train split and nothing else.

    Args:
        vocab_size: number of ids, the 256 bytes and the end of document included. A byte tokenizer
            always has 257.
        cache_dir: folder to keep and look for trained tokenizers, by the hash of the text and the
            settings; None always trains.

    The same documents give the same tokenizer. Raises ``CorpusError`` where the text has too few
    distinct pairs for ``vocab_size``.
    """
    if TokenizerKind(kind) is TokenizerKind.BYTE:
        return Tokenizer()
    require(
        vocab_size >= BYTE_VOCAB_SIZE,
        f"a vocabulary of at least {BYTE_VOCAB_SIZE} (bytes and end of document)",
        vocab_size,
        error=CorpusError,
        field="vocab_size",
    )
    if cache_dir is None:
        return _train(documents, vocab_size)
    texts = hashlib.sha256("".join(document.hash for document in documents).encode()).hexdigest()
    path = (
        Path(cache_dir)
        / "tokenizers"
        / f"{content_hash({'format': FORMAT, 'texts': texts, 'vocab_size': vocab_size})}.json"
    )
    if path.exists():
        try:
            return Tokenizer.load(path)
        except CorpusError:
            pass  # damaged: it is learnt again and written over
    tokenizer = _train(documents, vocab_size)
    tokenizer.save(path)
    return tokenizer


def _train(documents: Sequence[Document], vocab_size: int) -> Tokenizer:
    library = _library()
    bpe = library.Tokenizer(library.models.BPE())
    bpe.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size
        - 1,  # the end of document is ours: were it the library's, a text could spell it
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((document.text for document in documents), trainer=trainer)
    tokenizer = Tokenizer(_merges_of(json.loads(bpe.to_str())["model"]["merges"]))
    require(
        tokenizer.vocab_size >= vocab_size,
        f"text that supports a vocabulary of {vocab_size}",
        f"text that ends at {tokenizer.vocab_size}",
        "a smaller vocab_size",
        error=CorpusError,
        field="vocab_size",
    )
    return tokenizer


def _merges_of(spelled: Iterable[Sequence[str]]) -> list[tuple[int, int]]:
    """The library's merges, pairs of spellings, as pairs of our ids."""
    ids = {_to_characters(bytes([value])): value for value in range(NUM_BYTES)}
    merges = []
    for left, right in spelled:
        merges.append((ids[left], ids[right]))
        ids.setdefault(left + right, len(ids))
    return merges


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise CorpusError(
            expected("text that UTF-8 can write", f"a lone surrogate at character {error.start}"),
            field="text",
        ) from error


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


@functools.cache
def _byte_characters() -> tuple[str, ...]:
    """GPT-2's printable character for each byte, which is how byte-level BPE spells its tokens."""
    printable = {
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    }
    others = iter(range(NUM_BYTES, 2 * NUM_BYTES))
    return tuple(chr(value if value in printable else next(others)) for value in range(NUM_BYTES))


def _to_characters(token: bytes) -> str:
    characters = _byte_characters()
    return "".join(characters[value] for value in token)


def _library() -> Any:
    """The ``tokenizers`` library, imported when first needed and, unless the user says otherwise,
    on one thread as all our workers are.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import tokenizers

    return tokenizers
