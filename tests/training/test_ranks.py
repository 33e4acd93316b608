"""One run on two ranks is the run of one rank: losses, counts, controllers, files and trace; and it
ends as one.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from filelock import FileLock
from process_groups import ABORTED, free_port, unless_aborted
from rank_worlds import (
    PLAIN_KINDS,
    capture_on,
    captured_model,
    everything,
    expert_layer,
    expert_parallel_example,
    in_group,
    monitor_on,
    on_ranks,
    one_step,
    plain_ddp,
    plain_model,
    plain_steps,
    router_of,
    router_run,
    run_config,
    step_of_every_router,
    step_of_everything,
    write_corpus,
)
from refusals import refused
from safetensors.torch import load_file

from moe_lab import cli, training
from moe_lab.errors import RunError
from moe_lab.model import Decoder
from moe_lab.routing import ROUTERS, RouterConfig
from moe_lab.runs.tables import read_tables
from moe_lab.text import Split, load_tokens
from moe_lab.trace import Trace, capture, merge_traces, open_trace
from moe_lab.training import Parallel, RankError, RunConfig, monitor, train
from moe_lab.training import ranks as ranks_module
from moe_lab.training import run as run_module
from moe_lab.training.checkpoint import load_tensors
from moe_lab.training.evaluate import evaluate, evaluate_together
from moe_lab.training.finished_run import trace_meta
from moe_lab.training.objective import Objective, check_shareable, spread
from moe_lab.training.ranks import Ranks, join

STEPS = 200
CPU = torch.device("cpu")


class Stopped(BaseException):
    pass


def stop_after_checkpoint(rank: int, config: RunConfig, folder: Path, step: int) -> None:
    """Train up to the checkpoint at ``step`` and no further, as if every rank were ended there."""
    original = run_module.save_checkpoint

    def save(path: Path, model: Any, optimizer: Any, at: int, *args: Any, **kwargs: Any) -> None:
        original(path, model, optimizer, at, *args, **kwargs)
        if at == step:
            raise Stopped

    run_module.save_checkpoint = save
    try:
        with pytest.raises(Stopped):
            train(config, folder, cache_dir=folder.parent)
    finally:
        run_module.save_checkpoint = original


def train_on(rank: int, config: RunConfig, folder: Path, parallel: str | None) -> None:
    train(config, folder, cache_dir=folder.parent, parallel=parallel)


def evaluate_on(rank: int, config: RunConfig, weights: Path, folder: Path, fsdp: bool) -> None:
    """The validation pass of one rank's weights by all ranks."""
    from torch.distributed.fsdp import fully_shard

    text = load_tokens(config.text, folder.parent)
    model = Decoder(config.model)
    model.load_state_dict(load_tensors(weights)[0])
    if fsdp:
        fully_shard(model)
    with join(config, None, CPU) as ranks:
        meta = trace_meta(config, text.tokenizer.hash, "")
        documents = text.documents(Split.VALIDATION)
        evaluate_together(
            ranks,
            model,
            documents,
            text.tokenizer,
            seq_length=32,
            batch_size=3,
            trace=(folder, meta),
        )


