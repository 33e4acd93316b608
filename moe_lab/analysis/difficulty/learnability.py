"""How a token's loss moved while a reference model learnt: the four classes of Rho-1 (arXiv
2404.07965, section 2.1 and appendix D.1).

A token that was hard and stayed hard is likely noise, and a good router may well ignore it; one
that went from hard to easy repaid compute.
"""

import numpy as np
from numpy.typing import NDArray

from moe_lab.config import require

LEARNABILITY = ("H->H", "L->H", "H->L", "L->L")
FALL = 0.2
"""Nats that the fitted line must fall or rise by to count as a change."""


def learnability(losses: NDArray, fall: float = FALL) -> NDArray[np.uint8]:
    """[T] index into ``LEARNABILITY`` from [T, C] losses at C checkpoints, evenly spaced, of a
    reference model.

    A straight line is fitted to each token's losses. A fall of more than ``fall`` over the run is
    H->L, a rise L->H; otherwise the last loss above the mean of all tokens' last losses is H->H,
    else L->L. Tokens with a missing loss get 255.
    """
    losses = np.asarray(losses, dtype=np.float64)
    require(
        losses.ndim == 2 and losses.shape[1] >= 2,
        "losses of shape [tokens, at least 2 checkpoints]",
        list(losses.shape),
    )
    steps = np.linspace(-0.5, 0.5, losses.shape[1])
    change = losses @ steps / (steps @ steps)  # fitted end less fitted start
    last = losses[:, -1]
    high = last > np.nanmean(last)
    code = np.select([change < -fall, change > fall, high], [2, 1, 0], 3).astype(np.uint8)
    code[~np.isfinite(losses).all(axis=1)] = 255
    return code
