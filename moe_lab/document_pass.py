"""Documents in, batches of ids and masks out, and the losses of a pass over them.

Validation, dense twins, drafts, the difficulty study and pretrained models all read documents
through this module. Two ways to batch: ``windows`` cuts excerpts into rows of one length, in
order; ``length_batches`` keeps each document whole and sorts by length, so that a batch holds
little padding. Shape letters: B batch, S sequence, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORE = -100
"""Target where nothing is predicted; the default of ``torch.nn.functional.cross_entropy``."""


@dataclass(frozen=True)
class Excerpt:
    """Tokens ``start`` to ``stop - 1`` of the document at place ``document`` among those given."""

    document: int
    start: int
    stop: int


def excerpts_of(
    lengths: Sequence[int], excerpt_tokens: int | None = None, budget: int | None = None
) -> list[Excerpt]:
    """Documents cut into runs of ``excerpt_tokens`` (None: whole), of which evenly spaced ones are
    kept within ``budget`` tokens.
    """
    excerpts = [
        Excerpt(document, start, min(start + (excerpt_tokens or length), length))
        for document, length in enumerate(lengths)
        for start in range(0, length, excerpt_tokens or length)
    ]
    # A single token predicts nothing.
    excerpts = [excerpt for excerpt in excerpts if excerpt.stop - excerpt.start > 1]
    total = sum(excerpt.stop - excerpt.start for excerpt in excerpts)
    if budget is None or total <= budget:
        return excerpts
    kept = max(1, len(excerpts) * budget // total)
    return [excerpts[(2 * number + 1) * len(excerpts) // (2 * kept)] for number in range(kept)]


@dataclass(frozen=True)
class WindowBatch:
    """Windows of documents, padded on the right: ids, targets, valid [B, S]; doc [B, S] counts the
    given documents, pos their tokens.
    """

    ids: Tensor
    targets: Tensor
    valid: Tensor
    doc: np.ndarray
    pos: np.ndarray


def windows(
    documents: Sequence[np.ndarray], excerpts: Sequence[Excerpt], seq_length: int, batch_size: int
) -> Iterator[WindowBatch]:
    """Cut excerpts into consecutive windows of ``seq_length`` inputs; each token but an excerpt's
    first is a target once.
    """
    pieces = [
        (item.document, start, item.stop)
        for item in excerpts
        for start in range(item.start, item.stop, seq_length)
    ]
    for first in range(0, len(pieces), batch_size):
        chosen = pieces[first : first + batch_size]
        shape = (len(chosen), seq_length)
        ids, targets = np.zeros(shape, np.int64), np.full(shape, IGNORE, np.int64)
        doc, pos = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        valid = np.zeros(shape, bool)
        for row, (index, start, stop) in enumerate(chosen):
            inputs = documents[index][start : min(start + seq_length, stop)]
            following = documents[index][start + 1 : min(start + seq_length + 1, stop)]
            ids[row, : len(inputs)], targets[row, : len(following)] = inputs, following
            valid[row, : len(inputs)] = True
            doc[row], pos[row] = index, start + np.arange(seq_length)
        yield WindowBatch(
            *(torch.from_numpy(array) for array in (ids, targets, valid)), doc=doc, pos=pos
        )


class Document(Protocol):
    """The part of a document that ``length_batches`` reads: its [n] token ids."""

    @property
    def ids(self) -> np.ndarray: ...


D = TypeVar("D", bound=Document)


def length_batches(documents: Sequence[D], batch_tokens: int) -> Iterator[list[D]]:
    """Documents from the longest to the shortest, as many at a time as fit ``batch_tokens`` when
    padded (at least one).
    """
    batch: list[D] = []
    for document in sorted(documents, key=lambda document: -len(document.ids)):
        if batch and (len(batch) + 1) * len(batch[0].ids) > batch_tokens:
            yield batch
            batch = []
        batch.append(document)
    if batch:
        yield batch


def pad_right(documents: Sequence[Document], pad: int | None) -> tuple[Tensor, Tensor]:
    """[B, S] ids padded on the right (with ``pad``, or 0), and their mask."""
    width = max(len(document.ids) for document in documents)
    ids = torch.full((len(documents), width), pad or 0, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, document in enumerate(documents):
        ids[row, : len(document.ids)] = torch.from_numpy(document.ids.astype(np.int64))
        mask[row, : len(document.ids)] = 1
    return ids, mask


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode within the block, and restore its mode afterwards."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@torch.no_grad()
def token_losses(logits_BSV: Tensor, targets_BS: Tensor) -> np.ndarray:
    """[B, S] nats of each target, NaN for positions without a target; one row at a time, since the
    float32 logits of a whole batch can be larger than the model.
    """
    return np.stack([_scores(*row)[0] for row in zip(logits_BSV, targets_BS, strict=True)])


@torch.no_grad()
def token_losses_and_entropies(
    logits_BSV: Tensor, targets_BS: Tensor
) -> tuple[np.ndarray, np.ndarray]:
    """([B, S], [B, S]): ``token_losses`` and the entropy in nats of each prediction."""
    rows = [_scores(*row, entropies=True) for row in zip(logits_BSV, targets_BS, strict=True)]
    losses, entropies = np.stack(rows, axis=1)
    return losses, entropies


def _scores(logits_SV: Tensor, targets_S: Tensor, entropies: bool = False) -> np.ndarray:
    """[1 or 2, S] losses and entropies of one row."""
    targets_S = targets_S.to(logits_SV.device)
    predicts = targets_S != IGNORE
    log_p = logits_SV[predicts].float().log_softmax(dim=1)
    found = log_p.new_full((1 + entropies, len(targets_S)), float("nan"))
    found[0, predicts] = F.nll_loss(log_p, targets_S[predicts], reduction="none")
    if entropies:
        found[1, predicts] = -(log_p.exp() * log_p).sum(dim=1)
    return found.cpu().numpy()
