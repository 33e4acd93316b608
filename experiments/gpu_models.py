"""Pieces of ``gpu.py`` about whole models: training, captures, runs of the sparsity wall."""

import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu_session import Session, Sizes

ROOT = Path(__file__).resolve().parents[1]
BYTES_PER_PARAMETER = 16
"""Of training in float32: the weight, its gradient and two moments."""


def stepper(
    sizes: Sizes,
    layers: int,
    d_model: int,
    d_expert: int,
    experts: int,
    dispatch: str = "auto",
) -> Callable[[], None]:
    """A training step of a decoder under autocast."""
    import torch
    import training_throughput

    from moe_lab.model import DecoderConfig, MoEConfig
    from moe_lab.routing import RouterConfig

    router = RouterConfig(num_experts=experts, top_k=min(8, experts // 2), norm_topk_prob=True)
    config = DecoderConfig(
        vocab_size=4096 if sizes.device == "cuda" else 64,
        num_layers=layers,
        d_model=d_model,
        num_heads=max(1, d_model // 64),
        context_length=sizes.length,
        moe=MoEConfig(d_model, d_expert, router, dispatch=dispatch),
    )
    needed = BYTES_PER_PARAMETER * 3 * layers * experts * d_model * d_expert
    if sizes.device == "cuda" and needed > (there := torch.cuda.mem_get_info()[0]):
        raise MemoryError(f"experts in training take {needed / 1e9:.0f} GB of {there / 1e9:.0f}")
    return training_throughput.stepper(
        config, sizes.batch, sizes.length, sizes.device, autocast=torch.bfloat16
    )[0]


def training(session: Session) -> None:
    """Tokens per second of decoders alone, and of several processes of the first on the device."""
    sizes = session.sizes
    cases = [
        {"size": name, "experts": experts, "processes": 1}
        for name, *_ in sizes.decoders
        for experts in sizes.experts
    ] + [
        {"size": sizes.decoders[0][0], "experts": sizes.experts[0], "processes": number}
        for number in sizes.packed
    ]
    session.each("training", cases, lambda **case: _training_row(sizes, **case))


def _training_row(sizes: Sizes, size: str, experts: int, processes: int) -> dict[str, Any]:
    shape = next(rest for name, *rest in sizes.decoders if name == size)
    arguments = (sizes, *shape, experts)
    if processes == 1:
        return {"tokens_per_second": _rate(arguments, lambda: None)}
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, context.Pool(processes) as pool:
        together = manager.Barrier(processes, timeout=120)
        rates = pool.starmap(_rate_beside, [(arguments, together)] * processes, chunksize=1)
    return {"tokens_per_second": sum(rates)}


def _rate_beside(arguments: tuple[Any, ...], together: Any) -> float:
    try:
        return _rate(arguments, together.wait)
    except BaseException:
        together.abort()  # the others need not wait
        raise


def _rate(arguments: tuple[Any, ...], meet: Callable[[], object]) -> float:
    """Tokens per second of one process while those that it meets train too."""
    import torch

    sizes = arguments[0]
    torch.set_num_threads(1)
    step = stepper(*arguments)
    wait = torch.cuda.synchronize if sizes.device == "cuda" else lambda: None
    for _ in range(3):
        step()
    wait()
    meet()
    began, steps = time.perf_counter(), 0
    while time.perf_counter() < began + sizes.seconds:
        step()
        wait()
        steps += 1
    rate = steps * sizes.batch * sizes.length / (time.perf_counter() - began)
    meet()  # one that ends first must not leave its share to the others
    return rate


def capture(session: Session) -> None:
    """A transformers Qwen3-MoE of random weights, forward with and without an open capture."""
    import torch
    from capture_overhead import paired
    from capture_overhead import sizes as bytes_of
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    from moe_lab.trace import capture as traced
    from moe_lab.trace import open_trace

    layers, d_model, vocabulary = session.sizes.captured
    fields: dict[str, Any] = {
        "hidden_size": d_model, "moe_intermediate_size": d_model // 4,
        "intermediate_size": d_model, "num_attention_heads": 8, "num_key_value_heads": 4,
        "head_dim": d_model // 8, "num_hidden_layers": layers, "vocab_size": vocabulary,
        "num_experts": 64, "num_experts_per_tok": 8, "norm_topk_prob": True,
    }  # fmt: skip
    config = Qwen3MoeConfig(**fields)
    cuda = session.sizes.device == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    with torch.device(session.sizes.device):
        plain, watched = (
            torch.nn.Module.to(Qwen3MoeForCausalLM(config), dtype=dtype).eval() for _ in range(2)
        )
    watched.load_state_dict(plain.state_dict())

    def call(model: torch.nn.Module) -> None:
        model(torch.randint(0, vocabulary, (4, 256), device=session.sizes.device))
        if cuda:
            torch.cuda.synchronize()

    with tempfile.TemporaryDirectory() as folder:
        with torch.no_grad(), traced(watched, Path(folder) / "trace"):
            found = paired(lambda: call(plain), lambda: call(watched), max(4, session.sizes.rounds))
        found |= bytes_of(open_trace(Path(folder) / "trace").check())
    parameters = sum(value.numel() for value in plain.parameters())
    session.write("capture", [{"parameters": parameters, "layers": layers} | found])


def pilot(session: Session) -> None:
    """Finished runs of the preset in the time there is, the longest first, several on the device;
    interrupted ones go on from their checkpoints in FOLDER/pilot.
    """
    from moe_lab.runs import layout

    folder = session.out / "pilot"
    recipe, preset = ROOT / "experiments" / "sparsity_wall.py", session.sizes.pilot
    with contextlib.ExitStack() as stack:
        if not preset:  # a rehearsal
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            recipe, preset = _tiny_recipe(scratch), "tiny"
        command = [sys.executable, "-m", "moe_lab", "sweep", "run", str(recipe), "--preset", preset,
                   "--out", str(folder), "--device", session.sizes.device]  # fmt: skip
        if session.sizes.device == "cuda":
            command += ["--workers", "4"]
        process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
        ended = True
        try:
            process.wait(session.pilot)
        except subprocess.TimeoutExpired:
            ended = False
            process.send_signal(signal.SIGINT)  # checkpoints stay; the same command goes on
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
    rows = [
        {"run": path.parent.name} | json.loads(path.read_text())
        for path in sorted(folder.glob(f"*/{layout.RESULT}"))
    ]
    plain = str | int | float | None
    flat = [{key: value for key, value in row.items() if isinstance(value, plain)} for row in rows]
    session.write("pilot", flat or [{"run": "none ended in time"}])
    if ended and process.returncode:
        raise RuntimeError(f"the sweep ended with code {process.returncode}")


def _tiny_recipe(folder: Path) -> Path:
    path = folder / "recipe.py"
    path.write_text(
        "from moe_lab.model import DecoderConfig, MoEConfig\n"
        "from moe_lab.routing import RouterConfig\n"
        "from moe_lab.sweeps import SweepConfig\n"
        "from moe_lab.text import TextConfig\n"
        "from moe_lab.training import RunConfig\n"
        "PRESETS = ('tiny',)\n"
        "def sweep(preset, *, seed=0, device='cpu', alternative=None):\n"
        "    moe = MoEConfig(16, 8, RouterConfig(num_experts=2, top_k=1))\n"
        "    model = DecoderConfig(vocab_size=257, d_model=16, num_layers=1, num_heads=1,\n"
        "                          context_length=32, moe=moe)\n"
        f"    text = TextConfig(corpus={str(ROOT / 'examples')!r}, tokenizer='byte')\n"
        "    run = RunConfig(model=model, text=text, seq_length=32, train_tokens=2048,\n"
        "                    eval_tokens=500, device=device)\n"
        "    return SweepConfig(name='tiny', question='does it run?', preset=preset, runs=(run,))\n"
    )
    return path
