"""Pieces of ``gpu.py`` about one MoE layer: tests, speed, waits of the host, statistics."""

import os
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu_models import stepper
from gpu_session import Session, Sizes, leave_if_dead, quartiles, seconds_of

ROOT = Path(__file__).resolve().parents[1]
CONTESTANTS = ("matrix product", "dense", "grouped", "liger", "HF grouped", "quack")
ON_CUDA = ("liger", "quack")
COMPILING = 360.0
"""Seconds after which ``quack`` counts as hanging: its kernels compiled in 180 s on two cores."""
TARGETS = (0.40, 0.35, 1.25)
"""Least share of the peak forward, least with backward, most over the dense twin."""


def tests(session: Session) -> None:
    """tests/model/test_on_device.py, on the device."""
    env = os.environ | {"MOE_LAB_DEVICE": session.sizes.device, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-o", "addopts=-qrs", "-p", "no:cacheprovider",
         "--no-header", "--durations=5", str(ROOT / "tests" / "model" / "test_on_device.py")],
        env=env, cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    lines = done.stdout.strip().splitlines()
    print("\n".join(lines[-25:]))
    summary = lines[-1] if lines else done.stderr.strip()[-300:]
    row = {"error": summary if done.returncode else "", "returncode": done.returncode,
           "summary": summary, "output": done.stdout[-8000:]}  # fmt: skip
    session.write("tests", [row])
    if done.returncode:
        raise RuntimeError(f"pytest ended with code {done.returncode}: {summary}")


def target(session: Session) -> None:
    """``layer`` at its first shape."""
    _layer(session, session.sizes.shapes[:1])


def layer(session: Session) -> None:
    """One layer, forward and with backward, of each contestant; first the device's own peak."""
    _layer(session, session.sizes.shapes)


def _layer(session: Session, shapes: tuple[tuple[int, int, int, int, int], ...]) -> None:
    sizes = session.sizes
    cases = [
        {"name": name, **_named(shape)}
        for shape in shapes
        for name in CONTESTANTS
        if sizes.device == "cuda" or name not in ON_CUDA
    ]
    session.each(
        "layer",
        cases,
        lambda **case: _layer_row(sizes, **case),
        lambda case: COMPILING if case["name"] == "quack" else session.patience,
    )


def _layer_row(
    sizes: Sizes, name: str, tokens: int, d_model: int, experts: int, top_k: int, d_expert: int
) -> dict[str, Any]:
    import torch
    from moe_layer import Shape, module_of

    device = sizes.device
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    if name == "matrix product":
        a, b = (torch.randn(sizes.peak, sizes.peak, device=device, dtype=dtype) for _ in range(2))
        times = seconds_of(lambda: a @ b, device, sizes.rounds)
        rate = 2 * sizes.peak**3 / statistics.median(times) / 1e12
        return {"forward_tflops": rate, "both_tflops": rate} | quartiles(times, "forward")
    torch.manual_seed(1)
    with torch.device(device):  # a CPU would draw the largest's weights in 13 s
        module = module_of(name, Shape(tokens, d_model, experts, top_k, d_expert)).to(dtype)
        x, grad = (torch.randn(1, tokens, d_model).to(dtype) for _ in range(2))

    def forward(inside: torch.Tensor) -> torch.Tensor:
        y = module(inside)
        return y[0] if isinstance(y, tuple) else y

    def both() -> None:
        module.zero_grad(set_to_none=True)
        forward(x.clone().requires_grad_()).backward(grad)

    def alone() -> None:
        with torch.no_grad():
            forward(x)

    times = quartiles(seconds_of(alone, device, sizes.rounds), "forward")
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    resting = torch.cuda.memory_allocated() if device == "cuda" else 0
    times |= quartiles(seconds_of(both, device, sizes.rounds), "both")
    peak = torch.cuda.max_memory_allocated() - resting if device == "cuda" else 0
    work = 6 * tokens * top_k * d_model * d_expert  # of the experts alone, forward
    return times | {
        "forward_tflops": work / times["forward"] / 1e12,
        "both_tflops": 3 * work / times["both"] / 1e12,
        "peak_bytes": peak,
    }