@pytest.fixture(scope="module", autouse=True)
def _float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The same configurations on one rank and on two."""
    root = tmp_path_factory.mktemp("ranks")
    if "PYTEST_XDIST_WORKER" in os.environ:  # one of the workers makes them
        root = tmp_path_factory.getbasetemp().parent / "ranks"
    root.mkdir(exist_ok=True)
    with FileLock(root / "lock"):
        if not (root / "made").exists():
            mine = os.environ.get("PYTEST_XDIST_WORKER", "attempt")
            made = unless_aborted(lambda number: _make_worlds(root / f"{mine}-{number}"))
            (root / "made").write_text(made.name)
    folder = root / (root / "made").read_text()
    return SimpleNamespace(root=folder, config=run_config(folder / "corpus", STEPS))


def _make_worlds(root: Path) -> Path:
    corpus = write_corpus(root / "corpus")
    config = run_config(corpus, STEPS)
    short = run_config(corpus, 12, validate_every=4)
    split = run_config(corpus, 12, batch_size=8, grad_accumulation=2)
    train(config, root / "one", cache_dir=root)
    train(short, root / "short-one", cache_dir=root)
    train(split, root / "split-one", cache_dir=root)
    stop_after_checkpoint(0, short, root / "one-then-two", 5)
    on_ranks(
        2,
        in_group,
        [
            (train_on, (config, root / "ddp", None)),
            (train_on, (config, root / "fsdp", "fsdp")),
            (train_on, (split, root / "split-ddp", "ddp")),
            (train_on, (split, root / "split-fsdp", "fsdp")),
            (stop_after_checkpoint, (short, root / "two-then-one", 5)),
            (train_on, (short, root / "one-then-two", "fsdp")),
            (evaluate_on, (config, root / "one" / "model.safetensors", root / "scored", False)),
            (evaluate_on, (config, root / "one" / "model.safetensors", root / "scored-fsdp", True)),
            (step_of_every_router, (corpus, root / "ddp-1.safetensors", "ddp", 1)),
            (step_of_every_router, (corpus, root / "ddp-2.safetensors", "ddp", 2)),
            (step_of_every_router, (corpus, root / "fsdp-1.safetensors", "fsdp", 1)),
            (plain_ddp, (root / "plain-ddp.safetensors",)),
            (expert_parallel_example, (root / "expert-parallel",)),
            (capture_on, (root / "captured",)),
            (monitor_on, (root / "monitored",)),
            (step_of_everything, (corpus, root / "everything-ddp.safetensors", "ddp")),
            (step_of_everything, (corpus, root / "everything-fsdp.safetensors", "fsdp")),
            (fail_on, (short, root / "error", "error")),
        ],
    )
    train(short, root / "two-then-one", cache_dir=root)
    return root


def metrics(folder: Path) -> pl.DataFrame:
    return pl.read_parquet(folder / "metrics.parquet")


def rows(trace: Trace) -> pl.DataFrame:
    return trace.routing.collect()


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_follow_the_losses_of_one_over_200_steps(
    worlds: SimpleNamespace, parallel: str
) -> None:
    one, two = metrics(worlds.root / "one"), metrics(worlds.root / parallel)
    assert len(one) == STEPS
    assert one["step"].equals(two["step"])
    assert one["loss"][-10:].mean() < 0.5 * one["loss"][0]  # type: ignore[operator]
    for name in ("loss", "aux_loss", "grad_norm", "router_entropy"):
        np.testing.assert_allclose(two[name], one[name], atol=1e-5, rtol=0, err_msg=name)
    alone, record = (
        json.loads((worlds.root / name / "result.json").read_text()) for name in ("one", parallel)
    )
    assert (record["ranks"], record["parallel"]) == (2, parallel)
    assert record["loss"] == pytest.approx(alone["loss"], abs=1e-5)
    assert all(ratio > 0 for ratio in alone["gradient_ratio"])
    if parallel == "ddp":
        assert record["gradient_ratio"] == pytest.approx(alone["gradient_ratio"], rel=1e-4)
    else:
        assert "gradient_ratio" not in record, "no rank has the whole model"


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_counts_and_controllers_of_two_ranks_are_those_of_one(
    worlds: SimpleNamespace, parallel: str
) -> None:
    one, two = metrics(worlds.root / "one"), metrics(worlds.root / parallel)
    for name in ("load_cv", "max_violation", "mean_ffn_count"):
        assert one[name].to_list() == two[name].to_list(), name
    weights = [
        load_tensors(worlds.root / name / "model.safetensors")[0] for name in ("one", parallel)
    ]
    assert weights[0].keys() == weights[1].keys()
    biases = [name for name in weights[0] if name.endswith("controller.bias")]
    assert len(biases) == 2
    for name in biases:
        # The bias sums all steps' counts; it moved, and to the same place.
        assert weights[0][name].abs().max() > 0
        assert torch.equal(weights[0][name], weights[1][name])


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_the_trace_of_two_ranks_has_the_decisions_of_one_row_for_row(
    worlds: SimpleNamespace, parallel: str
) -> None:
    one, two = (open_trace(worlds.root / name / "trace") for name in ("one", parallel))
    two.check()
    exact = ["layer", "doc", "pos", "experts", "ffn_count", "zero_count"]
    assert rows(one).select(exact).equals(rows(two).select(exact))
    assert one.tokens.collect().drop("loss").equals(two.tokens.collect().drop("loss"))
    assert two.meta == one.meta
    assert not list(two.folder.parent.glob("trace.rank-*"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["scored", "scored-fsdp"])
def test_ranks_score_the_same_weights_to_the_same_trace_to_the_bit(
    worlds: SimpleNamespace, name: str
) -> None:
    text = load_tokens(worlds.config.text, worlds.root)
    model = Decoder(worlds.config.model)
    model.load_state_dict(load_tensors(worlds.root / "one" / "model.safetensors")[0])
    meta = trace_meta(worlds.config, text.tokenizer.hash, "")
    alone = worlds.root / f"{name}-alone"
    evaluate(
        model,
        text.documents(Split.VALIDATION),
        text.tokenizer,
        seq_length=32,
        batch_size=3,
        trace=(alone, meta),
    )
    one, two = open_trace(alone), open_trace(worlds.root / name)
    two.check()
    assert rows(one).equals(rows(two))
    assert one.tokens.collect().equals(two.tokens.collect())
    assert one.counts().equals(two.counts())


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_whole_micro_batches_are_dealt_to_ranks(worlds: SimpleNamespace, parallel: str) -> None:
    one, two = metrics(worlds.root / "split-one"), metrics(worlds.root / f"split-{parallel}")
    for name in ("loss", "aux_loss", "grad_norm"):
        np.testing.assert_allclose(two[name], one[name], atol=1e-5, rtol=0, err_msg=name)
    assert one["load_cv"].to_list() == two["load_cv"].to_list()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["two-then-one", "one-then-two"])
def test_a_run_goes_on_with_another_number_of_ranks(worlds: SimpleNamespace, name: str) -> None:
    whole, continued = metrics(worlds.root / "short-one"), metrics(worlds.root / name)
    assert continued["step"].to_list() == list(range(1, 13))
    np.testing.assert_allclose(continued["loss"], whole["loss"], atol=1e-5, rtol=0)
    np.testing.assert_allclose(continued["grad_norm"], whole["grad_norm"], atol=1e-5, rtol=0)
    alone, several = (read_tables(worlds.root / folder) for folder in ("short-one", name))
    assert several.validation["step"].to_list() == [0, 4, 8, 12]
    np.testing.assert_allclose(
        several.validation["loss"], alone.validation["loss"], atol=1e-5, rtol=0
    )
    assert several.loads.equals(alone.loads)
    exact = ["step", "layer", "load_cv", "dead_experts", "mean_ffn_count", "bias_spread"]
    assert several.layers.select(exact).equals(alone.layers.select(exact))


@pytest.mark.slow
def test_a_monitor_sums_over_ranks_and_one_of_them_writes(worlds: SimpleNamespace) -> None:
    model, ids = captured_model()
    with monitor(model, worlds.root / "monitored-alone", every=1) as watch:
        model(ids)
        alone = watch.step()
    for rank in range(2):
        scalars = json.loads((worlds.root / f"scalars-{rank}.json").read_text())
        assert scalars == pytest.approx(alone)
    one, two = (read_tables(worlds.root / name) for name in ("monitored-alone", "monitored"))
    assert two.loads.equals(one.loads)
    assert two.layers["dead_experts"].to_list() == one.layers["dead_experts"].to_list()


def fail_on(rank: int, config: RunConfig, folder: Path, how: str) -> None:
    """Train, and let rank 1 fail at step 8; what each rank saw goes to a file."""
    if how == "stopped":
        ranks_module.PATIENCE = timedelta(seconds=20)
        _wait_for_both(rank, folder)  # which may be that late themselves on a busy machine
    original = run_module.clip_gradients

    steps = iter(range(1, 100))

    def clip(model: Any, max_norm: float) -> Any:
        if next(steps) == 8 and rank == 1:
            if how == "error":
                raise RunError("expected finite router logits, got NaN or infinity")
            os.kill(os.getpid(), signal.SIGKILL if how == "killed" else signal.SIGSTOP)
        return original(model, max_norm)

    run_module.clip_gradients = clip
    try:
        train(config, folder, cache_dir=folder.parent)
    except RunError as error:
        told = error.reported if isinstance(error, RankError) else None
        (folder / f"seen-{rank}.json").write_text(
            json.dumps([type(error).__name__, str(error), told])
        )
    finally:
        run_module.clip_gradients = original


def _wait_for_both(rank: int, folder: Path) -> None:
    ready = [folder.with_name(f"{folder.name}-ready-{number}") for number in range(2)]
    ready[rank].touch()
    deadline = time.monotonic() + 500
    while not all(path.exists() for path in ready):
        assert time.monotonic() < deadline
        time.sleep(0.05)


BATCH_WIDE = {
    "base",
    "expert_choice",
    "expert_threshold",
    "gshard_top2",
    "quantile_threshold",
    "sinkhorn",
    "switch",
}
"""Routers that decide over a whole micro-batch, at the settings tried here."""
NOISY = {"noisy_topk", "random", "sparsemixer"}
"""Routers that draw random numbers, of which every rank has its own."""
SCALARS = {"dtop_p", "dynmoe"}
"""Routers with a parameter that has no axis to shard."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("parallel", "micro_batches", "others"),
    [("ddp", 1, BATCH_WIDE | NOISY), ("ddp", 2, NOISY), ("fsdp", 1, BATCH_WIDE | NOISY)],
)
def test_gradients_and_controllers_of_every_router_are_those_of_one_rank(
    worlds: SimpleNamespace, parallel: str, micro_batches: int, others: set[str]
) -> None:
    """All losses and their gradients, the router's own included; ``others`` are exactly the kinds
    of which the documentation says not.
    """
    found = load_file(worlds.root / f"{parallel}-{micro_batches}.safetensors")
    differing = set()
    for kind in sorted(set(ROUTERS) - (SCALARS if parallel == "fsdp" else set())):
        alone = one_step(
            router_run(worlds.root / "corpus", kind, micro_batches),
            Ranks(micro_batches=micro_batches),
        )
        together = {
            name.removeprefix(f"{kind} "): value
            for name, value in found.items()
            if name.startswith(f"{kind} ")
        }
        assert together.keys() == alone.keys()
        # The language loss is taken in float32.
        same = [
            torch.allclose(
                together[name], alone[name], rtol=1e-5, atol=1e-7 * float(alone[name].abs().max())
            )
            for name in alone
        ]
        if not all(same):
            differing.add(kind)
    assert differing == others


