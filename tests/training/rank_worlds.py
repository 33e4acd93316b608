"""Small runs in several processes of one gloo group, for the tests of ranks.

They run in float64. In float32 the rounding of sums, which are ordered otherwise on two ranks, now
and then turns a near tie of a token's scores into another choice, and from there on the two curves
are those of two runs (docs/training.md has the measured share).
"""

import json
import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from process_groups import free_port
from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel

from moe_lab.errors import MoELabError
from moe_lab.model import (
    Decoder,
    DecoderConfig,
    LatentAttentionConfig,
    MoEConfig,
    MoELayer,
    MTPConfig,
    NgramConfig,
    SparseAttentionConfig,
    Wiring,
)
from moe_lab.routing import ROUTERS, ControllerConfig, ControllerKind, RouterConfig, Routing
from moe_lab.text import TextConfig
from moe_lab.trace import capture
from moe_lab.training import OptimizerConfig, RunConfig, monitor
from moe_lab.training.checkpoint import whole
from moe_lab.training.objective import Objective, average_gradients, spread
from moe_lab.training.ranks import Ranks, join

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
        "model": model,
        "text": text,
        "batch_size": 4,
        "seq_length": 32,
        "train_tokens": 128 * steps,
        "checkpoint_every": 5,
        "log_every": 1,
        "eval_tokens": None,
        "eval_excerpt_tokens": 80,
        "optimizer": OptimizerConfig(lr=3e-3),
    }
    return RunConfig(**(values | changes))


def _enter(
    rank: int, size: int, port: int, work: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        RANK=str(rank),
        WORLD_SIZE=str(size),
        GLOO_SOCKET_IFNAME="lo",
    )
    work(rank, *arguments)


def on_ranks(
    size: int, work: Callable[..., None], *arguments: Any, join: bool = True
) -> mp.ProcessContext | None:
    """Call ``work(rank, *arguments)`` in ``size`` processes to which the environment describes one
    group, as ``torchrun`` does.
    """
    return mp.start_processes(
        _enter,
        args=(size, free_port(), work, arguments),
        nprocs=size,
        join=join,
        start_method="spawn",
    )


def in_group(rank: int, works: list[tuple[Callable[..., None], tuple[Any, ...]]]) -> None:
    """Several works in one group that stays: starting processes costs more than most of them."""
    dist.init_process_group("gloo")
    for work, arguments in works:
        work(rank, *arguments)
    dist.destroy_process_group()


def router_of(kind: str) -> RouterConfig:
    """A small router of any kind."""
    needs: dict[str, dict[str, Any]] = {
        name: {"vocab_size": 257} for name in ("hash", "scored_hash", "token_lookup")
    }
    needs |= {name: {"top_k": 1} for name in ("base", "llama4", "switch")} | {
        "mixture_of_depths": {"num_experts": 1, "top_k": 1}
    }
    needs |= {"zaya": {"num_zero_experts": 1, "top_k": 1}, "inkling": {"num_shared_gates": 1}}
    needs |= {name: {"num_zero_experts": 2} for name in ("moepp", "adamoe", "longcat")}
    return RouterConfig(**{"kind": kind, "num_experts": 4, "top_k": 2, **needs.get(kind, {})})


def one_step(config: RunConfig, ranks: Ranks) -> dict[str, torch.Tensor]:
    """Gradients after the backward passes of one step, whole on every rank, and the controllers'
    state after its update.
    """
    torch.manual_seed(config.seed)
    objective = Objective(Decoder(config.model), config, ranks)
    called = spread(objective, ranks)
    batch = torch.randint(
        0,
        256,
        (config.batch_size, config.seq_length + 1),
        generator=torch.Generator().manual_seed(1),
    )
    routings: list[list[Routing]] = [[] for _ in objective.model.moe_layers()]
    micro_batches = ranks.own(batch)
    for number, micro_batch in enumerate(micro_batches, start=1):
        average_gradients(called, now=number == len(micro_batches))
        nats, auxiliary, found = called(micro_batch)
        ((nats + auxiliary) / len(micro_batches)).backward()
        for seen, routing in zip(routings, found, strict=True):
            seen.append(routing)
    gradients = {
        name: whole(parameter.grad)
        for name, parameter in objective.model.named_parameters()
        if parameter.grad is not None
    }
    for layer, seen in zip(objective.model.moe_layers().values(), routings, strict=True):
        layer.router.update(seen)
    return gradients | {
        name: buffer.clone()
        for name, buffer in objective.model.named_buffers()
        if "controller" in name
    }


def step_of_every_router(
    rank: int, corpus: Path, target: Path, parallel: str, micro_batches: int
) -> None:
    """``one_step`` of each router on this group's ranks."""
    found = {}
    for kind in sorted(ROUTERS):
        config = router_run(corpus, kind, micro_batches)
        with suppress(MoELabError), join(config, parallel, torch.device("cpu")) as ranks:
            found |= {
                f"{kind} {name}": value.contiguous()
                for name, value in one_step(config, ranks).items()
            }
    if rank == 0:
        save_file(found, target)


def router_run(corpus: Path, kind: str, micro_batches: int) -> RunConfig:
    """The auxiliary losses weigh as much as the language's, so that a wrong one shows."""
    changes = {
        "router_aux_loss_coef": 1.0,
        "router_z_loss_coef": 1.0,
        "grad_accumulation": micro_batches,
    }
    config = run_config(corpus, 1, router_of(kind), **changes)
    assert config.model.moe is not None
    shared = (
        config.model.moe.replace(num_shared_experts=1) if kind == "inkling" else config.model.moe
    )
    return config.replace(model=config.model.replace(moe=shared))


