"""Several token budgets out of one long run: the same numbers as without it, for a fraction of the
work.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from refusals import refused

from moe_lab.model import DecoderConfig, MoEConfig
from moe_lab.routing import RouterConfig
from moe_lab.text import TextConfig
from moe_lab.training import OptimizerConfig, RunConfig, train
from moe_lab.training.branching import trunk_hash
from moe_lab.training.checkpoint import load_tensors
from moe_lab.training.optimizer import lr_factor

SHORT, LONG = 128 * 20, 128 * 60


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    for index in range(24):
        (folder / f"doc{index}.txt").write_text(
            f"{index} " + " ".join(rng.choice(["a", "def", "return", "x", "="], size=120))
        )
    return folder


@pytest.fixture(scope="module")
def long(corpus: Path) -> RunConfig:
    text = TextConfig(corpus=str(corpus), tokenizer="byte").resolve()  # type: ignore[arg-type]
    moe = MoEConfig(16, 8, RouterConfig(num_experts=4, top_k=2))
    model = DecoderConfig(
        vocab_size=text.vocab_size,
        num_layers=1,
        d_model=16,
        num_heads=2,
        context_length=32,
        moe=moe,
    )
    optimizer = OptimizerConfig(warmup_fraction=0.1, decay_fraction=0.2)
    values: dict[str, Any] = {
        "batch_size": 4,
        "seq_length": 32,
        "eval_tokens": 2000,
        "checkpoint_every": 7,
        "log_every": 1,
    }
    return RunConfig(
        model, text=text, optimizer=optimizer, train_tokens=LONG, budgets=(SHORT, LONG), **values
    )


def weights(folder: Path) -> dict[str, Any]:
    tensors, _ = load_tensors(folder / "model.safetensors")
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def metrics(folder: Path) -> pl.DataFrame:
    return pl.read_parquet(folder / "metrics.parquet").drop("tokens_per_second")


def tables(folder: Path) -> dict[str, pl.DataFrame]:
    """All but the metrics."""
    return {
        path.name: pl.read_parquet(path)
        for path in folder.glob("*.parquet")
        if path.name != "metrics.parquet"
    }


def test_a_branch_is_the_unbranched_run_to_the_bit(long: RunConfig, tmp_path: Path) -> None:
    long = long.replace(validate_every=8)
    short = long.replace(train_tokens=SHORT, name="short", arm="other")
    train(long, tmp_path / "sweep" / "long", cache_dir=tmp_path)
    trained: list[int] = []
    branched = train(
        short,
        tmp_path / "sweep" / "short",
        on_step=lambda row: trained.append(row["step"]),
        cache_dir=tmp_path,
    )
    assert trained == [17, 18, 19, 20], "the constant part was the long run's"
    assert not list((tmp_path / "sweep" / "trunks").iterdir()), "a state that was used is removed"
    alone = train(short, tmp_path / "alone" / "short", cache_dir=tmp_path)
    assert branched.record["loss"] == alone.record["loss"]
    assert metrics(branched.folder).equals(metrics(alone.folder))
    whole = tables(alone.folder)
    assert whole["validation.parquet"]["step"].to_list() == [0, 8, 16, 20]
    for name, table in tables(branched.folder).items():
        assert table.equals(whole[name]), name
    expected = weights(alone.folder)
    assert all(
        np.array_equal(value, expected[name]) for name, value in weights(branched.folder).items()
    )


def test_a_schedule_of_ones_own_with_the_same_steps_gives_the_same_run(
    long: RunConfig, tmp_path: Path
) -> None:
    """6 of 60 steps of warm-up are 30 % of 20."""
    train(long, tmp_path / "sweep" / "long", cache_dir=tmp_path)
    branched = train(
        long.replace(train_tokens=SHORT), tmp_path / "sweep" / "short", cache_dir=tmp_path
    )
    plain = long.replace(
        train_tokens=SHORT, budgets=(), optimizer=long.optimizer.replace(warmup_fraction=0.3)
    )
    assert (
        train(plain, tmp_path / "plain", cache_dir=tmp_path).record["loss"]
        == branched.record["loss"]
    )


def test_leaving_a_state_behind_changes_nothing_of_the_long_run(
    long: RunConfig, tmp_path: Path
) -> None:
    with_branches = train(long, tmp_path / "a" / "run", cache_dir=tmp_path)
    without = train(long.replace(budgets=()), tmp_path / "b" / "run", cache_dir=tmp_path)
    assert with_branches.record["loss"] == without.record["loss"]
    assert not (tmp_path / "b" / "trunks").exists()


def test_an_interrupted_branch_resumes_to_the_bit(long: RunConfig, tmp_path: Path) -> None:
    short = long.replace(train_tokens=SHORT, checkpoint_every=1)

    def stop(row: dict[str, Any]) -> None:
        if row["step"] == 18:
            raise KeyboardInterrupt

    train(long, tmp_path / "sweep" / "long", cache_dir=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        train(short, tmp_path / "sweep" / "short", on_step=stop, cache_dir=tmp_path)
    resumed = train(short, tmp_path / "sweep" / "short", cache_dir=tmp_path)
    assert (
        resumed.record["loss"]
        == train(short, tmp_path / "alone" / "short", cache_dir=tmp_path).record["loss"]
    )
    assert metrics(resumed.folder)["step"].to_list() == list(range(1, 21))


def test_a_damaged_trunk_is_trained_again(long: RunConfig, tmp_path: Path) -> None:
    short = long.replace(train_tokens=SHORT)
    train(long, tmp_path / "sweep" / "long", cache_dir=tmp_path)
    trunk = next((tmp_path / "sweep" / "trunks").glob("*.safetensors"))
    trunk.write_bytes(trunk.read_bytes()[:-9])
    trained: list[int] = []
    train(
        short,
        tmp_path / "sweep" / "short",
        on_step=lambda row: trained.append(row["step"]),
        cache_dir=tmp_path,
    )
    assert trained == list(range(1, 21))


def test_another_seed_or_rate_does_not_branch_off_this_run(long: RunConfig, tmp_path: Path) -> None:
    train(long, tmp_path / "sweep" / "long", cache_dir=tmp_path)
    for name, other in {
        "seed": long.replace(seed=1),
        "rate": long.replace(optimizer=long.optimizer.replace(lr=1e-3)),
    }.items():
        trained: list[int] = []
        train(
            other.replace(train_tokens=SHORT),
            tmp_path / "sweep" / name,
            on_step=lambda row, t=trained: t.append(row["step"]),
            cache_dir=tmp_path,
        )
        assert trained[0] == 1


def test_all_budgets_warm_up_alike_and_decay_on_their_own(long: RunConfig) -> None:
    short = long.replace(train_tokens=SHORT)
    first, second = (
        [lr_factor(step, run.steps, run.schedule) for step in range(run.steps)]
        for run in (short, long)
    )
    assert first[:16] == second[:16]
    assert first[15] == 1.0
    assert (first[16] < 1.0, len(first)) == (True, 20)


def test_a_run_that_is_alone_keeps_its_hash_and_a_branch_round_trips(long: RunConfig) -> None:
    alone = long.replace(budgets=())
    assert "budgets" not in alone.to_dict()
    assert RunConfig.from_dict(json.loads(json.dumps(long.to_dict()))) == long
    assert len({alone.hash(), long.hash(), long.replace(train_tokens=SHORT).hash()}) == 3


def test_budgets_that_make_no_sense_are_one_line(long: RunConfig) -> None:
    with refused("train_tokens"):
        long.replace(train_tokens=5)
    with refused("budgets"):
        long.replace(budgets=(LONG, SHORT))
    with refused("decay_fraction"):
        long.replace(train_tokens=128, budgets=(128, 128 * 1000))


def test_half_written_trunks_of_a_killed_run_are_tidied(long: RunConfig, tmp_path: Path) -> None:
    trunks = tmp_path / "sweep" / "trunks"
    trunks.mkdir(parents=True)
    (trunks / f".tmp-0badcafe-{trunk_hash(long)}-8.safetensors").touch()
    (trunks / ".tmp-0badcafe-aaaaaaaaaaaa-8.safetensors").touch()  # another run writes it now
    train(long, tmp_path / "sweep" / "long", cache_dir=tmp_path)
    left = [path.name for path in trunks.iterdir() if path.name.startswith(".")]
    assert left == [".tmp-0badcafe-aaaaaaaaaaaa-8.safetensors"]


@pytest.mark.parametrize("rows", ["5", "[5]", "null", "[" * 5000, '{"a": 1}'])
def test_a_trunk_with_other_metrics_is_trained_again(
    rows: str, long: RunConfig, tmp_path: Path
) -> None:
    short = long.replace(train_tokens=SHORT)
    train(long, tmp_path / "sweep" / "long", cache_dir=tmp_path)
    next((tmp_path / "sweep" / "trunks").glob("*.json")).write_text(rows)
    run = train(short, tmp_path / "sweep" / "short", cache_dir=tmp_path)
    assert metrics(run.folder)["step"].to_list() == list(range(1, 21))
