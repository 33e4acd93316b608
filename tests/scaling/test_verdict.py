"""The verdict on sweeps whose truth is known, and on sweeps no one can judge."""

import math

import numpy as np
import polars as pl
import pytest
from refusals import refused
from scipy import stats
from simulated_sweeps import DOUBLINGS_256, DOUBLINGS_512, line, sweep, wall_at_32

from moe_lab.errors import AnalysisError
from moe_lab.scaling import LAWS, Outcome, verdict_by_budget, wall_verdict


def test_a_straight_line_has_no_wall():
    verdict = wall_verdict(sweep(line))
    assert verdict.outcome == "no wall"
    assert verdict.at == 256
    assert verdict.interval[0] > 0.07
    assert "No wall up to ratio 256" in verdict.sentence


def test_a_hard_wall_with_four_quiet_doublings_beyond_is_found_where_it_is():
    verdict = wall_verdict(sweep(wall_at_32, DOUBLINGS_512))
    assert verdict.outcome is Outcome.WALL
    assert verdict.at == 32
    assert verdict.interval[1] < 0.07
    assert verdict.forms[0].name == "plateau"
    assert any("one token budget does not tell" in reason for reason in verdict.reasons)


@pytest.mark.parametrize("at", [6, 12, 24, 48])
def test_a_wall_between_two_measured_ratios_is_placed_between_them(at):
    verdict = wall_verdict(
        sweep(lambda x: 3 - 0.05 * min(x, math.log2(at)), DOUBLINGS_512, sd=0.001)
    )
    assert verdict.outcome is Outcome.WALL
    assert verdict.at == pytest.approx(at, rel=0.06)


def test_ratios_half_a_doubling_apart_are_compared_over_a_whole_one():
    verdict = wall_verdict(sweep(line, 2.0 ** np.arange(0, 8.1, 0.5)))
    assert {gain.ratio_to / gain.ratio_from for gain in verdict.gains} == {2.0}
    assert verdict.outcome is Outcome.NO_WALL
    uneven = wall_verdict(sweep(line, np.array([1, 3, 6, 10, 24, 60, 100, 200.0])))
    steps = [(gain.ratio_from, gain.ratio_to) for gain in uneven.gains]
    assert steps == [(1, 3), (3, 6), (6, 24), (10, 24), (24, 60), (60, 200), (100, 200)]


def ludziejewski(x, active=1e7, tokens=2e8):
    return float(
        LAWS["ludziejewski"].predict({"active_params": active, "tokens": tokens, "ratio": 2.0**x})
    )


@pytest.mark.parametrize("seed", range(5))
def test_gains_that_fade_as_smooth_laws_do_are_no_wall_however_clearly_they_fade(seed):
    """Ludziejewski's law at 20 tokens a parameter: .017 nats a doubling at first, none past 64, and
    no break anywhere.
    """
    verdict = wall_verdict(
        sweep(ludziejewski, 2.0 ** np.arange(8), sd=0.0005, tokens=2e8, draw=seed)
    )
    assert verdict.outcome is Outcome.BELOW_MARGIN


def test_a_fade_is_told_as_such():
    verdict = wall_verdict(sweep(ludziejewski, DOUBLINGS_512, sd=0.0005, tokens=6e8))
    faded = wall_verdict(
        sweep(
            lambda x: 3 - 0.05 * (x - 0.9 * math.log1p(math.exp((x - 4) / 0.9))),
            DOUBLINGS_512,
            sd=0.0005,
        )
    )
    assert (verdict.outcome, faded.outcome) == (Outcome.BELOW_MARGIN, Outcome.BELOW_MARGIN)
    assert any(
        "a bend spread over three doublings fits as well" in reason for reason in faded.reasons
    )


def test_a_hard_wall_one_doubling_before_the_end_is_not_claimed():
    verdict = wall_verdict(sweep(wall_at_32, 2.0 ** np.arange(7)))
    assert verdict.outcome is Outcome.CANNOT_TELL
    assert verdict.at is None
    assert verdict.r_star == (8, None)
    assert "up to ratio 32 a doubling was still worth more than 5 % of compute" in verdict.reasons


