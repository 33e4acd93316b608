"""``Bank``: the expert weights that a dispatch backend reads."""

from typing import Protocol

from torch import Tensor


class Bank(Protocol):
    """What a backend reads: ``gate_up`` [E, 2F, D] (gate first) and ``down`` [E, D, F]."""

    @property
    def gate_up(self) -> Tensor: ...
    @property
    def down(self) -> Tensor: ...
