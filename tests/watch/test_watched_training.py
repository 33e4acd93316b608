"""A run that is watched is the run that is not."""

from pathlib import Path
from typing import Any

import polars as pl

from moe_lab.model import DecoderConfig, MoEConfig
from moe_lab.routing import RouterConfig
from moe_lab.text import TextConfig
from moe_lab.training import RunConfig, train
from moe_lab.watch import Board, open_place
from moe_lab.watch.board import View


def test_a_watched_run_has_the_losses_of_one_that_is_not_to_the_bit(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(12):
        (corpus / f"{number}.txt").write_text(f"{number} " + "alpha = beta(1)\n" * 40)
    text = TextConfig(corpus=str(corpus), tokenizer="byte").resolve()  # type: ignore[arg-type]
    moe = MoEConfig(16, 8, RouterConfig(num_experts=4, top_k=2))
    sizes: dict[str, Any] = {"num_layers": 1, "d_model": 16, "num_heads": 2, "context_length": 32}
    model = DecoderConfig(vocab_size=text.vocab_size, moe=moe, **sizes)
    steps = {"batch_size": 2, "seq_length": 32, "train_tokens": 64 * 12, "log_every": 1}
    config = RunConfig(model=model, text=text, eval_tokens=200, **steps)  # type: ignore[arg-type]

    sentences: list[str] = []
    boards: list[Board] = []

    def watch(row: dict[str, Any]) -> None:
        if not boards:
            boards.append(Board(open_place(tmp_path / "watched")))
        boards[0].refresh(None)
        sentences.append(boards[0].changes("", "", View(run="watched")))

    for name, look in (("alone", None), ("watched", watch)):
        train(config, tmp_path / name, on_step=look, cache_dir=tmp_path)
    losses = [
        pl.read_parquet(tmp_path / name / "metrics.parquet")["loss"].to_list()
        for name in ("alone", "watched")
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 12
    assert '"layers"' in sentences[-1]
