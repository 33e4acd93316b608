"""Matrix products on the processor by the calling thread alone.

Threads of a BLAS library wait for their next product in a loop, which takes time from threads that
read. OpenBLAS takes one thread where a product is small: fewer than ``SMALL`` multiplications
(``interface/gemm.c``: 2 x 2^16 x GEMM_MULTITHREAD_THRESHOLD, which is 4). Such pieces, each packed,
are about as fast as the whole product in one thread.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import DTypeLike, NDArray

SMALL = 2**19
ROWS, COLUMNS, INNER = 24, 32, 640
"""Of a piece at most: multiples of what the kernels of x86 processors compute at once."""
TOGETHER = 4
"""Pieces of rows that stay in the processor's cache while all columns pass."""


class Left:
    """The left side of products, ``table`` [B, U] in pieces: packed once for all of them."""

    def __init__(self, table: NDArray, dtype: DTypeLike) -> None:
        self.shape = table.shape
        self._cuts = np.linspace(0, table.shape[1], -(-table.shape[1] // INNER) + 1).astype(int)
        padded = np.zeros((-(-len(table) // ROWS) * ROWS, table.shape[1]), dtype)
        padded[: len(table)] = table
        self._parts = [
            np.ascontiguousarray(part.reshape(-1, ROWS, part.shape[1]))
            for part in np.split(padded, self._cuts[1:-1], axis=1)
        ]

    def rows_times(self, right_UM: NDArray) -> Iterator[tuple[slice, NDArray]]:
        """Rows of the product [B, M], a few at a time: (which, [rows, M])."""
        columns = right_UM.shape[1]
        padded = np.zeros((len(right_UM), -(-columns // COLUMNS) * COLUMNS), self._parts[0].dtype)
        padded[:, :columns] = right_UM
        pieces = [
            np.ascontiguousarray(part.reshape(len(part), -1, COLUMNS).transpose(1, 0, 2))[:, None]
            for part in np.split(padded, self._cuts[1:-1])
        ]
        for start in range(0, len(self._parts[0]), TOGETHER):
            some = [part[start : start + TOGETHER] for part in self._parts]
            total = some[0] @ pieces[0]
            for part, piece in zip(some[1:], pieces[1:], strict=True):
                total += part @ piece
            rows = slice(start * ROWS, min((start + TOGETHER) * ROWS, self.shape[0]))
            block = total.transpose(1, 2, 0, 3).reshape(-1, padded.shape[1])
            yield rows, block[: rows.stop - rows.start, :columns]

    def times(self, right_UM: NDArray) -> NDArray:
        """The product [B, M]."""
        return np.concatenate([block for _, block in self.rows_times(right_UM)])
