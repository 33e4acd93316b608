"""Documents in, padded batches of them or of their windows out; the memory that one pass takes.

Shape letters: B batch, S sequence, N predicted tokens of a batch, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from moe_lab.document_pass import pad_right
from moe_lab.errors import AnalysisError, require
from moe_lab.free_memory import free_memory
from moe_lab.model import Decoder


@dataclass(frozen=True)
class Document:
    """Token ids [n] of the document at place ``number`` among those given, or of the window of it
    that begins at its token ``start``.
    """

    number: int
    ids: np.ndarray
    start: int = 0


@dataclass(frozen=True, eq=False)
class Batch:
    """Documents padded on the right: ids and mask [B, S]."""

    documents: Sequence[Document]
    ids: Tensor
    mask: Tensor

    @cached_property
    def predicts(self) -> Tensor:
        """[B, S] places at which a token of the document is predicted."""
        following_BS = self.mask.bool().roll(-1, dims=1)
        following_BS[:, -1] = False
        return following_BS

    @cached_property
    def targets(self) -> Tensor:
        """[N] the predicted tokens, in the order of ``predicts``."""
        return self.ids.roll(-1, dims=1)[self.predicts]

    @cached_property
    def docs(self) -> NDArray[np.int64]:
        """[N] number of the document of each predicted token."""
        return np.repeat(
            [document.number for document in self.documents],
            [len(document.ids) - 1 for document in self.documents],
        )


def padded_batches(
    model: nn.Module, documents: Sequence[np.ndarray], batch_tokens: int
) -> list[Batch]:
    """Documents of at least two tokens in batches of about equal lengths, each of at most
    ``batch_tokens`` tokens or of one row.

    A document that is longer than the model's context runs in windows that do not see each other,
    in order. They overlap by a token, so that every token but the first is predicted once.

    Raises:
        AnalysisError: no document of two tokens; a pass that takes more memory than is free.
    """
    context = context_of(model)
    whole = [
        [
            Document(number, np.asarray(ids)[start : start + (context or len(ids))], start)
            for start in range(0, len(ids) - 1, (context or len(ids)) - 1)
        ]
        for number, ids in enumerate(documents)
        if len(ids) > 1
    ]
    require(
        whole, "a document of at least two tokens", "none", error=AnalysisError, field="documents"
    )
    batches: list[list[Document]] = [[]]
    width = 0
    for windows in sorted(whole, key=lambda windows: -len(windows[0].ids)):
        for window in windows:
            width = max(width, len(window.ids))
            if batches[-1] and (len(batches[-1]) + 1) * width > batch_tokens:
                batches.append([])
                width = len(window.ids)
            batches[-1].append(window)
    _refuse_too_large(model, batches)
    return [Batch(chosen, *pad_right(chosen, None)) for chosen in batches]


def context_of(model: nn.Module) -> int | None:
    """The most tokens that a model takes at a time; None: no limit is known."""
    if isinstance(model, Decoder):
        return model.config.context_length
    positions = getattr(_text_config(model), "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 1 else None


def pass_bytes(model: nn.Module, tokens: int) -> int | None:
    """Bytes of the predictions that a pass of so many tokens holds at its peak: logits as the model
    returns them, those of the predicted places, and log-probabilities of the untouched pass in
    float32 (or the model's float64). None where the size of the vocabulary is not known.

    What layers hold on the way is not counted.
    """
    config: Any = model.config if isinstance(model, Decoder) else _text_config(model)
    vocabulary = getattr(config, "vocab_size", None)
    if not isinstance(vocabulary, int):
        return None
    size = next(model.parameters()).dtype.itemsize
    return tokens * vocabulary * (2 * size + max(size, 4))


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _refuse_too_large(model: nn.Module, batches: Sequence[Sequence[Document]]) -> None:
    tokens = max(len(rows) * max(len(row.ids) for row in rows) for rows in batches)
    need, device = pass_bytes(model, tokens), next(model.parameters()).device
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory(device.type)
    if need is None or free is None:
        return
    require(
        need <= free,
        f"passes whose predictions fit into the {free / 1e9:.1f} GB that are free",
        f"{tokens:,} tokens at a time, which take {need / 1e9:.1f} GB",
        f"documents and passes of at most {tokens * free // need:,} tokens (--max-tokens, "
        "--batch-tokens)",
        error=AnalysisError,
        field="batch_tokens",
    )
