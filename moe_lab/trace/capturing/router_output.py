"""``Reading``: what one call of a router says, in one form; and how a (logits, weights, indices)
triple is told from its shapes.

Shape letters: T tokens, K slots, E experts (real and zero-compute).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from moe_lab.errors import TraceError, expected
from moe_lab.routing import Routing
from moe_lab.trace.score_spread import Spread


@dataclass(frozen=True)
class Reading:
    """One router's decisions for T tokens, as the model used them.

    Attributes:
        indices: [T, K] integers; -1 where a slot runs nothing.
        weights: [T, K] gate weights, or None where the model has none.
        logits: [T, E] raw outputs, or probabilities (told apart by their sums), or None.
        scores: [T, E] scores where the router gives them itself, instead of those computed from the
            logits.
        selected: [T, K] what was selected before capacity dropping, or None where nothing is
            dropped.
        valid: [T] bool, False for padding, where the router knows.
        spread: entropy and margin where they are known by another way than from [T, E] numbers.
    """

    indices: Tensor
    weights: Tensor | None = None
    logits: Tensor | None = None
    scores: Tensor | None = None
    selected: Tensor | None = None
    valid: Tensor | None = None
    spread: Spread | None = None


Seen: TypeAlias = Mapping[str, Any]
"""What the hooks of one router saw in a call: ``"output"`` of the module, ``"input"`` (its
positional arguments), and for each further tapped module ``"<name> output"`` and ``"<name>
input"``.
"""

Reader: TypeAlias = Callable[[nn.Module, Seen], Reading | Routing | tuple]
"""(module, seen) -> reading; a tuple is taken for a triple in any order."""


def as_reading(value: Any, experts: int | None, slots: int | None) -> Reading:
    """A ``Reading`` from whatever a reader returned.

    Args:
        value: a ``Reading``, a ``Routing``, or a tuple with logits [.., E], weights [.., K] and
            indices [.., K] in any order.
        experts, slots: E and K where the configuration tells them; they settle what the shapes
            leave open.

    Raises:
        TraceError: no such triple in it.
    """
    if isinstance(value, Reading):
        return value
    if isinstance(value, Routing):
        routing = value.detach()
        return Reading(
            routing.indices,
            routing.weights,
            routing.logits,
            routing.scores,
            routing.selected,
            routing.valid,
        )
    tensors = [
        item
        for item in (value if isinstance(value, tuple | list) else (value,))
        if isinstance(item, Tensor)
    ]
    floats = [item for item in tensors if item.is_floating_point() and item.dim() >= 2]
    indices = next(
        (
            item
            for item in tensors
            if _is_indices(item) and (slots is None or item.shape[-1] == slots)
        ),
        None,
    )
    if indices is None:
        raise TraceError(
            expected(
                f"integer indices [tokens, {slots or 'top_k'}] among its outputs", describe(value)
            )
        )
    tokens = indices.numel() // max(indices.shape[-1], 1)
    weights = [
        item
        for item in floats
        if item.shape[-1] == indices.shape[-1] and item.numel() == indices.numel()
    ]
    # Experts as wide as the slots (K = E) leave two candidates of one shape: logits come first in
    # every known order but one reader's.
    logits = [
        item
        for item in floats
        if item.dim() >= 2
        and _rows(item) == tokens
        and (experts is None or item.shape[-1] == experts)
    ]
    wide = next((item for item in logits if not any(item is other for other in weights)), None)
    if wide is None and len(weights) > 1:
        wide = weights[0]
    narrow = next((item for item in weights if item is not wide), None)
    if narrow is None:
        raise TraceError(
            expected(
                f"gate weights of the shape {list(indices.shape)} of the indices among its outputs",
                describe(value),
            )
        )
    return Reading(_flat(indices), _flat(narrow), None if wide is None else _flat(wide))


def triple(module: nn.Module, seen: Seen) -> tuple[Any, ...]:
    """The router's own output, or, where that has no indices, its logits with what its model handed
    to the experts beside it.
    """
    output = seen["output"]
    parts = tuple(output) if isinstance(output, tuple | list) else (output,)
    if any(_is_indices(item) for item in parts) or "experts input" not in seen:
        return parts
    handed = [item for item in seen["experts input"][1:] if isinstance(item, Tensor)]
    return (*(item for item in parts if isinstance(item, Tensor)), *handed)


def describe(value: Any) -> str:
    """Shapes and types, for a message."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, tuple | list):
        return "(" + ", ".join(describe(item) for item in value[:8]) + ")"
    return type(value).__name__


def _is_indices(item: Any) -> bool:
    return isinstance(item, Tensor) and item.dim() >= 2 and item.dtype in (torch.int64, torch.int32)


def _rows(tensor: Tensor) -> int:
    return tensor.numel() // max(tensor.shape[-1], 1)


def _flat(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1, tensor.shape[-1])
