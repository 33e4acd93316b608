# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # Was that a sparsity wall?
#
# LongCat-2.0's authors report that, at about 97 % sparsity, another 135B expert parameters bought
# almost nothing. It reads like a wall: beyond some total:active ratio, experts stop paying. This
# notebook asks what the published scaling laws *expected* of that step, how many runs it would take
# to see it, which sweep could tell a wall from diminishing returns, and what a sweep of your own
# says.
#
# Everything here is closed form or simulation: it takes a few seconds, one thread and no data.

# %%
import math
from pathlib import Path

import numpy as np
import polars as pl

from moe_lab.report import figures
from moe_lab.scaling import (
    LAWS,
    Design,
    confounds,
    default_truths,
    expected_gain,
    main_arm,
    plan_power,
    power,
    read_runs,
    wall_study,
    wall_verdict,
    with_budgets,
)

pl.Config.set_tbl_rows(20).set_fmt_str_lengths(90).set_tbl_width_chars(
    160
).set_tbl_hide_column_data_types(True)

# %% [markdown]
# ## 1. How large was the step?
#
# Laws of sparsity are smooth in the *logarithm* of the ratio, so a step is counted in doublings.
# 1.6T parameters hold the 135B: before them there were 1.465T, of which +135B is 9.2 %. That is an
# eighth of a doubling.

# %%
TOTAL, ACTIVE, ADDED, TOKENS = 1.6e12, 48e9, 135e9, 35e12
before = TOTAL - ADDED
doublings = math.log2(TOTAL / before)
print(
    f"+{ADDED / before:.1%} is {doublings:.3f} of a doubling; the ratio goes from "
    f"{before / ACTIVE:.1f} to {TOTAL / ACTIVE:.1f}"
)
assert abs(doublings - 0.127) < 5e-4

# %% [markdown]
# ## 2. What did each law expect of it?
#
# `gain` is nats per token, `compute` the multiplier of training compute that would have bought the
# same. `extrapolated` lists the variables that leave the range of the runs behind a law: here
# nearly all of them do, so this is a range of expectations and no prediction.

# %%
step = expected_gain(before, ACTIVE, ADDED, TOKENS)
print(step.select("law", "coefficients", "gain", "compute", "seeds", "extrapolated"))
assert step["gain"].max() < 0.004  # type: ignore[operator]

# %% [markdown]
# No smooth law expects more than .004 nats, and Ludziejewski's joint law .0008: two per cent of
# compute. At this size two runs that differ only in their seed differ by about .0005 nats. *Almost
# nothing* is what diminishing returns look like from close by.
#
# ## 3. How large a step could be seen?
#
# The gain of a step grows with its doublings, the noise does not. One run of each arm shows a gain
# of about four times the noise.

# %%
law, noise = LAWS["ludziejewski"], 0.0005
start = {"active_params": ACTIVE, "tokens": TOKENS, "ratio": before / ACTIVE}
for added in (0.05, 0.127, 0.5, 1.0, 2.0):
    gain = float(law.predict(start) - law.predict({**start, "ratio": start["ratio"] * 2**added}))
    seeds = math.ceil(2 * (2.925 * noise / gain) ** 2)
    print(
        f"{added:5.3f} doublings: {gain:.4f} nats, {seeds} seed{'s' if seeds > 1 else ''} of each "
        "arm to see it nine times in ten"
    )

# %% [markdown]
# Seeing the step is still not seeing a wall. "The gain is not significant" is no evidence: on a
# perfectly straight frontier of 30 mnats per doubling, that rule calls a wall in most sweeps once
# the noise is .012.

# %%
rng = np.random.default_rng(0)
means = -0.03 * np.arange(7) + rng.normal(0, 0.012 / math.sqrt(3), (2000, 7))
naive = (-np.diff(means, axis=1) < 2 * 0.012 * math.sqrt(2 / 3)).any(axis=1).mean()
print(
    f'the rule "some gain below two standard errors" calls a wall on {naive:.0%} of straight lines'
)
assert naive > 0.38

# %% [markdown]
# ## 4. Which sweep could tell?
#
# A wall is claimed only if every gain beyond it lies *within a margin* (5 % of compute per
# doubling) for three doublings, and a form with a break beats smooth ones. Here is what a pilot at
# 3M active parameters and 300M tokens would say under five truths.

