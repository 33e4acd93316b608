"""A trainer without torch: a number per step that depends on all steps before it, checkpointed as a
real run is.
"""

import errno
import json
import os
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_lab.config import Config
from moe_lab.errors import RunError
from moe_lab.files import write_json, write_text
from moe_lab.sweeps import SweepConfig

STUB = "stub_trainer:train"
HOLD = "hold"
"""While a file of this name lies in the sweep's folder, no run goes beyond its current step, or
beyond the step that the file names.
"""


@dataclass(frozen=True)
class StubModel(Config):
    num_experts: int = 4

    def to_dict(self) -> dict[str, Any]:
        return {
            "model_type": "mixtral",
            "vocab_size": 64,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "num_local_experts": self.num_experts,
            "num_experts_per_tok": 2,
            "max_position_embeddings": 64,
            "tie_word_embeddings": False,
        }


@dataclass(frozen=True)
class StubRun(Config):
    """``trouble``: what goes wrong, at the middle step of the run."""

    name: str = "run"
    seed: int = 0
    arm: str = "stub"
    ratio: float = 2.0
    steps: int = 20
    step_seconds: float = 0.0
    trouble: str = ""
    device: str = "cpu"
    memory_bytes: int = 0
    seq_length: int = 8
    tokens_per_step: int = 8
    model: StubModel = field(default_factory=StubModel)


def stub_sweep(*runs: StubRun, name: str = "stub") -> SweepConfig:
    return SweepConfig(name=name, question="Does it come back?", runs=runs)  # type: ignore[arg-type]


def expected_loss(run: StubRun) -> float:
    """What an undisturbed run ends with."""
    state = float(run.seed)
    for step in range(run.steps):
        state = _next(state, step)
    return state


def _next(state: float, step: int) -> float:
    return (state * 1.37 + step * 0.11 + 0.5) % 7.0


def train(values: dict[str, Any], folder: Path) -> None:
    if (folder / "done").exists():
        return
    run = StubRun.from_dict(values)
    checkpoint = folder / "checkpoint.json"
    found = (
        json.loads(checkpoint.read_text())
        if checkpoint.exists()
        else {"step": 0, "state": float(run.seed)}
    )
    state = found["state"]
    with open(folder / "steps.log", "a") as log:
        for step in range(found["step"], run.steps):
            log.write(f"{os.getpid()} {step}\n")
            log.flush()
            if step == run.steps // 2:
                _trouble(run.trouble, folder)
            state = _next(state, step)
            time.sleep(run.step_seconds)
            while _held(folder.parent / HOLD, step):
                time.sleep(0.01)
            _replace(checkpoint, {"step": step + 1, "state": state})
            _replace(
                folder / "status.json",
                {"step": step + 1, "steps": run.steps, "loss": state, "tokens_per_second": 8.0},
            )
    with open(
        folder / "result.json", "w"
    ) as result:  # not renamed into place: only `done` may make a reader trust it
        for character in json.dumps({"loss": state, "name": run.name}):
            result.write(character)
            result.flush()
            time.sleep(run.step_seconds / 10)
    write_text(folder / "done", "")


def _held(hold: Path, step: int) -> bool:
    try:
        return step >= int(hold.read_text() or 0)
    except FileNotFoundError:
        return False


def _replace(path: Path, values: dict[str, Any]) -> None:
    """``write_json`` without its fsync: tests kill processes, not the machine, and these are many
    files.
    """
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(values))
    temporary.replace(path)


def _trouble(kind: str, folder: Path) -> None:
    if kind == "diverges":
        raise RunError("the loss is nan at step 10; try a lower learning rate than 1")
    if kind == "bug":
        raise ZeroDivisionError("division by zero\nand a second line")
    if kind == "exit":
        sys.exit(3)
    if kind == "no space":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if kind == "killed every time":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "killed once" and not (folder / "was-killed").exists():
        (folder / "was-killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "hangs once" and not (folder / "has-hung").exists():
        (folder / "has-hung").touch()
        time.sleep(3600)
    if kind == "noisy":
        print("hello from python")
        os.system("echo hello from a child")
    if kind == "fills the disk":
        with open(folder / "ballast", "wb", buffering=0) as ballast:
            while True:
                ballast.write(b" " * 512)
    if kind == "needs file" and not Path(os.environ["STUB_FILE"]).exists():
        raise RunError("the file is missing")
    if kind == "waits for file":
        while not Path(os.environ["STUB_FILE"]).exists():
            time.sleep(0.01)
    if kind == "tell environment":
        write_json(folder / "environment.json", dict(os.environ))


def drive(out: Path, runs: int, steps: int, step_seconds: float, workers: int) -> None:
    """A whole sweep as a process of its own, for tests that kill it."""
    from moe_lab.sweeps import run

    outcome = run(
        stub_sweep(*stub_grid(runs, steps, step_seconds)), out, workers=workers, trainer=STUB
    )
    print("outcome", len(outcome.finished), len(outcome.failed), len(outcome.interrupted))


def stub_grid(runs: int, steps: int, step_seconds: float) -> list[StubRun]:
    return [
        StubRun(name=f"run {seed}", seed=seed, steps=steps + seed, step_seconds=step_seconds)
        for seed in range(runs)
    ]


if __name__ == "__main__":
    drive(
        Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]), int(sys.argv[5])
    )
