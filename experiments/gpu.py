"""Everything about moe_lab that needs a GPU, in one command of a few minutes.

    python experiments/gpu.py --check       # what is missing here, before any time is spent
    python experiments/gpu.py --rehearse    # every piece, tiny, on a CPU: under a minute
    python experiments/gpu.py [--out FOLDER] [--minutes 8] [--only layer] [--pilot 5]

Each piece writes FOLDER/<piece>.parquet with its provenance as soon as it is done (``layer`` and
``training`` after each row), and a piece or row that is there is not measured again: the same
command continues. A piece does not start, and ``layer`` and ``training`` begin no further row, when
the minutes are over. What ran out of memory, or raised, has the reason in column ``error``.

| piece | question |
|---|---|
| tests | do all backends, the decoder and capture give on this device what they give on a CPU? |
| layer | how fast is a layer, forward and backward, beside its dense twin and transformers? |
| sync | does a training step wait for the host, and where? |
| instrumentation | what do the routing statistics of a step cost? |
| training | tokens per second of three decoders, alone and several on one device |
| capture | what does a capture cost on a transformers model? |
| pilot | the runs of the sparsity wall's preset ``pilot`` that end in ``--pilot`` minutes, packed |

docs/gpu.md says what the numbers mean.
"""

import argparse
import contextlib
import importlib
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "experiments" / "benchmarks")]
NEEDED = ("torch", "numpy", "scipy", "polars", "tokenizers", "safetensors", "jinja2", "rich")
FURTHER = {"transformers": "layer, capture", "liger_kernel": "layer", "pytest": "tests"}
WHEELS = ("polars", "polars-runtime-32", "rich", "liger-kernel")
"""What a machine that has torch, transformers and pytest may lack; together below 64 MB."""
OLDEST_TORCH = (2, 11)


# ------------------------------------------------------------------------------------------------
# check


def check() -> int:
    """Print what is there and what is missing; 1 where a piece cannot run."""
    missing = [name for name in NEEDED if not _there(name)]
    for name in (*NEEDED, *FURTHER):
        version = importlib.metadata.version(name.replace("_", "-")) if _there(name) else "missing"
        print(f"{name:14} {version:20} {FURTHER.get(name, 'every piece')}")
    print(f"wheels to bring: pip download --no-deps --only-binary :all: {' '.join(WHEELS)}")
    if "torch" in missing:
        return 1
    import torch

    parts = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    print(f"torch {torch.__version__}: {'new enough' if parts >= OLDEST_TORCH else 'too old'}")
    print(f"device: {torch.cuda.get_device_name() if torch.cuda.is_available() else 'no CUDA'}")
    return int(bool(missing) or parts < OLDEST_TORCH or not torch.cuda.is_available())


