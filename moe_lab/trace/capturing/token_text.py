"""``TokenText``: the bytes that each token of a tokenizer stands for, however the tokenizer spells
them.

``decode([id])`` alone is wrong in two ways: it drops the space that a SentencePiece token begins
with, and it has no bytes for a token that is part of a character. The bytes are therefore read from
the vocabulary: byte-level tokenizers spell each byte as one character (GPT-2), SentencePiece writes
a space as U+2581 and a lone byte as ``<0xE7>``.
"""

import json
import re
from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
import polars as pl

SPACE = "\u2581"
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class TokenText:
    """Bytes and text of token ids, each looked up once.

    Args:
        tokenizer: of transformers, of the tokenizers library, or anything with ``decode``.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, bytes] = {}

    def bytes_of(self, token_id: int) -> bytes:
        """The bytes of the token inside a text; empty for a special token."""
        if token_id not in self._known:
            self._known[token_id] = self._spelled(token_id)
        return self._known[token_id]

    def of(self, token_ids: np.ndarray) -> pl.Series:
        """[T] texts; a part of a character shows the replacement character."""
        texts = {
            i: self.bytes_of(i).decode(errors="replace") for i in np.unique(token_ids).tolist()
        }
        return pl.Series([texts[number] for number in token_ids.tolist()], dtype=pl.String)

    def of_document(self, token_ids: np.ndarray, text: str) -> list[bytes]:
        """[n] bytes of the tokens of ``text``, without the space that SentencePiece puts before the
        first one.
        """
        pieces = [self.bytes_of(number) for number in token_ids.tolist()]
        first = next((place for place, piece in enumerate(pieces) if piece), None)
        if first is not None and pieces[first].startswith(b" ") and not text.startswith(" "):
            pieces[first] = pieces[first][1:]
        return pieces

    def _spelled(self, token_id: int) -> bytes:
        convert = getattr(self._tokenizer, "convert_ids_to_tokens", None)
        if convert is None:
            return self._tokenizer.decode([token_id]).encode()
        token = convert(token_id)
        if token is None or token_id in self._special:
            return b""
        if token in self._added:
            return token.encode(errors="replace")
        return self._spelling(token)

    @cached_property
    def _special(self) -> frozenset[int]:
        return frozenset(getattr(self._tokenizer, "all_special_ids", ()) or ())

    @cached_property
    def _added(self) -> frozenset[str]:
        """Tokens that stand in a text as they are spelled."""
        return frozenset(getattr(self._tokenizer, "get_added_vocab", dict)())

    @cached_property
    def _spelling(self) -> Callable[[str], bytes]:
        """Token of the vocabulary -> bytes."""
        kinds = self._decoder_kinds
        if "ByteLevel" in kinds:
            return _of_byte_level
        if kinds & {"Metaspace", "ByteFallback"} or (not kinds and self._has_spaces):
            return _of_sentencepiece
        if "WordPiece" in kinds:
            return lambda token: token.removeprefix("##").encode(errors="replace")
        return lambda token: self._tokenizer.convert_tokens_to_string([token]).encode(
            errors="replace"
        )

    @cached_property
    def _decoder_kinds(self) -> frozenset[str | None]:
        """Types in the decoder of a fast tokenizer."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None:
            return frozenset()
        decoder = json.loads(backend.to_str()).get("decoder") or {}
        return frozenset(part.get("type") for part in (decoder, *decoder.get("decoders", ())))

    @property
    def _has_spaces(self) -> bool:
        return SPACE in self._tokenizer.get_vocab()


def _byte_alphabet() -> dict[str, int]:
    """Character -> byte as GPT-2 spells them: printable ones as they are, others from U+0100."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(b): b for b in plain} | {chr(256 + n): byte for n, byte in enumerate(others)}


_ALPHABET = _byte_alphabet()


def _of_byte_level(token: str) -> bytes:
    if all(letter in _ALPHABET for letter in token):
        return bytes(_ALPHABET[letter] for letter in token)
    return token.encode(errors="replace")


def _of_sentencepiece(token: str) -> bytes:
    match = _BYTE.fullmatch(token)
    return bytes([int(match[1], 16)]) if match else token.replace(SPACE, " ").encode()
