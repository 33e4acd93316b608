"""Every sentence and reason of the verdict, with the condition under which it is true."""

import ast
import math
import re
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from simulated_sweeps import DOUBLINGS_512, line, sweep, wall_at_32

from moe_lab import progress
from moe_lab.scaling import Outcome, wall_planner, wall_study, wall_verdict
from moe_lab.scaling import wall_sentences as words
from moe_lab.scaling.frontier_forms import effective_ratio


def spiked(frame, ratio, seed, nats):
    here = (pl.col("ratio") == ratio) & (pl.col("seed") == seed)
    return frame.with_columns(pl.col("loss") + pl.when(here).then(nats).otherwise(0.0))


def fade(x):
    return 3 - 0.05 * (x - 0.9 * math.log1p(math.exp((x - 4) / 0.9)))


def rising(x):
    return 3 - 0.03 * min(x, 6) + 0.04 * max(0, x - 6)


def growing_router(share):
    return sweep(line).with_columns(active_params=1e7 * (1 + share * pl.col("ratio") / 256))


def four_flat_and_a_spike():
    """Issue 18: falls to 16, then 3.264, 3.264, 3.264, 3.294, 3.264."""
    losses = [3.4 - 0.034 * min(x, 4) + 0.03 * (x == 7) for x in range(9)]
    return sweep(lambda x: losses[int(x)])


def resumes_in_the_last_step():
    """Nothing from 16 to 128, and then a last doubling that pays."""
    return sweep(lambda x: 3 - 0.03 * min(x, 4) - 0.03 * max(0, x - 7))


def saturating(x):
    """Clark's effective ratio, far from its maximum."""
    return 3 - 0.05 * math.log2(
        float(effective_ratio(np.array(2.0**x), np.array(2.0), np.array(1e4)))
    )


def louder_at_the_end(truth, draw, seeds=5, sd=0.002):
    """A noise that grows with the ratio, by 3 over 32."""
    rng = np.random.default_rng(draw)
    frame = sweep(truth, sd=0.0, seeds=seeds)
    noise = sd * 3 ** np.log2(frame["ratio"].to_numpy() ** 0.2) * rng.normal(size=frame.height)
    return frame.with_columns(pl.col("loss") + pl.Series(noise))


def unequal_seeds():
    frame = sweep(lambda x: 3 - 0.0116 * x, sd=0.003)
    return frame.filter((pl.col("ratio") > 1) | (pl.col("seed") < 2))


def two_off_together():
    """Two of the three runs of the largest ratio, half a nat above the line."""
    return spiked(spiked(sweep(line), 256, 0, 0.5), 256, 1, 0.5)


def two_budgets():
    return pl.concat(
        sweep(lambda x, at=at: at - 0.03 * min(x, 3), tokens=tokens)
        for tokens, at in ((1e9, 3.0), (4e9, 2.8))
    )


# the frame, the outcome, what the sentence says, and what it must not say
SENTENCES = {
    "wall": (
        sweep(wall_at_32, DOUBLINGS_512),
        "wall",
        r"^A wall at ratio 32: from 32 to 512 no doubling was worth 5 % of compute \(all 90 % "
        r"intervals within ±0\.011\d nats\) and the plateau form leads by \d+ in AICc, "
        r"at 1B tokens",
    ),
    "below margin": (
        sweep(fade, DOUBLINGS_512, sd=0.0005),
        "below margin",
        r"^Below the margin: from ratio 128 to 512 a doubling bought .* nats on average, less than "
        r"the 0\.011\d that 5 % of compute would; a doubling still paid at \d+ and no longer past "
        r"\d+ \(90 %\), at 1B",
    ),
    "below margin, loss rises": (sweep(rising), "below margin", r"a loss that rises: mistuned or"),
    "no wall": (
        sweep(line),
        "no wall",
        r"^No wall up to ratio 256: the last doubling still bought 0\.03\d+ \[.*\] nats, above the "
        r"0\.011\d that 5 % of compute would with probability 1\.00 \(elasticity ",
    ),
    "noise unknown": (sweep(line, seeds=1), "cannot tell", "left the noise between runs unknown"),
    "starved": (
        sweep(line, tokens=1e7),
        "cannot tell",
        r"measured early training, as experts saw fewer than 1M tokens: .* look alike there",
    ),
    "outlier": (
        spiked(sweep(wall_at_32), 128, 1, 0.2),
        "cannot tell",
        r'hold an outlying run, ratio 128 seed 1: .* "cannot tell", without it "wall"',
    ),
    "router growth": (
        growing_router(0.45),
        "cannot tell",
        r"above the 0\.011\d margin only until the 18 % more active parameters of that step",
    ),
    "both sides": (
        sweep(lambda x: 3 - 0.0116 * x, sd=0.003),
        "cannot tell",
        r"put the last gain at .* and the average of the last two doublings at .*, neither on one "
        r"side of the 0\.011\d margin",
    ),
    "average holds 0": (
        sweep(line, DOUBLINGS_512, seeds=2, sd=0.02, draw=3),
        "cannot tell",
        "put the last gain above the margin, but W3's interval holds 0",
    ),
    "only by the gains before": (
        louder_at_the_end(lambda x: 3 - 0.03 * min(x, 7), 1),
        "cannot tell",
        r"only by the gains before it: measured alone it is 0\.00\d+ \[.*\] nats, not above "
        r"0\.011\d, and the noise grows with the ratio",
    ),
    "not the best": (
        resumes_in_the_last_step(),
        "cannot tell",
        "the last ratio is not better than every ratio before that by the margin per doubling",
    ),
}


