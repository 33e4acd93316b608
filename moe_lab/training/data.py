"""Batches as a pure function of (tokens, seed, step): resuming at a step needs no state, and all
arms of a sweep see the same order.
"""

import numpy as np
import torch
from torch import Tensor

from moe_lab.errors import CorpusError, require


class Batches:
    """Windows of ``seq_length + 1`` tokens from a flat stream, in a new seeded permutation each
    epoch.
    """

    def __init__(self, stream: np.ndarray, batch_size: int, seq_length: int, seed: int) -> None:
        self.stream, self.batch_size, self.seq_length, self.seed = (
            stream,
            batch_size,
            seq_length,
            seed,
        )
        self.num_windows = (len(stream) - 1) // seq_length
        require(
            self.num_windows >= 1,
            f"at least {seq_length + 1} training tokens",
            len(stream),
            "more text or a shorter seq_length",
            error=CorpusError,
            field="text",
        )
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def __call__(self, step: int) -> Tensor:
        """[batch_size, seq_length + 1] int64: inputs are all but the last column, targets all but
        the first.
        """
        slots = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        starts = np.array([self._window(int(slot)) for slot in slots]) * self.seq_length
        return torch.from_numpy(
            self.stream[starts[:, None] + np.arange(self.seq_length + 1)].astype(np.int64)
        )

    def _window(self, slot: int) -> int:
        epoch, place = divmod(slot, self.num_windows)
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng([self.seed, epoch]).permutation(self.num_windows)
        return int(self._order[place])
