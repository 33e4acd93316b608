"""Frames of sweeps whose truth is known."""

import math

import numpy as np
import polars as pl

DOUBLINGS_256 = 2.0 ** np.arange(9)
DOUBLINGS_512 = 2.0 ** np.arange(10)


def sweep(
    truth,
    ratios=DOUBLINGS_256,
    seeds=3,
    sd=0.003,
    *,
    active=1e7,
    tokens=1e9,
    draw=0,
    seed_effect=0.0,
):
    rng = np.random.default_rng(draw)
    shift = rng.normal(0, seed_effect, seeds) if seed_effect else np.zeros(seeds)
    rows = [
        {
            "ratio": float(ratio),
            "seed": seed,
            "loss": truth(math.log2(ratio)) + shift[seed] + rng.normal(0, sd),
        }
        for ratio in ratios
        for seed in range(seeds)
    ]
    return pl.DataFrame(rows).with_columns(active_params=pl.lit(active), tokens=pl.lit(tokens))


def line(x):
    return 3 - 0.03 * x


def wall_at_32(x):
    return 3 - 0.03 * min(x, 5)
