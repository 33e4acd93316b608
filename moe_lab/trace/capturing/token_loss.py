"""The loss of each token in nats, from the logits that a model returns.

Shape letters: B batch, S sequence, V vocabulary.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from moe_lab.errors import TraceError, expected
from moe_lab.trace.capturing.model_inputs import Inputs
from moe_lab.trace.capturing.numbering import Labels


class TokenLoss:
    """Losses pass after pass: the first token of a decode step was predicted by the pass before."""

    def __init__(self) -> None:
        self._last_BV: Tensor | None = None

    def of(self, output: Any, inputs: Inputs, labels: Labels) -> np.ndarray:
        """[B, S] f32, NaN where a token was not predicted: the first of a document, padding, and
        where the model kept no logits (``generate`` keeps those of the last token of a prompt).

        Raises ``TraceError`` where the model returns no logits over the vocabulary.
        """
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
        real_BS = (
            torch.ones_like(ids_BS, dtype=torch.bool)
            if labels.keep is None
            else torch.from_numpy(labels.keep).view(batch, length)
        )
        real_BS = real_BS.to(ids_BS.device)
        losses = torch.full((batch, length), float("nan"), device=ids_BS.device)
        with torch.no_grad():
            # One row at a time: the log-softmaxes of a batch can be larger than the model.
            for row in range(batch):
                nats = F.cross_entropy(
                    logits_BSV[row, :-1].float(), ids_BS[row, known + 1 :], reduction="none"
                )
                losses[row, known + 1 :] = torch.where(
                    real_BS[row, known + 1 :] & real_BS[row, known:-1], nats, torch.nan
                )
            if labels.continues and self._last_BV is not None and len(self._last_BV) == batch:
                first = F.cross_entropy(self._last_BV.float(), ids_BS[:, 0], reduction="none")
                losses[:, 0] = (
                    torch.where(real_BS[:, 0], first, torch.nan)
                    if length == 1 or bool(real_BS[:, 0].all())
                    else losses[:, 0]
                )
            last = (torch.arange(length, device=ids_BS.device) * real_BS).amax(dim=1)
            self._last_BV = logits_BSV[
                torch.arange(batch, device=ids_BS.device), (last - known).clamp_min(0)
            ].clone()
        return losses.cpu().numpy()


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
