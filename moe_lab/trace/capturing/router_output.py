"""``Reading``: what one call of a router says, in one form; and how a (logits, weights, indices)
triple is recognised by its shapes.

Shape letters: T tokens, K slots, E experts (real and zero-compute).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from moe_lab.errors import TraceError, expected
from moe_lab.routing import Routing
from moe_lab.routing.config import ScoreFunc
from moe_lab.trace.score_spread import Spread, spread_of_logits, spread_of_scores


@dataclass(frozen=True)
class Reading:
    """One router's decisions for T tokens, as the model used them.

    Attributes:
        indices: [T, K] integers; -1 where a slot runs nothing.
        weights: [T, K] gate weights, or None where the model has none.
        logits: [T, E] raw outputs, or probabilities (recognised by their sums), or None.
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

    @property
    def num_choices(self) -> int | None:
        """E, where the router gave a number for every expert."""
        wide = self.logits if self.logits is not None else self.scores
        return None if wide is None else wide.shape[1]

    @property
    def has_scores(self) -> bool:
        return any(item is not None for item in (self.logits, self.scores, self.spread))

    @property
    def num_bytes(self) -> int:
        tensors = (self.indices, self.weights, self.logits, self.scores)
        return sum(item.numel() * item.element_size() for item in tensors if item is not None)

    def rows(self, keep: Tensor | None) -> "Reading":
        """The tokens at the places ``keep``; None: all."""
        if keep is None:
            return self
        return Reading(**{name: _rows(value, keep) for name, value in vars(self).items()})

    def spread_under(self, score_func: ScoreFunc | None) -> Spread:
        """Entropy and margin; ``score_func`` makes scores of logits (None: softmax)."""
        if self.spread is not None:
            return self.spread
        if self.scores is not None:
            return spread_of_scores(self.scores.detach().float(), self.indices)
        assert self.logits is not None
        logits = self.logits.detach().float()
        if are_probabilities(logits):
            return spread_of_scores(logits, self.indices)
        return spread_of_logits(logits, self.indices, score_func or ScoreFunc.SOFTMAX)


Seen: TypeAlias = Mapping[str, Any]
"""What the hooks of one router saw in a call: ``"output"`` of the module, its arguments ``"input"``
(positional) and ``"kwargs"``, and for each further tapped module ``"<name> output"`` and ``"<name>
input"``.
"""

Reader: TypeAlias = Callable[[nn.Module, Seen], Reading | Routing | tuple]
"""(module, seen) -> reading; a tuple is taken for a triple in any order."""


def joined(readings: Sequence[Reading]) -> Reading:
    """The tokens of several readings as one; a field that one of them lacks is missing."""
    if len(readings) == 1:
        return readings[0]
    names = [field.name for field in fields(Reading)]
    return Reading(**{name: _joined([vars(item)[name] for item in readings]) for name in names})


def _joined(values: list[Any]) -> Any:
    if any(value is None for value in values):
        return None
    if isinstance(values[0], Spread):
        return Spread(*(torch.cat(columns) for columns in zip(*values, strict=True)))
    return torch.cat(values)


def _rows(value: Any, keep: Tensor) -> Any:
    if value is None:
        return None
    if isinstance(value, Spread):
        return Spread(*(_rows(column, keep) for column in value))
    return value[keep.to(value.device)]


def are_probabilities(values_TE: Tensor) -> bool:
    """Whether rows are non-negative and sum to one: some models return those under the name of
    logits.
    """
    if not values_TE.numel():
        return False
    sums = values_TE.sum(dim=1)
    return bool((values_TE >= 0).all()) and bool((sums - 1).abs().max() < 1e-3)


def as_reading(value: Any, experts: int | None, slots: int | None) -> Reading:
    """A ``Reading`` from whatever a reader returned.

    Args:
        value: a ``Reading``, a ``Routing``, or a tuple with logits [.., E], weights [.., K] and
            indices [.., K] in any order.
        experts, slots: E and K where the configuration states them; they settle what the shapes
            leave open.

    Raises:
        TraceError: no such triple in it.
    """
    if isinstance(value, Reading):
        return value
    if not isinstance(value, Routing):
        return _of_triple(value, experts, slots)
    routing = value.detach()
    names = ("indices", "weights", "logits", "scores", "selected", "valid")
    return Reading(**{name: getattr(routing, name) for name in names})


def _of_triple(value: Any, experts: int | None, slots: int | None) -> Reading:
    parts = value if isinstance(value, tuple | list) else (value,)
    indices, weights, logits = triple_places(parts, experts, slots)
    logits_TE = None if logits is None else _flat(parts[logits])
    return Reading(_flat(parts[indices]), _flat(parts[weights]), logits_TE)


def triple_places(
    parts: Sequence[Any], experts: int | None, slots: int | None
) -> tuple[int, int, int | None]:
    """Where indices, weights and logits (None: absent) stand among a router's outputs.

    Args:
        experts, slots: as for ``as_reading``.

    Raises:
        TraceError: no integers [.., K], or no weights of their shape.
    """
    tensors = {
        place: item
        for place, item in enumerate(parts)
        if isinstance(item, Tensor) and item.dim() >= 2
    }
    indices = next(
        (
            place
            for place, item in tensors.items()
            if _is_indices(item) and slots in (None, item.shape[-1])
        ),
        None,
    )
    if indices is None:
        what = f"integer indices [tokens, {slots or 'top_k'}] among its outputs"
        raise TraceError(expected(what, describe(parts)))
    rows, width = _flat(tensors[indices]).shape
    widths = {
        place: item.shape[-1]
        for place, item in tensors.items()
        if item.is_floating_point() and len(_flat(item)) == rows
    }
    narrow = [place for place, columns in widths.items() if columns == width]
    # With K = E two candidates have one shape: logits come first in every known order.
    either = narrow[0] if len(narrow) > 1 else None
    wide = [place for place, columns in widths.items() if experts in (None, columns)]
    logits = next((place for place in wide if widths[place] != width), either)
    weights = next((place for place in narrow if place != logits), None)
    if weights is None:
        shape = list(tensors[indices].shape)
        what = f"gate weights of the shape {shape} of the indices among its outputs"
        raise TraceError(expected(what, describe(parts)))
    return indices, weights, logits


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


def _flat(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1, tensor.shape[-1])
