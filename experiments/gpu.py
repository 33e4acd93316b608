"""Everything about moe_lab that needs a GPU, in one command of a few minutes.

    python experiments/gpu.py --check       # what is missing here, before any time is spent
    python experiments/gpu.py --rehearse    # every piece, tiny, on a CPU: under a minute
    python experiments/gpu.py [--out FOLDER] [--minutes 8] [--only layer] [--pilot 5]

Each piece writes FOLDER/<piece>.parquet with its provenance as soon as it is done (``layer`` and
``training`` after each row), and a piece or row that is there is not measured again: the same
command continues, and each row keeps the provenance of its own measurement. It measures again what
raised, but not what ran out of memory; the reason is in column ``error``. No piece or row begins
when the minutes are over, and one that has begun ends within 15 seconds.

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
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import gpu_layer
import gpu_models
from gpu_session import DEAD, FULL, TINY, Session, free, leave_if_dead

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "experiments" / "benchmarks")]
EVERY, MODELS, TESTS = "every piece", "layer, capture", "tests"
LIGER, QUACK = "rows liger", "rows quack"
PACKAGES = {  # who needs it, MB of its wheel (CPython 3.11, Linux x86_64); torch brings Triton
    "torch": (EVERY, 0.0), "numpy": (EVERY, 16.9),
    "polars": (EVERY, 0.9), "polars-runtime-32": (EVERY, 53.9), "tokenizers": (EVERY, 3.4),
    "safetensors": (EVERY, 0.5),
    "triton": (LIGER, 0.0), "liger-kernel": (LIGER, 0.9),
    "pytest": (TESTS, 0.4), "pluggy": (TESTS, 0.1), "iniconfig": (TESTS, 0.1),
    "packaging": (TESTS, 0.1), "pygments": (TESTS, 1.3), "hypothesis": (TESTS, 1.2),
    "sortedcontainers": (TESTS, 0.1),
    "transformers": (MODELS, 13.5), "huggingface-hub": (MODELS, 0.9), "regex": (MODELS, 0.8),
    "tqdm": (MODELS, 0.1), "pyyaml": (MODELS, 0.8), "httpx2": (MODELS, 0.1),
    "httpcore2": (MODELS, 0.1), "h11": (MODELS, 0.1), "idna": (MODELS, 0.1),
    "truststore": (MODELS, 0.1),
    "scipy": ("pilot", 35.3), "jinja2": ("pilot", 0.1), "rich": ("pilot", 0.3),
    "markdown-it-py": ("pilot", 0.1), "mdurl": ("pilot", 0.1), "plotly": ("pilot", 9.7),
    "narwhals": ("pilot", 0.5),
    "quack-kernels": (QUACK, 0.7), "nvidia-cutlass-dsl": (QUACK, 0.1),
    "nvidia-cutlass-dsl-libs-base": (QUACK, 3.1), "nvidia-cutlass-dsl-libs-core": (QUACK, 1.6),
    "nvidia-cutlass-dsl-libs-cu12": (QUACK, 91.7), "apache-tvm-ffi": (QUACK, 3.3),
    "torch-c-dlpack-ext": (QUACK, 0.9), "einops": (QUACK, 0.1), "cuda-bindings": (QUACK, 8.4),
    "cuda-pathfinder": (QUACK, 0.1), "protobuf": (QUACK, 0.3),
}  # fmt: skip
CARRIED = 64.0
"""MB that fit beside the tree on the way to a machine without network."""
OLDEST_TORCH = "2.11"


def check() -> int:
    """Print what is there and what is missing; 1 where a piece cannot run."""
    versions = {name: _version(name) for name in PACKAGES}
    for name, (needs, _) in PACKAGES.items():
        print(f"{name:30} {versions[name] or 'missing':18} {needs}")
    lacking = {name: row for name, row in PACKAGES.items() if row[1] and not versions[name]}
    print("\nwheels to bring (pip download --no-deps --only-binary :all: NAMES):")
    total = 0.0
    for needs in dict.fromkeys(needs for needs, _ in lacking.values()):
        names = [name for name in lacking if lacking[name][0] == needs]
        size = sum(lacking[name][1] for name in names)
        total += size
        fits = "fit" if total <= CARRIED else "do not fit"
        print(f"  {needs}: {size:.1f} MB: {' '.join(names)}")
        print(f"    with those above {total:.1f} MB, {fits} in {CARRIED:.0f} MB")
    print("  a package that is missing fails its own rows alone; every piece needs the first group")
    if not versions["torch"]:
        return 1
    import torch

    print(f"torch {torch.__version__}")
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        print(f"device: {torch.cuda.get_device_name()}, compute capability {major}.{minor}")
    else:
        print("device: no CUDA")
    print(f"C compiler for Triton: {shutil.which('cc') or shutil.which('gcc') or 'missing'}")
    why = unfit()
    print(why or "the packages that every piece needs are there")
    return int(bool(why) or not torch.cuda.is_available())


def unfit() -> str:
    """What of the packages that every piece needs is missing or too old; "" where nothing is."""
    from moe_lab.errors import expected
    from moe_lab.versions import older_than

    missing = [name for name in PACKAGES if PACKAGES[name][0] == EVERY and not _version(name)]
    if missing:
        return expected("packages that every piece needs", f"no {', '.join(missing)}", "--check")
    if older_than("torch", OLDEST_TORCH):
        return expected(f"torch {OLDEST_TORCH} or newer", _version("torch"), "--check")
    return ""


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
        if piece == "pilot":  # with more minutes more of its runs end
            there = not session.pilot
        else:
            there = piece not in BY_ROW and session.table(piece).exists()
        if not there:
            yield piece


def work(session: Session, pieces: list[str]) -> None:
    """Run the pieces one after another; exit with 1 where one failed. For a process of its own."""
    end_with_parent()
    import torch

    torch.set_num_threads(1)
    failed = False
    for piece in pieces:
        if session.left < 0 and piece != "pilot":
            print(f"{piece}: not started, the minutes are over", flush=True)
            continue
        began = time.monotonic()
        until = session.until(PATIENCE.get(piece, session.patience))
        if piece == "pilot":  # its minutes are its own
            until = began + session.pilot + session.patience
        try:
            if piece not in BY_ROW:
                session.begin(piece, until)
            PIECES[piece](session)
        except Exception as error:  # the other pieces are worth having
            failed = True
            print(f"{piece}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            leave_if_dead(session.sizes.device)
        session.end()
        free(session.sizes.device)
        print(f"{piece}: {time.monotonic() - began:.1f} s", flush=True)
    sys.exit(int(failed))


def end_with_parent() -> None:
    """End this process, and what it starts, with the process that watches it, however that ends."""
    os.setpgid(0, 0)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()


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
    if not 0 < args.minutes < 1e4 or not 0 <= args.pilot < 1e4:
        parser.error("expected minutes between 0 and 10,000")
    if "pilot" in args.only and not (args.pilot or args.rehearse):
        parser.error("expected --pilot MINUTES beside --only pilot")
    if args.check:
        return check()
    why = unfit()
    if why:
        print(why, file=sys.stderr)
        return 2
    from moe_lab.errors import MoELabError

    try:
        return measure(args)
    except MoELabError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        return 130


def measure(args: argparse.Namespace) -> int:
    """Run the pieces that are wanted; 1 where one failed."""
    deadline = time.monotonic() + 60 * args.minutes
    import torch

    from moe_lab.errors import RunError
    from moe_lab.files import cannot_write
    from moe_lab.trace.publish import lock, unlock
    from moe_lab.versions import provenance

    if not args.rehearse and not torch.cuda.is_available():
        print("expected a CUDA device, got none; try --rehearse, or --check", file=sys.stderr)
        return 2
    name = "cpu" if args.rehearse else torch.cuda.get_device_name()
    slug = re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.")
    scratch = args.rehearse and args.out is None
    session = Session(
        Path(tempfile.mkdtemp(prefix="moe-lab-gpu-"))
        if scratch
        else (args.out or ROOT / "experiments" / "gpu" / slug).resolve(),
        TINY if args.rehearse else FULL,
        deadline,
        60 * (args.pilot or float(args.rehearse)),
        provenance() | {"commit": commit(), "device": name},
    )
    try:
        session.out.mkdir(parents=True, exist_ok=True)
        writer = lock(session.out)
    except OSError as error:
        raise RunError(cannot_write(session.out, error)) from error
    session.refuse_other_device()
    tables = sorted({BY_ROW.get(piece, piece) for piece in PIECES})
    for table in tables:
        session.forget_errors(table, table in BY_ROW.values())
    for number in (signal.SIGTERM, signal.SIGHUP):  # so that no process outlives this one
        signal.signal(number, lambda *_: sys.exit(1))
    failed = supervise(session, list(wanted(session, args.only)))
    for line in () if args.rehearse else gpu_layer.summary(session):
        print(line)
    for table in tables:
        if count := session.failed_rows(table):
            print(f"{table}: {count} of {len(session.rows(table))} rows have an error")
    print(f"tables in {session.out}")
    unlock(session.out, writer)
    return failed


def commit() -> str:
    """The commit that is measured, "+" where files differ from it, "" outside a repository."""
    command = ["git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
