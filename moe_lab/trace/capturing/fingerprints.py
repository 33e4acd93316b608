"""Who made a trace: names and hashes of the model, the tokenizer and the text, and the rank that
writes.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import nn

from moe_lab.files import content_hash


def model_name(model: nn.Module) -> str:
    """The name of a pretrained model with its revision, else the name of the class."""
    config = getattr(model, "config", None)
    name = getattr(config, "_name_or_path", "") or getattr(config, "name", "")
    revision = getattr(config, "_commit_hash", None)
    return f"{name}@{revision}" if name and revision else str(name or type(model).__name__)


def model_hash(model: nn.Module) -> str:
    """Hash of the configuration; without one, of the names and shapes of the parameters."""
    config = getattr(model, "config", None)
    if hasattr(config, "hash") and callable(config.hash):  # type: ignore[union-attr]
        return str(config.hash())  # type: ignore[union-attr]
    if hasattr(config, "to_dict"):
        values = config.to_dict()  # type: ignore[union-attr]
        return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[
            :12
        ]
    return content_hash(
        [[name, list(parameter.shape)] for name, parameter in model.named_parameters()]
    )


def tokenizer_hash(tokenizer: Any) -> str:
    """Of a tokenizer of ours, of transformers, or of the tokenizers library; "" for None."""
    if tokenizer is None:
        return ""
    if isinstance(getattr(tokenizer, "hash", None), str):
        return tokenizer.hash
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    text = (
        backend.to_str()
        if hasattr(backend, "to_str")
        else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    )
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def corpus_hash(text: str | Iterable[str] | None) -> str:
    """Of the documents, in order; "" for None."""
    if text is None:
        return ""
    digest = hashlib.sha256()
    for document in [text] if isinstance(text, str) else text:
        digest.update(len(document).to_bytes(8, "big") + document.encode())
    return digest.hexdigest()[:12]


class Pieces:
    """The text of each token by itself (one that is part of a character shows the replacement
    character), decoded once for each id.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}

    def of(self, token_ids: np.ndarray) -> pl.Series:
        """[T] texts."""
        ids = token_ids.tolist()
        for number in set(ids) - self._known.keys():
            self._known[number] = self._tokenizer.decode([number])
        return pl.Series([self._known[number] for number in ids], dtype=pl.String)


def rank_folder(folder: Path) -> Path:
    """``folder``, or ``<folder>.rank-<r>`` where several processes of ``torch.distributed`` would
    write the same one.
    """
    distributed = torch.distributed
    if (
        distributed.is_available()
        and distributed.is_initialized()
        and distributed.get_world_size() > 1
    ):
        return folder.with_name(f"{folder.name}.rank-{distributed.get_rank()}")
    return folder
