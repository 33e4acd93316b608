"""Small runs in several processes of one gloo group, for the tests of ranks.

They run in float64. In float32 the rounding of sums, which are ordered otherwise on two ranks, now and then turns a near tie of a token's
scores into another choice, and from there on the two curves are those of two runs (docs/training.md has the measured share).
"""

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from moe_lab.model import DecoderConfig, MoEConfig
from moe_lab.routing import ControllerConfig, ControllerKind, RouterConfig
from moe_lab.text import TextConfig
from moe_lab.training import OptimizerConfig, RunConfig

ZERO = RouterConfig(
    kind="longcat",
    num_experts=8,
    num_zero_experts=4,
    top_k=3,
    routed_scaling_factor=4.0,
    controller=ControllerConfig(kind=ControllerKind.PROPORTIONAL, rate=0.1, target_ffn_count=2),
)


def write_corpus(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    words = ["alpha", "beta", "def", "return", "x", "=", "1", "(", ")", "\n", "naïve", "€"]
    for index in range(24):
        (folder / f"doc{index}.txt").write_text(f"{index} " + " ".join(rng.choice(words, size=120)))
    return folder


def run_config(corpus: Path, steps: int, router: RouterConfig = ZERO, **changes: Any) -> RunConfig:
    text = TextConfig(corpus=str(corpus), tokenizer="byte").resolve()  # type: ignore[arg-type]
    model = DecoderConfig(
        vocab_size=text.vocab_size,
        num_layers=2,
        d_model=32,
        num_heads=2,
        context_length=32,
        moe=MoEConfig(32, 16, router),
        num_dense_layers=0,
    )
    values: dict[str, Any] = {
        "model": model, "text": text, "batch_size": 4, "seq_length": 32, "train_tokens": 128 * steps, "checkpoint_every": 5, "log_every": 1,
        "eval_tokens": None, "eval_excerpt_tokens": 80, "optimizer": OptimizerConfig(lr=3e-3),
    }  # fmt: skip
    return RunConfig(**(values | changes))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _enter(rank: int, size: int, port: int, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(size))
    work(rank, *arguments)


def on_ranks(size: int, work: Callable[..., None], *arguments: Any, join: bool = True) -> mp.ProcessContext | None:
    """Call ``work(rank, *arguments)`` in ``size`` processes to which the environment describes one group, as ``torchrun`` does."""
    return mp.start_processes(_enter, args=(size, free_port(), work, arguments), nprocs=size, join=join, start_method="spawn")


def in_group(rank: int, works: list[tuple[Callable[..., None], tuple[Any, ...]]]) -> None:
    """Several works in one group that stays: starting processes costs more than most of them."""
    dist.init_process_group("gloo")
    for work, arguments in works:
        work(rank, *arguments)
    dist.destroy_process_group()