def _there(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


# ------------------------------------------------------------------------------------------------
# sizes and the clock


@dataclass(frozen=True)
class Sizes:
    """What is measured; a rehearsal has a tiny grid on a CPU."""

    device: str
    shapes: tuple[tuple[int, int, int, int, int], ...]  # T, d, E, k, f
    decoders: tuple[tuple[str, int, int, int], ...]  # name, layers, d_model, d_expert
    experts: tuple[int, ...]
    packed: tuple[int, ...]
    batch: int
    length: int
    peak: int
    rounds: int
    captured: tuple[int, int, int]  # layers, d_model, vocabulary
    pilot: str


FULL = Sizes(
    device="cuda",
    shapes=(
        (16384, 2048, 128, 8, 768),  # Qwen3-30B-A3B
        (4096, 2048, 128, 8, 768),
        (32768, 2048, 128, 8, 768),
        (16384, 1024, 64, 4, 512),
        (16384, 4096, 128, 8, 1536),
        (16384, 2048, 512, 10, 512),  # Qwen3-Next-80B-A3B
        (16384, 2048, 256, 12, 512),
        (4096, 4096, 64, 8, 2048),
    ),
    decoders=(("20M", 6, 256, 192), ("120M", 12, 768, 512), ("400M", 16, 1024, 1024)),
    experts=(8, 64, 256),
    packed=(2, 4),
    batch=32,
    length=512,
    peak=8192,
    rounds=10,
    captured=(12, 1024, 32000),
    pilot="pilot",
)
TINY = Sizes(
    device="cpu",
    shapes=((64, 32, 4, 2, 16),),
    decoders=(("tiny", 1, 32, 16),),
    experts=(4,),
    packed=(2,),
    batch=2,
    length=16,
    peak=64,
    rounds=3,
    captured=(1, 64, 100),
    pilot="",
)


@dataclass
class Session:
    """Where the tables go, and until when.

    Attributes:
        deadline: of ``time.monotonic``.
        pilot: seconds for piece pilot; 0: it is left out.
    """

    out: Path
    sizes: Sizes
    deadline: float
    pilot: float = 0.0
    record: Mapping[str, str] = field(default_factory=dict)

    @property
    def over(self) -> bool:
        return time.monotonic() > self.deadline

    def table(self, piece: str) -> Path:
        return self.out / f"{piece}.parquet"

    def rows(self, piece: str) -> list[dict[str, Any]]:
        import polars as pl

        path = self.table(piece)
        return (
            pl.read_parquet(path).drop(list(self.record), strict=False).to_dicts()
            if path.exists()
            else []
        )

    def write(self, piece: str, rows: list[dict[str, Any]]) -> None:
        import polars as pl

        from moe_lab.files import atomic_path

        self.out.mkdir(parents=True, exist_ok=True)
        frame = pl.DataFrame(rows, infer_schema_length=None)
        with atomic_path(self.table(piece)) as temporary:
            frame.with_columns(
                pl.lit(value).alias(key) for key, value in self.record.items()
            ).write_parquet(temporary)

    def each(
        self, piece: str, cases: list[dict[str, Any]], measure: Callable[..., dict[str, Any]]
    ) -> None:
        """``measure(**case)`` for each case that has no row yet, written one by one."""
        rows = self.rows(piece)
        for case in cases:
            if self.over or any(case.items() <= row.items() for row in rows):
                continue
            try:
                found = {"error": ""} | measure(**case)
            except Exception as error:  # one contestant that fails must not cost the others
                found = {"error": f"{type(error).__name__}: {error}"[:300]}
            rows.append(case | found)
            print(json.dumps(rows[-1], default=str)[:300], flush=True)
            self.write(piece, rows)
            _free(self.sizes.device)


def _free(device: str) -> None:
    import gc

    import torch

    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def seconds_of(call: Callable[[], object], device: str, rounds: int) -> list[float]:
    """Of each of ``rounds`` calls after three that are not counted, by the device's own clock."""
    import torch

    for _ in range(3):
        call()
    if device == "cpu":
        found = []
        for _ in range(rounds):
            began = time.perf_counter()
            call()
            found.append(time.perf_counter() - began)
        return found
    events = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        for _ in range(rounds)
    ]
    for start, end in events:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in events]


def quartiles(values: list[float], name: str) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4)
    return {name: middle, f"{name}_q1": low, f"{name}_q3": high}


# ------------------------------------------------------------------------------------------------
# pieces


def tests(session: Session) -> None:
    """tests/model/test_on_device.py, on the device."""
    env = os.environ | {"MOE_LAB_DEVICE": session.sizes.device, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header",
         str(ROOT / "tests" / "model" / "test_on_device.py")],
        env=env, cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    lines = done.stdout.strip().splitlines()
    print("\n".join(lines[-15:]))
    summary = lines[-1] if lines else done.stderr.strip()[-300:]
    row = {"returncode": done.returncode, "summary": summary, "output": done.stdout[-8000:]}
    session.write("tests", [row])