def test_a_wall_hidden_in_noise_is_not_claimed_though_no_gain_is_significant():
    frame = sweep(line, seeds=2, sd=0.03, draw=3)
    verdict = wall_verdict(frame)
    last = verdict.gains[-1]
    assert last.lo < 0 < last.hi, "the naive rule would call a wall here"
    assert verdict.outcome is Outcome.CANNOT_TELL
    assert "seeds" in verdict.sentence


def naive_rule(frame: pl.DataFrame) -> bool:
    """The rule never used: a wall is where some doubling's gain is below two standard errors."""
    means = (
        frame.group_by("ratio")
        .agg(pl.col("loss").mean(), pl.col("loss").var().alias("v"), pl.len().alias("n"))
        .sort("ratio")
    )
    se = math.sqrt(means["v"].mean() * 2 / means["n"][0])  # type: ignore[operator]
    return bool((-np.diff(means["loss"].to_numpy()) < 2 * se).any())


def test_the_naive_rule_calls_walls_on_a_straight_line_and_ours_does_not():
    frames = [sweep(line, 2.0 ** np.arange(7), sd=0.012, draw=draw) for draw in range(100)]
    assert np.mean([naive_rule(frame) for frame in frames]) > 0.38
    assert not any(wall_verdict(frame).outcome is Outcome.WALL for frame in frames)


def test_returns_below_the_margin_everywhere_are_below_it_and_no_wall():
    verdict = wall_verdict(sweep(lambda x: 3 - 0.003 * x, sd=0.001))
    assert verdict.outcome is Outcome.BELOW_MARGIN
    assert verdict.r_star == (None, 2)
    assert verdict.interval[1] < 0.07


@pytest.mark.parametrize(
    ("seeds", "phrase"),
    [(1, "one seed on 5 ratios"), (2, "2 seeds on 5 ratios"), (3, "3 seeds on 5 ratios")],
)
def test_a_tiny_sweep_cannot_tell_and_says_what_would(seeds, phrase):
    verdict = wall_verdict(
        sweep(lambda x: 6 - 0.1 * x, 2.0 ** np.arange(5), seeds, 0.01, active=5e5, tokens=200_000)
    )
    assert verdict.outcome is Outcome.CANNOT_TELL
    assert phrase in verdict.sentence
    assert "12.5k per expert at ratio 16" in verdict.sentence
    assert ("1M per expert" in verdict.sentence) == (seeds > 1), "without a noise that comes first"
    assert verdict.sentence.count(". ") == 0


def test_one_seed_cannot_tell_unless_the_noise_is_known_from_elsewhere():
    frame = sweep(line, seeds=1)
    blind = wall_verdict(frame)
    assert blind.outcome is Outcome.CANNOT_TELL
    assert math.isnan(blind.noise_sd)
    assert "one seed" in blind.reasons[0]
    assert wall_verdict(frame, noise_sd=0.003).outcome is Outcome.NO_WALL


def test_the_interval_of_a_gain_is_students_paired_interval():
    frame = sweep(line, seed_effect=0.2)
    table = (
        frame.pivot(on="seed", index="ratio", values="loss").sort("ratio").drop("ratio").to_numpy()
    )
    residual = table - table.mean(1, keepdims=True) - table.mean(0, keepdims=True) + table.mean()
    df = (table.shape[0] - 1) * (table.shape[1] - 1)
    half = stats.t.ppf(0.95, df) * math.sqrt((residual**2).sum() / df * 2 / 3)
    last = wall_verdict(frame).gains[-1]
    gain = (table[-2] - table[-1]).mean()
    assert (last.gain, last.lo, last.hi) == pytest.approx((gain, gain - half, gain + half))


