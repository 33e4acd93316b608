"""How a run store bears ten thousand runs and two hundred writers, and how near the memory estimate
comes.

    python experiments/benchmarks/sweep_store.py opens      # plan, status, report of 10,000 runs
    python experiments/benchmarks/sweep_store.py writers    # 200 processes write into one store
    python experiments/benchmarks/sweep_store.py memory     # the memory estimate over the peak


``opens`` makes a store as a sweep leaves it (6,000 finished runs, 1,500 failed, 500 interrupted,
2,000 pending; every finished run has its metrics and a trace) and runs each command three times as
a process of its own; the first time is kept apart, because it reads cold files.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from measure import save

from moe_lab.model import DecoderConfig, MoEConfig
from moe_lab.routing import RouterConfig, Routing
from moe_lab.sweeps import RunStore, SweepConfig, load_recipe, run_memory
from moe_lab.text import TextConfig
from moe_lab.trace import LayerMeta, TraceMeta, TraceWriter
from moe_lab.training import RunConfig

WRITERS = Path(__file__).resolve().parents[2] / "tests" / "sweeps"
"""Where the test of many writers lies, which this runs with more of them."""

RECIPE = """
from moe_lab.model import DecoderConfig, MoEConfig
from moe_lab.routing import RouterConfig
from moe_lab.sweeps import SweepConfig
from moe_lab.text import TextConfig
from moe_lab.training import OptimizerConfig, RunConfig

PRESETS = ("large",)
TEXT = TextConfig(vocab_size=512, corpus_hash="c0ffee")
ARMS = (("topk", 3e-3), ("lr", 2e-3), ("warm", 4e-3), ("cold", 1e-3), ("hot", 6e-3))


def sweep(preset, *, seed=0, device="cpu"):
    runs = []
    for ratio in (1, 2, 4, 8, 16, 32, 64, 128):
        router = RouterConfig(num_experts=2 * ratio, top_k=2)
        moe = MoEConfig(d_model=64, d_expert=64, router=router)
        sizes = {"num_layers": 2, "d_model": 64, "num_heads": 2, "context_length": 64}
        model = DecoderConfig(vocab_size=512, moe=moe, **sizes)
        for arm, lr in ARMS:
            for offset in range(SEEDS):
                runs.append(
                    RunConfig(
                        model=model,
                        name=f"{arm}-r{ratio}-s{offset}",
                        arm=arm,
                        seed=seed + offset,
                        text=TEXT,
                        seq_length=64,
                        optimizer=OptimizerConfig(lr=lr),
                        device=device,
                    )
                )
    return SweepConfig(name="large", question="Does it open?", preset=preset, runs=tuple(runs))
