"""Do more experts still pay? The verdict on the losses of your own runs."""

import polars as pl

from moe_lab.scaling import wall_verdict

SEED_0 = [3.400, 3.331, 3.272, 3.229, 3.206, 3.195, 3.190]
SEED_1 = [3.404, 3.334, 3.275, 3.231, 3.207, 3.199, 3.193]

runs = pl.DataFrame(  # or pl.read_csv("runs.csv"): one row per run, loss in nats per token
    {
        "ratio": [1.0, 2, 4, 8, 16, 32, 64] * 2,
        "seed": [0] * 7 + [1] * 7,
        "loss": SEED_0 + SEED_1,
        "active_params": [30e6] * 14,
        "tokens": [2e9] * 14,
    }
)
verdict = wall_verdict(runs)
print(verdict.outcome.value, verdict.r_star)
print(verdict.sentence)
print(verdict.gain_table().select("ratio_from", "ratio_to", "gain", "lo", "hi"))
