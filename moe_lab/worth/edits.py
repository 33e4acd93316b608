"""The edits of a routing that ``intervene`` makes.

``Silence`` sets the gate weight of an expert's slots to 0 and renormalises
nothing. ``Forbid`` takes an expert out of the choice: the family's own code selects and weighs
among the others, as if the expert's rows were deleted. ``Exchange`` sends the tokens of one expert
to another, and back. ``TopK`` changes the number of slots. ``Replay`` selects what a trace
recorded. Forbidding, top k and replay act inside the router's own forward pass; silencing and
exchanging act on what it returns, in the order in which they are given.
"""

from dataclasses import dataclass, field
from typing import TypeAlias

from torch import Tensor

from moe_lab.trace import Trace


@dataclass(frozen=True)
class Silence:
    """The expert's contribution is zero: its gate weight is 0, and nothing is renormalised."""

    layer: int
    expert: int


@dataclass(frozen=True)
class Forbid:
    """The expert cannot be chosen; the router chooses and renormalises among the others."""

    layer: int
    expert: int


@dataclass(frozen=True)
class Exchange:
    """Tokens that choose ``first`` go to ``second``, and those of ``second`` to ``first``."""

    layer: int
    first: int
    second: int


@dataclass(frozen=True)
class TopK:
    """Every token has ``k`` slots in ``layer`` (None: in all layers).

    Attributes:
        tokens: [B, S] of each pass in the block, True where a token has ``k`` slots; the others
            have their own, with equal weights to the bit. Slots that a token lacks beside others
            have weight 0. None: all tokens.
    """

    layer: int | None
    k: int
    tokens: Tensor | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Replay:
    """The selection of a trace, for all its layers that the model has.

    The passes in the block must be those of the recording, in the same order: a token is found by
    its document and position, and its id is compared. Padding selects for itself.

    Attributes:
        trace: the recording.
        recorded_weights: use the gate weights of the trace (float16) instead of those that the
            router computes for the replayed ids. Only the latter carry a gradient.
        first_document: number in the trace of the first document that runs in the block.
    """

    trace: Trace
    recorded_weights: bool = False
    first_document: int = 0


Edit: TypeAlias = Silence | Forbid | Exchange | TopK | Replay
