"""``Described``: the class columns of traced tokens, by the rules of ``moe_lab.text``, for the
tokenizer of any model.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl

from moe_lab.text import CLASSES, TokenizedDocument, token_classes
from moe_lab.trace.capturing.token_text import TokenText

CLASS_COLUMNS = (
    "start",
    "end",
    "n_bytes",
    "lexer",
    "subword",
    "unicode",
    "case",
    "copy",
    "repeat",
    "position",
    "boundary",
    "function",
)
TEXTS = frozenset(CLASSES) & frozenset(CLASS_COLUMNS)
"""Those that hold a word; the others hold numbers."""


class Described:
    """Class columns of a batch by the rules of ``moe_lab.text``, for tokenizers of transformers or
    of the tokenizers library.
    """

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        self.text = TokenText(tokenizer)
        self.fast = bool(getattr(tokenizer, "is_fast", False))
        known = _size(tokenizer)
        self.vocab_size = max(known, vocab_size)
        pieces = [self.text.bytes_of(number) for number in range(known)]
        pieces += [b""] * (self.vocab_size - known)
        self.token_lengths = np.array([len(piece) for piece in pieces], dtype=np.int64)
        self.is_fragment = np.array(
            ["\ufffd" in piece.decode(errors="replace") for piece in pieces]
        )
        special = getattr(tokenizer, "bos_token_id", None)
        self.eos_id = -1 if special is None else special

    def columns(self, batch: Sequence[TokenizedDocument], width: int) -> dict[str, np.ndarray]:
        """[B, S] of each column: name of the document, text and bytes of the token, and its classes
        where the tokenizer gives spans.
        """
        rows = [self._of_document(document) for document in batch]
        columns: dict[str, np.ndarray] = {}
        for name in rows[0]:
            values = [row[name] for row in rows]
            text = any(isinstance(item, str) for row in values for item in row[:1])
            filled = np.full((len(batch), width), "" if text else 0, dtype=object)
            for place, row in enumerate(values):
                filled[place, : len(row)] = row
            columns[name] = filled if text else filled.astype(np.int64)
        return columns

    def _of_document(self, document: TokenizedDocument) -> dict[str, list[Any]]:
        pieces = self.text.of_document(document.ids, document.text)
        own: dict[str, list[Any]] = {
            "document": [document.name] * len(pieces),
            "text": [piece.decode(errors="replace") for piece in pieces],
            "n_bytes": [len(piece) for piece in pieces],
        }
        if not self.fast:
            return own
        frame = token_classes(document, self)  # type: ignore[arg-type]
        names = [name for name in CLASS_COLUMNS if name in frame.columns]
        return {name: frame[name].to_list() for name in names} | own

    def of_rows(
        self, doc: np.ndarray, pos: np.ndarray, token_id: np.ndarray
    ) -> dict[str, pl.Series]:
        """[n] class columns of the tokens of one pass, whose text is what they write. Null for the
        tokens of a document that did not begin in this pass.
        """
        columns: dict[str, list[Any]] = {name: [None] * len(doc) for name in CLASS_COLUMNS}
        for number in np.unique(doc):
            places = np.flatnonzero(doc == number)
            if not np.array_equal(pos[places], np.arange(len(places))):
                continue
            ids = token_id[places].astype(np.int32)
            texts = [self.text.bytes_of(one).decode(errors="replace") for one in ids.tolist()]
            ends = np.cumsum([len(text) for text in texts])
            starts = np.append(0, ends[:-1])
            spans = (starts.astype(np.int32), ends.astype(np.int32))
            document = TokenizedDocument(int(number), "", "".join(texts), ids, *spans)
            frame = token_classes(document, self)  # type: ignore[arg-type]
            for name, values in columns.items():
                for place, value in zip(places, frame[name].to_list(), strict=True):
                    values[place] = value
        return {
            name: pl.Series(values, dtype=pl.String if name in TEXTS else pl.Int64)
            for name, values in columns.items()
        }


def _size(tokenizer: Any) -> int:
    """Token ids that a tokenizer has, of transformers or of the tokenizers library."""
    return len(tokenizer) if hasattr(tokenizer, "__len__") else tokenizer.get_vocab_size()
