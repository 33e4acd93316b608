"""The kernels of backends ``liger`` and ``quack`` on a CPU, against the oracle.

    pip install 'moe_lab[gpu]' triton
    python experiments/kernels_on_cpu.py liger    # about a minute a case on one core
    python experiments/kernels_on_cpu.py liger --cases 0    # compiles them only: half a minute
    python experiments/kernels_on_cpu.py quack    # about four minutes

Outputs and the gradients of tokens, gate weights and both matrices, in float32, over routings with
empty experts, one expert, one slot, zero-compute and unused slots, weights on the experts' input.
``error`` is the largest difference over the largest value of the oracle.

``liger`` runs its Triton kernels in Triton's interpreter. Besides, those of a step in bfloat16 at
the shapes of ``gpu.py`` are compiled for sm_90 and sm_100, without launching them: seconds of
processor time, shared memory of a block, registers and spilled bytes of a thread.

``quack`` runs on quack-kernels' own reference functions; besides, a forward and backward pass in
bfloat16 compiles every product for sm_90a and sm_100a as it would on a device (rows ``compiled``,
with seconds), without launching it.

Exits with 1 above 1e-5, where a kernel does not compile, or where one needs more shared memory than
a block has.
Out: ``experiments/gpu/<backend>_on_cpu.parquet`` and ``liger_compiled.parquet``.
"""

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

if "--compile" not in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # both before Triton is imported
os.environ["LIGER_FUSED_MOE_AUTOTUNE"] = "0"

import polars as pl
import torch
from torch import Tensor

from moe_lab.files import atomic_path
from moe_lab.model import ExpertBank
from moe_lab.model.dispatch import BACKENDS
from moe_lab.model.dispatch.bank import Weights
from moe_lab.model.dispatch.quack import Kernels
from moe_lab.routing import Routing
from moe_lab.versions import provenance

OUT = Path(__file__).parent / "gpu"
BOUND = 1e-5
ARCHITECTURES = {"90": "sm_90a", "100": "sm_100a"}
SHARED = 227 * 1024
"""Bytes that a block can have on either."""
CASES = {  # tokens, real experts, zero-compute experts, slots, share of unused slots, on the input
    "unused slots, zero-compute experts, an empty expert": (7, 5, 2, 3, 0.3, False),
    "every slot runs": (9, 4, 0, 2, 0.0, False),
    "one expert, one slot": (5, 1, 0, 1, 0.0, False),
    "weights on the input": (6, 3, 0, 2, 0.0, True),
    "no slot runs": (4, 3, 2, 2, 1.0, False),
    "no token": (0, 3, 0, 2, 0.0, False),
}


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


class References:
    """quack-kernels' functions for tests under the names of its kernels.

    They lack what the kernels add: the scaled gradient and its sums, and an output whose last
    dimension is not contiguous.
    """

    def __init__(self) -> None:
        self.module = importlib.import_module("quack.gemm_interface")

    def gemm(self, A: Tensor, B: Tensor, *, tuned: bool, **options: Any) -> Tensor:
        out, layout = options.pop("out", None), options.pop("concat_layout", None)
        halves = layout == ("out",)
        found = self.module.gemm_ref(A, B, concat_layout=None if halves else layout, **options)
        if halves:  # the kernel writes columns in turns to an output that holds two halves
            found = torch.cat([found[..., ::2], found[..., 1::2]], dim=-1)
        return found if out is None else out.copy_(found)

    def gemm_gated(
        self, A: Tensor, B: Tensor, *, tuned: bool, **options: Any
    ) -> tuple[Tensor | None, Tensor]:
        return self.module.gemm_gated_ref(A, B, **options)

    def gemm_dgated(
        self, A: Tensor, B: Tensor, act: Tensor, *, colvec_scale: Tensor, colvec_reduce: bool,
        activation: str, dynamic_scheduler: bool, tuned: bool, **rows: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        with torch.enable_grad():  # it differentiates SwiGLU by autograd
            A, B, act = A.detach(), B.detach(), act.detach()
            found = self.module.gemm_dgated_ref(A, B, act, activation=activation, **rows)
        grad_act, hidden = (value.detach() for value in found)
        sums = (self.module.gemm_ref(A, B, **rows) * hidden).sum(dim=1)
        scale = colvec_scale.unsqueeze(1)
        return grad_act * scale, hidden * scale, sums


def set_kernels(functions: object) -> None:
    """Backend ``quack`` runs the functions of that object from now on, on any device."""
    backend = sys.modules["moe_lab.model.dispatch.quack"]
    chosen = Kernels(*(getattr(functions, name) for name in Kernels._fields))
    vars(backend)["kernels"] = lambda: chosen
    vars(backend)["obstacle"] = lambda x_TD, bank: ""


def compile_here(architecture: str) -> None:
    """Compile what a step of ``quack`` runs, and print a line of JSON for each product."""
    os.environ |= {
        "QUACK_ARCH": architecture,
        "CUTE_DSL_ARCH": ARCHITECTURES[architecture],
        "QUACK_CACHE_ENABLED": "0",
    }
    interface = importlib.import_module("quack.gemm_interface")
    for name in ("quack.gemm", "quack.gemm_runtime.host"):  # the two that launch
        launching = vars(importlib.import_module(name))
        launching["launch_gemm"] = lambda *_: None
        launching["get_max_active_clusters"] = lambda *_, **__: 1

    class Timed:
        """The kernels, compiled at their first call."""

        def __getattr__(self, name: str) -> Any:
            def call(*operands: Tensor, **options: Any) -> Any:
                began = time.perf_counter()
                found = getattr(interface, name)(*operands, **options)
                line = {"what": name, "seconds": time.perf_counter() - began}
                print(json.dumps(line), flush=True)
                return found

            return call

    set_kernels(Timed())
    bank = ExpertBank(4, 64, 32).bfloat16()
    x_TD = torch.zeros(20, 64, dtype=torch.bfloat16, requires_grad=True)
    routing = routing_of(20, 4, 0, 2, 0.0, False)
    BACKENDS["quack"](x_TD, routing, bank).sum().backward()
    with torch.no_grad():
        BACKENDS["quack"](x_TD, routing, bank)


def compile_liger(architecture: str) -> None:
    """Compile what a step of ``liger`` runs at the shapes of ``gpu.py``, and print a line of JSON
    for each kernel.

    The kernels' arguments are CPU tensors: few tokens, and few experts except where their number is
    compiled in.
    """
    from gpu_session import FULL

    triton, runtime = importlib.import_module("triton"), importlib.import_module("triton.runtime")
    target = importlib.import_module("triton.backends.compiler").GPUTarget
    kernel_class = runtime.JITFunction

    class Driver:
        """Of a device that is not there."""

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: object = None) -> int:
            return 0

        def get_current_target(self) -> Any:
            return target("cuda", int(architecture), 32)

    runtime.driver.set_active(Driver())
    tool = Path(str(triton.__file__)).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    run, seen = kernel_class.run, set[int]()
    shape: dict[str, int] = {}

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool = False, **options: Any) -> Any:
        began = sum(os.times()[:4])
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        seconds = sum(os.times()[:4]) - began
        if id(kernel) in seen:
            return kernel
        seen.add(id(kernel))
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            Path(file.name).write_bytes(kernel.asm["cubin"])
            usage = subprocess.run(
                [tool, "--dump-resource-usage", file.name],
                capture_output=True, text=True, check=True,
            ).stdout  # fmt: skip
        numbers = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
        line = {
            "what": self.__name__, "seconds": seconds, "shared_bytes": kernel.metadata.shared,
            "registers": int(numbers["REG"]),
            "spilled_bytes": int(numbers["STACK"]) + int(numbers["LOCAL"]),
            "triton": triton.__version__,
        }  # fmt: skip
        print(json.dumps(shape | line), flush=True)
        return kernel

    kernel_class.run = compile_only
    torch.Tensor.item = lambda self: 8  # type: ignore[method-assign]  # tiles: nothing counted them
    liger = importlib.import_module("liger_kernel.ops.fused_moe")
    for _, d_model, experts, top_k, d_expert in FULL.shapes:
        shape = {"d_model": d_model, "experts": experts, "top_k": top_k, "d_expert": d_expert}
        bank = ExpertBank(2, d_model, d_expert).bfloat16()
        x_TD = torch.zeros(64, d_model, dtype=torch.bfloat16, requires_grad=True)
        indices = torch.zeros(64, top_k, dtype=torch.int32)
        weights = torch.zeros(64, top_k, dtype=torch.bfloat16, requires_grad=True)
        liger.compute_routing_metadata(indices, experts)
        run_once = liger.LigerFusedMoEFunction.apply
        run_once(x_TD, bank.gate_up, bank.down, indices, weights).sum().backward()


