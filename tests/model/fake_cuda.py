"""Training steps on a CUDA device that computes nothing, and where the host would wait for it.

    python fake_cuda.py LIBRARY    # fake_cuda.cpp, compiled; prints a line of JSON for each step

Tensors are torch's fake ones: shapes, strides, dtypes and devices as on CUDA, no values. A wait is
an operation that gives the host a value of the device, or copies between them without
``non_blocking``; the line is the innermost one of moe_lab.
"""

import ctypes
import json
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

if __name__ == "__main__":
    ctypes.CDLL(sys.argv[1])  # before torch

import numpy as np
import torch
import torch.cuda.amp.common
from decoder_options import OPTIONS
from test_router_gradients import CONFIGS  # pyright: ignore[reportMissingImports]
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moe_lab.model import DecoderConfig, MoEConfig, MoELayer
from moe_lab.model.dispatch.quack import Kernels
from moe_lab.routing import ROUTERS, RouterConfig, RouterContext
from moe_lab.training import RunConfig
from moe_lab.training.ranks import ALONE
from moe_lab.training.run import _Run

PACKAGE = str(Path(__file__).parents[2] / "moe_lab")
CUDA = torch.device("cuda")
COPIES = ("aten::_to_copy", "aten::copy_")
DECODERS = ("plain", "shortcut", "hash layers", "n-gram tables", "most at once")
FIELDS: dict[str, dict[str, Any]] = CONFIGS | {
    "hash": {"vocab_size": 9}, "token_lookup": {"vocab_size": 9}, "random": {},
}  # fmt: skip


def no_gemm(A: Tensor, B: Tensor, out: Tensor | None = None, **options: Any) -> Tensor:
    """The shapes of quack-kernels' products (quack_stand_in.py has the values)."""
    index, bounds = options.get("A_idx"), options.get("cu_seqlens_k")
    rows = len(A) if index is None else len(index)
    found = A.new_empty(rows, B.shape[-1])
    if bounds is not None:
        found = A.new_empty(len(bounds) - 1, A.shape[0], B.shape[1])
    assert out is None or out.shape == found.shape
    return found if out is None else out


def no_gemm_gated(A: Tensor, B: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    act = no_gemm(A, B, **options)
    return act, act.new_empty(len(act), act.shape[1] // 2)


def no_gemm_dgated(A: Tensor, B: Tensor, PreAct: Tensor, **options: Any) -> Any:
    hidden = no_gemm(A, B, A_idx=options["A_idx"])
    return torch.empty_like(PreAct), hidden, hidden.new_empty(len(hidden), dtype=torch.float32)


class Waits(TorchDispatchMode):
    """Counts of (what, line)."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def note(self, what: str) -> None:
        error = sys.exc_info()[2]
        stack = traceback.extract_tb(error) if error else traceback.extract_stack()
        frames = [f for f in stack if f.filename.startswith(PACKAGE)]
        last = frames[-1] if frames else traceback.extract_stack()[0]
        self.seen[f"{what} at {Path(last.filename).name}: {last.line}"] += 1

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.name() == "aten::_pin_memory":  # fake tensors have none
            return args[0]
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        devices = {tensor.device.type for tensor in tensors}
        if func.name() == "aten::_local_scalar_dense":
            if "cuda" in devices:
                self.note("value")
            return 1
        found = func(*args, **kwargs)
        waiting = func.name() in COPIES and not kwargs.get("non_blocking")
        if waiting and devices | {found.device.type} >= {"cpu", "cuda"}:
            self.note(f"copy to {found.device.type}")
        return found


@contextmanager
def fake_cuda() -> Iterator[Waits]:
    with FakeTensorMode(allow_non_fake_inputs=True), Waits() as waits, CUDA:
        yield waits


def say(what: str, waits: Waits) -> None:
    print(json.dumps({"step": what, "waits": dict(waits.seen)}), flush=True)
    waits.seen.clear()


def run_of(config: DecoderConfig, folder: str) -> _Run:
    run = RunConfig(
        model=config, seq_length=16, batch_size=4, train_tokens=640,
        dtype="bfloat16",  # type: ignore[arg-type]
    )  # fmt: skip
    text: Any = SimpleNamespace(train=np.zeros(5000, dtype=np.int64))
    return _Run(run, Path(folder), text, CUDA, ALONE, None, ())


def decoders() -> None:
    for name in DECODERS:
        config = OPTIONS[name]
        with fake_cuda() as waits, tempfile.TemporaryDirectory() as folder:
            run = run_of(config, folder)
            waits.seen.clear()
            run._one_step(logged=False)
            say(f"decoder, {name}", waits)
            if name == "shortcut":
                run._one_step(logged=True)
                say("logged", waits)


def layers() -> None:
    """Forward, backward and the controller's update with each router, and each backend."""
    cases = [(f"router {kind}", kind, "grouped") for kind in sorted(ROUTERS)]
    cases += [(f"backend {name}", "longcat", name) for name in ("grouped", "cpu", "quack", "auto")]
    for what, kind, dispatch in cases:
        router = RouterConfig(**{"kind": kind, "top_k": 2, "num_experts": 8} | FIELDS.get(kind, {}))
        with fake_cuda() as waits, torch.autocast("cuda", torch.bfloat16):
            layer = MoELayer(MoEConfig(64, 32, router, dispatch=dispatch))
            x = torch.randn(2, 50, 64, requires_grad=True)
            ids = torch.zeros(100, dtype=torch.int64)
            context = RouterContext(token_ids=ids, sequence_length=50)
            waits.seen.clear()
            try:
                y, routing = layer(x, context, return_routing=True)
            except (DataDependentOutputException, DynamicOutputShapeException, RuntimeError):
                waits.note("needs values")
                say(what, waits)
                continue
            assert y.dtype == torch.bfloat16 or layer.zero_experts is not None, what
            y.sum().backward()
            layer.router.update([routing.detach()])
            down = layer.experts.down
            assert down.grad is not None
            assert (down.grad.shape, down.grad.dtype) == (down.shape, torch.float32)
            say(what, waits)


def main() -> None:
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.cuda.is_bf16_supported = lambda *_, **__: True  # type: ignore[assignment]
    torch.cuda.get_device_capability = lambda *_: (9, 0)  # type: ignore[assignment]
    sys.modules["moe_lab.model.dispatch.quack"].kernels = lambda: Kernels(  # type: ignore[attr-defined]
        no_gemm, no_gemm_gated, no_gemm_dgated
    )
    torch.nn.Module.to = lambda self, *_, **__: self  # type: ignore[assignment]  # made there
    decoders()
    layers()


if __name__ == "__main__":
    main()
