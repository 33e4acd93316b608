"""Simulated truths through the very judge that real sweeps meet."""

import math

import numpy as np
import polars as pl
import pytest
from refusals import refused

from moe_lab.errors import AnalysisError
from moe_lab.scaling import (
    LAWS,
    Design,
    Truth,
    cheapest,
    default_truths,
    designs,
    expected_gain,
    power,
    wall_verdict,
)
from moe_lab.scaling.wall_planner import seeds_at_the_end
from moe_lab.scaling.wall_power import draw, law_truth, line_truth, right_answers, wall_truth
from moe_lab.scaling.wall_rule import Outcome

CLARK = {"a": -0.0830, "b": -0.1180, "c": 0.0099, "d": 1.1136, "Estart": 2.07, "Emax": 300.0}


def doublings(largest: int) -> tuple[float, ...]:
    return tuple(2.0**e for e in range(int(math.log2(largest)) + 1))


# the truths of docs/scaling.md, in nats, at 10M active and 1B tokens
LINE = Truth("line", lambda r, d: -0.03 * np.log2(r), ("line",))
SATURATION = Truth(
    "clark",
    lambda r, d: LAWS["clark"].predict({"active_params": 1.3e8, "ratio": r}, CLARK),
    ("saturation",),
)
JOINT = law_truth("ludziejewski")
WALL = Truth("wall", lambda r, d: -0.03 * np.log2(np.minimum(r, 32)), ("plateau",), wall=32.0)

# truth, largest ratio, sd, seeds, share of draws that chose the right form in the notes
TABLE = [
    (LINE, 64, 0.006, 3, 0.95),
    (LINE, 512, 0.003, 3, 0.95),
    (SATURATION, 64, 0.003, 3, 1.0),
    (SATURATION, 64, 0.006, 3, 0.90),
    (SATURATION, 64, 0.006, 1, 0.43),
    (SATURATION, 64, 0.012, 3, 0.27),
    (SATURATION, 256, 0.006, 3, 0.97),
    (SATURATION, 256, 0.006, 1, 0.71),
    (SATURATION, 256, 0.012, 3, 0.67),
    (JOINT, 64, 0.003, 3, 0.98),
    (JOINT, 64, 0.006, 3, 0.59),
    (JOINT, 64, 0.006, 1, 0.23),
    (JOINT, 512, 0.006, 3, 0.91),
    (JOINT, 512, 0.006, 1, 0.88),
    (WALL, 64, 0.006, 3, 0.94),
    (WALL, 64, 0.006, 1, 0.71),
    (WALL, 64, 0.012, 3, 0.64),
    (WALL, 256, 0.006, 3, 0.99),
    (WALL, 256, 0.006, 1, 0.95),
    (WALL, 256, 0.012, 3, 0.89),
]


@pytest.mark.parametrize(("truth", "largest", "sd", "seeds", "published"), TABLE)
def test_the_right_form_is_chosen_as_often_as_in_the_notes(truth, largest, sd, seeds, published):
    design = Design(doublings(largest), seeds, 1e7, 1e9)
    judged = draw(truth, design, sd, 400, np.random.default_rng(7), known=True)
    found = float(np.isin(judged.best_form(), truth.forms).mean())
    spread = math.sqrt(max(published * (1 - published), 0.01) / 400)
    assert found >= published - 3 * spread


@pytest.mark.parametrize("largest", [64, 256, 512])
@pytest.mark.parametrize(("sd", "seeds"), [(0.003, 3), (0.006, 2), (0.012, 3)])
def test_smooth_truths_are_called_walls_in_at_most_two_of_a_hundred(largest, sd, seeds):
    design = Design(doublings(largest), seeds, 1e7, 1e9)
    for truth in (LINE, SATURATION, JOINT):
        assert (
            draw(truth, design, sd, 300, np.random.default_rng(3)).outcomes() == Outcome.WALL
        ).mean() <= 0.02