def compiled(backend: str) -> list[dict[str, Any]]:
    rows = []
    for architecture, name in ARCHITECTURES.items():
        with tempfile.TemporaryDirectory() as cache:
            done = subprocess.run(
                [sys.executable, __file__, backend, "--compile", architecture],
                env=os.environ | {"TRITON_CACHE_DIR": cache, "TRITON_INTERPRET": "0"},
                capture_output=True, text=True, check=False,
            )  # fmt: skip
        if done.returncode:
            print(done.stderr[-2000:], file=sys.stderr)
        lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        case = {"case": f"compiled for {name}", "error": float(done.returncode)}
        rows += [case | line for line in lines or [{"what": "nothing", "seconds": 0.0}]]
    return rows


def save(rows: list[dict[str, Any]], name: str) -> None:
    frame = pl.DataFrame(rows, infer_schema_length=None).with_columns(
        pl.lit(value).alias(key) for key, value in provenance().items()
    )
    OUT.mkdir(exist_ok=True)
    with atomic_path(OUT / f"{name}.parquet") as temporary:
        frame.write_parquet(temporary)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("backend", choices=("liger", "quack"))
    parser.add_argument("--cases", type=int, default=len(CASES), help="the first so many")
    parser.add_argument("--compile", choices=ARCHITECTURES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.compile:
        {"liger": compile_liger, "quack": compile_here}[args.backend](args.compile)
        return 0
    if args.backend == "quack":
        set_kernels(References())
    rows = []
    for case, shape in list(CASES.items())[: args.cases]:
        torch.manual_seed(0)
        routing, bank = routing_of(*shape), ExpertBank(shape[1], 32, 16)
        x_TD = torch.randn(shape[0], 32)
        wanted = outputs("oracle", routing, bank, x_TD)
        for what, value in outputs(args.backend, routing, bank, x_TD).items():
            scale = float(wanted[what].abs().max()) if wanted[what].numel() else 0.0
            gap = float((value - wanted[what]).abs().max()) if value.numel() else 0.0
            rows.append({"case": case, "what": what, "error": gap / scale if scale else gap})
            print(f"{case:52} {what:22} {rows[-1]['error']:.1e}", flush=True)
    whole = args.cases == len(CASES)
    products = compiled(args.backend) if whole or not args.cases else []
    if args.backend == "quack":
        rows += products
    elif products:
        save(products, "liger_compiled")
    if whole:
        save(rows, f"{args.backend}_on_cpu")
    wrong = any(row["error"] > BOUND for row in [*rows, *products])
    return int(wrong or any(row.get("shared_bytes", 0) > SHARED for row in products))


if __name__ == "__main__":
    sys.exit(main())
