"""A corpus as ids: ``TextConfig`` in, ``TokenizedText`` out, through a cache that makes the second
load a matter of milliseconds.

One ``.npz`` file holds a whole tokenized corpus: the merges, the ids and the names. The texts are
not stored beside them, since the ids spell them exactly. The file is named after the content hash
of the corpus and the settings, and is renamed into place when whole, so any
number of processes may build it at once: they write the same bytes.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated

import numpy as np

from moe_lab.config import Config, at_least, require
from moe_lab.errors import CorpusError
from moe_lab.files import atomic_path, content_hash, default_cache_dir
from moe_lab.text.corpus import STDLIB, Corpus, Document, Split, load_corpus
from moe_lab.text.tokenizer import BYTE_VOCAB_SIZE, Tokenizer, TokenizerKind, train_tokenizer

FORMAT = "moe_lab.tokens/1"
SPLITS = tuple(Split)
COUNTED = 2**22
"""Ids that are counted at a time."""


@dataclass(frozen=True)
class TextConfig(Config):
    """The text of a run and its tokenizer.

    Attributes:
        corpus: ``"stdlib"`` or a path (see ``load_corpus``).
        text_column: where a ``.jsonl`` or ``.parquet`` corpus keeps its text.
        tokenizer: ``"bpe"``, learnt from the train split, or ``"byte"``.
        vocab_size: number of ids, end of document included; always 257 with ``"byte"``.
        corpus_hash: content hash the corpus must have; None takes it as it is. ``resolve`` fills it
            in.
        seed: of the split into train, validation and reference documents.
    """

    corpus: str = STDLIB
    text_column: str = "text"
    tokenizer: TokenizerKind = TokenizerKind.BPE
    vocab_size: Annotated[int, at_least(BYTE_VOCAB_SIZE)] = 2048
    corpus_hash: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.corpus, '"stdlib" or a path as corpus', repr(self.corpus), field="corpus")
        # One way to write one thing, so that equal settings have equal hashes.
        if self.tokenizer == TokenizerKind.BYTE:
            object.__setattr__(self, "vocab_size", BYTE_VOCAB_SIZE)
        super().__post_init__()

    def resolve(self) -> "TextConfig":
        """The same configuration with the hash of the corpus as it is now.

        Raises ``CorpusError`` where it had another hash.
        """
        return self.replace(corpus_hash=self.load().hash)

    def load(self) -> Corpus:
        """The corpus.

        Raises ``CorpusError`` where ``corpus_hash`` is set and the text found is not that text.
        """
        corpus = load_corpus(self.corpus, self.text_column)
        require(
            self.corpus_hash in (None, corpus.hash),
            f"the corpus with content hash {self.corpus_hash}",
            f"{corpus.hash} in {self.corpus}",
            "the text and Python version of this configuration, or corpus_hash=None",
            error=CorpusError,
            field="corpus_hash",
        )
        return corpus


@dataclass(frozen=True, eq=False)
class TokenizedDocument:
    """A document and its tokens. The first token is the end-of-document id, an empty span at
    character 0.

    Attributes:
        index: place of the document in the corpus, unique across splits; the ``doc`` of traces.
        ids, starts, ends: [n] int32; token i covers ``text[starts[i]:ends[i]]`` in characters.
    """

    index: int
    name: str
    text: str
    ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray


class _SpeltDocument(TokenizedDocument):
    """One whose text and spans are spelt out on first use: of many documents few are shown."""

    def __init__(self, index: int, name: str, ids: np.ndarray, tokenizer: Tokenizer) -> None:
        self.__dict__.update(index=index, name=name, ids=ids, tokenizer=tokenizer)

    @cached_property
    def text(self) -> str:  # type: ignore[override]
        return self.__dict__["tokenizer"].decode(self.ids)

    @cached_property
    def _spans(self) -> tuple[np.ndarray, np.ndarray]:
        return self.__dict__["tokenizer"].spans(self.text, self.ids)

    @property
    def starts(self) -> np.ndarray:  # type: ignore[override]
        return self._spans[0]

    @property
    def ends(self) -> np.ndarray:  # type: ignore[override]
        return self._spans[1]


@dataclass(frozen=True, eq=False)
class TokenizedText:
    """A corpus as ids, its documents one after another, each opened by ``tokenizer.eos_id``.

    Attributes:
        config: what was asked for, with ``corpus_hash`` set.
        tokenizer: learnt from the train documents alone.
        ids: [n] uint16 or int32, every document of the corpus in corpus order.
        offsets: [documents + 1] int64, where each document begins in ``ids``.
        split_codes: [documents] uint8, index into ``SPLITS``.
        names: [documents].
    """

    config: TextConfig
    tokenizer: Tokenizer
    ids: np.ndarray
    offsets: np.ndarray
    split_codes: np.ndarray
    names: tuple[str, ...]

    @cached_property
    def train(self) -> np.ndarray:
        """[n] of the type of ``ids``: the stream to train on."""
        return self.stream(Split.TRAIN)

    def stream(self, split: Split | str) -> np.ndarray:
        """[n] of the type of ``ids``: all ids of a split in one row, every document opened by
        ``eos_id``.
        """
        bounds = zip(self.offsets[:-1], self.offsets[1:], strict=True)
        parts = [self.ids[start:end] for start, end in bounds]
        return np.concatenate([parts[index] for index in self._members(split)])

    def counts(self, split: Split | str = Split.REFERENCE) -> np.ndarray:
        """[V] int64: how often each id occurs in a split."""
        ids, size = self.stream(split), self.tokenizer.vocab_size
        blocks = range(0, len(ids), COUNTED)  # counting makes 64-bit numbers of them
        return np.sum(
            [np.bincount(ids[at : at + COUNTED], minlength=size) for at in blocks], axis=0
        )

    def documents(self, split: Split | str) -> list[TokenizedDocument]:
        """The documents of a split in corpus order, with their texts and the character span of each
        token.
        """
        return [self._document(int(index)) for index in self._members(split)]

    def _members(self, split: Split | str) -> np.ndarray:
        return np.flatnonzero(self.split_codes == SPLITS.index(Split(split)))

    def _document(self, index: int) -> TokenizedDocument:
        ids = self.ids[self.offsets[index] : self.offsets[index + 1]].astype(np.int32)
        return _SpeltDocument(index, self.names[index], ids, self.tokenizer)


def tokenize_documents(
    documents: Sequence[Document], tokenizer: Tokenizer
) -> list[TokenizedDocument]:
    """Any documents in the tokens of ``tokenizer``, each opened by ``eos_id``; ``index`` is the
    place in ``documents``.
    """
    tokenized = []
    for index, document in enumerate(documents):
        ids = np.concatenate(
            [np.array([tokenizer.eos_id], dtype=np.int32), tokenizer.encode(document.text)]
        )
        starts, ends = tokenizer.spans(document.text, ids)
        tokenized.append(
            TokenizedDocument(
                index=index,
                name=document.name,
                text=document.text,
                ids=ids,
                starts=starts,
                ends=ends,
            )
        )
    return tokenized


def load_tokens(config: TextConfig, cache_dir: Path | str | None = None) -> TokenizedText:
    """The corpus of ``config`` as ids, from the cache where it is there, else read, split,
    tokenized and put there.

    With ``config.corpus_hash`` set and a warm cache the corpus itself is not read. A damaged cache
    file is built again. Raises ``CorpusError`` for a corpus that is missing, unfit, or not the one
    with ``corpus_hash``.
    """
    corpus = None
    if config.corpus_hash is None:
        corpus = config.load()
        config = config.replace(corpus_hash=corpus.hash)
    path = _path(config, cache_dir)
    cached = _read(path, config)
    if cached is not None:
        return cached
    built = _build(config, corpus or config.load(), path.parent.parent)
    _write(path, built)
    return built


def stored_bytes(config: TextConfig, cache_dir: Path | str | None = None) -> int:
    """Size of the cache file of ``config``, nearly all of it ids; 0 where it is not known."""
    if config.corpus_hash is None:
        return 0
    try:
        return _path(config, cache_dir).stat().st_size
    except OSError:
        return 0


def _path(config: TextConfig, cache_dir: Path | str | None) -> Path:
    cache = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    return cache / "tokens" / f"{_cache_key(config)}.npz"


def _cache_key(config: TextConfig) -> str:
    """The path of the text is left out: the same documents are the same tokens in any folder."""
    values = config.to_dict()
    return content_hash(
        {
            "format": FORMAT,
            **{name: values[name] for name in ("corpus_hash", "tokenizer", "vocab_size", "seed")},
        }
    )


def _build(config: TextConfig, corpus: Corpus, cache: Path) -> TokenizedText:
    parts = corpus.split(config.seed)
    code = {
        document.hash: SPLITS.index(split)
        for split, documents in parts.items()
        for document in documents
    }
    tokenizer = train_tokenizer(
        parts[Split.TRAIN], config.vocab_size, config.tokenizer, cache_dir=cache
    )
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32
    opened = np.array([tokenizer.eos_id], dtype=dtype).tobytes()
    ids, offsets = bytearray(), [0]  # grows in place: the texts themselves are never all in memory
    for document in corpus.documents:
        ids += opened + tokenizer.encode(document.text).astype(dtype).tobytes()
        offsets.append(len(ids) // dtype().itemsize)
    return TokenizedText(
        config=config,
        tokenizer=tokenizer,
        ids=np.frombuffer(ids, dtype),
        offsets=np.array(offsets, dtype=np.int64),
        split_codes=np.array(
            [code[document.hash] for document in corpus.documents], dtype=np.uint8
        ),
        names=tuple(document.name for document in corpus.documents),
    )


def _write(path: Path, text: TokenizedText) -> None:
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez(
            file,
            merges=np.array(text.tokenizer.merges, dtype=np.int32).reshape(-1, 2),
            ids=text.ids,
            offsets=text.offsets,
            split_codes=text.split_codes,
            names=np.frombuffer(json.dumps(text.names).encode(), dtype=np.uint8),
        )


def _read(path: Path, config: TextConfig) -> TokenizedText | None:
    """What ``_write`` wrote, or None where there is no such file or it is damaged (each array
    carries its checksum).
    """
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as arrays:
            text = TokenizedText(
                config=config,
                tokenizer=Tokenizer(arrays["merges"].tolist()),
                ids=arrays["ids"],
                offsets=arrays["offsets"],
                split_codes=arrays["split_codes"],
                names=tuple(json.loads(arrays["names"].tobytes())),
            )
    except (
        Exception
    ):  # a damaged archive raises nearly anything, and the answer is always to build it again
        return None
    return text if _is_whole(text) else None


def _is_whole(text: TokenizedText) -> bool:
    """Whether the arrays fit each other, for a file that was written whole but not by us."""
    starts, end = text.offsets[:-1], text.offsets[-1]
    return (
        len(text.names) == len(text.split_codes) == len(starts)
        and end == len(text.ids)
        and bool((np.diff(text.offsets) > 0).all())
        and np.array_equal(np.flatnonzero(text.ids == text.tokenizer.eos_id), starts)
        and int(text.ids.max()) < text.tokenizer.vocab_size
        and set(text.split_codes.tolist()) == set(range(len(SPLITS)))
    )
