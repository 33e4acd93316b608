"""Everything about moe_lab that needs a GPU, in one command of a few minutes.

    python experiments/gpu.py --check       # what is missing here, before any time is spent
    python experiments/gpu.py --rehearse    # every piece, tiny, on a CPU: under a minute
    python experiments/gpu.py [--out FOLDER] [--minutes 8] [--only layer] [--pilot 5]

Each piece writes FOLDER/<piece>.parquet with its provenance as soon as it is done (``layer`` and
``training`` after each row), and a piece or row that is there is not measured again: the same
command continues. It measures again what raised, but not what ran out of memory; the reason is in
column ``error``. No piece or row begins when the minutes are over.

The pieces run in a process of their own. One that dies, hangs for three minutes or loses the device
costs the row or piece that it was at: another process goes on behind it.

| piece | question |
|---|---|
| target | ``layer`` at its first shape, that of Qwen3-30B-A3B |
| tests | do all backends, the decoder and capture give on this device what they give on a CPU? |
| sync | does a training step wait for the host, and where? |
| instrumentation | what do the routing statistics of a step cost? |
| layer | how fast is a layer, forward and backward, beside its dense twin and transformers? |
| training | tokens per second of three decoders, alone and several on one device |
| capture | what does a capture cost on a transformers model? |
| pilot | the runs of the sparsity wall's preset ``pilot`` that end in ``--pilot`` minutes, packed |

docs/gpu.md says what the numbers mean.
"""

import argparse
import contextlib
import importlib.metadata
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import gpu_layer
import gpu_models
from gpu_session import DEAD, FULL, TINY, Session, leave_if_dead

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "experiments" / "benchmarks")]
EVERY, MODELS, TESTS = "every piece", "layer, capture", "tests"
LIGER, QUACK = "rows liger", "rows quack"
PACKAGES = {  # who needs it, MB of its wheel (CPython 3.11, Linux x86_64); torch brings Triton
    "torch": (EVERY, 0.0), "numpy": (EVERY, 16.9), "scipy": (EVERY, 35.3),
    "polars": (EVERY, 0.9), "polars-runtime-32": (EVERY, 53.9), "tokenizers": (EVERY, 3.4),
    "safetensors": (EVERY, 0.5), "jinja2": (EVERY, 0.1), "rich": (EVERY, 0.3),
    "markdown-it-py": (EVERY, 0.1), "mdurl": (EVERY, 0.1), "pygments": (EVERY, 1.3),
    "transformers": (MODELS, 13.5), "liger-kernel": (LIGER, 0.9), "triton": (LIGER, 0.0),
    "pytest": (TESTS, 0.4), "pluggy": (TESTS, 0.1), "iniconfig": (TESTS, 0.1),
    "hypothesis": (TESTS, 1.2), "sortedcontainers": (TESTS, 0.1),
    "plotly": ("pilot", 9.7), "narwhals": ("pilot", 0.5),
    "quack-kernels": (QUACK, 0.7), "nvidia-cutlass-dsl": (QUACK, 0.1),
    "nvidia-cutlass-dsl-libs-base": (QUACK, 3.1), "nvidia-cutlass-dsl-libs-core": (QUACK, 1.6),
    "nvidia-cutlass-dsl-libs-cu12": (QUACK, 91.7), "apache-tvm-ffi": (QUACK, 3.3),
    "torch-c-dlpack-ext": (QUACK, 0.9), "einops": (QUACK, 0.1), "cuda-bindings": (QUACK, 8.4),
    "cuda-pathfinder": (QUACK, 0.1), "protobuf": (QUACK, 0.3),
}  # fmt: skip
CARRIED = 64.0
"""MB that fit beside the tree on the way to a machine without network."""
OLDEST_TORCH = (2, 11)


def check() -> int:
    """Print what is there and what is missing; 1 where a piece cannot run."""
    versions = {name: _version(name) for name in PACKAGES}
    for name, (needs, _) in PACKAGES.items():
        print(f"{name:30} {versions[name] or 'missing':18} {needs}")
    lacking = {name: row for name, row in PACKAGES.items() if row[1] and not versions[name]}
    print("\nwheels to bring (pip download --no-deps --only-binary :all: NAMES):")
    for needs in dict.fromkeys(needs for needs, _ in lacking.values()):
        names = [name for name in lacking if lacking[name][0] == needs]
        size = sum(lacking[name][1] for name in names)
        print(f"  {needs}: {size:.1f} MB: {' '.join(names)}")
    for title, left_out in (("without quack", QUACK), ("all", None)):
        size = sum(size for needs, size in lacking.values() if needs != left_out)
        fits = "fit" if size <= CARRIED else "do not fit"
        print(f"  {title}: {size:.1f} MB, {fits} in {CARRIED:.0f} MB")
    print("  a package that is missing fails its own rows alone; every piece needs the first group")
    if not versions["torch"]:
        return 1
    import torch

    parts = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    print(f"torch {torch.__version__}: {'new enough' if parts >= OLDEST_TORCH else 'too old'}")
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        print(f"device: {torch.cuda.get_device_name()}, compute capability {major}.{minor}")
    else:
        print("device: no CUDA")
    print(f"C compiler for Triton: {shutil.which('cc') or shutil.which('gcc') or 'missing'}")
    missing = any(needs == EVERY and not versions[name] for name, (needs, _) in PACKAGES.items())
    return int(missing or parts < OLDEST_TORCH or not torch.cuda.is_available())


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