def summary(session: Session) -> list[str]:
    """A line for each measured contestant of a shape: shares of the matrix product's speed, and
    time over the dense twin's.
    """
    lines: list[str] = []
    measured = [row for row in session.rows("layer") if not row["error"]]
    for shape in map(_named, session.sizes.shapes):
        here = {row["name"]: row for row in measured if shape.items() <= row.items()}
        if not {"matrix product", "dense"} <= set(here):
            continue
        peak, dense = here.pop("matrix product")["forward_tflops"], here.pop("dense")["both"]
        for name, row in here.items():
            shares = row["forward_tflops"] / peak, row["both_tflops"] / peak
            ratio = row["both"] / dense
            met = shares[0] >= TARGETS[0] and shares[1] >= TARGETS[1] and ratio <= TARGETS[2]
            verdict = "targets met" if met else "below the targets"
            lines.append(
                f"{', '.join(f'{key} {value}' for key, value in shape.items())}, {name}: "
                f"{shares[0]:.2f} of the peak forward, {shares[1]:.2f} with backward, "
                f"{ratio:.2f} of dense: {verdict}"
            )
    return lines


def _named(shape: tuple[int, int, int, int, int]) -> dict[str, int]:
    names = ("tokens", "d_model", "experts", "top_k", "d_expert")
    return dict(zip(names, shape, strict=True))


def sync(session: Session) -> None:
    """Host waits of a step after warming up: as torch names them where it sees them (a warning with
    the line), and by the runtime calls in the profile.
    """
    sizes = session.sizes
    rows = []
    for dispatch in ("grouped", *(ON_CUDA if sizes.device == "cuda" else ())):
        try:
            step = stepper(sizes, *sizes.decoders[0][1:], sizes.experts[0], dispatch)
            rows += [{"step": f"decoder, {dispatch}"} | row for row in waits(step, sizes.device)]
        except Exception as error:  # a package that is missing
            why = f"{type(error).__name__}: {error}"[:300]
            rows.append({"step": f"decoder, {dispatch}", "seen_by": "", "what": "", "error": why})
            leave_if_dead(sizes.device)
    for name, metrics in (("without", False), ("with", True)):
        step = _layer_step(sizes, metrics)
        rows += [{"step": f"layer, {name} statistics"} | row for row in waits(step, sizes.device)]
    session.write("sync", rows)


def waits(step: Callable[[], object], device: str) -> list[dict[str, Any]]:
    """A row for each kind of wait of one step, or one that says there is none."""
    import torch

    for _ in range(3):
        step()
    cuda = device == "cuda"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if cuda:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            if cuda:
                torch.cuda.set_sync_debug_mode("default")
    places = [
        f"{Path(item.filename).name}:{item.lineno}"
        for item in caught
        if "called a synchronizing" in str(item.message)  # switching it on warns too
    ]
    rows = [{"seen_by": "torch", "what": at, "count": places.count(at)} for at in sorted({*places})]
    own = _calls_of(lambda: None, cuda)
    for key, count in _calls_of(step, cuda).items():
        if ("Synchronize" in key or "_local_scalar_dense" in key) and count > own.get(key, 0):
            rows.append({"seen_by": "profiler", "what": key, "count": count - own.get(key, 0)})
    return rows or [{"seen_by": "both", "what": "no wait", "count": 0}]


def _calls_of(step: Callable[[], object], cuda: bool) -> dict[str, int]:
    """Operator or runtime call -> how often, those of the profiler's own end included."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=kinds) as seen:
        step()
        if cuda:
            torch.cuda.synchronize()
    return {item.key: item.count for item in seen.key_averages()}


def _layer_step(sizes: Sizes, metrics: bool) -> Callable[[], None]:
    """A step of the first shape, with the statistics that training records or without."""
    import torch
    from moe_layer import Shape, our_layer

    from moe_lab.training.readings import read_layers

    dtype = torch.bfloat16 if sizes.device == "cuda" else torch.float32
    shape = Shape(*sizes.shapes[0])
    with torch.device(sizes.device):
        module = our_layer(shape, "auto").to(dtype)
        x = torch.randn(1, shape.tokens, shape.d_model, dtype=dtype)

    def step() -> None:
        module.zero_grad(set_to_none=True)
        y, routing = module(x.clone().requires_grad_(), return_routing=True)
        y.sum().backward()
        if metrics:
            read_layers(1, {0: module}, [[routing.detach()]])

    return step


def instrumentation(session: Session) -> None:
    """A layer's step with the metrics of a training step over that without, in turns."""
    import numpy as np

    sizes = session.sizes
    steps = [_layer_step(sizes, metrics) for metrics in (False, True)]
    ratios = []
    for _ in range(max(3, sizes.rounds)):
        off, on = (statistics.median(seconds_of(step, sizes.device, 5)) for step in steps)
        ratios.append(on / off)
    draws = np.random.default_rng(0).choice(ratios, (2000, len(ratios)))
    low, high = np.quantile(np.median(draws, axis=1), (0.025, 0.975))
    row = {"ratio": statistics.median(ratios), "lo": float(low), "hi": float(high)}
    session.write("instrumentation", [_named(sizes.shapes[0]) | row])
