"""Training throughput of three small decoders with top-2 of E experts, against the dense twin of
the same active width, per process.

A step is forward, backward, clipping and fused AdamW on random bytes (batch 16 x 256), as a sweep's
worker runs it: one thread, and freed memory kept. Contestants take turns; figures are medians with
quartiles, ratios are paired. The reference tokens/s are those of a sort-and-split loop with fused
AdamW on one thread of two quiet cores. ``--split`` times the parts of a step alone: routers,
experts, attention (forward and backward each, over all layers), and clipping with AdamW; ``rest``
is what they leave.

    python experiments/benchmarks/training_throughput.py [--size 0.8M] [--experts 2 16 64 256]
    [--rounds 9] [--processes 2] [--split]

The bank of the 14M size with 256 experts has 1.2 billion parameters: a step needs more than 20 GB.
"""

import argparse
import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import polars as pl
import torch
from measure import save, summary, take_turns
from torch import Tensor

from moe_lab.model import Decoder, DecoderConfig, MoEConfig, MoELayer
from moe_lab.model.blocks import Block
from moe_lab.model.rotary import Rotary
from moe_lab.routing import RouterConfig, Routing
from moe_lab.training import OptimizerConfig, keep_freed_memory
from moe_lab.training.optimizer import build_optimizer, clip_gradients

BATCH, LENGTH, EXPERTS = 16, 256, [2, 16, 64, 256]


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
        table = summary(take_turns(contestants | {f"E={experts}": step}, rounds), against="dense")
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
            take_turns({"step": step} | parts_of(model, optimizer), rounds), against="step"
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=list(SIZES), default="0.8M")
    parser.add_argument("--experts", type=int, nargs="+", default=EXPERTS)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--split", action="store_true")
    arguments = parser.parse_args()
    name = f"training_{'split' if arguments.split else 'throughput'}_{arguments.size}"
    if arguments.split:
        frame = split(arguments.size, arguments.rounds, arguments.experts)
    else:
        frame = both(arguments.size, arguments.rounds, arguments.experts, arguments.processes)
        name += f"_{arguments.processes}p"
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
