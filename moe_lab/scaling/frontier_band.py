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
from moe_lab.scaling.sweep_means import read_sweep
from moe_lab.scaling.wall_rule import Noise, form_scores

POINTS = 65
FEWEST_FITTED = 4


@dataclass(frozen=True)
class Band:
    """``form`` is the best by AICc on the fitted ratios; ``curve`` [ratio, loss, lo, hi]; ``means``
    [ratio, loss, lo, hi, held_out] with intervals of the means (NaN where the noise is unknown);
    ``forms`` [form, delta_aicc, error, rmse]: misses at the ratios held out, measured less
    expected, at the largest and root mean square (null where none was held out).
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
    x, counts = sweep.log2, sweep.counts
    kept = max(min(len(x), FEWEST_FITTED), len(x) - hold_out)
    inner, weights = x[:kept], counts[:kept]
    noise = Noise(np.array([sweep.within]), sweep.df, noise_sd)
    scores = form_scores(inner, sweep.means[None, :kept], weights, noise)
    best = min(scores, key=lambda name: float(scores[name][0]))
    sd = float(noise.sd[0])
    error = np.where(np.isfinite(sd), sd, 0.0) / np.sqrt(counts)
    means = np.vstack(
        [
            sweep.means,
            sweep.means + np.random.default_rng(seed).normal(0, 1, (draws, len(x))) * error,
        ]
    )
    at = np.linspace(x[0], x[-1], POINTS)
    drawn = curve(
        fit_form(FORMS[best], inner, means[:, :kept], weights), inner, means[:, :kept], weights, at
    )
    low, high = np.quantile(drawn[1:], [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    half = noise.quantile(confidence) * sd / np.sqrt(counts)
    rows = []
    for name, form in FORMS.items():
        missed = (
            sweep.means[kept:]
            - curve(
                fit_form(form, inner, sweep.means[None, :kept], weights),
                inner,
                sweep.means[None, :kept],
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
                "loss": sweep.means,
                "lo": sweep.means - half,
                "hi": sweep.means + half,
                "held_out": np.arange(len(x)) >= kept,
            }
        ),
        pl.DataFrame(rows, schema_overrides={"error": pl.Float64, "rmse": pl.Float64}).sort(
            "delta_aicc"
        ),
    )
