"""Decoders of every part in the rooms above: training, evaluation, traces, difficulty passes, the
command line.
"""

import json
import math
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from decoder_options import OPTIONS
from hf_copied import randomise

from moe_lab.analysis.difficulty.gain import marginal_gain
from moe_lab.analysis.difficulty.scored_documents import score
from moe_lab.cli import main
from moe_lab.model import Decoder, DecoderConfig
from moe_lab.routing import RouterContext
from moe_lab.text import TextConfig
from moe_lab.trace import capture, open_trace
from moe_lab.training import OptimizerConfig, RunConfig, load_run, train

NAMES = pytest.mark.parametrize("name", OPTIONS)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> TextConfig:
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    words = ["alpha", "beta", "def", "return", "x", "=", "1", "(", ")", "\n", "é"]
    for index in range(16):
        (folder / f"doc{index}.txt").write_text(f"{index} " + " ".join(rng.choice(words, size=60)))
    return TextConfig(corpus=str(folder), tokenizer="byte").resolve()  # type: ignore[arg-type]


def run_of(config: DecoderConfig, text: TextConfig) -> RunConfig:
    return RunConfig(
        model=config.replace(vocab_size=text.vocab_size),
        text=text,
        batch_size=2,
        seq_length=32,
        train_tokens=3 * 64,
        log_every=1,
        eval_tokens=200,
        eval_excerpt_tokens=40,
        optimizer=OptimizerConfig(lr=1e-2),
    )


@NAMES
def test_every_option_trains_evaluates_and_leaves_a_whole_trace(
    name: str, text: TextConfig, tmp_path: Path
) -> None:
    config = run_of(OPTIONS[name], text)
    result = train(config, tmp_path / "run", cache_dir=tmp_path / "cache")
    metrics = pl.read_parquet(result.folder / "metrics.parquet")
    assert metrics.height == 3
    assert metrics["loss"].is_finite().all()
    assert math.isfinite(result.record["loss"])
    trace = open_trace(result.folder / "trace").check()
    assert [layer.layer for layer in trace.meta.layers] == list(config.model.moe_layers)
    run = load_run(result.folder)
    assert result.record["total_params"] == sum(
        value.numel() for key, value in run.model.named_parameters() if not key.startswith("mtp.")
    )


def test_a_run_of_most_options_resumes_to_the_bit(text: TextConfig, tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    def die(row: dict[str, float]) -> None:
        if row["step"] == 2:
            raise Killed

    config = run_of(OPTIONS["most at once"], text).replace(checkpoint_every=1)
    whole = train(config, tmp_path / "whole", cache_dir=tmp_path / "cache")
    with pytest.raises(Killed):
        train(config, tmp_path / "cut", on_step=die, cache_dir=tmp_path / "cache")
    cut = train(config, tmp_path / "cut", cache_dir=tmp_path / "cache")
    metrics = [
        pl.read_parquet(run.folder / "metrics.parquet")["loss"].to_list() for run in (whole, cut)
    ]
    assert metrics[0] == metrics[1]
    assert whole.record["loss"] == cut.record["loss"]


@NAMES
def test_capture_records_each_moe_layer_of_every_option(name: str, tmp_path: Path) -> None:
    """Two attentions and two dense feed-forwards of a layer are no layers of their own."""
    config = OPTIONS[name]
    torch.manual_seed(0)
    model, ids = Decoder(config).eval(), torch.randint(0, 61, (3, 20))
    with torch.no_grad(), capture(model, tmp_path / "t"):
        output = model(ids)
    trace = open_trace(tmp_path / "t").check()
    assert [layer.layer for layer in trace.meta.layers] == list(config.moe_layers)
    for layer, routing in zip(trace.meta.layers, output.routings, strict=True):
        rows = trace.routing.filter(pl.col("layer") == layer.layer).sort("doc", "pos").collect()
        assert rows["ffn_count"].to_list() == routing.ffn_count().tolist()
        assert rows["zero_count"].to_list() == routing.zero_count().tolist()


@pytest.mark.parametrize(
    "name",
    [
        "plain",
        "shortcut",
        "sequential",
        "shortcut after a dense layer",
        "hash layers",
        "most at once",
    ],
)
def test_difficulty_passes_measure_what_the_moe_adds_to_its_own_stream(name: str) -> None:
    """Layer by layer by hand: norm of the MoE's output over the norm of the stream that its norm
    reads.
    """
    config = OPTIONS[name]
    model = Decoder(config).eval()
    randomise(model, 1)
    documents = [np.random.default_rng(number).integers(0, 60, 20) for number in range(2)]
    found = score(model, documents, seq_length=32)
    assert found.layers == config.moe_layers
    ids = torch.from_numpy(np.stack(documents))
    output, streams = model(ids), {}
    handles = [
        model.blocks[layer].moe_norm.register_forward_pre_hook(
            lambda _, given, layer=layer: streams.__setitem__(layer, given[0])
        )
        for layer in config.moe_layers
    ]
    model(ids)
    for handle in handles:
        handle.remove()
    for row, (layer, routing) in enumerate(zip(config.moe_layers, output.routings, strict=True)):
        stream = streams[layer]
        if config.wiring == "plain":
            assert model.blocks[layer].moe_norm is model.blocks[layer].ffn_norm
        else:
            assert model.blocks[layer].moe_norm is model.blocks[layer].ffn_norms[0]
        context = RouterContext(token_ids=ids.flatten(), sequence_length=20)
        added = model.moe_layers()[layer](model.blocks[layer].moe_norm(stream), context)
        wanted = (added.norm(dim=2) / stream.norm(dim=2)).flatten()
        torch.testing.assert_close(
            torch.from_numpy(found.norm_ratio[row]), wanted.detach(), rtol=1e-4, atol=1e-5
        )
        assert found.ffn_count[row].tolist() == routing.ffn_count().tolist()


def test_compute_can_be_moved_in_a_shortcut_decoder() -> None:
    model = Decoder(OPTIONS["shortcut"]).eval()
    randomise(model, 2)
    documents = [np.random.default_rng(number).integers(0, 60, 30) for number in range(6)]
    gains = marginal_gain(model, documents, step=0.5, seq_length=32)
    assert gains.height == 6 * 29
    assert gains["moved"][0] == pytest.approx(1.0, abs=0.4)
    assert gains["marginal_gain"].is_finite().all()


def test_the_command_line_trains_a_shortcut_decoder(
    text: TextConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOE_LAB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "config.json").write_text(
        json.dumps(run_of(OPTIONS["most at once"], text).to_dict())
    )
    arguments = [
        "train",
        "--config",
        str(tmp_path / "config.json"),
        "--out",
        str(tmp_path / "run"),
        "--json",
    ]
    assert main(arguments) == 0
    assert (tmp_path / "run" / "done").exists()
    assert load_run(tmp_path / "run").config.model.wiring == "shortcut"
