"""Ratio + seed + noise with cells missing, unequal seeds, outlying runs and noise that grows."""

import numpy as np
import pytest
from scipy.special import ndtr
from simulated_sweeps import DOUBLINGS_256, line, sweep

from moe_lab.scaling import Outcome, wall_verdict
from moe_lab.scaling.gain_process import LENGTHS, SIZES, _integrated, posterior
from moe_lab.scaling.two_way import GROWTHS, Layout, estimate, unlike_ratio
from moe_lab.scaling.wall_rule import Price, judge

X = np.arange(9.0)
MARGIN = 0.0116
GRID = Layout.grid(X, np.full(9, 3))
LAST = np.zeros(9)
LAST[-2:] = 1, -1


def draws(truth, sd, layout=GRID, count=400, seed=0):
    noise = np.random.default_rng(seed).normal(0, sd, (count, layout.runs))
    return truth(X)[layout.ratio] + noise


def test_a_complete_table_gives_the_means_and_the_residuals_of_both_effects():
    losses = draws(lambda x: 3 - 0.03 * x, 0.01, count=1)
    table = losses.reshape(9, 3)
    residual = table - table.mean(1, keepdims=True) - table.mean(0) + table.mean()
    found = estimate(GRID, losses)
    assert found.means[0] == pytest.approx(table.mean(1))
    assert found.within[0] == pytest.approx((residual**2).sum())
    assert found.df == 16
    assert found.error(LAST[None])[0, 0] == pytest.approx(found.sd[0] * np.sqrt(2 / 3))


def test_missing_cells_are_least_squares_on_what_is_there():
    """Against the normal equations of ratio and seed dummies, written out."""
    layout = GRID.without(5).without(20)
    effect = np.array([0.3, -0.2, 0.1])
    losses = draws(lambda x: 3 - 0.03 * x, 0.002, layout, 1) + effect[layout.seed]
    design = np.hstack([np.eye(9)[layout.ratio], np.eye(3)[layout.seed][:, 1:]])
    solved, rest, *_ = np.linalg.lstsq(design, losses[0], rcond=None)
    found = estimate(layout, losses)
    assert np.diff(found.means[0]) == pytest.approx(np.diff(solved[:9]))
    assert found.within[0] == pytest.approx(rest[0])
    assert found.sd[0] < 0.004, "not the seeds' .25"


def test_unequal_seeds_use_every_run_of_the_last_ratios():
    layout = Layout.grid(X, np.array([2] * 6 + [5] * 3))
    even = estimate(GRID, draws(lambda x: 3 - 0.03 * x, 0.006))
    late = estimate(layout, draws(lambda x: 3 - 0.03 * x, 0.006, layout))
    assert late.error(LAST[None]).mean() < 0.8 * even.error(LAST[None]).mean()
    assert late.df == 27 - 9 - 4


@pytest.mark.parametrize("run", [0, 13, 22, 26])
def test_a_run_off_by_five_hundredths_is_flagged_and_named(run):
    losses = draws(lambda x: 3 - 0.03 * x, 0.003)
    assert (estimate(GRID, losses).outlier >= 0).mean() <= 0.02, "1 % and its error"
    losses[:, run] += 0.05
    assert (estimate(GRID, losses).outlier == run).mean() > 0.95


@pytest.mark.parametrize("size", [0.02, 0.05, 0.1, 0.2, 0.4, 1.0, 5.0])
def test_no_spike_makes_a_wall_no_wall(size):
    """A hard wall at 16, one run at 128 spiked: once "no wall" in .5 to 1.0 of sweeps."""
    losses = draws(lambda x: 3 - 0.03 * np.minimum(x, 4), 0.003)
    losses[:, 22] += size
    outcomes = judge(GRID, losses, Price(MARGIN)).outcomes()
    assert (outcomes == Outcome.NO_WALL).mean() <= 0.01


def test_issue_18s_sweep_of_a_plateau_and_a_spike_is_not_no_wall():
    losses = [3.4 - 0.034 * min(x, 4) + 0.03 * (x == 7) for x in range(9)]
    outcomes = {wall_verdict(sweep(lambda x: losses[int(x)], draw=d)).outcome for d in range(20)}
    assert Outcome.NO_WALL not in outcomes


def test_a_published_sweep_with_one_badly_trained_ratio_is_not_no_wall():
    """4.7535, 4.7384, 4.7907, 4.7377 at 4, 16, 64, 256 (misfit)."""
    truth = dict(zip((2, 4, 6, 8), (4.7535, 4.7384, 4.7907, 4.7377), strict=True))
    for seed in range(10):
        frame = sweep(lambda x: truth[round(x)], 2.0 ** np.array([2, 4, 6, 8]), draw=seed)
        assert wall_verdict(frame).outcome is not Outcome.NO_WALL
    one = sweep(lambda x: truth[round(x)], 2.0 ** np.array([2, 4, 6, 8]), seeds=1, sd=0)
    assert wall_verdict(one, noise_sd=0.004).outcome is not Outcome.NO_WALL


