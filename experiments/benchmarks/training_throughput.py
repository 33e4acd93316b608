"""Training throughput of three small decoders with top-2 of E experts, against the dense twin of
the same active width, per process.

A step is forward, backward, clipping and fused AdamW on random bytes (batch 16 x 256), as a sweep's
worker runs it: one thread, and freed memory kept. Contestants take turns; figures are medians with
quartiles, ratios are paired. The reference tokens/s are those of a sort-and-split loop with fused
AdamW on one thread of two quiet cores. ``--split`` times the parts of a step alone: routers,
experts, attention (forward and backward each, over all layers), and clipping with AdamW; ``rest``
is what they leave. ``--floor`` asks how much of the speed with the fewest experts any code could
keep: the step with the fewest, less its routing, optimiser and experts, plus what more experts
cannot do without (``floor_of``), at the arithmetic and memory speeds measured in the same rounds.

    python experiments/benchmarks/training_throughput.py [--size 0.8M] [--experts 2 16 64 256]
    [--rounds 9] [--processes 2] [--split | --floor]

The bank of the 14M size with 256 experts has 1.2 billion parameters: a step needs more than 20 GB.
"""

import argparse
import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import torch
import torch.nn.functional as F
from measure import save, summary, take_turns
from torch import Tensor

from moe_lab.cpu_kernels.linear import linear
from moe_lab.cpu_kernels.noted_squares import note_squares
from moe_lab.model import Decoder, DecoderConfig, MoEConfig, MoELayer
from moe_lab.model.blocks import Block
from moe_lab.model.rotary import Rotary
from moe_lab.routing import RouterConfig, Routing
from moe_lab.training import OptimizerConfig, keep_freed_memory
from moe_lab.training.optimizer import build_optimizer, clip_gradients

BATCH, LENGTH, EXPERTS = 16, 256, [2, 16, 64, 256]
WARMUP = 5
"""Uncounted rounds: in the first ones the process still asks the system for memory."""
REPEATS = 10
"""Products in a row whose arithmetic is timed."""


@dataclass(frozen=True)
class Size:
    num_layers: int
    d_model: int
    d_expert: int
    reference: dict[int, int]

    def config(self, experts: int | None) -> DecoderConfig:
        """The decoder with that many experts; None is the dense twin."""
        router = RouterConfig(num_experts=experts or 2, top_k=2, norm_topk_prob=True)
        return DecoderConfig(
            vocab_size=256,
            num_layers=self.num_layers,
            d_model=self.d_model,
            num_heads=self.d_model // 32,
            context_length=LENGTH,
            d_dense=2 * self.d_expert,
            moe=MoEConfig(self.d_model, self.d_expert, router) if experts else None,
        )


SIZES = {
    "0.8M": Size(4, 128, 192, {2: 5400, 16: 5600, 64: 5400, 256: 3500}),
    "5M": Size(6, 256, 344, {2: 2150, 16: 1970, 64: 1410, 256: 960}),
    "14M": Size(8, 384, 512, {2: 980, 16: 830, 64: 670, 256: 270}),
}