PIECES: dict[str, Callable[[Session], None]] = {
    "target": gpu_layer.target,
    "tests": gpu_layer.tests,
    "sync": gpu_layer.sync,
    "instrumentation": gpu_layer.instrumentation,
    "layer": gpu_layer.layer,
    "training": gpu_models.training,
    "capture": gpu_models.capture,
    "pilot": gpu_models.pilot,
}
PATIENCE = {"tests": 300.0}  # it compiles the kernels of four backends in two dtypes
BY_ROW = {"target": "layer", "layer": "layer", "training": "training"}
"""Piece -> its table; each row is written by itself."""


def wanted(session: Session, only: list[str]) -> Iterator[str]:
    """Pieces that have no table yet, in order; those written by the row fill theirs up."""
    for piece in only or PIECES:
        if piece == "pilot" and not session.pilot:
            continue
        if piece in BY_ROW or not session.table(piece).exists():
            yield piece


def work(session: Session, pieces: list[str]) -> None:
    """Run the pieces one after another; exit with 1 where one failed. For a process of its own."""
    os.setpgid(0, 0)  # what it starts ends with it
    import torch

    torch.set_num_threads(1)
    failed = False
    for piece in pieces:
        if session.left < 0 and piece != "pilot":
            print(f"{piece}: not started, the minutes are over", flush=True)
            continue
        began = time.monotonic()
        if piece not in BY_ROW:
            patience = PATIENCE.get(piece, session.patience)
            session.begin(piece, patience + (session.pilot if piece == "pilot" else 0))
        try:
            PIECES[piece](session)
        except Exception as error:  # the other pieces are worth having
            failed = True
            print(f"{piece}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            leave_if_dead(session.sizes.device)
        session.end()
        print(f"{piece}: {time.monotonic() - began:.1f} s", flush=True)
    sys.exit(int(failed))


def supervise(
    session: Session,
    pieces: list[str],
    target: Callable[[Session, list[str]], None] = work,
) -> int:
    """``target`` in a process of its own, and again behind the row or piece at which it died or
    hung. Returns 1 where anything failed.
    """
    failed = 0
    while True:
        session.end()
        process = multiprocessing.get_context("spawn").Process(
            target=target, args=(session, pieces)
        )
        process.start()
        try:
            why = _watch(session, process)
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid or 0, signal.SIGKILL)  # and what it started
            process.kill()
            process.join()
        if not why:
            return failed | int(process.exitcode != 0)
        failed = 1
        if session.marker.exists():
            note = json.loads(session.marker.read_text())
            print(f"{note['piece']}: {why}: {note['case'] or 'given up'}", flush=True)
            if note["case"]:
                name = note["piece"]
                session.write(name, [*session.rows(name), note["case"] | {"error": why}])
            else:
                pieces = [piece for piece in pieces if piece != note["piece"]]
        elif process.exitcode != DEAD:
            print(why, file=sys.stderr)
            return 1


def _watch(session: Session, process: BaseProcess) -> str:
    """Wait for the process; why it did not come to its end, "" if it did."""
    while process.is_alive():
        process.join(0.2)
        with contextlib.suppress(FileNotFoundError):
            if time.monotonic() > json.loads(session.marker.read_text())["until"]:
                return "did not end in time"
    return "" if process.exitcode in (0, 1) else f"its process ended with code {process.exitcode}"


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
    deadline = time.monotonic() + 60 * args.minutes
    import torch

    from moe_lab.versions import provenance

    if not args.rehearse and not torch.cuda.is_available():
        print("expected a CUDA device, got none; try --rehearse, or --check", file=sys.stderr)
        return 2
    name = "cpu" if args.rehearse else torch.cuda.get_device_name()
    slug = "-".join(name.lower().split())
    scratch = args.rehearse and args.out is None
    session = Session(
        Path(tempfile.mkdtemp(prefix="moe-lab-gpu-"))
        if scratch
        else args.out or ROOT / "experiments" / "gpu" / slug,
        TINY if args.rehearse else FULL,
        deadline,
        60 * (args.pilot or float(args.rehearse)),
        provenance() | {"device": name},
    )
    for table in sorted(set(BY_ROW.values())):
        session.forget_errors(table)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that no process outlives this one
    failed = supervise(session, list(wanted(session, args.only)))
    for line in () if args.rehearse else gpu_layer.summary(session):
        print(line)
    print(f"tables in {session.out}")
    return failed


if __name__ == "__main__":
    sys.exit(main())
