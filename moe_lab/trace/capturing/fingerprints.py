"""Names and hashes that say how a trace was made: of the model, the tokenizer and the text, and the
rank that writes.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

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
    """Hash of a tokenizer of moe_lab, of transformers, or of the tokenizers library; "" for None.

    Truncation and padding are settings of a call, not of the tokenizer, and take no part.
    """
    if tokenizer is None:
        return ""
    if isinstance(getattr(tokenizer, "hash", None), str):
        return tokenizer.hash
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if not hasattr(backend, "to_str"):
        text = json.dumps(tokenizer.get_vocab(), sort_keys=True)
    elif backend.truncation is None and backend.padding is None:
        text = backend.to_str()
    else:
        other = type(backend).from_str(backend.to_str())
        other.no_truncation()
        other.no_padding()
        text = other.to_str()
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def corpus_hash(text: str | Iterable[str] | None) -> str:
    """Hash of the documents, in order; "" for None."""
    if text is None:
        return ""
    digest = hashlib.sha256()
    for document in [text] if isinstance(text, str) else text:
        digest.update(len(document).to_bytes(8, "big") + document.encode())
    return digest.hexdigest()[:12]


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