"""
STEPS = 40
FINISHED, FAILED, INTERRUPTED = 0.6, 0.15, 0.05
"""Shares of the runs of the synthetic store; the rest is pending."""


def recipe(folder: Path, runs: int) -> Path:
    path = folder / "large_recipe.py"
    path.write_text(RECIPE.replace("SEEDS", str(runs // 40)))
    return path


def make_store(sweep: SweepConfig, folder: Path) -> RunStore:
    """A store in which the runs of ``sweep`` are in all states; the trace of every finished run is
    the same files, linked.
    """
    store = RunStore(folder)
    store.add(sweep)
    random = np.random.default_rng(0)
    traces = {
        run.model: _trace(folder / "traces" / str(int(run.ratio)), run)
        for run in {run.model: run for run in sweep.runs}.values()
    }
    steps = np.arange(1, STEPS + 1)
    for run_hash, run, chance in zip(
        sweep.hashes, sweep.runs, random.permutation(len(sweep.runs)) / len(sweep.runs), strict=True
    ):
        if chance >= FINISHED + FAILED + INTERRUPTED:
            continue
        path = store.path(run_hash)
        path.mkdir()
        (path / "config.json").write_text(json.dumps(run.to_dict()))
        (path / "status.json").write_text(
            json.dumps({"step": STEPS, "steps": 2 * STEPS, "loss": 3.0, "tokens_per_second": 5e3})
        )
        if chance >= FINISHED + FAILED:
            (path / ".claim-1").write_text("")
            os.utime(path / ".claim-1", (0, 0))
        elif chance >= FINISHED:
            lines = "\n".join(f'  File "trainer.py", line {line}, in step' for line in range(20))
            (path / "log.txt").write_text("step 1\nstep 2\n")
            (path / "error.txt").write_text(
                "the loss is nan at step 40\n\nTraceback (most recent call last):\n"
                f"{lines}\nRunError: nan\n"
            )
        else:
            _finish(path, run_hash, run, steps, random, traces[run.model])
    shutil.rmtree(folder / "traces")
    return store


def _finish(
    path: Path,
    run_hash: str,
    run: RunConfig,
    steps: np.ndarray,
    random: np.random.Generator,
    trace: Path,
) -> None:
    loss = 3.1 - 0.05 * np.log2(run.ratio) + 0.004 * random.standard_normal()
    metrics = {
        "step": steps,
        "tokens": steps * 1024,
        "loss": loss + 4 * np.exp(-steps / 10),
        "grad_norm": 1 + 1 / steps,
    }
    metrics |= {
        "load_cv": 0.3 + 1 / steps,
        "max_violation": 0.8 + 1 / steps,
        "mean_ffn_count": np.full(STEPS, 2.0),
    }
    pl.DataFrame(metrics).write_parquet(path / "metrics.parquet")
    result = {
        "run": run_hash,
        "name": run.name,
        "arm": run.arm,
        "ratio": run.ratio,
        "ratio_meaning": "E/k",
        "seed": run.seed,
        "loss": loss,
        "total_params": int(1e5 * run.ratio),
        "active_params": 100_000,
        "flops_per_token": 6e5,
        "train_tokens": 200_000,
        "bits_per_byte": loss / 2.2,
        "num_experts": int(2 * run.ratio),
        "num_zero_experts": 0,
        "top_k": 2,
        "load_cv": 0.3,
        "mean_ffn_count": 2.0,
        "target_ffn_count": 2.0,
        "tokens_per_second": 5e3,
        "sees_later_tokens": False,
        "learning_rate": run.optimizer.lr,
        "device": "cpu",
        "versions": {"torch": torch.__version__},
    }
    (path / "result.json").write_text(json.dumps(result))
    shutil.copytree(trace, path / "trace", copy_function=os.link)
    (path / "done").write_text("")


def _trace(folder: Path, run: RunConfig) -> Path:
    assert run.model.moe is not None
    router, tokens = run.model.moe.router, 300
    numbers, positions = np.arange(tokens) // 50, np.arange(tokens) % 50
    layers = tuple(
        LayerMeta(layer, router.num_experts, 0, router.top_k)
        for layer in range(run.model.num_layers)
    )
    with TraceWriter(folder, TraceMeta(layers=layers, model="made up", seed=0)) as writer:
        frame = {
            "doc": numbers.astype(np.uint32),
            "pos": positions.astype(np.uint32),
            "token_id": positions.astype(np.uint32),
        }
        words = {
            "text": ["word "] * tokens,
            "lexer": ["name"] * tokens,
            "subword": ["start"] * tokens,
        }
        writer.write_tokens(
            pl.DataFrame(frame | words).with_columns(loss=pl.lit(3.0, dtype=pl.Float32))
        )
        for layer in layers:
            logits = torch.randn(
                tokens, router.num_experts, generator=torch.Generator().manual_seed(layer.layer)
            )
            weights, indices = logits.softmax(1).topk(router.top_k)
            writer.write_routing(
                layer.layer,
                numbers,
                positions,
                Routing(indices, weights, logits, logits.softmax(1), router.num_experts),
            )
    return folder


MEASURE = """
import json, resource, subprocess, sys, time
began = time.perf_counter()
done = subprocess.run(sys.argv[1:], capture_output=True, text=True)
usage = resource.getrusage(resource.RUSAGE_CHILDREN)
wall, processor = time.perf_counter() - began, usage.ru_utime + usage.ru_stime
peak = usage.ru_maxrss / 1024
print(json.dumps({"seconds": wall, "processor_seconds": processor, "peak_mb": peak}))
sys.exit(done.returncode and done.stderr[-2000:])
"""


def timed(command: list[str]) -> dict[str, float]:
    """Wall and processor seconds and the peak of resident memory (MB) of a process.

    It is started by a small one: a process counts the memory of the one that it was forked from as
    its own.
    """
    found = subprocess.run(
        [sys.executable, "-c", MEASURE, *command], capture_output=True, text=True, check=False
    )
    if found.returncode:
        raise SystemExit(f"{' '.join(command)[:200]} failed:\n{found.stderr}")
    return json.loads(found.stdout.splitlines()[-1])


def opens(scratch: Path, runs: int, rounds: int) -> pl.DataFrame:
    path = recipe(scratch, runs)
    began = time.perf_counter()
    store = make_store(load_recipe(path, "large"), scratch / "store")
    print(f"made {runs} runs in {time.perf_counter() - began:.0f} s")
    program = [sys.executable, "-m", "moe_lab.cli"] if not shutil.which("moe-lab") else ["moe-lab"]
    commands = {
        "python -c 'import torch, polars'": [sys.executable, "-c", "import torch, polars"],
        "sweep plan": [
            *program,
            "sweep",
            "plan",
            str(path),
            "--preset",
            "large",
            "--no-calibration",
        ],
        "sweep status": [*program, "sweep", "status", str(store.folder)],
        "report": [*program, "report", str(store.folder), "--out", str(scratch / "report.html")],
    }
    rows = []
    for number in range(rounds):
        for name, command in commands.items():
            rows.append({"opened": name, "runs": runs, "round": number, **timed(command)})
            print(rows[-1])
    print(f"the page has {(scratch / 'report.html').stat().st_size / 1e6:.1f} MB")
    return pl.DataFrame(rows)


def writers(scratch: Path, processes: int, runs: int) -> pl.DataFrame:
    """So many processes, and so many runs that they share beside one of its own for each."""
    sys.path.insert(0, str(WRITERS))
    from writers import compete, lost  # type: ignore[import-not-found]

    seconds = compete(scratch / "store", processes, runs)
    problems = lost(scratch / "store", processes, runs)
    print(*problems, sep="\n")
    return pl.DataFrame(
        {
            "processes": [processes],
            "runs": [runs + processes],
            "seconds": [seconds],
            "lost": [len(problems)],
        }
    )


PEAK = """
import json, sys
from pathlib import Path
from moe_lab.sweeps.launchers import train_run
train_run(json.loads(sys.argv[1]), Path(sys.argv[2]))
"""
COMMON = {
    "d_model": 128,
    "num_layers": 4,
    "num_experts": 8,
    "d_expert": 96,
    "batch_size": 32,
    "seq_length": 128,
}
SMALL = {
    "d_model": 96,
    "num_layers": 2,
    "num_experts": 8,
    "d_expert": 64,
    "batch_size": 16,
    "seq_length": 128,
}
SHAPES: dict[str, dict[str, Any]] = {
    "demo": {**SMALL, "d_model": 64, "num_layers": 3, "num_experts": 32, "batch_size": 8},
    "wide": {
        **COMMON,
        "d_model": 192,
        "num_layers": 3,
        "num_experts": 16,
        "d_expert": 192,
        "batch_size": 16,
    },
    "many experts": {**COMMON, "num_experts": 256, "d_expert": 64, "batch_size": 16},
    "vocabulary": {**SMALL, "vocab_size": 4096},
    "untied": {**SMALL, "batch_size": 8, "seq_length": 64, "tie_embeddings": False},
    "shared": {**COMMON, "num_shared_experts": 2},
    "dense": {**COMMON, "num_experts": 0, "d_dense": 512},
    "accumulated": {**COMMON, "batch_size": 64, "grad_accumulation": 8},
}
"""None of them is one that the constants of `moe_lab.sweeps.memory` were fitted on."""


def memory(scratch: Path) -> pl.DataFrame:
    """Three steps and the validation pass of each shape on the standard library's sources, in a
    fresh process.
    """
    rows = []
    for name, shape in SHAPES.items():
        run = _run(**shape)
        peak = timed(
            [
                sys.executable,
                "-c",
                PEAK,
                json.dumps(run.to_dict()),
                str(scratch / name.replace(" ", "-")),
            ]
        )
        estimate = run_memory(run) / 2**20
        rows.append(
            {"shape": name, "estimate_mb": estimate, "ratio": estimate / peak["peak_mb"], **peak}
        )
        print(rows[-1])
    return pl.DataFrame(rows)


def _run(
    *, batch_size: int, seq_length: int, grad_accumulation: int = 1, **shape: Any
) -> RunConfig:
    experts, width = shape.pop("num_experts"), shape.pop("d_expert", 0)
    shared = shape.pop("num_shared_experts", 0)
    router = RouterConfig(num_experts=experts, top_k=2) if experts else None
    moe = (
        MoEConfig(
            d_model=shape["d_model"], d_expert=width, router=router, num_shared_experts=shared
        )
        if router
        else None
    )
    model = DecoderConfig(**{"vocab_size": 1024, "context_length": seq_length, "moe": moe} | shape)
    text = TextConfig(vocab_size=model.vocab_size).resolve()
    return RunConfig(
        model=model, text=text, batch_size=batch_size, seq_length=seq_length,
        grad_accumulation=grad_accumulation,
        train_tokens=3 * batch_size * seq_length, eval_tokens=20_000,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("opens", "writers", "memory"))
    parser.add_argument(
        "--runs", type=int, help="of the store (default: 10,000 to open, 200 to share)"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=200)
    parser.add_argument(
        "--scratch", type=Path, help="folder for the store (default: a temporary one)"
    )
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        frame = {
            "opens": lambda: opens(Path(folder), args.runs or 10_000, args.rounds),
            "writers": lambda: writers(Path(folder), args.processes, args.runs or 200),
            "memory": lambda: memory(Path(folder)),
        }[args.what]()
    if args.what == "opens":
        print(
            frame.group_by("opened", maintain_order=True).agg(
                pl.col("seconds", "processor_seconds").median(), pl.col("peak_mb").max()
            )
        )
    else:
        print(frame)
    if args.save:
        save(frame, f"sweep_store_{args.what}")


if __name__ == "__main__":
    main()