def stepper(
    config: DecoderConfig,
    batch: int = BATCH,
    length: int = LENGTH,
    device: str = "cpu",
    autocast: torch.dtype | None = None,
) -> tuple[Callable[[], None], Decoder, torch.optim.Optimizer]:
    """A training step: forward (in ``autocast``, if given), backward, clipping, fused AdamW."""
    torch.manual_seed(0)
    with torch.device(device):
        model = Decoder(config)
        ids = torch.randint(0, config.vocab_size, (batch, length + 1))
    optimizer = build_optimizer(model, OptimizerConfig())

    def step() -> None:
        with torch.autocast(device, autocast, enabled=autocast is not None):
            loss = model(ids[:, :-1], ids[:, 1:]).loss
        assert loss is not None
        loss.backward()
        clip_gradients(model, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, model, optimizer


def parts_of(model: Decoder, optimizer: torch.optim.Optimizer) -> dict[str, Callable[[], None]]:
    """The parts of a step over all layers, forward and backward, each on its own."""
    x = torch.randn(BATCH, LENGTH, model.config.d_model)
    rotary = Rotary(model.cos, model.sin).head(LENGTH)
    blocks = [block for block in model.blocks if isinstance(block, Block)]
    layers = [block.ffn for block in blocks if isinstance(block.ffn, MoELayer)]
    fixed = [layer.router(x.flatten(0, 1)).detach() for layer in layers]

    def over(
        modules: list[Any], forward: Callable[[Any, Tensor, int], Tensor]
    ) -> Callable[[], None]:
        def run() -> None:
            for number, module in enumerate(modules):
                inside = x.clone().requires_grad_()
                forward(module, inside, number).sum().backward()
            optimizer.zero_grad(set_to_none=True)

        return run

    def experts(layer: MoELayer, inside: Tensor, number: int) -> Tensor:
        routing: Routing = fixed[number]
        return layer.dispatch(inside.flatten(0, 1), routing, layer.experts)

    gradients = [torch.randn_like(parameter) for parameter in model.parameters()]
    banks = {id(weight) for layer in layers for weight in layer.experts.parameters()}
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        if id(parameter) in banks:  # as the backward pass of the experts does
            note_squares(gradient, torch.linalg.vector_norm(gradient).double().square())

    def update() -> None:
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient
        clip_gradients(model, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return {
        "routing": over(
            layers, lambda layer, inside, _: layer.router(inside.flatten(0, 1)).weights
        ),
        "experts": over(layers, experts),
        "attention": over(blocks, lambda block, inside, _: block.attention(inside, rotary)[0]),
        "optimizer": update,
    }


def measure(size: str, rounds: int, numbers: list[int]) -> pl.DataFrame:
    """One process's table."""
    torch.set_num_threads(1)
    keep_freed_memory()
    contestants = {"dense": stepper(SIZES[size].config(None))[0]}
    frames = []
    for experts in numbers:  # one bank at a time: four of 1.2 billion parameters would not fit
        step, *kept = stepper(SIZES[size].config(experts))
        table = summary(
            take_turns(contestants | {f"E={experts}": step}, rounds, WARMUP), against="dense"
        )
        frames.append(table if experts == numbers[0] else table.tail(1))
        del step, kept
    speed = BATCH * LENGTH / (pl.col("ms") / 1e3)
    reference = pl.Series(
        [None, *(SIZES[size].reference.get(experts) for experts in numbers)], dtype=pl.Int64
    )
    return pl.concat(frames).with_columns(
        tokens_per_second=speed, reference=reference, size=pl.lit(size)
    )


def split(size: str, rounds: int, numbers: list[int]) -> pl.DataFrame:
    torch.set_num_threads(1)
    keep_freed_memory()
    frames = []
    for experts in numbers:
        step, model, optimizer = stepper(SIZES[size].config(experts))
        table = summary(
            take_turns({"step": step} | parts_of(model, optimizer), rounds, WARMUP), against="step"
        ).select("name", "ms", "ratio")
        rest = pl.DataFrame(
            {
                "name": "rest",
                "ms": 2 * table["ms"][0] - table["ms"].sum(),
                "ratio": 2 - table["ratio"].sum(),
            }
        )
        frames.append(pl.concat([table, rest]).with_columns(experts=pl.lit(experts)))
        del step, model, optimizer
    return pl.concat(frames).with_columns(size=pl.lit(size))


def floor(size: str, rounds: int, numbers: list[int]) -> pl.DataFrame:
    """Milliseconds of a step, of its floor, and the shares of the speed with the fewest experts
    that they keep; every share is the median of ratios within a round.
    """
    torch.set_num_threads(1)
    keep_freed_memory()
    fewest, *more = sorted(numbers)
    tokens, d_model = BATCH * LENGTH, SIZES[size].d_model
    step, model, optimizer = stepper(SIZES[size].config(fewest))
    stream = torch.ones(2**26)  # 256 MB: far more than caches
    x, weight = torch.randn(tokens, d_model), torch.randn(256, d_model)
    rows = []
    for experts in more:
        other, larger, *_ = stepper(SIZES[size].config(experts))
        contestants = {
            "fewest": step, "step": other,
            "stream": lambda: stream.mul_(1.0),
            "tiles": lambda: [linear(x, weight) for _ in range(REPEATS)],
            "torch": lambda: [F.linear(x, weight) for _ in range(REPEATS)],
        } | parts_of(model, optimizer)  # fmt: skip
        seconds = {
            name: np.array(part) for name, part in take_turns(contestants, rounds, WARMUP).items()
        }
        work = floor_of(larger, tokens)
        memory = seconds["stream"] / (2 * stream.nbytes)  # seconds for a byte, read or written
        products = REPEATS * tokens * weight.numel()
        arithmetic = seconds["tiles"] / products  # seconds for a multiplication and its addition
        replaced = seconds["routing"] + seconds["optimizer"] + seconds["experts"]
        bound = (
            seconds["fewest"] - replaced
            + np.maximum(seconds["experts"], memory * work.bank_bytes)
            + arithmetic * work.router_products + memory * work.update_bytes
        )  # fmt: skip
        shares = {"kept": seconds["step"], "floor_kept": bound}
        rows.append(
            {
                "experts": experts, "rounds": rounds,
                "fewest_ms": np.median(seconds["fewest"]) * 1e3,
                "ms": np.median(seconds["step"]) * 1e3, "floor_ms": np.median(bound) * 1e3,
                "gb_per_s": np.median(1e-9 / memory), "gflop_per_s": np.median(2e-9 / arithmetic),
                "torch_gflop_per_s": np.median(2e-9 * products / seconds["torch"]),
            }
            | {
                name + suffix: np.quantile(seconds["fewest"] / of, quantile)
                for name, of in shares.items()
                for suffix, quantile in (("", 0.5), ("_q1", 0.25), ("_q3", 0.75))
            }
        )  # fmt: skip
        del other, larger
    return pl.DataFrame(rows).with_columns(size=pl.lit(size))


@dataclass(frozen=True)
class Work:
    """What a step cannot do without, over all layers.

    Attributes:
        router_products: multiplications of the routers, forward and backward.
        bank_bytes: expert weights, read in both directions, and their gradient, written. It may
            pass while the experts compute, whose arithmetic is that of the fewest experts.
        update_bytes: AdamW reads parameters, gradients and both moments, and writes all but the
            gradients. It waits for the norm of all gradients, so nothing hides it.
    """

    router_products: int
    bank_bytes: int
    update_bytes: int


def floor_of(model: Decoder, tokens: int) -> Work:
    """The norm of the gradients is taken to be added up while they are written, and softmax, top k
    and the order of slots to cost nothing.
    """
    layers = [module for module in model.modules() if isinstance(module, MoELayer)]
    matrices = sum(weight.numel() for layer in layers for weight in layer.router.parameters())
    bank = sum(weight.nbytes for layer in layers for weight in layer.experts.parameters())
    total = sum(parameter.nbytes for parameter in model.parameters())
    return Work(3 * tokens * matrices, 3 * bank, 7 * total)


def both(size: str, rounds: int, numbers: list[int], processes: int) -> pl.DataFrame:
    """``processes`` at once, each on one thread; speeds are added up."""
    if processes == 1:
        return measure(size, rounds, numbers)
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        frames = pool.starmap(measure, [(size, rounds, numbers)] * processes)
    speed = sum(
        (frame["tokens_per_second"] for frame in frames[1:]), frames[0]["tokens_per_second"]
    )
    return frames[0].with_columns(
        speed.alias("tokens_per_second"), pl.lit(processes).alias("processes")
    )


PARTS = {"split": split, "floor": floor}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=list(SIZES), default="0.8M")
    parser.add_argument("--experts", type=int, nargs="+", default=EXPERTS)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--processes", type=int, default=1)
    alone = parser.add_mutually_exclusive_group()
    for option in PARTS:
        alone.add_argument(f"--{option}", dest="part", action="store_const", const=option)
    arguments = parser.parse_args()
    if arguments.part:
        frame = PARTS[arguments.part](arguments.size, arguments.rounds, arguments.experts)
        name = f"training_{arguments.part}_{arguments.size}"
    else:
        frame = both(arguments.size, arguments.rounds, arguments.experts, arguments.processes)
        name = f"training_throughput_{arguments.size}_{arguments.processes}p"
    with pl.Config(
        tbl_rows=-1,
        tbl_cols=-1,
        tbl_width_chars=180,
        float_precision=2,
        tbl_hide_dataframe_shape=True,
    ):
        print(frame)
    print("saved", save(frame, name))


if __name__ == "__main__":
    main()