def test_a_hard_wall_is_never_called_no_wall_and_needs_three_quiet_doublings_to_be_found():
    for largest, sd, at_least, at_most in (
        (64, 0.006, 0, 0),
        (256, 0.006, 0, 0.1),
        (512, 0.003, 0.95, 1),
    ):
        outcomes = draw(
            WALL, Design(doublings(largest), 3, 1e7, 1e9), sd, 300, np.random.default_rng(5)
        ).outcomes()
        assert (outcomes == Outcome.NO_WALL).mean() <= 0.01
        assert at_least <= (outcomes == Outcome.WALL).mean() <= at_most


def test_one_draw_is_judged_as_a_frame_of_the_same_losses_is():
    design = Design(doublings(512), 3, 1e7, 1e9)
    losses = (WALL.loss(np.array(design.ratios), design) + 3)[
        design.layout.ratio
    ] + np.random.default_rng(2).normal(0, 0.003, (1, design.runs))
    rows = [
        {
            "ratio": design.ratios[ratio],
            "seed": seed,
            "loss": loss,
            "active_params": 1e7,
            "tokens": 1e9,
        }
        for ratio, seed, loss in zip(
            design.layout.ratio, design.layout.seed, losses[0], strict=True
        )
    ]
    verdict = wall_verdict(pl.DataFrame(rows))
    shifted = Truth("same", lambda r, d: WALL.loss(r, d) + 3, ("plateau",))
    judged = draw(shifted, design, 0.003, 1, np.random.default_rng(2))
    assert verdict.outcome == judged.outcomes()[0]
    assert [gain.gain for gain in verdict.gains] == pytest.approx(judged.gains[0])
    assert [gain.hi - gain.gain for gain in verdict.gains] == pytest.approx(judged.half[0])
    assert verdict.forms[0].name == judged.best_form()[0]


def test_power_grows_with_seeds_and_the_cheapest_design_is_the_least_that_suffices():
    plans = designs(1e7, 1e9, ratio_max=(64, 512), seeds=(2, 5))
    table = power(plans, noise_sd=0.004, draws=200, flops_per_second=1e13)
    settled = {
        (row["ratio_max"], row["seeds"], row["truth"]): row["settled"]
        for row in table.iter_rows(named=True)
    }
    assert settled[(512, 5, "law ludziejewski")] > settled[(512, 2, "law ludziejewski")]
    assert settled[(64, 5, "wall at 32")] == 0, "its last doublings disagree"
    assert (table["wrong"] <= 0.02).all()
    best = cheapest(table)
    assert best is not None
    assert (plans[best].ratios[-1], plans[best].seeds) == (512, 2)
    assert cheapest(table.filter(pl.col("ratio_max") == 64)) is None
    row = table.filter(pl.col("design") == best).row(0, named=True)
    assert row["flops"] == 6 * 1e7 * 1e9 * 20
    assert row["hours"] == pytest.approx(row["flops"] / 1e13 / 3600)


def test_one_seed_or_starved_experts_settle_nothing():
    for design in (Design(doublings(512), 1, 1e7, 1e9), Design(doublings(512), 3, 1e6, 1e7)):
        table = power(design, noise_sd=0.003, draws=20)
        assert table["cannot_tell"].min() == 1
        assert cheapest(table) is None


def test_right_answers_are_those_of_sweeps_without_noise():
    short, long = Design(doublings(64), 3, 1e7, 1e9), Design(doublings(4096), 3, 1e7, 1e10)
    assert right_answers(line_truth(), short) == {Outcome.NO_WALL}
    assert right_answers(wall_truth(8), short) == {Outcome.WALL, Outcome.BELOW_MARGIN}
    assert right_answers(wall_truth(32), short) == set(), "the last gain and the average disagree"
    assert right_answers(line_truth(worth=1.01), short) == {Outcome.BELOW_MARGIN}
    fading = {truth.name: right_answers(truth, long) for truth in default_truths()}
    assert fading["saturation at 300"] == {Outcome.BELOW_MARGIN}


