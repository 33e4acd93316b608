"""Sums of squares that a kernel added up of what it wrote, while that was in cache: the norm of a
gradient without another pass through memory.

A sum is kept with the memory of the tensor and forgotten with it. One that autograd or an in-place
operation has changed since has no sum.
"""

from torch import Tensor

_NAME = "moe_lab_squares"


def note_squares(value: Tensor, squares: Tensor) -> None:
    """``squares`` [] float64 is the sum of squares of ``value`` as it is now."""
    # With the memory, not the tensor: autograd puts another tensor of that memory into ``grad``.
    setattr(value.untyped_storage(), _NAME, (value._version, value.nbytes, squares))


def noted_squares(value: Tensor) -> Tensor | None:
    """[] float64; None: not known."""
    now = value._version, value.nbytes
    *then, squares = getattr(value.untyped_storage(), _NAME, (None,))
    return squares if then == [*now] else None
