"""Mutated files against every reader: each ends in exit code 0 or in one line and exit code 2.

    python experiments/fuzz.py --minutes 10

Traces, imports, configurations, run folders, corpora, plans and tables of runs are mutated by
bytes, by structure (keys dropped, doubled, nested) and by type (a value becomes another kind of
value), and given to the command that reads them, in a worker process. A traceback, a crash, more
than one line of error or a command without end is a failure: its input stays in
``fuzz-failures/`` and the exit code is 1. The same ``--seed`` gives the same inputs.
"""

import argparse
import base64
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
PAGE = "page of a sweep"
CHEAP = 8
"""Inputs of each other kind for each ``PAGE``, which takes seconds."""
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
    _write_engine_records(place, ids)
    _write_run_files(place)
    routes = ["trace", "--out", "{out}", "--num-experts", "8", "--top-k", "2", "--import"]
    commands = {
        "routes.npy": [*routes, "vllm", "{}"],
        "routes.npz": [*routes, "vllm", "{}"],
        "sglang.jsonl": [*routes, "sglang", "{}"],
        "megatron.jsonl": [*routes, "megatron", "{}"],
        "route_trace.csv": [*routes[:3], "--import", "route-trace", "{}"],
        "route_trace.csv.gz": [*routes[:3], "--import", "route-trace", "{}"],
        "llama_cpp.csv": [*routes, "llama-cpp", "{}"],
        "expert_map.json": ["expert_map", "{}"],
        "atlas.json": [*routes[:3], "--import", "moe-atlas", "{}"],
        "strata.json": [*routes[:3], "--import", "stratamoe", "{}"],
        "counts.pt": [*routes, "sglang", "{}"],
        "counts.json": ["trace", "--out", "{out}", "--import", "counts", "{}"],
        "config.json": ["count", "{}"],
        "corpus.parquet": ["corpus", "{}"],
        "corpus.jsonl": ["corpus", "{}"],
        "runs.csv": ["scaling", "verdict", "{}"],
        "runs.parquet": ["scaling", "verdict", "{}"],
        "trace": ["open", "{}"],
        "sweep": ["sweep", "status", "{}"],
        "plan": ["sweep", "status", "{}"],
        "store": ["store", "{}"],
        "run": ["run", "{}"],
        "checkpoint.safetensors": ["checkpoint", "{}"],
        "tokenizer.json": ["tokenizer", "{}"],
    }
    kinds = {name: (place / name, command) for name, command in commands.items()}
    return kinds | {PAGE: (place / "sweep", ["report", "{}", "--out", "{out}.html"])}