def test_noise_that_grows_is_found_and_its_last_ratios_are_trusted_less():
    growing = 0.003 * 4 ** (X / 8)
    noise = np.random.default_rng(3).normal(size=(600, 27)) * growing[GRID.ratio]
    found = estimate(GRID, 3 - 0.03 * X[GRID.ratio] + noise)
    flat = estimate(GRID, draws(lambda x: 3 - 0.03 * x, 0.006, count=600))
    assert (found.growth > 0).mean() > 0.6
    assert (flat.growth > 0).mean() < 0.09
    rate = np.median(found.growth[found.growth > 0])
    assert rate == pytest.approx(np.log(4) / 8, abs=0.1)
    assert rate in GROWTHS
    error = found.error(LAST[None])[:, 0][found.growth > 0]
    assert np.median(error) == pytest.approx(np.sqrt(2 / 3) * growing[-2:].mean(), rel=0.35)


def test_a_ratio_whose_seeds_disagree_is_found_at_the_rate_of_its_test():
    def found(losses):
        return [unlike_ratio(GRID, row) for row in losses]

    quiet = found(draws(lambda x: 3 - 0.03 * x, 0.003, count=200))
    assert np.mean([one is not None for one in quiet]) <= 0.02, "1 % and its error"
    growing = 0.002 * 3 ** (X / 8)[GRID.ratio]
    rising = found(draws(lambda x: 3 - 0.03 * x, growing, count=200))
    assert np.mean([one is not None for one in rising]) < 0.06, "growth is part of the noise"
    off = draws(lambda x: 3 - 0.03 * x, 0.003, count=60)
    off[:, 24:26] += 0.05
    off += np.array([0.3, -0.2, 0.1])[GRID.seed]
    assert np.mean([one is not None and one.ratio == 8 for one in found(off)]) > 0.95


def test_one_missing_run_costs_nothing_beside_a_large_seed_effect():
    right = 0
    for draw in range(20):
        frame = sweep(line, DOUBLINGS_256, sd=0.002, seed_effect=0.05, draw=draw)
        right += wall_verdict(frame.slice(1)).outcome is Outcome.NO_WALL
    assert right >= 19


def test_the_process_is_sure_of_lines_and_unsure_where_the_last_step_alone_differs():
    def sure(truth):
        found = estimate(GRID, draws(truth, 0.006, count=200))
        return posterior(X, found, LAST, MARGIN, MARGIN)

    steep, at_margin = sure(lambda x: 3 - 2 * MARGIN * x), sure(lambda x: 3 - MARGIN * x)
    resumed = sure(lambda x: 3 - 2 * MARGIN * np.minimum(x, 4))
    assert (steep.above > 0.95).mean() > 0.95
    assert (at_margin.above > 0.95).mean() < 0.02
    assert resumed.above.max() < 0.5
    assert steep.mean.mean() == pytest.approx(2 * MARGIN, rel=0.05)
    inside = np.abs(steep.mean - 2 * MARGIN) < 1.645 * steep.sd
    assert inside.mean() > 0.9


def test_the_process_is_the_formula_written_out():
    """Universal kriging with a dense inverse for each length and size, their likelihoods as
    weights.
    """
    layout, noise = Layout.grid(X, np.array([2] * 6 + [5] * 3)), 0.004
    found = estimate(layout, draws(lambda x: 3 - 0.02 * x, noise, layout, 1), known=noise)
    flat, losses = np.stack([np.ones(9), X], 1), found.means[0]
    logs, means, variances = [], [], []
    for length in LENGTHS:
        for size in (MARGIN * np.array(SIZES)) ** 2:
            process = size * _integrated(tuple(X.tolist()), length)
            inverse = np.linalg.inv(process + noise**2 * found.spread[0])
            fixed = np.linalg.inv(flat.T @ inverse @ flat)
            trend = fixed @ flat.T @ inverse @ losses
            rest = inverse @ (losses - flat @ trend)
            left = flat.T @ LAST - flat.T @ inverse @ process @ LAST
            means.append(LAST @ (flat @ trend + process @ rest))
            variances.append(LAST @ (process - process @ inverse @ process) @ LAST)
            variances[-1] += left @ fixed @ left
            volume = np.linalg.slogdet(inverse)[1] + np.linalg.slogdet(fixed)[1]
            logs.append(volume / 2 - losses @ rest / 2)
    weights = np.exp(np.array(logs) - max(logs))
    weights /= weights.sum()
    mean = weights @ means
    sd = np.sqrt(weights @ (np.array(variances) + (np.array(means) - mean) ** 2))
    above = weights @ ndtr((np.array(means) - MARGIN) / np.sqrt(variances))
    made = posterior(X, found, LAST, MARGIN, MARGIN)
    assert [made.mean[0], made.sd[0], made.above[0]] == pytest.approx([mean, sd, above], rel=1e-8)


def test_errors_between_pairs_of_contrasts_are_those_of_their_differences():
    layout = Layout.grid(X, np.array([2] * 6 + [5] * 3))
    losses = draws(lambda x: 3 - 0.03 * x, 0.003, layout, 20) * (1 + layout.x[layout.ratio])
    found = estimate(layout, losses)
    contrasts = np.random.default_rng(0).normal(size=(5, 9))
    first, second = np.triu_indices(5, 1)
    between = found.error_between(contrasts, first, second)
    assert len(set(found.group)) > 1
    assert between == pytest.approx(found.error(contrasts[first] - contrasts[second]), rel=1e-9)