@pytest.mark.slow
def test_every_router_trains_in_plain_ddp_with_the_mean_gradient_of_the_ranks(
    worlds: SimpleNamespace,
) -> None:
    found = load_file(worlds.root / "plain-ddp.safetensors")
    for kind in sorted(set(PLAIN_KINDS) - NOISY):
        model, ids = plain_model(kind)
        plain_steps(model, model, ids)
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, (kind, name)
            label = f"{kind} {name}"
            torch.testing.assert_close(found[label], parameter.grad, msg=label)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_losses_of_the_models_own_parts_have_the_gradients_of_one_rank(
    worlds: SimpleNamespace, parallel: str
) -> None:
    """MTP, the indexer of sparse attention, the hidden z-loss, n-gram tables; shortcut wiring and
    latent attention.
    """
    alone = one_step(everything(worlds.root / "corpus"), Ranks())
    together = load_file(worlds.root / f"everything-{parallel}.safetensors")
    assert together.keys() == alone.keys()
    for name, value in alone.items():
        torch.testing.assert_close(
            together[name], value, rtol=1e-6, atol=1e-9 * float(value.abs().max()), msg=name
        )


@pytest.mark.parametrize(
    ("router", "is_refused"),
    [
        (router_of("sinkhorn"), True),
        (router_of("switch"), True),
        (router_of("switch").replace(capacity_scope="sequence"), False),
        (router_of("moepp"), False),
        (router_of("moepp").replace(capacity_factor=1.0), True),
        (router_of("mixture_of_depths").replace(capacity_factor=0.5), False),
    ],
)
def test_a_router_that_decides_over_a_micro_batch_is_given_whole_ones(
    tmp_path: Path, router: RouterConfig, is_refused: bool
) -> None:
    config = run_config(write_corpus(tmp_path / "corpus"), 2, router)
    with refused("grad_accumulation") if is_refused else nullcontext():
        check_shareable(config, Ranks(0, 2, Parallel.DDP))
    check_shareable(config, Ranks())
    check_shareable(
        config.replace(grad_accumulation=2), Ranks(0, 2, Parallel.DDP, micro_batches=2, groups=2)
    )


