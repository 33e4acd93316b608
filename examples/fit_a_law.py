"""Fit a scaling law to runs, with intervals, and say which coefficients the runs cannot fix."""

import numpy as np
import polars as pl

from moe_lab.scaling import bootstrap, fit

rng = np.random.default_rng(0)
sizes, tokens = np.meshgrid([1e7, 3e7, 1e8, 3e8], [2e8, 1e9, 5e9, 2e10])
loss = 1.7 + 400 / sizes**0.34 + 410 / tokens**0.28  # yours: measured
runs = pl.DataFrame(
    {
        "active_params": sizes.ravel(),
        "tokens": tokens.ravel(),
        "loss": loss.ravel() * (1 + 0.002 * rng.normal(size=16)),
    }
)
law = bootstrap(fit("hoffmann", runs), 100)
print(law)
for name in law.coefficients:
    low, high = law.interval(name)
    print(f"{name}: {law.coefficients[name]:.3g} ({low:.3g} to {high:.3g})")