@pytest.mark.parametrize("name", SENTENCES)
def test_each_sentence_under_its_condition(name):
    frame, outcome, pattern = SENTENCES[name]
    verdict = wall_verdict(frame)
    assert verdict.outcome == outcome
    assert re.search(pattern, verdict.sentence), verdict.sentence
    others = [other for other in SENTENCES if other != name and "below margin" not in other]
    for other in others:
        assert not re.search(SENTENCES[other][2], verdict.sentence), other


REASONS = {
    "noise measured": (sweep(line), r"the noise between runs is 0\.00\d+ nats \(each seed's own"),
    "noise pooled": (
        sweep(line).with_columns(seed=pl.int_range(pl.len())),
        "pooled within ratios",
    ),
    "noise unknown": (sweep(line, seeds=1), "gives no estimate of the noise between runs"),
    "noise silent": (sweep(line, sd=0.0), "to the last bit"),
    "diverged": (
        sweep(line).with_columns(
            loss=pl.when((pl.col("ratio") == 8) & (pl.col("seed") == 2))
            .then(float("nan"))
            .otherwise("loss")
        ),
        r"left out, as the loss is not finite: ratio 8 seed 2; the runs that remain may be the",
    ),
    "outlier": (
        spiked(sweep(line), 4, 0, 0.1),
        r'the run at ratio 4 seed 0 lies \d+\.\d standard errors .* "no wall"',
    ),
    "starved": (sweep(line, tokens=1e7), "fewer than in any published sweep"),
    "W1 holds": (sweep(wall_at_32, DOUBLINGS_512), "W1: from ratio 32 on every gain lies within"),
    "W1 too short": (sweep(wall_at_32, 2.0 ** np.arange(8)), "a wall needs it over 3 doublings"),
    "W1 above": (sweep(line), "W1: the last gain, .* is above"),
    "W1 below": (sweep(rising), "W1: the last gain, .* is below"),
    "W1 overlaps": (sweep(lambda x: 3 - 0.0116 * x, sd=0.003), "W1: the last gain, .* overlaps"),
    "break anywhere": (
        sweep(saturating, DOUBLINGS_512),
        r"W2: saturation leads .* its break not identified \(a wall needs it below 64\)",
    ),
    "paid": (sweep(wall_at_32), "up to ratio 32 a doubling was still worth more than 5 %"),
    "crossing": (
        sweep(wall_at_32, DOUBLINGS_512),
        r"r\*: a doubling still paid at (8|16) and no longer past (32|64) \(90 %\), "
        r"if returns do not grow",
    ),
    "crossing, one end": (
        sweep(lambda x: 3 - 0.003 * x, sd=0.001),
        r"r\*: a doubling no longer paid past 2 \(90 %\)",
    ),
    "growing": (resumes_in_the_last_step(), "returns grow with the ratio somewhere"),
    "no break": (sweep(line), "no form with a break leads the line and the power law by 6"),
    "few runs": (sweep(line, np.array([1.0, 2.0, 4.0])), "too few to fit a form with a break"),
    "break": (sweep(wall_at_32, DOUBLINGS_512), r"W2: plateau leads .* \(far enough inside"),
    "break late": (
        sweep(wall_at_32, 2.0 ** np.arange(8), sd=0.001),
        r"W2: .* \(a wall needs it below 16\)",
    ),
    "fade": (sweep(fade, DOUBLINGS_512, sd=0.0005), "a bend spread over three doublings fits"),
    "W3": (sweep(line), r"W3: elasticity .* over the last two doublings \(0\.07 is the margin\)"),
    "W3 without noise": (sweep(line, seeds=1), "W3: elasticity .*, without an interval"),
    "process": (sweep(line), "a Gaussian process over all gains puts the last one at"),
    "slope of a law": (sweep(line), "compute spent on active parameters and tokens alike"),
    "router": (growing_router(0.45), "active parameters differ by 45 % over the ratios"),
    "one budget": (sweep(wall_at_32), "one token budget does not tell an end of returns"),
}