# %%
pilot = Design(tuple(4.0**e for e in range(5)), seeds=2, active_params=3e6, tokens=3e8)
plan = plan_power(pilot, noise_sd=0.004, draws=100)
print(f"the pilot, {pilot.runs} runs, {pilot.flops:.1e} FLOPs:")
print(plan.own.select("truth", "wall", "below_margin", "no_wall", "cannot_tell", "settled"))
best = plan.best
print(
    "cheapest sufficient design:",
    "none tried"
    if best is None
    else f"{best.ratios[-1]:g} x {best.seeds} seeds, {best.flops:.1e} FLOPs",
)

# %%
grid = [Design(tuple(2.0**e for e in range(10)), seeds, 1e7, 1e9) for seeds in (2, 3, 5, 8)]
figures.wall_power(power(grid, default_truths(), noise_sd=0.004, draws=100))

# %% [markdown]
# ## 5. A sweep of your own
#
# A frame with a row per run is enough: ratio, seed, loss (nats per token), active_params, tokens.
# `read_runs` takes Parquet, CSV, JSONL or the folder of `moe-lab sweep run`. This is the committed
# `small` preset if it is there, and otherwise a sweep drawn from a frontier that bends at 32.

# %%
roots = [Path.cwd(), *Path.cwd().parents]
committed = next(
    (
        path
        for root in roots
        if (path := root / "experiments" / "sparsity_wall" / "runs.parquet").exists()
    ),
    None,
)


def drawn() -> pl.DataFrame:
    rows = [
        {
            "arm": "topk",
            "ratio": 2.0**e,
            "seed": seed,
            "loss": 3 - 0.03 * min(e, 5) + rng.normal(0, 0.002),
            "active_params": 1e7,
            "tokens": 1e9,
        }
        for e in range(10)
        for seed in range(3)
    ]
    return pl.DataFrame(rows)


runs = drawn() if committed is None else read_runs(committed)
mine, arm = main_arm(runs)
verdict = wall_verdict(mine, budgets=with_budgets(runs, arm) if arm else None)
print(verdict.outcome.upper(), verdict.sentence, *verdict.reasons, sep="\n- ")

# %% [markdown]
# The headline is the elasticity: how many per cent of compute a per cent of ratio is worth. Kimi K2
# reports .29; .07 is the margin.

# %%
print(
    f"elasticity {verdict.elasticity:.2f}, {verdict.interval[0]:.2f} to {verdict.interval[1]:.2f}"
)
print(
    verdict.gain_table().select("ratio_from", "ratio_to", "gain", "lo", "hi", "compute", "margin")
)
figures.wall_gain(verdict.gain_table())

# %%
study = wall_study(runs, arm=arm)
print(study.band.forms)
figures.frontier(study.judged, means=study.means, curve=study.band.curve)

# %% [markdown]
# Before a wall is believed: what else could have made it, or hidden it? Learning rates a factor of
# two off cost as much as a doubling of the experts, and experts that are short of data look like
# experts that are too many.

# %%
print(confounds(runs, arm=arm or None))

# %% [markdown]
# ## 6. A wall, and a fade that is none
#
# The same verdict on two sweeps whose truth we know: a hard wall at 32, and Ludziejewski's law at
# 20 tokens per parameter, whose gains fade to nothing by 64. The second has no break: its returns
# are below the margin, and it is a model short of data. The other two outcomes are "no wall" and
# "cannot tell".

# %%
walled = wall_verdict(drawn())
print(walled.sentence)
assert walled.outcome == "wall"
assert walled.at == 32
short = pl.DataFrame(
    {
        "ratio": 2.0**e,
        "seed": seed,
        "loss": float(law.predict({"active_params": 1e7, "tokens": 2e8, "ratio": 2.0**e}))
        + rng.normal(0, 0.002),
        "active_params": 1e7,
        "tokens": 2e8,
    }
    for e in range(8)
    for seed in range(3)
)
faded = wall_verdict(short)
print(faded.sentence)
assert faded.outcome == "below margin"
print(f"no doubling paid past ratio {faded.r_star[1]:g}, with 90 % confidence")

# %% [markdown]
# On the command line:
#
# ```
# moe-lab scaling step --total 1.6T --active 48B --add 135B --tokens 35T --included
# moe-lab sweep plan experiments/sparsity_wall.py --preset gpu --power
# moe-lab scaling verdict runs.parquet
# ```
