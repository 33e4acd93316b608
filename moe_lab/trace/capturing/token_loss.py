"""The loss of each token in nats, from the logits that a model returns.

Shape letters: B batch, S sequence, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from moe_lab.document_pass import IGNORE, token_losses
from moe_lab.errors import TraceError, expected, require
from moe_lab.trace.capturing.model_inputs import Inputs
from moe_lab.trace.capturing.numbering import Labels

Head: TypeAlias = Callable[[Any, int, slice], Tensor]
"""(output of the model without its head, row, positions) -> their logits [n, V]."""

CHUNK_LOGITS = 2**26
"""Logits that are made at a time: a quarter of a gigabyte in float32."""


class TokenLoss:
    """Losses pass after pass: the first token of a decode step was predicted by the pass before."""

    def __init__(self, head: Head | None = None) -> None:
        self._head = head
        self._last_BV: Tensor | None = None

    def of(self, output: Any, inputs: Inputs, labels: Labels) -> np.ndarray:
        """[B, S] f32, NaN where a token was not predicted: the first of a document, padding, and
        where the model kept no logits (``generate`` keeps those of the last token of a prompt).

        Raises ``TraceError`` where the model returns no logits over the vocabulary, or such that
        the loss of a predicted token is NaN or infinite.
        """
        if self._head is not None:
            return self._in_chunks(self._head, output, inputs, labels)
        logits_BSV, ids_BS = _logits(output), inputs.ids
        if (
            ids_BS is None
            or logits_BSV.dim() != 3
            or len(logits_BSV) != len(ids_BS)
            or logits_BSV.shape[1] > ids_BS.shape[1]
        ):
            raise TraceError(
                expected(
                    "logits [batch, sequence, vocabulary] and token ids to take losses from",
                    _shape(logits_BSV),
                )
            )
        batch, length = ids_BS.shape
        known = length - logits_BSV.shape[1]  # position of the first logits
        real_BS = torch.ones_like(ids_BS, dtype=torch.bool)
        if labels.keep is not None:
            real_BS = torch.from_numpy(labels.keep).view(batch, length).to(ids_BS.device)
        targets_BS = ids_BS.masked_fill(~real_BS, IGNORE)
        losses = np.full((batch, length), np.nan, np.float32)
        losses[:, known + 1 :] = _losses(
            logits_BSV[:, :-1],
            targets_BS[:, known + 1 :].masked_fill(~real_BS[:, known:-1], IGNORE),
        )
        last_BV = self._last_BV if length == 1 or bool(real_BS[:, 0].all()) else None
        if labels.continues and last_BV is not None and len(last_BV) == batch:
            losses[:, :1] = _losses(last_BV[:, None], targets_BS[:, :1])
        last_B = (torch.arange(length, device=ids_BS.device) * real_BS).amax(dim=1)
        self._last_BV = logits_BSV[
            torch.arange(batch, device=ids_BS.device), (last_B - known).clamp_min(0)
        ].detach()
        return losses

    def _in_chunks(self, head: Head, output: Any, inputs: Inputs, labels: Labels) -> np.ndarray:
        """The same from hidden states: logits of a few positions at a time, whatever the length."""
        ids_BS = inputs.ids
        assert ids_BS is not None
        batch, length = ids_BS.shape
        losses = np.full((batch, length), np.nan, np.float32)
        real_BS = np.ones((batch, length), bool)
        if labels.keep is not None:
            real_BS = labels.keep.reshape(batch, length)
        last_BV, self._last_BV = self._last_BV, None
        if labels.continues and last_BV is not None and bool(real_BS[:, 0].all()):
            losses[:, :1] = _losses(last_BV[:, None], ids_BS[:, :1])
        ends = [int(row.nonzero()[0].max(initial=0)) for row in real_BS]
        if inputs.past is not None:  # a cache was given: another part may follow
            last = [head(output, row, slice(end, end + 1)) for row, end in enumerate(ends)]
            self._last_BV = torch.cat(last)
        step = 1  # of the first chunk, which says how large the vocabulary is
        for row, end in enumerate(ends):
            start = 0
            while start < end:
                chosen = slice(start, min(start + step, end))
                logits_NV = head(output, row, chosen)
                step = max(1, CHUNK_LOGITS // logits_NV.shape[-1])
                following = slice(chosen.start + 1, chosen.stop + 1)
                losses[row, following] = token_losses(logits_NV[None], ids_BS[[row], following])[0]
                start = chosen.stop
        both = real_BS[:, 1:] & real_BS[:, :-1]
        losses[:, 1:][~both] = np.nan
        _require_finite(losses[:, 1:][both])
        return losses


def _losses(logits_BSV: Tensor, targets_BS: Tensor) -> np.ndarray:
    losses_BS = token_losses(logits_BSV, targets_BS)
    _require_finite(losses_BS[(targets_BS != IGNORE).cpu().numpy()])
    return losses_BS


def _require_finite(losses: np.ndarray) -> None:
    require(
        np.isfinite(losses).all(),
        "finite losses",
        "NaN or infinity",
        "losses=False to record the routing alone",
        error=TraceError,
        field="losses",
    )


def _logits(output: Any) -> Tensor:
    found = getattr(output, "logits", None)
    if found is None:
        found = output[0] if isinstance(output, tuple) and output else output
    if not isinstance(found, Tensor):
        raise TraceError(
            expected("a model that returns logits", type(output).__name__, "losses=False")
        )
    return found


def _shape(tensor: Tensor) -> str:
    return f"a tensor {list(tensor.shape)}"
