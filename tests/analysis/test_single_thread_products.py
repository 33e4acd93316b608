"""Products in pieces, against numpy's whole product."""

import numpy as np
import pytest

from moe_lab.analysis import single_thread_products
from moe_lab.analysis.single_thread_products import COLUMNS, INNER, ROWS, TOGETHER, Left


def test_a_piece_is_too_small_for_threads():
    assert ROWS * COLUMNS * INNER < single_thread_products.SMALL


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (25, 30, 33), (ROWS * TOGETHER, INNER, COLUMNS), (100, 2 * INNER + 1, 70)]
)
def test_the_product_is_that_of_the_tables(shape, dtype):
    """Of whole numbers, which are exact in both precisions."""
    generator = np.random.default_rng(0)
    rows, inner, columns = shape
    left = generator.integers(0, 5, (rows, inner)).astype(np.float64)
    right = generator.integers(-9, 9, (inner, columns))
    product = Left(left, dtype).times(right)
    assert product.dtype == dtype
    np.testing.assert_array_equal(product, left @ right)
    blocks = list(Left(left, dtype).rows_times(right))
    np.testing.assert_array_equal(
        np.concatenate([np.arange(rows)[at] for at, _ in blocks]), range(rows)
    )
