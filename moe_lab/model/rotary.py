"""Rotary positions (arXiv 2104.09864)."""

from typing import NamedTuple

import torch
from torch import Tensor


class Rotary(NamedTuple):
    """cos and sin [S, dim / 2] of the rotation angles of S positions, starting at 0."""

    cos: Tensor
    sin: Tensor

    def head(self, length: int) -> "Rotary":
        """cos and sin of the first ``length`` positions."""
        return Rotary(self.cos[:length], self.sin[:length])


def rotary_tables(length: int, dim: int, theta: float) -> Rotary:
    """Angles ``position * theta^(-2 i / dim)``, computed in float64."""
    frequency = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle = torch.outer(torch.arange(length, dtype=torch.float64), frequency)
    return Rotary(angle.cos().float(), angle.sin().float())


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotate the pairs (first half, second half) of the last axis of [B, H, S, dim]."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = rotary.cos.to(x.dtype), rotary.sin.to(x.dtype)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
