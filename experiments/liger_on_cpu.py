"""The Triton kernels of backend ``liger`` on a CPU, in Triton's interpreter, against the oracle.

    pip install 'moe_lab[gpu]' triton
    python experiments/liger_on_cpu.py              # about a minute a case on one core

Outputs and the gradients of tokens, gate weights and both matrices, in float32, over routings with
empty experts, one expert, one slot, zero-compute and unused slots, weights on the experts' input.
``error`` is the largest difference over the largest value of the oracle. Exits with 1 above 1e-5.
Out: ``experiments/gpu/interpreter.parquet``.
"""

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

os.environ["TRITON_INTERPRET"] = "1"  # both before Triton is imported
os.environ["LIGER_FUSED_MOE_AUTOTUNE"] = "0"

import polars as pl
import torch
from torch import Tensor

from moe_lab.files import atomic_path
from moe_lab.model import ExpertBank
from moe_lab.model.dispatch import BACKENDS
from moe_lab.routing import Routing
from moe_lab.versions import provenance

OUT = Path(__file__).parent / "gpu" / "interpreter.parquet"
BOUND = 1e-5
CASES = {  # tokens, real experts, zero-compute experts, slots, share of unused slots, on the input
    "unused slots, zero-compute experts, an empty expert": (7, 5, 2, 3, 0.3, False),
    "every slot runs": (9, 4, 0, 2, 0.0, False),
    "one expert, one slot": (5, 1, 0, 1, 0.0, False),
    "weights on the input": (6, 3, 0, 2, 0.0, True),
    "no slot runs": (4, 3, 2, 2, 1.0, False),
    "no token": (0, 3, 0, 2, 0.0, False),
}


class Weights(NamedTuple):
    gate_up: Tensor
    down: Tensor


def routing_of(
    tokens: int, experts: int, zero: int, slots: int, unused: float, on_input: bool
) -> Routing:
    generator = torch.Generator().manual_seed(tokens)
    noise = torch.rand(tokens, experts + zero, generator=generator)
    noise[:, experts - 1] -= 1.0 if experts > slots else 0.0  # the last expert is not chosen
    indices = noise.argsort(dim=1, descending=True)[:, :slots]
    indices = torch.where(torch.rand(tokens, slots, generator=generator) < unused, -1, indices)
    weights = torch.rand(tokens, slots, generator=generator) * (indices >= 0)
    scores = torch.full((tokens, experts + zero), 1 / (experts + zero))
    return Routing(indices, weights, scores.log(), scores, experts, zero, weights_on_input=on_input)


def outputs(name: str, routing: Routing, bank: ExpertBank, x_TD: Tensor) -> dict[str, Tensor]:
    """The output and all gradients of backend ``name``."""
    inputs = {
        "tokens": x_TD.clone().requires_grad_(),
        "weights": routing.weights.clone().requires_grad_(),
    } | {key: value.detach().requires_grad_() for key, value in bank.named_parameters()}
    y_TD = BACKENDS[name](
        inputs["tokens"],
        replace(routing, weights=inputs["weights"]),
        Weights(inputs["gate_up"], inputs["down"]),
    )
    if not y_TD.requires_grad:  # the oracle, where nothing runs
        zeros = {f"gradient of {key}": torch.zeros_like(value) for key, value in inputs.items()}
        return {"output": y_TD} | zeros
    weighting = torch.arange(y_TD.numel()).view_as(y_TD).cos()
    gradients = torch.autograd.grad(
        (y_TD * weighting).sum(), list(inputs.values()), allow_unused=True
    )
    return {"output": y_TD.detach()} | {
        f"gradient of {key}": torch.zeros_like(value) if gradient is None else gradient
        for (key, value), gradient in zip(inputs.items(), gradients, strict=True)
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=len(CASES), help="the first so many")
    args = parser.parse_args()
    rows = []
    for case, shape in list(CASES.items())[: args.cases]:
        torch.manual_seed(0)
        routing, bank = routing_of(*shape), ExpertBank(shape[1], 32, 16)
        x_TD = torch.randn(shape[0], 32)
        wanted = outputs("oracle", routing, bank, x_TD)
        for what, value in outputs("liger", routing, bank, x_TD).items():
            scale = float(wanted[what].abs().max()) if wanted[what].numel() else 0.0
            gap = float((value - wanted[what]).abs().max()) if value.numel() else 0.0
            rows.append({"case": case, "what": what, "error": gap / scale if scale else gap})
            print(f"{case:52} {what:22} {rows[-1]['error']:.1e}", flush=True)
    frame = pl.DataFrame(rows).with_columns(
        pl.lit(value).alias(key) for key, value in provenance().items()
    )
    if args.cases == len(CASES):
        OUT.parent.mkdir(exist_ok=True)
        with atomic_path(OUT) as temporary:
            frame.write_parquet(temporary)
    return int(frame["error"].max() > BOUND)  # type: ignore[operator]


if __name__ == "__main__":
    sys.exit(main())
