"""Mutated files against every reader: each ends in exit code 0 or in one line and exit code 2.

    python experiments/fuzz.py --minutes 10

Traces, imports, configurations, run folders, corpora, plans and tables of runs are mutated by
bytes, by structure (keys dropped, doubled, nested) and by type (a value becomes another kind of
value), and given to the command that reads them, in a worker process. A traceback, a crash, more
than one line of error or a command without end is a failure: its input stays in
``fuzz-failures/`` and the exit code is 1. The same ``--seed`` gives the same inputs.
"""

import argparse
import io
import json
import random
import select
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from copy import deepcopy
from pathlib import Path
from typing import Any

FIXTURES = Path(__file__).resolve().parents[1] / "tests" / "fixtures"
FAILURES = Path("fuzz-failures")
LONGEST_CASE = 120
"""Seconds on the clock after which a case counts as one without end."""
MOST_MESSAGE = 2200
BYTES = (0, 1, 10, 34, 44, 91, 123, 127, 128, 192, 254, 255)
VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2**31, 2**63, 2**64, 10**400, 1e308, -1e-300, float("nan"), float("inf"),
    "", "x", "\x1b[2J", "\ud800", "9" * 5000, "../../x", "/etc/passwd", [], {}, [[]], [None],
    {"a": {"b": []}}, [0] * 1000, "a" * 100_000,
)  # fmt: skip


# pristine inputs
def pristine(place: Path) -> dict[str, tuple[Path, list[str]]]:
    """Kind -> (file or folder, command that reads it; ``{}`` is its path, ``{out}`` a new path)."""
    import numpy as np
    import polars as pl

    place.mkdir(parents=True)
    ids = np.random.default_rng(0).permuted(np.tile(np.arange(8), (64, 1)), axis=1)[:, :2]
    np.save(place / "routes.npy", np.stack([ids, ids], axis=1).astype(np.uint8))
    np.savez(place / "routes.npz", routed_experts=np.stack([ids, ids], axis=1))
    counts = np.bincount(ids.ravel(), minlength=8).tolist()
    (place / "counts.json").write_text(json.dumps({"counts": [counts, counts], "top_k": 2}))
    (place / "config.json").write_text(
        json.dumps(
            {
                "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "hidden_size": 64,
                "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
                "num_key_value_heads": 2, "vocab_size": 256, "num_local_experts": 8,
                "num_experts_per_tok": 2, "tie_word_embeddings": False,
            }
        )
    )  # fmt: skip
    text = pl.DataFrame({"text": ["one two three", "four five six", "seven"] * 9})
    text.write_parquet(place / "corpus.parquet")
    text.write_ndjson(place / "corpus.jsonl")
    rows = [
        {"ratio": r, "seed": s, "loss": 3.4 - 0.03 * r**0.5, "active_params": 9e5, "tokens": 1e6}
        for r in (1, 2, 4, 8, 16, 32)
        for s in (0, 1)
    ]
    pl.DataFrame(rows).write_csv(place / "runs.csv")
    pl.DataFrame(rows).write_parquet(place / "runs.parquet")
    _write_trace(place / "trace", ids)
    shutil.copytree(FIXTURES / "sweep", place / "sweep")
    routes = ["trace", "--out", "{out}", "--num-experts", "8", "--import"]
    commands = {
        "routes.npy": [*routes, "vllm", "{}"],
        "routes.npz": [*routes, "vllm", "{}"],
        "counts.json": ["trace", "--out", "{out}", "--import", "counts", "{}"],
        "config.json": ["count", "{}"],
        "corpus.parquet": ["corpus", "{}"],
        "corpus.jsonl": ["corpus", "{}"],
        "runs.csv": ["scaling", "verdict", "{}"],
        "runs.parquet": ["scaling", "verdict", "{}"],
        "trace": ["open", "{}"],
        "sweep": ["sweep", "status", "{}"],
    }
    kinds = {name: (place / name, command) for name, command in commands.items()}
    return kinds | {"page of a sweep": (place / "sweep", ["report", "{}", "--out", "{out}.html"])}


def _write_trace(folder: Path, ids: Any) -> None:
    import numpy as np
    import polars as pl

    from moe_lab.trace import LayerMeta, TraceMeta, TraceWriter

    meta = TraceMeta(tuple(LayerMeta(layer, 6, 2, 2) for layer in (0, 1)), vocab_size=99)
    with TraceWriter(folder, meta) as writer:
        doc, pos = np.repeat(np.arange(4), 16), np.tile(np.arange(16), 4)
        words = ["name", "space"] * 32
        writer.write_tokens(
            pl.DataFrame({"doc": doc, "pos": pos, "token_id": pos, "lexer": words, "text": words})
        )
        for layer in (0, 1):
            real = (ids < 6).sum(axis=1).astype(np.uint8)
            rows = {
                "doc": doc.astype(np.uint32),
                "pos": pos.astype(np.uint32),
                "experts": ids.astype(np.uint16),
                "weights": np.full(ids.shape, 0.5, np.float16),
                "ffn_count": real,
                "zero_count": (2 - real).astype(np.uint8),
                "gate_mass_ffn": (real / 2).astype(np.float32),
                "entropy": np.ones(len(ids), np.float32),
                "margin": np.full(len(ids), 0.1, np.float32),
                "dropped": np.zeros(len(ids), np.uint8),
            }
            writer.write_rows(layer, rows, np.bincount(ids.ravel(), minlength=8))


