"""One MoE layer, forward and backward, against the limit and a peer: the dense SwiGLU of the same
active FLOPs, each dispatch backend of ours, and transformers' ``Qwen3MoeSparseMoeBlock`` with its
eager and its grouped experts. Same weights, same tokens, same selections.

Contestants take turns; figures are medians with quartiles, ratios to the dense twin are paired
round by round. ``peak_mb`` is the memory that a step adds over the resting process, gradients
included (each contestant measured alone, in a fresh process); ``bound_mb`` is the bar: 1.3 times
the dense twin's step plus the bank's gradient, which no layer can do without.

    python experiments/benchmarks/moe_layer.py [--rounds 15] [--threads 2] [--growth |
    --instrumentation] [--device cuda]

``--growth`` instead doubles T, E and k one at a time and fits the exponents. ``--instrumentation``
pairs the layer with and without the metrics of a training step (entropy, counts, ffn_count, MaxVio,
load CV); its interval is a bootstrap of the median over rounds. On CUDA the shapes are d_model 1024
to 2048 in bfloat16.
"""

import argparse
import math
import multiprocessing
import resource
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import torch
from measure import save, summary, take_turns
from torch import Tensor, nn

from moe_lab.model import MoEConfig, MoELayer, SwiGLU
from moe_lab.model.dispatch import BACKENDS, choose
from moe_lab.model.dispatch.liger import kernels as liger
from moe_lab.model.dispatch.quack import kernels as quack
from moe_lab.routing import RouterConfig, Routing
from moe_lab.training.readings import LayerReading, read_layers

HF_EXPERTS = {"HF eager": "eager", "HF grouped": "grouped_mm"}
OURS = tuple(name for name in BACKENDS if name != "oracle")
SLOW = 64
"""Experts above which ``HF eager``, seconds a step, is timed for 3 rounds only."""


@dataclass(frozen=True)
class Shape:
    tokens: int
    d_model: int
    experts: int
    top_k: int
    d_expert: int

    def __str__(self) -> str:
        return f"T{self.tokens} d{self.d_model} E{self.experts} k{self.top_k} f{self.d_expert}"