def test_a_missing_run_keeps_the_pairing():
    """Unpaired, the seeds' own effects of .2 nats would drown a noise of .003."""
    verdict = wall_verdict(sweep(line, seed_effect=0.2).slice(1))
    assert verdict.noise_sd < 0.006
    assert verdict.outcome is Outcome.NO_WALL
    assert "15 degrees of freedom" in verdict.reasons[0]


def test_seeds_that_link_no_ratios_are_pooled_within_them():
    frame = sweep(line).with_columns(seed=pl.int_range(pl.len()))
    within = (
        frame.group_by("ratio")
        .agg(((pl.col("loss") - pl.col("loss").mean()) ** 2).sum())["loss"]
        .sum()
    )
    verdict = wall_verdict(frame)
    assert verdict.noise_sd == pytest.approx(math.sqrt(within / (27 - 9)))
    assert "pooled within ratios" in verdict.reasons[0]


def test_the_margin_is_five_percent_of_compute_by_the_published_values():
    """docs/scaling.md, evaluated at ratio 16, the middle of a 1-256 grid."""
    for active, tokens, nats in (
        (3e6, 3e8, 0.0149),
        (1e7, 3e8, 0.0137),
        (1e7, 1e9, 0.0116),
        (1e8, 1e10, 0.0073),
        (1e9, 1e11, 0.0046),
    ):
        verdict = wall_verdict(sweep(line, active=active, tokens=tokens))
        assert verdict.margin == pytest.approx(nats, abs=6e-5)
        extrapolated = active < 7.8e7 or tokens > 8e10
        assert any("extrapolated" in reason for reason in verdict.reasons) == extrapolated


def test_the_margin_is_measured_where_other_budgets_were_run():
    truth = {1e9: 3.0, 4e9: 2.7}
    budgets = pl.concat(
        sweep(lambda x, at=at: at - 0.03 * x, tokens=tokens, sd=1e-6)
        for tokens, at in truth.items()
    )
    verdict = wall_verdict(budgets.filter(pl.col("tokens") == 1e9), budgets=budgets)
    assert verdict.compute_slope == pytest.approx(0.3 / math.log(4), rel=1e-4)
    assert verdict.elasticity == pytest.approx(0.03 / math.log(2) / (0.3 / math.log(4)), rel=1e-3)
    assert any("measured" in reason for reason in verdict.reasons)


def growing_router(share):
    return sweep(line).with_columns(active_params=1e7 * (1 + share * pl.col("ratio") / 256))


def test_a_routers_growth_is_charged_before_a_gain_refutes_a_wall():
    """The last gain of .03 nats is worth 13 % of compute; at 22 % more active parameters for the
    last step it proves nothing.
    """
    assert wall_verdict(growing_router(0.05)).outcome is Outcome.NO_WALL
    charged = wall_verdict(growing_router(0.45))
    assert charged.outcome is Outcome.CANNOT_TELL
    assert "18 % more active parameters" in charged.sentence
    assert any("differ by 45 % over the ratios" in reason for reason in charged.reasons)


def test_a_loss_that_rises_with_the_ratio_is_no_wall_but_a_fault():
    verdict = wall_verdict(sweep(lambda x: 3 - 0.03 * min(x, 6) + 0.04 * max(0, x - 6)))
    assert verdict.outcome is Outcome.BELOW_MARGIN
    assert "mistuned or short of data" in verdict.sentence


def test_seeds_that_agree_to_the_last_bit_measure_no_noise():
    verdict = wall_verdict(sweep(line, sd=0.0))
    assert verdict.outcome is Outcome.CANNOT_TELL
    assert "to the last bit" in verdict.reasons[0]


def test_every_budget_has_its_own_verdict_with_the_slope_between_them():
    walls = {1e9: 5, 4e9: 20}
    frames = [
        sweep(
            lambda x, w=w, t=t: 3 - 0.1 * math.log(t / 1e9) - 0.03 * min(x, w),
            DOUBLINGS_512,
            sd=0.001,
            tokens=t,
        )
        for t, w in walls.items()
    ]
    verdicts = verdict_by_budget(pl.concat(frames))
    assert list(verdicts) == [1e9, 4e9]
    assert verdicts[1e9].outcome is Outcome.WALL
    assert verdicts[4e9].outcome is Outcome.NO_WALL
    assert 0.1 < verdicts[1e9].compute_slope < 0.16, "between the ratios' own slopes, .1 to .18"