def _write_engine_records(place: Path, ids: Any) -> None:
    """What engines and two tools write of the same routes, and a placement."""
    import gzip

    import numpy as np
    import torch

    encoded = base64.b64encode(np.stack([ids, ids], axis=1).astype(np.int32).tobytes()).decode()
    answer = {"output_ids": list(range(65)), "meta_info": {"routed_experts": encoded}}
    (place / "sglang.jsonl").write_text(json.dumps(answer))
    steps = [
        {"step": step, "layer": layer, "num_tokens": 64, "topk": 2, "top_indices": ids.tolist()}
        for step in (0, 1)
        for layer in (0, 1)
    ]
    (place / "megatron.jsonl").write_text("\n".join(map(json.dumps, steps)))
    chosen = [
        {"layer": layer, "token_idx": token, "expert_idx": int(expert), "gate_weight": 0.5}
        for layer in (0, 1)
        for token in range(64)
        for expert in ids[token]
    ]
    sizes = {"model_id": "m", "num_layers": 2, "num_experts": 8, "top_k": 2}
    (place / "atlas.json").write_text(json.dumps({**sizes, "activations": chosen}))
    sizes = {"version": 2, "expertsPerLayer": 8, "topK": 2, "layers": 2, "tokens": 64}
    selections = np.stack([ids, ids], axis=1).tolist()
    (place / "strata.json").write_text(json.dumps({**sizes, "selections": selections}))
    lines = [
        "# route_trace v1",
        "# model=m.gguf arch=x n_layer=2 n_expert=8 n_expert_used=2",
        *(f"# layer={layer} expert_bytes=64 dense_bytes=1" for layer in (0, 1)),
        "turn,phase,step,layer,slot,expert,weight,residency,expert_bytes",
    ]
    lines += (
        f"{token // 32},{token % 2},{token % 32},{layer},{slot},{expert},0.5,0,64"
        for token in range(64)
        for layer in (0, 1)
        for slot, expert in enumerate(ids[token].tolist())
    )
    (place / "route_trace.csv").write_text("\n".join(lines))
    (place / "route_trace.csv.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    lines = [f"{layer},{e}" for token in ids.tolist() for layer in (0, 1) for e in token]
    (place / "llama_cpp.csv").write_text("\n".join(lines))
    held = [{"device_id": device, "device_expert": list(range(4 * device, 4 * device + 4))}
            for device in (0, 1)]  # fmt: skip
    layer = {"layer_id": 0, "device_count": 2, "device_list": held}
    (place / "expert_map.json").write_text(
        json.dumps({"moe_layer_count": 1, "layer_list": [layer]})
    )
    counts = torch.from_numpy(np.bincount(ids.ravel(), minlength=8)).repeat(2, 1)
    torch.save({"logical_count": counts}, place / "counts.pt")


def _write_run_files(place: Path) -> None:
    """A sweep of finished, failed and interrupted runs; its plan, a store of it, and its files."""
    sweep = place / "sweep"
    shutil.copytree(FIXTURES / "sweep", sweep)
    finished = next(path.parent for path in sorted(sweep.glob("*/done")))
    shutil.copytree(finished, place / "run")
    shutil.copy(finished / "tokenizer.json", place)
    shutil.copy(next(sweep.glob("*/checkpoint.safetensors")), place)
    (place / "plan").mkdir()
    shutil.copy(sweep / "sweep.json", place / "plan")
    plan = json.loads((sweep / "sweep.json").read_text())
    head = {"schema_version": plan["schema_version"], "added": 0.0, "entries": plan["runs"]}
    store = place / "store"
    (store / "sweeps").mkdir(parents=True)
    (store / "sweeps" / "0.json").write_text(json.dumps(head | plan["sweeps"][0]))
    for run in plan["runs"]:
        for path in (sweep / run).iterdir() if (sweep / run).is_dir() else ():
            kind = "files" if path.name.startswith(("metrics.p", "trace")) else "state"
            target = store / kind / run / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir():
                shutil.copytree(path, target)
            elif not path.name.startswith(("checkpoint", "model", ".", "metrics.j")):
                shutil.copy(path, target)


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
    """Let the manifest of a trace list the changed file as it is now, and ``meta.json`` the
    manifest.
    """
    import polars as pl

    from moe_lab.trace.manifest import NAME, part_name, whole_digest
    from moe_lab.trace.seal import digest

    manifest = folder / part_name(0)
    try:
        meta = json.loads((folder / "meta.json").read_text())
        if target != manifest:
            changed = pl.lit(target.relative_to(folder).as_posix()) == NAME
            now = {"bytes": target.stat().st_size, "digest": bytes.fromhex(digest(target))}
            entries = pl.read_parquet(manifest)
            entries.with_columns(
                pl.when(changed)
                .then(pl.lit(value, entries.schema[name]))
                .otherwise(name)
                .alias(name)
                for name, value in now.items()
            ).write_parquet(manifest)
        meta["manifest"]["digest"] = whole_digest([digest(manifest)])
    except (OSError, ValueError, KeyError, TypeError, pl.exceptions.PolarsError):
        return
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


def _store(path: str) -> int:
    from moe_lab.report.sources import gather, training_metrics
    from moe_lab.runs.object_store import ObjectStore

    store = ObjectStore(f"file://{path}")
    list(store.records(list(store.plan()["runs"])))
    with store.readable() as folder:
        training_metrics(gather(folder).finished)
    return 0


def _run(path: str) -> int:
    from moe_lab.training import load_run

    load_run(path)
    return 0


def _checkpoint(path: str) -> int:
    from moe_lab.training.checkpoint import load_tensors

    load_tensors(Path(path))
    return 0


def _tokenizer(path: str) -> int:
    from moe_lab.text import Tokenizer

    Tokenizer.load(path).decode([0, 1])
    return 0


def _expert_map(path: str) -> int:
    from moe_lab.serving import read_vllm_expert_map

    read_vllm_expert_map(path, 8)
    return 0


DIRECT: dict[str, Callable[[str], int]] = {
    "open": _open,
    "corpus": _corpus,
    "store": _store,
    "run": _run,
    "checkpoint": _checkpoint,
    "tokenizer": _tokenizer,
    "expert_map": _expert_map,
}


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


def fuzz(
    minutes: float, seed: int, only: str | None = None, most: int | None = None
) -> tuple[Counter[tuple[str, int]], int]:
    """Mutate and run until the time is over, or for ``most`` inputs.

    Returns how often each (kind, exit code) came, and the number of failures.
    """
    ends, outcomes, failures = time.monotonic() + 60 * minutes, Counter[tuple[str, int]](), 0
    asked = Worker()
    with tempfile.TemporaryDirectory(prefix="moe_lab-fuzz-") as folder:
        kinds = pristine(Path(folder) / "pristine")
        if only is not None:
            kinds = {only: kinds[only]}
        for kind, (source, command) in kinds.items():  # each must be read before it is mutated
            found = asked.ask(filled(command, source, Path(folder) / f"out of {kind}"))
            if found["code"] != 0:
                print(f"{kind}: the input without mutation ends in {found}")
                failures += 1
        order = [kind for kind in kinds for _ in range(1 if kind == PAGE else CHEAP)]
        number = 0
        while time.monotonic() < ends and number != most:
            draw = random.Random(f"{seed} {number}")
            kind = order[number % len(order)]
            source, command = kinds[kind]
            case = Path(folder) / "case"
            shutil.rmtree(case, ignore_errors=True)
            case.mkdir()
            path = case / source.name
            (shutil.copytree if source.is_dir() else shutil.copy)(source, path)
            done = mutate(path, draw)
            found = asked.ask(filled(command, path, case / "out"))
            outcomes[kind, found["code"]] += 1
            if found["wrong"]:
                failures += 1
                kept = FAILURES / f"{seed}-{number}"
                shutil.rmtree(kept, ignore_errors=True)
                shutil.copytree(case, kept)
                (kept / "wrong.txt").write_text(f"{kind}: {done}\n{command}\n{found['wrong']}\n")
                last = found["wrong"].strip().splitlines()[-1][:200]
                print(f"{kept}: {kind}: {done}: {last}", flush=True)
            number += 1
    return outcomes, failures


def filled(command: list[str], path: Path, out: Path) -> list[str]:
    """A command for the input at ``path``."""
    return [part.replace("{out}", str(out)).replace("{}", str(path)) for part in command]


def table(outcomes: Counter[tuple[str, int]], failures: int) -> str:
    """Kinds of input and how they ended, as Markdown."""
    codes = sorted({code for _, code in outcomes})
    lines = ["| input | " + " | ".join(f"exit code {code}" for code in codes) + " |"]
    lines.append("|---" * (len(codes) + 1) + "|")
    kinds = dict.fromkeys(kind for kind, _ in sorted(outcomes))
    lines += (
        f"| {kind} | " + " | ".join(str(outcomes[kind, code]) for code in codes) + " |"
        for kind in kinds
    )
    return "\n".join([*lines, "", f"{outcomes.total()} inputs, {failures} failures"])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--inputs", type=int, default=None, help="end after so many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default=None, help="one kind of input, such as trace")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker()
        return 0
    outcomes, failures = fuzz(args.minutes, args.seed, args.only, args.inputs)
    print(table(outcomes, failures))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
