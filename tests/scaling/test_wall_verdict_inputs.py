"""Tables of runs from which no gain can be computed are refused in one line."""

import polars as pl
import pytest

from moe_lab.errors import AnalysisError
from moe_lab.scaling import wall_verdict


@pytest.mark.parametrize("odd", [float("inf"), 16 * (1 + 1e-15)])
def test_ratios_that_no_fit_can_tell_apart_are_refused(odd: float) -> None:
    ratios = [1.0, 2.0, 4.0, 8.0, 16.0, odd]
    rows = [
        {"ratio": ratio, "seed": seed, "loss": loss, "active_params": 9e5, "tokens": 1e6}
        for ratio, loss in zip(ratios, [3.37, 3.35, 3.34, 3.31, 3.28, 3.27], strict=True)
        for seed in (0, 1)
    ]
    with pytest.raises(AnalysisError):
        wall_verdict(pl.DataFrame(rows))