# mutations
def mutate(path: Path, draw: random.Random) -> str:
    """Change one file (of a folder) in place; returns what was done."""
    files = sorted(item for item in path.rglob("*") if item.is_file()) if path.is_dir() else [path]
    target = draw.choice(files)
    if target.suffix in (".json", ".jsonl") and draw.random() < 0.7:
        return f"{target.name}: {_mutate_json(target, draw)}"
    data = bytearray(target.read_bytes())
    for _ in range(draw.choice((1, 1, 2, 8))):
        how = draw.choice(("set", "set", "cut", "insert", "repeat", "swap"))
        at = draw.randrange(len(data) + 1)
        if draw.random() < 0.3:  # footers and headers decide most
            at = draw.choice((at % 64, max(len(data) - 1 - at % 400, 0)))
        span = draw.choice((1, 4, 64))
        if how == "set" and data:
            data[min(at, len(data) - 1)] = draw.choice((*BYTES, draw.randrange(256)))
        elif how == "cut":
            del data[at : draw.choice((at + span, len(data)))]
        elif how == "insert":
            data[at:at] = bytes(draw.choice(BYTES) for _ in range(span))
        elif how == "repeat":
            data[at:at] = data[at : at + span] * draw.choice((1, 3, 1000))
        else:
            data[at : at + span] = data[at : at + span][::-1]
    target.write_bytes(data)
    if path.is_dir() and target.suffix == ".parquet":
        _forge_checksum(path, target)
    return f"{target.name}: bytes"


def _forge_checksum(folder: Path, target: Path) -> None:
    """Let ``meta.json`` of a trace list the changed file as it is now."""
    import zlib

    try:
        meta = json.loads((folder / "meta.json").read_text())
        entry = meta["parts"][target.relative_to(folder).as_posix()]
    except (OSError, ValueError, KeyError, TypeError):
        return
    data = target.read_bytes()
    entry |= {"bytes": len(data), "crc32": zlib.crc32(data)}
    (folder / "meta.json").write_text(json.dumps(meta))


