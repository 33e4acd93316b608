"""One run: finished, resumed and repeated to the bit; honest records; one clear line for each
mistake.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
import torch.nn.functional as F
from refusals import refused

from moe_lab import cpu_kernels
from moe_lab.errors import CheckpointError, RunError
from moe_lab.model import DecoderConfig, MoEConfig
from moe_lab.routing import ControllerConfig, ControllerKind, RouterConfig
from moe_lab.text import Split, TextConfig, load_tokens
from moe_lab.trace import open_trace
from moe_lab.training import OptimizerConfig, RunConfig, load_run, train
from moe_lab.training import run as run_module
from moe_lab.training.checkpoint import load_tensors

ZERO = RouterConfig(
    kind="longcat",
    num_experts=8,
    num_zero_experts=4,
    top_k=3,
    routed_scaling_factor=4.0,
    controller=ControllerConfig(kind=ControllerKind.PROPORTIONAL, rate=0.1, target_ffn_count=2),
)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    words = ["alpha", "beta", "def", "return", "x", "=", "1", "(", ")", "\n", "naïve", "€"]
    for index in range(24):
        (folder / f"doc{index}.txt").write_text(f"{index} " + " ".join(rng.choice(words, size=120)))
    return folder


@pytest.fixture
def config(corpus: Path) -> RunConfig:
    return config_of(corpus)


def config_of(corpus: Path, router: RouterConfig = ZERO, **changes: Any) -> RunConfig:
    text = TextConfig(corpus=str(corpus), tokenizer="byte").resolve()  # type: ignore[arg-type]
    model = DecoderConfig(
        vocab_size=text.vocab_size,
        num_layers=2,
        d_model=16,
        num_heads=2,
        context_length=32,
        moe=MoEConfig(16, 8, router),
        num_dense_layers=0,
    )
    values: dict[str, Any] = {
        "model": model,
        "text": text,
        "batch_size": 4,
        "seq_length": 32,
        "train_tokens": 128 * 12,
        "checkpoint_every": 5,
        "log_every": 1,
        "eval_tokens": None,
        "eval_excerpt_tokens": 80,
        "optimizer": OptimizerConfig(lr=1e-2),
    }
    return RunConfig(**(values | changes))


def losses(folder: Path) -> list[float]:
    return pl.read_parquet(folder / "metrics.parquet")["loss"].to_list()


def numbers(record: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value
        for name, value in record.items()
        if name not in ("seconds", "tokens_per_second")
    }


def test_the_same_seed_twice_gives_the_same_losses_to_the_bit(
    config: RunConfig, tmp_path: Path
) -> None:
    one, two = (train(config, tmp_path / name, cache_dir=tmp_path) for name in ("one", "two"))
    assert losses(one.folder) == losses(two.folder)
    assert numbers(one.record) == numbers(two.record)
    other = train(config.replace(seed=1), tmp_path / "other", cache_dir=tmp_path)
    assert losses(other.folder) != losses(one.folder)


@pytest.mark.parametrize("stop", [1, 5, 7, 12])
def test_a_run_stopped_at_any_step_resumes_to_identical_losses(
    config: RunConfig, tmp_path: Path, stop: int
) -> None:
    class Killed(BaseException):
        pass

    def die(row: dict[str, Any]) -> None:
        if row["step"] == stop:
            raise Killed

    whole = train(config, tmp_path / "whole", cache_dir=tmp_path)
    with pytest.raises(Killed):
        train(config, tmp_path / "cut", on_step=die, cache_dir=tmp_path)
    assert not (tmp_path / "cut" / "done").exists()
    cut = train(config, tmp_path / "cut", cache_dir=tmp_path)
    assert losses(cut.folder) == losses(whole.folder)
    assert numbers(cut.record) == numbers(whole.record)
    for name, tensor in load_tensors(whole.folder / "model.safetensors")[0].items():
        assert torch.equal(tensor, load_tensors(cut.folder / "model.safetensors")[0][name]), name


def test_gradient_accumulation_counts_once_and_leaves_the_loss_curve(
    config: RunConfig, tmp_path: Path
) -> None:
    plain = train(config, tmp_path / "plain", cache_dir=tmp_path)
    split = train(config.replace(grad_accumulation=4), tmp_path / "split", cache_dir=tmp_path)
    # The balance loss is per micro-batch, so curves agree closely but not to the bit; the
    # controller's steps are equal in number.
    np.testing.assert_allclose(losses(split.folder), losses(plain.folder), rtol=2e-2)
    tensors = load_tensors(split.folder / "model.safetensors")[0]
    assert tensors["blocks.0.ffn.router.controller.steps"].item() == config.steps


def test_the_trace_holds_every_validation_token_once_per_layer(
    config: RunConfig, tmp_path: Path
) -> None:
    result = train(config, tmp_path / "run", cache_dir=tmp_path)
    trace = open_trace(result.folder / "trace")
    trace.check()
    documents = load_tokens(config.text, tmp_path).documents(Split.VALIDATION)
    wanted = {
        (document.index, pos): int(token)
        for document in documents
        for pos, token in enumerate(document.ids)
    }
    tokens = trace.tokens.collect()
    assert {
        (doc, pos): token for doc, pos, token in tokens.select("doc", "pos", "token_id").iter_rows()
    } == wanted
    assert (
        trace.routing.group_by("layer").len().sort("layer").collect()["len"].to_list()
        == [len(wanted)] * 2
    )
    assert set(tokens.filter(pl.col("loss").is_null())["pos"] % 80) == {0}
    assert set(tokens["doc"].unique()) == {document.index for document in documents}


def test_the_recorded_loss_is_that_of_the_saved_model_on_each_token(
    config: RunConfig, tmp_path: Path
) -> None:
    result = train(config, tmp_path / "run", cache_dir=tmp_path)
    run = load_run(result.folder)
    documents = {
        document.index: document
        for document in load_tokens(config.text, tmp_path).documents(Split.VALIDATION)
    }
    tokens = open_trace(result.folder / "trace").tokens.collect()
    ids = torch.from_numpy(documents[tokens["doc"][0]].ids[:33].astype(np.int64))
    nats = F.cross_entropy(run.model(ids[None, :32]).logits[0], ids[1:], reduction="none")
    written = tokens.filter(pl.col("doc") == tokens["doc"][0]).sort("pos")["loss"].to_numpy()[1:33]
    np.testing.assert_allclose(written, nats.detach().numpy(), rtol=1e-4)
    scored = tokens.filter(pl.col("loss").is_not_null())
    assert result.record["loss"] == pytest.approx(scored["loss"].cast(pl.Float64).mean(), rel=1e-6)
    # The byte tokenizer's first token of a document is its opening mark; each further excerpt
    # leaves out its own first byte.
    n_bytes = sum(
        len(document.ids) - 1 - len(range(80, len(document.ids), 80))
        for document in documents.values()
    )
    assert result.record["bits_per_byte"] == pytest.approx(
        float(scored["loss"].to_numpy().sum(dtype=float)) / math.log(2) / n_bytes, rel=1e-6
    )


def test_the_record_states_parameters_and_what_the_ratio_means(
    config: RunConfig, tmp_path: Path
) -> None:
    record = train(config, tmp_path / "run", cache_dir=tmp_path).record
    model = config.model.build()
    total = sum(parameter.numel() for parameter in model.parameters())
    expert = 3 * 16 * 8
    assert record["total_params"] == total
    assert record["active_params_max"] == total - 2 * (8 - 3) * expert
    assert record["active_params_min"] == total - 2 * 8 * expert
    assert record["active_params"] == pytest.approx(total - 2 * (8 - 2) * expert)
    assert record["ratio"] == 4.0
    assert "E/k" in record["ratio_meaning"]
    assert record["train_tokens"] == config.steps * config.tokens_per_step
    assert record["flops_per_token"] > 6 * 2 * 2 * expert


def test_a_dense_decoder_trains_without_a_trace(corpus: Path, tmp_path: Path) -> None:
    config = config_of(corpus)
    dense = config.replace(model=config.model.replace(moe=None, d_dense=16))
    result = train(dense, tmp_path / "run", cache_dir=tmp_path)
    assert result.record["ratio"] == 1.0
    assert not (result.folder / "trace").exists()
    assert result.record["loss"] < math.log(257)


def test_training_learns(config: RunConfig, tmp_path: Path) -> None:
    result = train(config.replace(train_tokens=128 * 60), tmp_path / "run", cache_dir=tmp_path)
    curve = losses(result.folder)
    assert sum(curve[-5:]) / 5 < 0.6 * curve[0]


def test_a_damaged_checkpoint_is_told_from_a_whole_one(config: RunConfig, tmp_path: Path) -> None:
    folder = interrupted(config, tmp_path)
    path = folder / "checkpoint.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"is damaged: expected digest .*try deleting"):
        train(config, folder, cache_dir=tmp_path)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r"cannot read checkpoint .*; try deleting"):
        train(config, folder, cache_dir=tmp_path)
    path.unlink()
    assert train(config, folder, cache_dir=tmp_path).record["loss"] > 0


def test_half_a_line_of_metrics_is_forgotten_on_resume(config: RunConfig, tmp_path: Path) -> None:
    folder = interrupted(config, tmp_path)
    with open(folder / "metrics.jsonl", "a") as log:
        log.write('{"step": 6, "lo')
    result = train(config, folder, cache_dir=tmp_path)
    assert pl.read_parquet(result.folder / "metrics.parquet")["step"].to_list() == list(
        range(1, config.steps + 1)
    )


def interrupted(config: RunConfig, tmp_path: Path) -> Path:
    def stop(row: dict[str, Any]) -> None:
        if row["step"] == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "run", on_step=stop, cache_dir=tmp_path)
    return tmp_path / "run"


def test_a_folder_of_another_run_is_refused(config: RunConfig, tmp_path: Path) -> None:
    interrupted(config, tmp_path)
    with refused("run", RunError):
        train(config.replace(seed=5), tmp_path / "run", cache_dir=tmp_path)
    finished = train(config, tmp_path / "run", cache_dir=tmp_path)
    with refused("run", RunError):
        train(config.replace(seed=5), finished.folder, cache_dir=tmp_path)


def test_a_diverging_run_says_at_which_step(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        run_module, "lr_factor", lambda step, steps, config: float("inf") if step == 3 else 1.0
    )
    with pytest.raises(
        RunError, match=r"step 5 of run: expected finite .*; try a lower learning rate"
    ):
        train(config, tmp_path / "run", cache_dir=tmp_path)
    assert not (tmp_path / "run" / "done").exists()


def test_a_finished_run_is_not_trained_again(config: RunConfig, tmp_path: Path) -> None:
    first = train(config, tmp_path / "run", cache_dir=tmp_path)
    stamp = (first.folder / "model.safetensors").stat().st_mtime_ns
    again = train(
        config,
        tmp_path / "run",
        on_step=lambda row: pytest.fail("trained again"),
        cache_dir=tmp_path,
    )
    assert again.record == first.record == json.loads((first.folder / "result.json").read_text())
    assert (first.folder / "model.safetensors").stat().st_mtime_ns == stamp


def test_a_wrong_vocabulary_or_device_is_one_line(config: RunConfig, tmp_path: Path) -> None:
    with refused("model.vocab_size"):
        train(
            config.replace(model=config.model.replace(vocab_size=99)),
            tmp_path / "a",
            cache_dir=tmp_path,
        )
    with refused("device"):
        train(config.replace(device="abacus"), tmp_path / "b", cache_dir=tmp_path)


def test_load_run_refuses_an_unfinished_run(config: RunConfig, tmp_path: Path) -> None:
    folder = interrupted(config, tmp_path)
    with refused("run", RunError):
        load_run(folder)


def test_a_run_without_compiled_experts_says_so_once(
    config: RunConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(cpu_kernels, "_ready", False)
    monkeypatch.setattr(cpu_kernels, "_search", lambda: "no C++ compiler found")
    assert train(config, tmp_path / "run").record["dispatch"] == "cpu"
    assert capsys.readouterr().err.count("no C++ compiler found") == 1