def test_a_parameter_without_an_axis_cannot_be_sharded(tmp_path: Path) -> None:
    config = router_run(write_corpus(tmp_path / "corpus"), "dynmoe", 1)
    ranks = Ranks(0, 2, Parallel.FSDP)
    with refused("parallel"):
        spread(Objective(Decoder(config.model), config, ranks), ranks)


@pytest.mark.slow
def test_the_documented_expert_parallel_dispatch_is_the_layer(worlds: SimpleNamespace) -> None:
    layer, x = expert_layer("oracle")
    y, routing = layer(x, return_routing=True)
    y.square().sum().backward()
    parts = [load_file(worlds.root / f"expert-parallel-{rank}") for rank in range(2)]
    torch.testing.assert_close(torch.cat([part["y"] for part in parts]), y.detach())
    for name, parameter in layer.experts.named_parameters():
        torch.testing.assert_close(torch.cat([part[name] for part in parts]), parameter.grad)
    assert torch.equal(parts[0]["counts"] + parts[1]["counts"], routing.counts())


@pytest.mark.slow
def test_the_recorder_of_any_model_writes_a_trace_per_rank_that_merge_to_that_of_one(
    worlds: SimpleNamespace, tmp_path: Path
) -> None:
    model, ids = captured_model()
    with torch.no_grad(), capture(model, tmp_path / "one"):
        for half in ids.chunk(2):
            model(half)
    merged = merge_traces(
        [worlds.root / f"captured.rank-{rank}" for rank in range(2)], tmp_path / "two"
    ).check()
    one = open_trace(tmp_path / "one")
    assert rows(merged).equals(rows(one))
    assert merged.tokens.collect().equals(one.tokens.collect())
    assert merged.counts().equals(one.counts())


