"""``Bank``: the expert weights that a dispatch backend reads; ``Gating``: what makes hidden units
of the two halves that they give.
"""

from typing import Any, NamedTuple, Protocol

from torch import Tensor


class Gating(NamedTuple):
    """``h = g sigmoid(alpha g) (u + offset)`` with ``g = min(gate, limit)`` and ``u`` = up within
    ``-limit`` and ``limit``.

    The default is SwiGLU (arXiv 2002.05202). DeepSeek-V4 has a limit (arXiv 2606.19348), gpt-oss
    (arXiv 2508.10925) limit 7, alpha 1.702 and offset 1.
    """

    limit: float = float("inf")
    alpha: float = 1.0
    offset: float = 0.0

    def halves(self, act: Tensor) -> tuple[Tensor, Tensor]:
        """g and ``u + offset`` of [..., 2F], the gate first."""
        gate, up = act.chunk(2, dim=-1)
        if self.limit != float("inf"):
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return gate, up + self.offset if self.offset else up

    def hidden(self, act: Tensor) -> Tensor:
        """[..., 2F] -> [..., F]."""
        gate, up = self.halves(act)
        return gate * (gate * self.alpha if self.alpha != 1.0 else gate).sigmoid() * up

    def inside(self, act: Tensor) -> tuple[Tensor, Tensor] | None:
        """Where gate and up are within the limit and so have a gradient; None: everywhere."""
        if self.limit == float("inf"):
            return None
        gate, up = act.chunk(2, dim=-1)
        return gate <= self.limit, up.abs() <= self.limit


SWIGLU = Gating()


def gating_of(bank: Any) -> Gating:
    """How a bank makes hidden units: plain SwiGLU where it does not say."""
    return getattr(bank, "gating", SWIGLU)


class Bank(Protocol):
    """What a backend reads: ``gate_up`` [E, 2F, D] (gate first) and ``down`` [E, D, F].

    One whose hidden units are not SwiGLU's has a ``gating`` beside them.
    """

    @property
    def gate_up(self) -> Tensor: ...
    @property
    def down(self) -> Tensor: ...
