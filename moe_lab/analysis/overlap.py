"""How many experts two choices share: of the same token in two traces, or of two tokens that follow
each other.
"""

import numpy as np
from numpy.typing import NDArray

from moe_lab.trace.rows import EMPTY_SLOT

Ids = NDArray[np.uint16]


def shared(first_TK: Ids, second_TL: Ids) -> NDArray[np.int64]:
    """[T] experts in both lists; unused slots match nothing.

    Each list names an expert at most once.
    """
    total = np.zeros(len(first_TK), dtype=np.int64)
    for column in first_TK.T:
        total += ((second_TL == column[:, None]) & (column != EMPTY_SLOT)[:, None]).any(axis=1)
    return total


def used(ids_TK: Ids) -> NDArray[np.int64]:
    """[T] slots used."""
    return (ids_TK != EMPTY_SLOT).sum(axis=1)
