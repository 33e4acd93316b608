"""Run folders as training leaves them while it goes on, made without training."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_lab.runs import RunState
from moe_lab.runs.tables import TABLES, parse_lines

LAYERS, EXPERTS = 3, 8


def make_run(
    folder: Path,
    *,
    state: RunState = RunState.RUNNING,
    arm: str = "topk",
    ratio: float = 4.0,
    seed: int = 0,
    steps: int = 40,
    of: int = 100,
    layers: int = LAYERS,
    experts: int = EXPERTS,
) -> Path:
    """A run of ``steps`` logged steps; RUNNING: without a claim, as ``moe-lab train`` has none."""
    folder.mkdir(parents=True)
    config = {"name": f"{arm} {ratio:g}", "arm": arm, "seed": seed}
    (folder / "config.json").write_text(json.dumps(config))
    for step in range(1, steps + 1):
        log_step(folder, step, of=of, layers=layers, experts=experts, status=step == steps)
    if state is RunState.FAILED:
        (folder / "error.txt").write_text("the loss is nan\nTraceback\n  last line of it\n")
    if state is RunState.FINISHED:
        finish(folder, arm, ratio, seed)
    return folder


def finish(folder: Path, arm: str = "topk", ratio: float = 4.0, seed: int = 0) -> None:
    """Write what a run leaves when it is done."""
    for table in TABLES.values():
        if (folder / table.log).exists():
            lines, _ = parse_lines((folder / table.log).read_bytes())
            table.frame(lines).write_parquet(folder / table.parquet)
    result = {"run": folder.name, "name": f"{arm} {ratio:g}", "arm": arm, "ratio": ratio}
    result |= {"seed": seed, "loss": 2.2 - 0.1 * math.log2(ratio), "seconds": 12.5}
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "done").write_text("{}")


def log_step(
    folder: Path,
    step: int,
    *,
    of: int = 100,
    layers: int = LAYERS,
    experts: int = EXPERTS,
    status: bool = True,
    loss: float | None = None,
) -> None:
    """Write what training writes at a logged step."""
    loss = loss_at(step) if loss is None else loss
    row = {"step": step, "tokens": step * 256, "loss": loss, "grad_norm": 1.0, "load_cv": 0.3}
    row |= {"max_violation": 0.5, "router_entropy": 2.0, "mean_ffn_count": 1.9}
    append(folder / "metrics.jsonl", row | {"tokens_per_second": 5000.0})
    if layers and step % 5 == 0:
        numbers = list(range(layers))
        by_layer: dict[str, Sequence[Any]] = {
            "layer": numbers,
            "load_cv": [0.2 + 0.1 * layer for layer in numbers],
            "max_violation": [0.4] * layers,
            "dead_experts": [float(layer == 0) for layer in numbers],
            "router_entropy": [1.5] * layers,
            "entropy_max": [math.log(experts)] * layers,
            "mean_ffn_count": [1.9] * layers,
            "ffn_target": [2.0] * layers,
            "gradient_ratio": [0.05] * layers,
        }
        append(folder / "layers.jsonl", {"step": step, **by_layer})
        share = [0.0, 2 / experts] + [1 / experts] * (experts - 2)
        append(
            folder / "loads.jsonl",
            {
                "step": step,
                "layer": numbers,
                "load": [share] + [[1 / experts] * experts] * (layers - 1),
            },
        )
        append(folder / "validation.jsonl", {"step": step, "loss": loss + 0.05, "tokens": 100})
    if status:
        values = {"state": "training", "step": step, "steps": of, "loss": loss}
        part = folder / ".tmp-status"
        part.write_text(json.dumps(values | {"tokens_per_second": 5000.0}))
        part.replace(folder / "status.json")


def log_alarm(folder: Path, sentence: str, kind: str = "router_collapse") -> None:
    row = {"step": 40, "kind": kind, "layer": 1, "value": 0.1, "threshold": 0.2}
    append(folder / "alarms.jsonl", row | {"sentence": sentence, "advice": "raise the loss"})


def append(path: Path, row: dict[str, Any]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def loss_at(step: int) -> float:
    return 2.0 + 3.0 * math.exp(-step / 30)
