"""The frontier as a curve with a band, fitted without its largest ratios, and how far each form
misses those.

In: runs of one sweep. Out: the form with the smallest AICc drawn through the smaller ratios, its
interval from redrawn noise, and the measured means of the ratios it did not see beside what it
expected there. A form that fits and does not foresee is no law.
"""

from dataclasses import dataclass

import numpy as np
import polars as pl

from moe_lab.scaling.frontier_forms import FORMS, curve, fit_form
from moe_lab.scaling.sweep_losses import read_sweep
from moe_lab.scaling.wall_rule import form_scores

POINTS = 65
FEWEST_FITTED = 4


@dataclass(frozen=True)
class Band:
    """The frontier, fitted without its largest ratios. ``form`` is the best by AICc on the fitted
    ratios; ``curve`` [ratio, loss, lo, hi]; ``means`` [ratio, loss, lo, hi, held_out] with
    intervals of the means (NaN where the noise is unknown); ``forms`` [form, delta_aicc, error,
    rmse]: misses at the ratios held out, measured less expected, at the largest and root mean
    square (null where none was held out).
    """

    form: str
    curve: pl.DataFrame
    means: pl.DataFrame
    forms: pl.DataFrame


def frontier_band(
    frame: pl.DataFrame,
    *,
    hold_out: int = 1,
    draws: int = 400,
    confidence: float = 0.9,
    noise_sd: float | None = None,
    seed: int = 0,
) -> Band:
    """Fit without the ``hold_out`` largest ratios (fewer where less than four ratios would be
    left). Raises ``AnalysisError`` as `wall_verdict` does.
    """
    sweep = read_sweep(frame)
    x, counts, found = sweep.log2, sweep.layout.counts, sweep.estimate(noise_sd)
    kept = max(min(len(x), FEWEST_FITTED), len(x) - hold_out)
    inner, weights, measured = x[:kept], counts[:kept], found.means[0]
    scores = form_scores(inner, measured[None, :kept], weights, found)
    best = min(scores, key=lambda name: float(scores[name][0]))
    error = found.error(np.eye(len(x)))[0]
    half = found.quantile(confidence) * error
    redrawn = np.random.default_rng(seed).normal(0, 1, (draws, len(x))) * np.nan_to_num(error)
    means = np.vstack([measured, measured + redrawn])
    at = np.linspace(x[0], x[-1], POINTS)
    drawn = curve(
        fit_form(FORMS[best], inner, means[:, :kept], weights), inner, means[:, :kept], weights, at
    )
    low, high = np.quantile(drawn[1:], [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    rows = []
    for name, form in FORMS.items():
        missed = (
            measured[kept:]
            - curve(
                fit_form(form, inner, measured[None, :kept], weights),
                inner,
                measured[None, :kept],
                weights,
                x,
            )[0, kept:]
        )
        rows.append(
            {
                "form": name,
                "delta_aicc": float(scores[name][0] - scores[best][0]),
                "error": float(missed[-1]) if len(missed) else None,
                "rmse": float(np.sqrt((missed**2).mean())) if len(missed) else None,
            }
        )
    return Band(
        best,
        pl.DataFrame({"ratio": 2.0**at, "loss": drawn[0], "lo": low, "hi": high}),
        pl.DataFrame(
            {
                "ratio": sweep.ratios,
                "loss": measured,
                "lo": measured - half,
                "hi": measured + half,
                "held_out": np.arange(len(x)) >= kept,
            }
        ),
        pl.DataFrame(rows, schema_overrides={"error": pl.Float64, "rmse": pl.Float64}).sort(
            "delta_aicc"
        ),
    )