CPU_SHAPES = (
    Shape(4096, 256, 8, 2, 256),
    Shape(4096, 256, 64, 4, 128),
    Shape(4096, 256, 256, 8, 64),
)
CUDA_SHAPES = tuple(
    Shape(tokens, d_model, experts, top_k, d_model // 2)
    for tokens, d_model, experts, top_k in (
        (8192, 1024, 64, 4),
        (16384, 1024, 256, 8),
        (16384, 2048, 64, 8),
        (32768, 2048, 256, 8),
    )
)


def hf_block(shape: Shape, experts: str) -> nn.Module:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    config = Qwen3MoeConfig(
        hidden_size=shape.d_model,
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        moe_intermediate_size=shape.d_expert,
        norm_topk_prob=True,
    )
    config._experts_implementation = experts
    return Qwen3MoeSparseMoeBlock(config)


def our_layer(shape: Shape, dispatch: str) -> MoELayer:
    router = RouterConfig(num_experts=shape.experts, top_k=shape.top_k, norm_topk_prob=True)
    return MoELayer(MoEConfig(shape.d_model, shape.d_expert, router, dispatch=dispatch))


def module_of(name: str, shape: Shape) -> nn.Module:
    """The contestant of that name; all MoE contestants of a shape have the same weights."""
    if name == "dense":
        return SwiGLU(shape.d_model, shape.top_k * shape.d_expert)
    torch.manual_seed(0)
    layer = our_layer(shape, name if name in BACKENDS else "auto")
    if name not in HF_EXPERTS:
        return layer
    block = hf_block(shape, HF_EXPERTS[name])
    state = {
        "gate.weight": layer.router.weight,
        "experts.gate_up_proj": layer.experts.gate_up,
        "experts.down_proj": layer.experts.down,
    }
    block.load_state_dict({key: value.detach() for key, value in state.items()})
    return block


def step_of(
    module: nn.Module, shape: Shape, device: str, dtype: torch.dtype
) -> Callable[[], Tensor]:
    """One forward and backward on fixed tokens; returns the output."""
    module.to(device, dtype)
    generator = torch.Generator().manual_seed(1)
    x, grad = (
        torch.randn(1, shape.tokens, shape.d_model, generator=generator).to(device, dtype)
        for _ in range(2)
    )

    def step() -> Tensor:
        module.zero_grad(set_to_none=True)
        inside = x.clone().requires_grad_()
        y = module(inside)
        y = y[0] if isinstance(y, tuple) else y
        y.backward(grad)
        if device == "cuda":
            torch.cuda.synchronize()
        return y.detach()

    return step


def contest(shape: Shape, rounds: int, device: str, dtype: torch.dtype) -> pl.DataFrame:
    absent = {"native"} if device == "cuda" else {"liger", "quack"}
    if device == "cuda":
        absent |= {name for name, has in (("liger", liger()), ("quack", quack())) if has is None}
    names = [name for name in ("dense", *OURS, *HF_EXPERTS) if name not in absent]
    steps = {name: step_of(module_of(name, shape), shape, device, dtype) for name in names}
    wanted = steps["cpu"]()
    for name, step in steps.items():
        if name != "dense":
            torch.testing.assert_close(
                step(), wanted, atol=1e-4 if dtype == torch.float32 else 0.1, rtol=1e-2
            )
    slow = {name: steps.pop(name) for name in ("HF eager",) if shape.experts > SLOW}
    frames = [summary(take_turns(steps, rounds), against="dense")]
    if slow:
        frames.append(
            summary(take_turns({"dense": steps["dense"]} | slow, 3), against="dense").filter(
                pl.col("name") != "dense"
            )
        )
    return pl.concat(frames).with_columns(shape=pl.lit(str(shape)))


def peak_of(name: str, shape: Shape, threads: int) -> float:
    """MB that a step adds to a fresh process which holds the module and its input."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (name, shape, threads))


def _peak(name: str, shape: Shape, threads: int) -> float:
    torch.set_num_threads(threads)
    one = torch.ones(1, 1, requires_grad=True)
    torch.ops.moe_lab.mm(one, one, False, True).backward()  # the first call imports more of torch
    small = Shape(64, shape.d_model, 4, 2, 16)
    step_of(
        module_of(name, small), small, "cpu", torch.float32
    )()  # libraries and thread pools are not the step's
    step = step_of(module_of(name, shape), shape, "cpu", torch.float32)
    before = _resident()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    step()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024 - before


def _resident() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def bank_mb(shape: Shape) -> float:
    return 3 * shape.experts * shape.d_model * shape.d_expert * 4 / 2**20


def growth(rounds: int, device: str, dtype: torch.dtype) -> pl.DataFrame:
    """Milliseconds of ``auto`` and its dense twin as T, E and k double, and the exponent of each
    curve with its standard error.
    """
    base = Shape(2048, 256, 32, 4, 128)
    rows = []
    for axis, field in (("T", "tokens"), ("E", "experts"), ("k", "top_k")):
        values = [getattr(base, field) * factor // 2 for factor in (1, 2, 4, 8)]
        shapes = [Shape(**(vars(base) | {field: value})) for value in values]
        steps = {
            str(value): step_of(our_layer(shape, "auto"), shape, device, dtype)
            for value, shape in zip(values, shapes, strict=True)
        }
        frame = summary(take_turns(steps, rounds), against=str(values[0]))
        x, y = np.log2(values), np.log2(frame["ms"].to_numpy())
        (slope, _), covariance = np.polyfit(x, y, 1, cov=True)
        exponent = {"axis": axis, "exponent": slope, "exponent_se": math.sqrt(covariance[0, 0])}
        rows.append(
            frame.with_columns(
                value=pl.Series(values), **{key: pl.lit(item) for key, item in exponent.items()}
            )
        )
    return pl.concat(rows).select(
        "axis", "value", "ms", "ms_q1", "ms_q3", "exponent", "exponent_se"
    )


class _Watched(nn.Module):
    """A layer that keeps its last routing, as the decoder does."""

    routing: Routing

    def __init__(self, layer: MoELayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y, self.routing = self.layer(x, return_routing=True)
        return y


def instrumentation(rounds: int, device: str, dtype: torch.dtype) -> pl.DataFrame:
    """Time of a layer's step with a training step's readings over that without, per shape, with a
    95 % interval.
    """
    rows = []
    for shape in CUDA_SHAPES if device == "cuda" else CPU_SHAPES:
        # One layer for both: two differ by as much as the readings cost, by where they lie.
        watched = _Watched(our_layer(shape, "auto"))
        step_off = step_of(watched, shape, device, dtype)

        def with_metrics(
            step: Callable[[], Tensor] = step_off, module: _Watched = watched
        ) -> list[LayerReading]:
            step()
            return read_layers(1, {0: module.layer}, [[module.routing.detach()]])

        seconds = take_turns({"off": step_off, "on": with_metrics}, rounds)
        ratios = np.array(seconds["on"]) / np.array(seconds["off"])
        resampled = np.median(np.random.default_rng(0).choice(ratios, (2000, rounds)), axis=1)
        low, high = np.quantile(resampled, [0.025, 0.975])
        rows.append(
            {
                "shape": str(shape),
                "rounds": rounds,
                "ratio": float(np.median(ratios)),
                "lo": float(low),
                "hi": float(high),
            }
        )
    return pl.DataFrame(rows)


def show(frame: pl.DataFrame) -> None:
    with pl.Config(
        tbl_rows=-1,
        tbl_cols=-1,
        tbl_width_chars=180,
        float_precision=2,
        tbl_hide_dataframe_shape=True,
    ):
        print(frame, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    other = parser.add_mutually_exclusive_group()
    other.add_argument("--growth", action="store_true")
    other.add_argument("--instrumentation", action="store_true")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    cuda = arguments.device == "cuda"
    dtype, suffix = (torch.bfloat16, "_cuda") if cuda else (torch.float32, f"_{arguments.threads}t")
    if arguments.growth:
        frame, name = growth(arguments.rounds, arguments.device, dtype), "moe_layer_growth"
        show(frame)
    elif arguments.instrumentation:
        frame, name = (
            instrumentation(arguments.rounds, arguments.device, dtype),
            "moe_layer_instrumentation",
        )
        show(frame)
    else:
        frames = []
        for shape in CUDA_SHAPES if cuda else CPU_SHAPES:
            table = contest(shape, arguments.rounds, arguments.device, dtype)
            if not cuda:
                peaks = pl.DataFrame(
                    {
                        "name": table["name"],
                        "peak_mb": [
                            peak_of(name, shape, arguments.threads) for name in table["name"]
                        ],
                    }
                )
                bound = 1.3 * peaks.filter(pl.col("name") == "dense")["peak_mb"][0] + bank_mb(shape)
                table = table.join(peaks, on="name", how="left").with_columns(
                    bound_mb=pl.lit(bound)
                )
            layer = our_layer(shape, "auto")
            x = torch.empty(1, shape.d_model, device=arguments.device, dtype=dtype)
            frames.append(
                table.with_columns(
                    auto=pl.lit(choose(x, layer.experts.to(arguments.device, dtype)).name)
                )
            )
            show(frames[-1])
        frame, name = pl.concat(frames), "moe_layer"
    print("saved", save(frame, name + suffix))


if __name__ == "__main__":
    main()
