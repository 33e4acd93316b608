from itertools import product
from pathlib import Path

import polars as pl
import pytest

from moe_lab.model import DecoderConfig, MoEConfig
from moe_lab.routing import RouterConfig
from moe_lab.sweeps import (
    PLAN_COLUMNS,
    SweepConfig,
    describe,
    design_of,
    plan,
    plan_rows,
    plan_totals,
    timing,
    wall_minutes,
)
from moe_lab.terminal import table_text
from moe_lab.text import TextConfig
from moe_lab.training import RunConfig


def tiny_run(corpus: Path, *, num_experts: int = 4, seed: int = 0) -> RunConfig:
    router = RouterConfig(num_experts=num_experts, top_k=2)
    moe = MoEConfig(d_model=16, d_expert=8, router=router)
    model = DecoderConfig(
        vocab_size=257, num_layers=2, d_model=16, num_heads=2, context_length=16, moe=moe
    )
    text = TextConfig(corpus=str(corpus), tokenizer="byte")  # type: ignore[arg-type]
    name = f"E{num_experts} s{seed}"
    return RunConfig(
        name=name,
        model=model,
        text=text,
        seed=seed,
        batch_size=2,
        seq_length=16,
        train_tokens=1000,
        eval_tokens=40,
    )


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for index in range(30):
        (folder / f"{index}.txt").write_text(f"document {index} says {index * index}. " * 20)
    monkeypatch.setenv("MOE_LAB_CACHE", str(tmp_path / "cache"))
    return folder


def sweep(*runs: RunConfig) -> SweepConfig:
    return SweepConfig(name="tiny", question="?", runs=runs)


def test_the_plan_counts_what_the_model_really_has(corpus: Path):
    run = tiny_run(corpus)
    row = describe(run)
    decoder = run.model.build()
    bank = 3 * 16 * 8  # one SwiGLU expert
    assert row["total_params"] == sum(parameter.numel() for parameter in decoder.parameters())
    assert (
        row["active_params"] == row["total_params"] - 2 * 2 * bank
    )  # 2 of 4 experts idle in each of 2 layers
    assert (row["ratio"], row["tokens"]) == (2.0, 1024)  # whole steps of 32


def test_flops_grow_with_active_and_not_with_total_parameters(corpus: Path):
    small, large = (describe(tiny_run(corpus, num_experts=number)) for number in (4, 64))
    assert large["total_params"] > 2 * small["total_params"]
    router_only = (
        2 * 3 * 2 * 16 * (64 - 4) * 1024
    )  # two layers of a larger router, 2 FLOPs a weight, forward and twice backward
    assert large["flops"] - small["flops"] == pytest.approx(router_only)


def test_a_plan_has_a_row_per_run_in_the_sweeps_order(corpus: Path):
    runs = [
        tiny_run(corpus, num_experts=number, seed=seed) for number, seed in product((4, 8), (0, 1))
    ]
    frame = plan(sweep(*runs), calibrate=False)
    assert frame["run"].to_list() == [run.hash() for run in runs]
    assert frame["name"].to_list() == ["E4 s0", "E4 s1", "E8 s0", "E8 s1"]
    assert frame["minutes"].null_count() == 4


def test_calibration_times_each_shape_once_and_remembers(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
):
    runs = [
        tiny_run(corpus, num_experts=number, seed=seed) for number, seed in product((4, 8), (0, 1))
    ]
    timed = []
    real = timing._seconds_per_step
    monkeypatch.setattr(
        timing, "_seconds_per_step", lambda run: timed.append(run.name) or real(run)
    )
    first = plan(sweep(*runs))
    assert timed == ["E4 s0", "E8 s0"]
    assert first["minutes"].min() > 0  # type: ignore[operator]
    assert plan(sweep(*runs))["minutes"].to_list() == first["minutes"].to_list()
    assert len(timed) == 2


def test_minutes_cover_training_and_a_third_of_it_for_each_validation_token(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(timing, "_seconds_per_step", lambda run: 32 * 60.0)  # a minute per token
    run = tiny_run(corpus)
    assert plan(sweep(run))["minutes"].item() == pytest.approx(1024 + 40 / 3)


def test_a_branch_costs_its_decay_alone_where_the_sweep_has_its_trunk(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(timing, "_seconds_per_step", lambda run: 32 * 60.0)  # a minute per token
    long = tiny_run(corpus).replace(train_tokens=3200, budgets=(640, 3200), eval_tokens=3)
    short = long.replace(train_tokens=640, name="short")
    assert plan(sweep(long, short))["minutes"].to_list() == pytest.approx([3201, 0.2 * 641])
    assert plan(sweep(short))["minutes"].item() == pytest.approx(641)


def test_a_branch_can_be_timed(corpus: Path):
    short = tiny_run(corpus).replace(train_tokens=640, budgets=(640, 3200))
    assert plan(sweep(short))["minutes"].item() > 0


def test_the_design_of_a_plan_is_its_widest_arm_at_its_largest_budget(corpus: Path):
    runs = [
        tiny_run(corpus, num_experts=number, seed=seed)
        for number, seed in product((2, 4, 8), (0, 1))
    ]
    runs += [run.replace(train_tokens=4096) for run in runs] + [runs[0].replace(arm="hash")]
    design = design_of(plan(sweep(*runs), calibrate=False))
    assert (design.ratios, design.seeds, design.tokens) == ((1.0, 2.0, 4.0), 2, 4096)


def test_calibration_leaves_threads_and_random_state_alone(corpus: Path):
    import torch

    threads, state = torch.get_num_threads(), torch.get_rng_state()
    plan(sweep(tiny_run(corpus)))
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("workers", "minutes"), [(1, 20), (2, 11), (3, 8), (8, 8)])
def test_wall_time_is_that_of_handing_out_the_longest_first(workers: int, minutes: float):
    assert wall_minutes(pl.DataFrame({"minutes": [3.0, 8.0, 4.0, 5.0]}), workers) == minutes


def test_the_table_shows_the_plan_and_its_totals(corpus: Path):
    frame = plan(sweep(tiny_run(corpus), tiny_run(corpus, seed=1)), calibrate=False)
    lines = table_text(PLAN_COLUMNS, plan_rows(frame), 80).splitlines()
    assert max(map(len, lines)) <= 80
    cells = [line.split() for line in lines]
    assert cells[0] == list(PLAN_COLUMNS)
    text = plan_totals(frame)
    assert [tiny_run(corpus).hash(), "E4", "s0", "topk", "2", "0", "9.44k", "7.9k", "1.02k"] in [
        row[:9] for row in cells
    ]
    assert "2 runs, 2.05k tokens" in text
