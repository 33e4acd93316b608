"""The "+X experts" calculator: what each published law expects of adding expert parameters, and how
many seeds would measure it.

LongCat-2.0's +135B on 1.6T is a ninth of a doubling; smooth laws expect .0004-.004 nats of it, so
seeing almost nothing is what diminishing returns look like, not a wall.
"""

import math

import polars as pl

from moe_lab.errors import AnalysisError, require
from moe_lab.scaling.compute_slope import law_slope
from moe_lab.scaling.laws import LAWS

ASKED = ("ludziejewski", "clark", "abnar", "ling", "kimi")
LARGE_RUN_NOISE = 0.0005  # nats between seeds above 100M parameters: .00025-.0007 (docs/scaling.md)
SEEN = 1.645 + 1.28  # a 90 % interval that excludes zero nine times in ten


def expected_gain(
    total: float,
    active: float,
    add: float,
    tokens: float,
    *,
    routed: float | None = None,
    ratio: float | None = None,
    granularity: float = 12.0,
    noise_sd: float = LARGE_RUN_NOISE,
) -> pl.DataFrame:
    """[law, coefficients, gain (nats), compute (multiplier), seeds, doublings, extrapolated] for
    ``add`` more expert parameters.

    ``routed``: parameters of the routed experts today (their growth is the growth of the ratio; by
    default all of ``total``);
    ``ratio``: experts E/k today, by default total / active. ``seeds``: runs of each arm for the
    gain to be seen nine times in ten against ``noise_sd`` (null where no gain is expected). Laws of
    leverage give compute; the nats beside are that times Ludziejewski's dL/dlnC.
    """
    numbers = {
        "total": total,
        "active": active,
        "add": add,
        "tokens": tokens,
        "noise_sd": noise_sd,
        "granularity": granularity,
    }
    for name, value in numbers.items():
        require(
            math.isfinite(value) and value > 0,
            f"{name} above 0",
            value,
            error=AnalysisError,
            field=name,
        )
    routed = total if routed is None else routed
    ratio = total / active if ratio is None else ratio
    require(
        total >= active and 0 < routed <= total and ratio >= 1,
        "active <= total, routed <= total and a ratio of at least 1",
        f"total {total:g}, active {active:g}, routed {routed:g}, ratio {ratio:g}",
        error=AnalysisError,
        field="total",
    )
    growth = (routed + add) / routed
    before = {
        "active_params": active,
        "total_params": total,
        "tokens": tokens,
        "ratio": ratio,
        "granularity": granularity,
        "compute": 6 * active * tokens,
    }
    after = {**before, "total_params": total + add, "ratio": ratio * growth}
    slope = law_slope(active, tokens, ratio).value
    rows = []
    for name in ASKED:
        law = LAWS[name]
        for which in law.published:
            compute = law.compute_equivalent(before, after, which)
            nats = slope * math.log(compute)
            if law.output == "loss":
                nats = float(law.predict(before, which) - law.predict(after, which))
            rows.append(
                {
                    "law": name,
                    "coefficients": which,
                    "gain": nats,
                    "compute": compute,
                    "seeds": math.ceil(2 * (SEEN * noise_sd / nats) ** 2) if nats > 0 else None,
                    "doublings": math.log2(growth),
                    "extrapolated": "; ".join(law.outside(after)),
                }
            )
    return pl.DataFrame(rows, schema_overrides={"seeds": pl.Int64})