@pytest.mark.slow
def test_the_reason_of_the_rank_that_failed_is_what_all_say(worlds: SimpleNamespace) -> None:
    kind, message, told = json.loads((worlds.root / "error" / "seen-0.json").read_text())
    assert (kind, told) == ("RankError", True)
    assert (
        message == "rank 1 of 2: step 8 of run: expected finite router logits, got NaN or infinity"
    )
    assert json.loads((worlds.root / "error" / "seen-1.json").read_text())[:2] == [
        "RunError",
        message.removeprefix("rank 1 of 2: "),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_a_rank_that_is_lost_ends_the_run_which_one_rank_can_continue(
    tmp_path: Path, how: str
) -> None:
    config = run_config(write_corpus(tmp_path / "corpus"), 20)

    def lose(number: int) -> Path:
        context = on_ranks(2, fail_on, config, tmp_path / f"run-{number}", how, join=False)
        assert context is not None
        context.processes[0].join(600)
        ended = context.processes[0].exitcode
        for process in context.processes:
            process.kill()
            process.join()
        if ended == -signal.SIGABRT:
            raise ABORTED
        assert ended == 0
        return tmp_path / f"run-{number}"

    folder = unless_aborted(lose)
    kind, message, told = json.loads((folder / "seen-0.json").read_text())
    assert (kind, told) == ("RankError", False)
    assert "\n" not in message
    assert message.startswith("rank 0 of 2: another rank ended or does not answer (")
    assert message.endswith("; try the same command, which continues from the last checkpoint")
    assert not (folder / "done").exists()
    # Step 5 has a checkpoint.
    resumed = train(config, folder, cache_dir=tmp_path)
    whole = train(config, tmp_path / "whole", cache_dir=tmp_path)
    np.testing.assert_allclose(
        metrics(resumed.folder)["loss"], metrics(whole.folder)["loss"], atol=1e-5, rtol=0
    )


@pytest.mark.slow
def test_torchrun_trains_one_run_on_the_command_line(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    (tmp_path / "config.json").write_text(json.dumps(run_config(corpus, 12).to_dict()))
    environment = os.environ | {
        "MOE_LAB_CACHE": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }

    def train(number: int) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
        command += ["--master-port", str(free_port()), "-m", "moe_lab", "train"]
        command += ["--corpus", str(corpus), "--config", str(tmp_path / "config.json")]
        command += ["--tokenizer", "byte", "--out", str(tmp_path / f"run-{number}")]
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        if "Signal 6 (SIGABRT)" in result.stderr:
            raise ABORTED
        assert result.returncode == 0, result.stderr
        assert (tmp_path / f"run-{number}" / "done").exists()
        return result

    result = unless_aborted(train)
    assert [line.split()[1] for line in result.stdout.splitlines() if line.startswith("step")] == [
        str(step) for step in range(1, 13)
    ]
    assert result.stdout.count("validation loss") == 1


def test_a_rank_whose_reason_was_told_elsewhere_prints_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lose(*args: Any, **kwargs: Any) -> None:
        raise RankError("rank 1 of 2: no space", reported=told)

    monkeypatch.setattr(training, "train", lose)
    arguments = [
        "train",
        "--corpus",
        str(write_corpus(tmp_path / "corpus")),
        "--tokenizer",
        "byte",
        "--out",
        str(tmp_path / "run"),
    ]
    told = True
    assert cli.main(arguments) == 2
    assert capsys.readouterr().err == ""
    told = False
    assert cli.main(arguments) == 2
    assert capsys.readouterr().err == "moe-lab train: rank 1 of 2: no space\n"


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("micro_batches", [1, 2, 3, 4])
def test_every_sequence_of_a_step_is_one_ranks_in_its_own_micro_batch(
    size: int, micro_batches: int
) -> None:
    batch = torch.arange(24 * micro_batches)
    groups = int(np.gcd(size, micro_batches))
    seen: dict[int, list[int]] = {}
    for rank in range(size):
        ranks = Ranks(rank, size, Parallel.DDP, micro_batches=micro_batches, groups=groups)
        own = ranks.own(batch)
        assert len(own) == micro_batches // groups
        assert len({len(part) for part in own}) == 1
        for part in own:
            seen.setdefault(int(part[0]) // 24, []).extend(part.tolist())
            assert len({int(sequence) // 24 for sequence in part}) == 1
    assert {number: sorted(found) for number, found in seen.items()} == {
        number: list(range(24 * number, 24 * number + 24)) for number in range(micro_batches)
    }


def test_ranks_that_cannot_share_a_batch_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_config(write_corpus(tmp_path / "corpus"), 2, batch_size=4)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    with refused("batch_size"):
        ranks_module._spread(config, Parallel.DDP, CPU)


def test_an_unknown_way_to_spread_is_one_line(tmp_path: Path) -> None:
    config = run_config(write_corpus(tmp_path / "corpus"), 2)
    with refused("parallel"):
        train(config, tmp_path / "run", cache_dir=tmp_path, parallel="pipeline")


def test_one_rank_exchanges_nothing() -> None:
    values = torch.tensor([1.0, 2.0])
    assert Ranks().total(values) is values
    assert Ranks().mean(values) is values
    assert Ranks().from_first(lambda: 3) == 3