def test_a_budget_that_cannot_be_judged_is_named():
    whole = sweep(line, tokens=1e9)
    one_ratio = sweep(lambda x: line(x) - 0.1, tokens=4e9).filter(
        pl.col("ratio") == pl.col("ratio").min()
    )
    with pytest.raises(AnalysisError) as caught:
        verdict_by_budget(pl.concat([whole, one_ratio]))
    assert "runs of 4,000,000,000 tokens" in str(caught.value)


def test_verdict_tables_hold_every_step_and_every_form():
    verdict = wall_verdict(sweep(line))
    gains, forms = verdict.gain_table(), verdict.form_table()
    assert gains.columns == [
        "ratio_from",
        "ratio_to",
        "gain",
        "lo",
        "hi",
        "compute",
        "compute_lo",
        "compute_hi",
        "margin",
    ]
    assert gains["ratio_to"].to_list() == DOUBLINGS_256[1:].tolist()
    assert sorted(forms["name"]) == ["hinge", "line", "plateau", "power", "saturation"]
    assert forms["weight"].sum() == pytest.approx(1)


def bad(**columns):
    return sweep(line).with_columns(**columns)


BAD_INPUT = {
    "two ratios": (sweep(line, np.array([1.0, 2.0])), "expected three or more ratios, got 2"),
    "NaN": (
        bad(loss=pl.when(pl.col("ratio") == 8).then(float("nan")).otherwise(pl.col("loss"))),
        "got nan at ratio 8 seed 0 (3 of 27 runs)",
    ),
    "mixed budgets": (
        bad(tokens=pl.when(pl.col("ratio") > 8).then(2e9).otherwise(1e9)),
        "expected one token budget, got 1e+09, 2e+09",
    ),
    "duplicates": (
        pl.concat([sweep(line), sweep(line)]),
        "expected one run per ratio and seed, got 2 at ratio 1 seed 0",
    ),
    "learning rates": (
        pl.concat([sweep(line).with_columns(learning_rate=pl.lit(rate)) for rate in (1e-3, 2e-3)]),
        "try the best learning rate of each ratio alone",
    ),
    "no loss": (sweep(line).drop("loss"), "got none called loss"),
    "text": (bad(loss=pl.col("loss").cast(pl.String)), "expected numbers in loss, got String"),
    "empty": (sweep(line).clear(), "got an empty frame"),
    "null": (
        bad(loss=pl.when(pl.col("seed") > 0).then(pl.col("loss"))),
        "expected a value of loss in every run, got 9 empty",
    ),
    "perplexity": (
        bad(loss=pl.col("loss").exp()),
        "expected losses in nats per token, between 0 and 15",
    ),
    "bits": (
        bad(loss=pl.col("loss") / math.log(2), vocab_size=pl.lit(32)),
        "try multiplying by ln 2 if they are bits",
    ),
    "bits per byte": (bad(bits_per_byte=pl.col("loss")), "got the column bits_per_byte again"),
    "other sizes": (
        bad(active_params=pl.col("ratio") * 1e6),
        "expected one active size (within 50 %)",
    ),
    "inverse": (bad(ratio=1 / pl.col("ratio")), "expected ratios total:active of at least 1"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_told_in_one_line(name):
    frame, message = BAD_INPUT[name]
    with pytest.raises(AnalysisError) as caught:
        wall_verdict(frame)
    text = str(caught.value)
    assert message in text
    assert "\n" not in text


def test_budgets_too_close_to_measure_a_slope_are_refused():
    with refused("budgets", AnalysisError):
        wall_verdict(sweep(line), budgets=sweep(line))