@pytest.mark.parametrize("name", REASONS)
def test_each_reason_under_its_condition(name):
    frame, pattern = REASONS[name]
    reasons = wall_verdict(frame).reasons
    assert any(re.search(pattern, reason) for reason in reasons), reasons


def test_a_given_noise_and_a_measured_slope_are_named():
    assert "was given, not measured here" in wall_verdict(sweep(line), noise_sd=0.01).reasons[0]
    budgets = two_budgets()
    verdict = wall_verdict(budgets.filter(pl.col("tokens") == 4e9), budgets=budgets)
    assert any("compute spent on tokens, and averaged over" in reason for reason in verdict.reasons)
    assert any("compare the verdicts of the other budgets" in reason for reason in verdict.reasons)


def test_seeds_that_differ_over_the_ratios_are_told():
    assert wall_verdict(unequal_seeds()).sentence.startswith(
        "Cannot tell: 2 to 3 seeds on 9 ratios"
    )


def test_noise_that_grows_is_named_with_both_ends():
    rng = np.random.default_rng(1)
    frame = sweep(line, sd=0.0, seeds=5)
    noise = 0.002 * 4 ** np.log2(frame["ratio"].to_numpy() ** 0.25) * rng.normal(size=frame.height)
    verdict = wall_verdict(frame.with_columns(pl.col("loss") + pl.Series(noise)))
    assert re.search(r"at ratio 1 and grows to 0\.0\d+ at 256", verdict.reasons[0])


@pytest.mark.parametrize("noise_sd", [None, 0.003])
def test_runs_that_are_off_together_are_a_warning_in_the_sentence(noise_sd):
    verdict = wall_verdict(two_off_together(), noise_sd=noise_sd)
    assert verdict.outcome is Outcome.BELOW_MARGIN
    assert verdict.sentence.endswith(
        "But the seeds at ratio 256 disagree by more than the noise of the other ratios: the "
        "outcome may rest on runs that are off."
    )
    warning = next(reason for reason in verdict.reasons if "disagree" in reason)
    assert re.search(r"3 runs at ratio 256 disagree by 0\.2\d+ nats where .* 0\.00[23]\d", warning)
    unlike = wall_verdict(spiked(two_off_together(), 256, 2, 0.5), noise_sd=noise_sd)
    assert "disagree" not in " ".join((unlike.sentence, *unlike.reasons)), "off, but they agree"


def test_every_function_that_makes_a_sentence_is_reached():
    """A new sentence needs a row in the tables above."""
    known = {
        "_noise", "_diverged", "_outlying", "_unlike", "_starvation", "_equivalence", "_paid",
        "_crossing", "_shape", "_average", "_chance", "_router_growth", "_one_budget",
        "_wall_sentence", "_below_sentence", "_no_wall_sentence", "_cannot_tell_sentence",
        "_shortfall",
    }  # fmt: skip
    helpers = {"_seeds", "_budget", "_percent", "_margin", "_interval", "_smoothed"}
    made = {name for name, value in vars(words).items() if name.startswith("_") and callable(value)}
    assert {name for name in made if getattr(words, name).__module__ == words.__name__} == (
        known | helpers
    )