def layer(session: Session) -> None:
    """One layer, forward and with backward, of each contestant; first the device's own peak."""
    sizes = session.sizes
    names = ["matrix product", "dense", "grouped", "liger", "HF grouped"]
    cases = [
        {"name": name, "tokens": t, "d_model": d, "experts": e, "top_k": k, "d_expert": f}
        for t, d, e, k, f in sizes.shapes
        for name in names
    ]
    if sizes.device == "cpu":
        cases = [case for case in cases if case["name"] != "liger"]
    session.each("layer", cases, lambda **case: _layer_row(sizes, **case))


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
    module = module_of(name, Shape(tokens, d_model, experts, top_k, d_expert)).to(device, dtype)
    generator = torch.Generator().manual_seed(1)
    x, grad = (
        torch.randn(1, tokens, d_model, generator=generator).to(device, dtype) for _ in range(2)
    )

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


def _stepper(
    sizes: Sizes, layers: int, d_model: int, d_expert: int, experts: int
) -> Callable[[], None]:
    """A training step of a decoder: forward, backward, clipping, fused AdamW."""
    import torch

    from moe_lab.model import Decoder, DecoderConfig, MoEConfig
    from moe_lab.routing import RouterConfig
    from moe_lab.training import OptimizerConfig
    from moe_lab.training.optimizer import build_optimizer, clip_gradients

    router = RouterConfig(num_experts=experts, top_k=min(8, experts // 2), norm_topk_prob=True)
    config = DecoderConfig(
        vocab_size=4096 if sizes.device == "cuda" else 64,
        num_layers=layers,
        d_model=d_model,
        num_heads=max(1, d_model // 64),
        context_length=sizes.length,
        moe=MoEConfig(d_model, d_expert, router),
    )
    torch.manual_seed(0)
    model = Decoder(config).to(sizes.device)
    optimizer = build_optimizer(model, OptimizerConfig())
    ids = torch.randint(0, config.vocab_size, (sizes.batch, sizes.length + 1), device=sizes.device)

    def step() -> None:
        with torch.autocast(sizes.device, torch.bfloat16):
            loss = model(ids[:, :-1], ids[:, 1:]).loss
        assert loss is not None
        loss.backward()
        clip_gradients(model, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def sync(session: Session) -> None:
    """Host waits of a step after warming up: as torch names them where it sees them (a warning with
    the line), and by the runtime calls in the profile.
    """
    import torch
    from torch.profiler import ProfilerActivity, profile

    sizes = session.sizes
    step = _stepper(sizes, *sizes.decoders[0][1:], sizes.experts[0])
    for _ in range(3):
        step()
    rows = []
    cuda = sizes.device == "cuda"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if cuda:
            torch.cuda.set_sync_debug_mode("warn")
        step()
        if cuda:
            torch.cuda.set_sync_debug_mode("default")
    rows += [
        {"seen_by": "torch", "what": f"{Path(item.filename).name}:{item.lineno}", "count": 1}
        for item in caught
        if "synchroniz" in str(item.message)
    ]
    with profile(
        activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    ) as seen:
        step()
        if cuda:
            torch.cuda.synchronize()  # one of the waits that are counted
    calls = {item.key: item.count for item in seen.key_averages()}
    waits = {
        key: n for key, n in calls.items() if "Synchronize" in key or "_local_scalar_dense" in key
    }
    rows += [{"seen_by": "profiler", "what": key, "count": n} for key, n in waits.items()]
    session.write("sync", rows or [{"seen_by": "both", "what": "no wait", "count": 0}])


def instrumentation(session: Session) -> None:
    """A layer's step with the metrics of a training step over that without, in turns."""
    import numpy as np
    import torch
    from moe_layer import Shape, our_layer

    from moe_lab.training.readings import read_layers

    sizes = session.sizes
    dtype = torch.bfloat16 if sizes.device == "cuda" else torch.float32
    t, d, e, k, f = sizes.shapes[0]
    module = our_layer(Shape(t, d, e, k, f), "auto").to(sizes.device, dtype)
    x = torch.randn(1, t, d, device=sizes.device, dtype=dtype)

    def step(metrics: bool) -> None:
        module.zero_grad(set_to_none=True)
        y, routing = module(x.clone().requires_grad_(), return_routing=True)
        y.sum().backward()
        if metrics:
            read_layers(1, {0: module}, [[routing.detach()]])

    ratios = []
    for _ in range(max(3, sizes.rounds)):
        off, on = (
            statistics.median(seconds_of(lambda m=m: step(m), sizes.device, 5))
            for m in (False, True)
        )
        ratios.append(on / off)
    draws = np.random.default_rng(0).choice(ratios, (2000, len(ratios)))
    low, high = np.quantile(np.median(draws, axis=1), (0.025, 0.975))
    row = {"tokens": t, "d_model": d, "experts": e, "top_k": k, "d_expert": f}
    session.write(
        "instrumentation",
        [row | {"ratio": statistics.median(ratios), "lo": float(low), "hi": float(high)}],
    )


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
        rates = [_rate(arguments)]
    else:
        with multiprocessing.get_context("spawn").Pool(processes) as pool:
            rates = pool.map(_rate, [arguments] * processes, chunksize=1)
    return {"tokens_per_second": sum(rates)}


def _rate(arguments: tuple[Any, ...]) -> float:
    """Of one process; the several of a pool run at the same time but for their start."""
    sizes = arguments[0]
    times = seconds_of(_stepper(*arguments), sizes.device, sizes.rounds)
    return sizes.batch * sizes.length / statistics.median(times)


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
    plain, watched = (
        torch.nn.Module.to(Qwen3MoeForCausalLM(config), session.sizes.device, dtype).eval()
        for _ in range(2)
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
        try:
            process.wait(session.pilot)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # checkpoints stay; the same command goes on
            process.wait()
        else:
            if process.returncode:
                raise RuntimeError(f"the sweep ended with code {process.returncode}")
    rows = [
        {"run": path.parent.name} | json.loads(path.read_text())
        for path in sorted(folder.glob(f"*/{layout.RESULT}"))
    ]
    plain = str | int | float | None
    flat = [{key: value for key, value in row.items() if isinstance(value, plain)} for row in rows]
    session.write("pilot", flat or [{"run": "none ended in time"}])


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


PIECES: dict[str, Callable[[Session], None]] = {
    "tests": tests,
    "layer": layer,
    "sync": sync,
    "instrumentation": instrumentation,
    "training": training,
    "capture": capture,
    "pilot": pilot,
}
BY_ROW = ("layer", "training")


def wanted(session: Session, only: list[str]) -> Iterator[str]:
    """Pieces that have no table yet, in order; those written by the row fill theirs up."""
    for piece in only or PIECES:
        if piece == "pilot" and not session.pilot:
            continue
        if piece in BY_ROW or not session.table(piece).exists():
            yield piece


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="say what is missing, and stop")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on a CPU")
    parser.add_argument("--out", type=Path, help="default: experiments/gpu/<device>")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--pilot", type=float, default=0.0, metavar="MINUTES")
    parser.add_argument("--only", action="append", choices=PIECES, default=[])
    args = parser.parse_args()
    if args.check:
        return check()
    import torch

    from moe_lab.versions import provenance

    if not args.rehearse and not torch.cuda.is_available():
        print("expected a CUDA device, got none; try --rehearse, or --check", file=sys.stderr)
        return 2
    name = "cpu" if args.rehearse else torch.cuda.get_device_name()
    slug = "-".join(name.lower().split())
    torch.set_num_threads(1)
    session = Session(
        args.out or ROOT / "experiments" / "gpu" / slug,
        TINY if args.rehearse else FULL,
        time.monotonic() + 60 * args.minutes,
        60 * (args.pilot or float(args.rehearse)),
        provenance() | {"device": name},
    )
    if args.rehearse and args.out is None:
        session.out = Path(tempfile.mkdtemp(prefix="moe-lab-gpu-"))
    failed = []
    for piece in wanted(session, args.only):
        if session.over and piece != "pilot":
            print(f"{piece}: not started, the {args.minutes:g} minutes are over", flush=True)
            continue
        began = time.monotonic()
        try:
            PIECES[piece](session)
        except Exception as error:  # the other pieces are worth having
            failed.append(piece)
            print(f"{piece}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        print(f"{piece}: {time.monotonic() - began:.1f} s", flush=True)
    print(f"tables in {session.out}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
