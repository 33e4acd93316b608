"""Text and tokens: corpora, tokenizers, and the classes and model-free difficulty of tokens."""

from moe_lab.text.corpus import Corpus, Document, Split, load_corpus
from moe_lab.text.surprisal import (
    NgramModel,
    difficulty_columns,
    ngram_halves,
    ngram_surprisal,
    unigram_surprisal,
)
from moe_lab.text.token_classes import CLASSES, token_classes
from moe_lab.text.tokenized_text import (
    TextConfig,
    TokenizedDocument,
    TokenizedText,
    load_tokens,
    tokenize_documents,
)
from moe_lab.text.tokenizer import Tokenizer, TokenizerKind, train_tokenizer

__all__ = [
    "CLASSES",
    "Corpus",
    "Document",
    "NgramModel",
    "Split",
    "TextConfig",
    "TokenizedDocument",
    "TokenizedText",
    "Tokenizer",
    "TokenizerKind",
    "difficulty_columns",
    "load_corpus",
    "load_tokens",
    "ngram_halves",
    "ngram_surprisal",
    "token_classes",
    "tokenize_documents",
    "train_tokenizer",
    "unigram_surprisal",
]