def test_the_routers_growth_is_charged_in_a_plan_as_in_a_verdict():
    """A line of 14 % a doubling beside a router that adds 9 % to the last step's active size."""
    plain = Design(doublings(128), 3, 1e7, 1e9)
    grown = plain.replace(active_at=tuple(1e7 * (1 + 0.002 * r) for r in plain.ratios))
    table = power([plain, grown], [line_truth()], noise_sd=0.006, draws=100)
    assert table["no_wall"][0] > 0.9
    assert table["no_wall"][1] < 0.3
    assert grown.flops > plain.flops


def test_the_same_runs_placed_at_the_end_tell_more():
    """27 runs on nine ratios: 3 everywhere, or 2 x 6 + 5 x 3."""
    even = Design(doublings(256), 3, 1e7, 1e9)
    late = even.replace(seeds_at=seeds_at_the_end(9, 3))
    assert late.counts == (2, 2, 2, 2, 2, 2, 5, 5, 5)
    assert late.runs == even.runs == 27
    truth = line_truth(worth=math.exp(0.05 * 0.65))
    table = power([even, late], [truth], noise_sd=0.006, draws=300)
    assert table["below_margin"][1] > table["below_margin"][0] + 0.1


def test_a_plan_that_is_none_is_told_in_one_line():
    with refused("ratios"):
        Design((1.0, 2.0), 3, 1e7, 1e9)
    with refused("ratios"):
        Design((4.0, 2.0, 1.0), 3, 1e7, 1e9)
    with refused("plans", AnalysisError):
        power([], noise_sd=0.01)


def gains(**changes) -> dict[tuple[str, str], dict]:
    table = expected_gain(1.6e12, 48e9, 135e9, 35e12, **{"routed": 135e9 / 0.092, **changes})
    return {(row["law"], row["coefficients"]): row for row in table.iter_rows(named=True)}


def test_longcats_135_billion_are_an_eighth_of_a_doubling_and_worth_what_smooth_laws_say():
    """docs/scaling.md: .127 doubling, .0004-.004 nats, .0008 by Ludziejewski (2 % of compute), 5 %
    of compute by Ling.
    """
    found = gains()
    joint, ling = found[("ludziejewski", "joint")], found[("ling", "table 2")]
    assert joint["doublings"] == pytest.approx(0.127, abs=5e-4)
    assert joint["gain"] == pytest.approx(0.0008, abs=5e-5)
    assert joint["compute"] == pytest.approx(1.02, abs=0.005)
    assert ling["compute"] == pytest.approx(1.05, abs=0.005)
    assert found[("kimi", "report")]["compute"] == pytest.approx(1.092**0.289)
    assert all(-0.0005 < row["gain"] < 0.004 for row in found.values())
    assert "active_params" in joint["extrapolated"]


def test_seeds_to_see_a_gain_are_those_that_would():
    """Two arms of n runs: the 90 % interval of the difference excludes 0 in nine of ten pairs."""
    row = gains()[("ludziejewski", "joint")]
    rng = np.random.default_rng(0)
    for seeds, low, high in ((row["seeds"], 0.88, 1.0), (max(1, row["seeds"] // 2), 0.0, 0.85)):
        difference = (
            row["gain"]
            + rng.normal(0, 0.0005, (4000, seeds)).mean(1)
            - rng.normal(0, 0.0005, (4000, seeds)).mean(1)
        )
        seen = (difference > 1.645 * 0.0005 * math.sqrt(2 / seeds)).mean()
        assert low <= seen <= high
    assert gains()[("clark", "RL-R")]["seeds"] is None


def test_a_step_that_makes_no_sense_is_told_in_one_line():
    with refused("add", AnalysisError):
        expected_gain(1e9, 1e8, -1, 1e10)
    with refused("total", AnalysisError):
        expected_gain(1e8, 1e9, 1e8, 1e10)
