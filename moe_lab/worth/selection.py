"""``Selection``: changes what a router selects while its own code runs.

The family's forward pass computes scores, selects and renormalises; this mode only changes what
that code sees. A forbidden expert's logit is -inf, and so is every sum of its score with a
selection bias; a replayed selection stands in for the result of the router's top k. Shape letters:
T tokens, K slots, E experts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

PRODUCTS = ("linear", "matmul", "__matmul__", "mm", "addmm")
SUMS = ("add", "__add__", "__radd__", "add_", "__iadd__")


@dataclass(frozen=True)
class Replayed:
    """The selection of one call.

    Attributes:
        ids: [T, K], -1 in unused slots.
        known: [T], False for tokens that select for themselves.
    """

    ids: Tensor
    known: Tensor


class Selection(TorchFunctionMode):
    """Active during one call of a router.

    Args:
        experts: E.
        width: columns of the product that makes the logits; more than E where shared experts have
            columns too.
        forbidden: ids that cannot be chosen.
        replayed: the selection that stands in for the router's.
        masks_logits: False where the caller masks the logits itself.

    Attributes:
        masked, selected: whether logits were masked and a top k was replaced.
    """

    def __init__(
        self,
        experts: int,
        width: int,
        forbidden: Sequence[int],
        replayed: Replayed | None,
        masks_logits: bool = True,
    ) -> None:
        super().__init__()
        self.experts, self.width, self.replayed = experts, width, replayed
        self.forbidden = list(forbidden)
        self.masked = not (forbidden and masks_logits)
        self.selected = replayed is None
        self.running = True

    def without_forbidden(self, values: Tensor) -> Tensor:
        """[..., E] with -inf in the columns of the forbidden experts."""
        columns = torch.tensor(self.forbidden, device=values.device)
        return values.index_fill(-1, columns, -torch.inf)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self.running:
            return result
        name = getattr(func, "__name__", "")
        if name == "topk" and self.replayed is not None:
            # Each one over all experts: where they are one group, its best two come before.
            return self._replace(args[0] if args else (kwargs or {})["input"], result)
        if not isinstance(result, Tensor) or result.dim() < 2 or not self.forbidden:
            return result
        if not self.masked and name in PRODUCTS and result.shape[-1] == self.width:
            self.masked = True
            return self.without_forbidden(result)
        if name in SUMS and self._adds_bias(result, args):
            return self.without_forbidden(result)
        return result

    def _adds_bias(self, result: Tensor, args: Sequence[Any]) -> bool:
        """Is it a sum of scores [.., E] and one number for each expert?"""
        return result.shape[-1] == self.experts and any(
            isinstance(item, Tensor) and item.numel() == item.shape[-1:].numel() == self.experts
            for item in args
        )

    def _replace(self, scores: Tensor, result: Any) -> Any:
        """The top k over all experts, at the replayed ids."""
        assert self.replayed is not None
        ids_TK = self.replayed.ids.to(scores.device)
        known_T = self.replayed.known.to(scores.device)
        ids_alone = isinstance(result, Tensor)  # those of ``moe_lab.cpu_kernels.top_k``
        indices = result if ids_alone else result.indices
        if scores.shape[-1] != self.experts or indices.numel() != ids_TK.numel():
            return result
        self.selected = True
        shape = indices.shape
        ids = torch.where(known_T[:, None], ids_TK, indices.reshape(ids_TK.shape)).view(shape)
        if ids_alone:
            return ids.clamp_min(0)
        values = scores.gather(-1, ids.clamp_min(0)).masked_fill(ids < 0, -torch.inf)
        return torch.return_types.topk((values, ids.clamp_min(0)))