def _mutate_json(target: Path, draw: random.Random) -> str:
    text = target.read_text(errors="replace")
    lines = text.splitlines() if target.suffix == ".jsonl" else [text]
    number = draw.randrange(max(len(lines), 1))
    try:
        value = json.loads(lines[number])
    except (ValueError, IndexError):
        return "already no JSON"
    done = []
    for _ in range(draw.choice((1, 1, 2, 4))):
        places = list(_places(value))
        if not places:
            break
        container, key = draw.choice(places)
        how = draw.choice(("type", "type", "drop", "nest", "deep", "double"))
        if how == "type":
            container[key] = deepcopy(draw.choice(VALUES))  # a later step may change it
        elif how == "drop":
            del container[key]
        elif how == "nest":
            container[key] = draw.choice(([container[key]], {"x": container[key]}))
        elif how == "deep":
            for _ in range(draw.choice((20, 1500))):
                container[key] = [container[key]]
        elif isinstance(container, list):
            container.append(container[key])
        else:
            container[f"{key}2"] = container[key]
        done.append(f"{how} of {str(key)[:40]}")
    try:
        lines[number] = json.dumps(value)
    except (RecursionError, ValueError):
        lines[number] = "[" * 100_000
    target.write_text("\n".join(lines))
    return ", ".join(done)


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) of a JSON value, without recursion."""
    waiting = [value]
    while waiting:
        container = waiting.pop()
        keys = container.keys() if isinstance(container, dict) else range(len(container))
        for key in list(keys):
            yield container, key
            if isinstance(container[key], dict | list):
                waiting.append(container[key])


# worker and driver
def _open(path: str) -> int:
    from moe_lab.analysis import class_profile, expert_load, router_entropy
    from moe_lab.trace import open_trace

    trace = open_trace(path).check()
    names = trace.tokens.collect_schema()
    for analysis in (expert_load, router_entropy):
        analysis(trace)
    if "lexer" in names and trace.meta.per_token and trace.meta.zero_experts_known:
        class_profile(trace, "lexer", resamples=10)
    return 0


def _corpus(path: str) -> int:
    from moe_lab.text import load_corpus

    load_corpus(path)
    return 0


DIRECT: dict[str, Callable[[str], int]] = {"open": _open, "corpus": _corpus}


def run_case(command: list[str]) -> dict[str, Any]:
    """In the worker: the exit code of a command, and what is wrong with how it ended ("" if
    nothing).
    """
    from moe_lab.cli import main
    from moe_lab.errors import MoELabError

    out, err = io.StringIO(), io.StringIO()
    try:
        with redirect_stdout(out), redirect_stderr(err):
            direct = DIRECT.get(command[0])
            code = main(command) if direct is None else direct(command[1])
    except MoELabError as error:
        code, message = 2, f"moe-lab: {' '.join(str(error).split())}"
        err.write(message[:MOST_MESSAGE])
        if "\n" in str(error).strip():
            return {"code": 2, "wrong": f"more than one line: {error}"}
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 2
    except BaseException:
        return {"code": 1, "wrong": traceback.format_exc()[-3000:]}
    lines = err.getvalue().strip().splitlines()
    wrong = ""
    if code not in (0, 1, 2):
        wrong = f"exit code {code}"
    elif code == 2 and (not lines or len(lines[-1]) > MOST_MESSAGE):
        wrong = f"{len(lines)} lines of error, the last of {len(lines[-1]) if lines else 0}"
    elif "\x1b[2J" in out.getvalue() + err.getvalue():
        wrong = "an escape sequence reached the terminal"
    return {"code": code, "wrong": wrong}


def worker() -> None:
    """Serve cases, one JSON line each."""
    import os
    import resource

    resource.setrlimit(resource.RLIMIT_DATA, (3 * 2**30, 3 * 2**30))
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        print(json.dumps(run_case(json.loads(line))), file=answers, flush=True)


class Worker:
    """A worker process, started again after it died."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None

    def ask(self, command: list[str]) -> dict[str, Any]:
        if self.process is None or self.process.poll() is not None:
            self.process = subprocess.Popen(
                [sys.executable, __file__, "--worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(command) + "\n")
            self.process.stdin.flush()
            if not select.select([self.process.stdout], [], [], LONGEST_CASE)[0]:
                self.process.kill()
                return {"code": 1, "wrong": f"no end within {LONGEST_CASE} s"}
            return json.loads(self.process.stdout.readline())
        except (OSError, ValueError):
            return {"code": 1, "wrong": f"the process ended with {self.process.wait()}"}


def fuzz(minutes: float, seed: int, only: str | None = None) -> int:
    """Mutate and run until the time is over; returns the number of failures."""
    ends, outcomes, failures = time.monotonic() + 60 * minutes, Counter[tuple[str, int]](), 0
    asked = Worker()
    with tempfile.TemporaryDirectory(prefix="moe_lab-fuzz-") as folder:
        kinds = pristine(Path(folder) / "pristine")
        if only is not None:
            kinds = {only: kinds[only]}
        for kind, (source, command) in kinds.items():  # each must be read before it is mutated
            out = str(Path(folder) / f"out of {kind}")
            found = asked.ask(
                [part.replace("{out}", out).replace("{}", str(source)) for part in command]
            )
            if found["code"] != 0:
                print(f"{kind}: the input without mutation ends in {found}")
                failures += 1
        number = 0
        while time.monotonic() < ends:
            draw = random.Random(f"{seed} {number}")
            kind = list(kinds)[number % len(kinds)]
            source, command = kinds[kind]
            case = Path(folder) / "case"
            shutil.rmtree(case, ignore_errors=True)
            case.mkdir()
            path = case / source.name
            (shutil.copytree if source.is_dir() else shutil.copy)(source, path)
            done = mutate(path, draw)
            found = asked.ask(
                [
                    part.replace("{out}", str(case / "out")).replace("{}", str(path))
                    for part in command
                ]
            )
            outcomes[kind, found["code"]] += 1
            if found["wrong"]:
                failures += 1
                kept = FAILURES / f"{seed}-{number}"
                shutil.rmtree(kept, ignore_errors=True)
                shutil.copytree(case, kept)
                (kept / "wrong.txt").write_text(f"{kind}: {done}\n{command}\n{found['wrong']}\n")
                print(f"{kept}: {kind}: {done}: {found['wrong'].strip().splitlines()[-1][:200]}")
            number += 1
    for (kind, code), count in sorted(outcomes.items()):
        print(f"{kind:16} exit code {code}: {count}")
    print(f"{number} inputs, {failures} failures")
    return failures


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default=None, help="one kind of input, such as trace")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker()
        return 0
    return 1 if fuzz(args.minutes, args.seed, args.only) else 0


if __name__ == "__main__":
    sys.exit(main())