def test_every_return_that_makes_a_sentence_is_reached():
    """By a frame of the tables above, so that each text has a row that says when it is true."""
    reached = set()

    def watch(frame, event, arg):
        if frame.f_code.co_filename != words.__file__:
            return None
        reached.add(frame.f_lineno)
        return watch

    budgets = two_budgets()
    cases = [(frame, {}) for frame, *_ in (*SENTENCES.values(), *REASONS.values())]
    cases += [
        (sweep(line), {"noise_sd": 0.01}),
        (two_off_together(), {}),
        (budgets.filter(pl.col("tokens") == 4e9), {"budgets": budgets}),
        (louder_at_the_end(line, 1), {}),
        (unequal_seeds(), {}),
    ]
    before = sys.gettrace()
    sys.settrace(watch)
    try:
        for frame, options in cases:
            wall_verdict(frame, **options)
    finally:
        sys.settrace(before)
    tree = ast.parse(Path(words.__file__).read_text(encoding="utf-8"))
    returns = [node for node in ast.walk(tree) if isinstance(node, ast.Return)]
    missed = [
        ast.unparse(node)
        for node in returns
        if not reached & set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    ]
    assert not missed, missed


def test_what_is_not_excluded_stands_in_the_sentence_of_a_study():
    verdict = wall_study(sweep(wall_at_32, DOUBLINGS_512)).verdict
    assert verdict.outcome is Outcome.WALL
    assert "Not excluded: learning rate bracketed (not measured)" in verdict.sentence
    assert "break moves with tokens (not measured)" in verdict.sentence
    assert verdict.caveats[0] == "learning rate bracketed (not measured)"
    assert not wall_study(sweep(line, seeds=1)).verdict.caveats, "it claims nothing"


def test_a_learned_router_that_a_table_beats_is_named_in_the_sentence():
    """Issue 18: flat past 16, and hash routing .2 nats better and still falling."""
    learned = sweep(lambda x: 3 - 0.03 * min(x, 4), DOUBLINGS_512).with_columns(arm=pl.lit("topk"))
    hashed = sweep(lambda x: 2.8 - 0.03 * x, DOUBLINGS_512, draw=1).with_columns(arm=pl.lit("hash"))
    study = wall_study(pl.concat([learned, hashed]), arm="topk")
    assert study.verdict.outcome is Outcome.WALL
    assert "hash-routing control (suspect)" in study.verdict.sentence
    detail = study.confounds.filter(confound="hash-routing control")["detail"][0]
    assert "a fixed table beats the learned router" in detail


def test_a_study_has_one_margin():
    runs = sweep(line).with_columns(learning_rate=pl.lit(1e-3))
    study = wall_study(runs)
    assert study.margin == study.verdict.margin
    assert study.verdict.gain_table()["margin"].unique().to_list() == [study.margin]


def test_what_would_settle_is_simulated_under_the_sweeps_own_noise():
    unsure = wall_study(sweep(lambda x: 3 - 0.016 * x, seeds=2, sd=0.009, draw=2))
    assert unsure.verdict.outcome is Outcome.CANNOT_TELL
    assert re.search(r"seeds on 9 ratios up to 256 .* settle it in 9\d|100 %", unsure.settles)
    at_the_margin = wall_study(sweep(lambda x: 3 - 0.0116 * x, seeds=2, sd=0.006))
    if at_the_margin.verdict.outcome is Outcome.CANNOT_TELL:
        assert at_the_margin.settles
    assert wall_study(sweep(line, seeds=1)).settles == "", "no noise to simulate with"
    assert wall_study(sweep(line, tokens=1e7)).settles == "", "experts short of data"
    assert wall_study(sweep(line)).settles == ""


def test_sweeps_too_large_to_simulate_are_said_not_to_be_simulated(monkeypatch):
    unsure = sweep(lambda x: 3 - 0.016 * x, seeds=2, sd=0.009, draw=2)
    monkeypatch.setattr(wall_planner, "MOST_RUNS", 17)
    assert (
        wall_study(unsure).settles == "not simulated, as it would be a sweep of more than 17 runs"
    )
    monkeypatch.setattr(wall_planner, "MOST_RUNS", 18)
    assert (
        "seeds and ratios up to 256, of at most 18 runs, settles it" in wall_study(unsure).settles
    )


def test_a_verdict_says_what_it_computes_while_it_does():
    told = []
    token = progress._listener.set(lambda what, done, total: told.append(what))
    try:
        _ = wall_study(sweep(lambda x: 3 - 0.016 * x, seeds=2, sd=0.009, draw=2)).settles
    finally:
        progress._listener.reset(token)
    assert list(dict.fromkeys(told)) == ["judging 18 runs", "simulating larger sweeps"]