EXPERTS = RouterConfig(kind="longcat", num_experts=8, num_zero_experts=2, top_k=3)


PLAIN_KINDS = sorted(set(ROUTERS) - {"d2dmoe"})
"""All but D2DMoE, whose router is trained afterwards, by ``norm_regression_loss`` alone."""


class Trained(torch.nn.Module):
    """A model with its language loss and the routers' own losses, by which alone the predictor of
    mixture of depths learns.
    """

    def __init__(self, model: Decoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids_BS: torch.Tensor, targets_BS: torch.Tensor) -> torch.Tensor:
        output = self.model(ids_BS, targets_BS)
        return output.loss + sum(sum(routing.losses.values()) for routing in output.routings)


def plain_model(kind: str) -> tuple[Trained, list[torch.Tensor]]:
    """A decoder of two MoE layers of a kind, and the tokens of each of two ranks."""
    torch.manual_seed(0)
    moe = MoEConfig(16, 8, router_of(kind))
    model = DecoderConfig(
        vocab_size=257, num_layers=2, d_model=16, num_heads=2, context_length=16, moe=moe
    ).build()
    return Trained(model), list(torch.randint(0, 257, (2, 2, 17)))


def plain_steps(model: torch.nn.Module, called: torch.nn.Module, ids: list[torch.Tensor]) -> None:
    """Two steps of plain descent; the gradients of the second, a mean over ``ids``, stay."""
    for _ in range(2):
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad
        model.zero_grad()
        for rows in ids:
            (called(rows[:, :-1], rows[:, 1:]) / len(ids)).backward()


def plain_ddp(rank: int, target: Path) -> None:
    """Two steps of every kind of router in DistributedDataParallel with its defaults, which stops
    at the second where the first left a parameter without gradient.
    """
    found = {}
    for kind in PLAIN_KINDS:
        model, ids = plain_model(kind)
        plain_steps(model, DistributedDataParallel(model), [ids[rank]])
        found |= {f"{kind} {name}": p.grad for name, p in model.named_parameters()}
    if rank == 0:
        save_file(found, target)


def expert_layer(dispatch: str) -> tuple[MoELayer, torch.Tensor]:
    """A layer and the tokens [20, 16] of all ranks."""
    torch.manual_seed(4)
    return MoELayer(
        MoEConfig(16, 8, EXPERTS, num_shared_experts=1, dispatch=dispatch)
    ), torch.randn(20, 16)


def expert_parallel_example(rank: int, target: Path) -> None:
    """The example of docs/training.md on this rank's half of the tokens and of the experts:
    outputs, and the shard's gradients.
    """
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    (example,) = [
        block
        for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL)
        if "def expert_parallel" in block
    ]
    exec(compile(example, "docs/training.md", "exec"), {})
    layer, x = expert_layer("expert_parallel")
    for name in ("gate_up", "down"):
        setattr(
            layer.experts,
            name,
            torch.nn.Parameter(getattr(layer.experts, name).detach().chunk(2)[rank].clone()),
        )
    y, routing = layer(x.chunk(2)[rank], return_routing=True)
    y.square().sum().backward()
    gradients = {
        name: parameter.grad.contiguous()
        for name, parameter in layer.experts.named_parameters()
        if parameter.grad is not None
    }
    save_file(
        {"y": y.detach().contiguous(), "counts": routing.counts(), **gradients},
        target.with_name(f"{target.name}-{rank}"),
    )


def captured_model() -> tuple[Decoder, torch.Tensor]:
    """A decoder and four documents [4, 12]."""
    torch.manual_seed(5)
    return Decoder(
        DecoderConfig(
            vocab_size=50,
            num_layers=2,
            d_model=16,
            num_heads=2,
            context_length=16,
            moe=MoEConfig(16, 8, EXPERTS),
        )
    ), (torch.randint(0, 50, (4, 12)))


def capture_on(rank: int, folder: Path) -> None:
    """Every rank runs two documents through its replica, under the recorder for any model."""
    model, ids = captured_model()
    replica = DistributedDataParallel(model)
    with torch.no_grad(), capture(replica, folder):
        replica(ids.chunk(2)[rank])


def monitor_on(rank: int, folder: Path) -> None:
    """Every rank trains on two documents under ``monitor``; the first writes."""
    model, ids = captured_model()
    replica = DistributedDataParallel(model)
    with monitor(replica, folder, every=1) as watch:
        replica(ids.chunk(2)[rank])
        scalars = watch.step()
    (folder.parent / f"scalars-{rank}.json").write_text(json.dumps(scalars))


def everything(corpus: Path) -> RunConfig:
    """A decoder with every part that has a loss or tables of its own, in LongCat's wiring."""
    config = run_config(corpus, 1)
    model = config.model.replace(
        wiring=Wiring.SHORTCUT,
        latent_attention=LatentAttentionConfig(
            kv_rank=10, q_rank=12, nope_dim=6, rope_dim=4, value_dim=5
        ),
        sparse_attention=SparseAttentionConfig(
            top_k=6, num_heads=2, head_dim=8, initial=1, local=2, share=2
        ),
        ngram=NgramConfig(layers=(1,)),
        mtp=MTPConfig(1, d_hidden=9),
        hidden_z_loss_coef=1e-2,
    )
    return config.replace(model=model)


def step_of_everything(rank: int, corpus: Path, target: Path, parallel: str) -> None:
    config = everything(corpus)
    with join(config, parallel, torch.device("cpu")) as ranks:
        found = one_step(config, ranks)
    if rank == 0:
        save_file({name: value.contiguous() for name, value in found.items()}, target)
