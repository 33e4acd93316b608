"""The arms of the sparsity-wall recipe hold fixed what they say they hold fixed."""

import math
from collections import defaultdict
from pathlib import Path

import pytest

from moe_lab.accounting import count, flops
from moe_lab.sweeps import load_recipe, plan
from moe_lab.training import RunConfig
from moe_lab.training.branching import branch_steps, trunk_hash

RECIPE = Path(__file__).resolve().parents[2] / "experiments" / "sparsity_wall.py"


@pytest.fixture(scope="module", params=["small", "gpu"])
def arms(request: pytest.FixtureRequest) -> dict[str, list[RunConfig]]:
    runs = defaultdict(list)
    for run in load_recipe(RECIPE, request.param).runs:
        runs[run.arm].append(run)
    return runs


def test_the_main_arm_has_one_active_shape_and_one_budget(arms):
    active = [count(run.model).active("C") - router_rows(run) for run in arms["topk"]]
    assert max(active) == pytest.approx(min(active))
    assert len({run.train_tokens for run in arms["topk"]}) == 1
    assert len({run.ratio for run in arms["topk"]}) >= 7


def router_rows(run: RunConfig) -> int:
    assert run.model.moe is not None
    return run.model.num_layers * run.model.d_model * run.model.moe.router.num_experts


def test_every_short_run_branches_off_a_long_one(arms):
    trunks = {trunk_hash(run): branch_steps(run) for run in arms["topk"]}
    assert len(trunks) == len(arms["topk"])
    for run in arms["topk-short"]:
        assert run.decay_step(run.train_tokens) in trunks[trunk_hash(run)]
        assert run.budgets[-1] == 4 * run.train_tokens, "far enough apart to see a wall move"


def test_learning_rates_bracket_the_short_runs_by_the_square_root_of_two(arms):
    middle = {(run.ratio, run.seed): run for run in arms["topk-short"]}
    for run in arms["lr"]:
        twin = middle[run.ratio, run.seed]
        assert abs(math.log(run.optimizer.lr / twin.optimizer.lr)) == pytest.approx(math.log(2) / 2)
        assert run.replace(optimizer=twin.optimizer, name=twin.name, arm=twin.arm) == twin
    assert len(arms["lr"]) == 2 * len({run.ratio for run in arms["lr"]})
    assert {1.0, 8.0, 64.0} <= {run.ratio for run in arms["lr"]}


def test_tokens_per_expert_are_those_of_the_largest_ratio(arms):
    widest = max(arms["topk"], key=lambda run: run.ratio)
    for run in arms["per_expert"]:
        assert run.train_tokens / run.ratio == pytest.approx(
            widest.train_tokens / widest.ratio, rel=1e-6
        )


def test_total_parameters_and_training_flops_are_fixed_in_the_arm_total(arms):
    runs = arms["total"]
    assert len({count(run.model).total for run in runs}) == 1
    work = [
        flops(run.model, context=run.seq_length, phase="train").total * run.train_tokens
        for run in runs
    ]
    assert max(work) == pytest.approx(min(work), rel=1e-4)
    assert all(run.model.moe is not None and run.model.moe.router.top_k > 1 for run in runs), (
        "top-1 of normalised weights has no gradient"
    )


def test_runs_of_one_seed_see_the_same_batches_in_every_arm(arms):
    orders = {(run.text, run.batch_size, run.seq_length) for runs in arms.values() for run in runs}
    assert len(orders) == 1, "batches are a function of text, seed and step"
    assert {run.seed for run in arms["topk"]} == {run.seed for run in arms["hash"]} == {0, 1, 2}


def test_the_plan_charges_branches_their_decay(arms):
    long, short = arms["topk"][0], arms["topk-short"][0]
    table = plan(load_recipe(RECIPE, "demo"), calibrate=False)
    assert table.height == 12
    assert short.steps - short.decay_step(short.train_tokens) == pytest.approx(
        0.05 * long.steps, abs=1
    )
