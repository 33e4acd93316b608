"""A small real grid as a process: ``python tiny_grid.py CORPUS OUT LAUNCHER [key=value ...]``, to
begin and to continue.

Decoders of two ratios, of a few seconds each, trained on the bytes of a folder of text. ``steps=``,
``seeds=`` and ``workers=`` are the grid's, other pairs the launcher's. A run stands still at step
``HELD_AT`` while the file ``HOLD`` lies beside it, or in the folder ``MOE_LAB_TEST_HOLD``, so that
what a test does to it happens in the middle of its training, however slow the machine is. With
``MOE_LAB_TEST_SILENCE`` claims and leases of another host are dead after so many seconds.
"""

import json
import os
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_lab.errors import MoELabError
from moe_lab.model import DecoderConfig, MoEConfig
from moe_lab.routing import RouterConfig
from moe_lab.runs import folder_claims, object_leases
from moe_lab.sweeps import SweepConfig, run
from moe_lab.text import TextConfig
from moe_lab.training import RunConfig

STEP_TOKENS = 4 * 32
STEPS = 100
VOLATILE = ("seconds", "tokens_per_second")
"""Of a result: what depends on the clock."""
TRAINER = "tiny_grid:train"
HOLD = "hold"
HELD = "held"
"""In a run's folder: the process that stands still."""
HELD_AT = 20
HOLD_SECONDS = 1200
"""At most, for runs that a failed test leaves behind."""
HOLD_IN, SILENCE = "MOE_LAB_TEST_HOLD", "MOE_LAB_TEST_SILENCE"

if SILENCE in os.environ:  # in the driver and in its workers, which import this file
    seconds = float(os.environ[SILENCE])
    folder_claims.SILENT_SECONDS = object_leases.SILENT_SECONDS = seconds
    folder_claims.HEARTBEAT_SECONDS = object_leases.RENEW_SECONDS = seconds / 5


def write_corpus(folder: Path) -> Path:
    folder.mkdir()
    for index in range(40):
        (folder / f"{index}.txt").write_text(
            "".join(f"{index} times {n} is {index * n}.\n" for n in range(40))
        )
    return folder


def tiny_grid(corpus: Path, steps: int, seeds: int) -> SweepConfig:
    runs = []
    for num_experts in (4, 8):
        moe = MoEConfig(
            d_model=32, d_expert=16, router=RouterConfig(num_experts=num_experts, top_k=2)
        )
        model = DecoderConfig(
            vocab_size=257, num_layers=2, d_model=32, num_heads=2, context_length=32, moe=moe
        )
        text = TextConfig(corpus=str(corpus), tokenizer="byte")  # type: ignore[arg-type]
        common: dict[str, Any] = {
            "batch_size": 4,
            "seq_length": 32,
            "train_tokens": steps * STEP_TOKENS,
            "checkpoint_every": 10,
        }
        runs += [
            RunConfig(
                name=f"E{num_experts} seed {seed}", seed=seed, model=model, text=text, **common
            )
            for seed in range(seeds)
        ]
    return SweepConfig(name="tiny", question="Is it the same wherever it runs?", runs=tuple(runs))


def results(out: Path) -> dict[str, dict[str, Any]]:
    """Result by run, without what depends on the clock."""
    paths = out.glob("*/result.json")
    return lasting({path.parent.name: json.loads(path.read_text()) for path in paths})


def lasting(found: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Results without what depends on the clock."""
    return {
        name: {key: value for key, value in values.items() if key not in VOLATILE}
        for name, values in found.items()
    }


class Hold:
    """A logger that waits: the run goes on with the numbers it would have had."""

    def __init__(self, folder: Path) -> None:
        place = os.environ.get(HOLD_IN)
        self.hold = Path(place or folder.parent) / HOLD
        self.held = Path(place) / folder.name if place else folder / HELD
        self.deadline = time.monotonic() + HOLD_SECONDS

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        while step >= HELD_AT and self.hold.exists() and time.monotonic() < self.deadline:
            self.held.write_text(f"{os.getpid()} {socket.gethostname()}")
            time.sleep(0.05)
        self.close()

    def close(self) -> None:
        self.held.unlink(missing_ok=True)


def train(values: dict[str, Any], folder: Path) -> None:
    """As ``launchers.train_run``, held on request."""
    import torch

    from moe_lab import training

    torch.set_num_threads(1)
    training.train(RunConfig.from_dict(values), folder, loggers=[Hold(folder)])


def main(corpus: str, out: str, launcher: str, *pairs: str) -> int:
    """As ``moe-lab sweep run``, without its report."""
    options = dict(pair.split("=", 1) for pair in pairs)
    steps, seeds, workers = (
        int(options.pop(name, default))
        for name, default in (("steps", STEPS), ("seeds", 2), ("workers", 0))
    )
    try:
        grid = tiny_grid(Path(corpus), steps, seeds)
        outcome = run(
            grid,
            out,
            workers or None,
            launcher=launcher,
            launcher_options=options,
            trainer=TRAINER,
        )
    except MoELabError as error:
        print(f"moe-lab: {error}", file=sys.stderr)
        return 2
    print("outcome", len(outcome.finished), len(outcome.failed), len(outcome.interrupted))
    for failure in outcome.failed:
        print(f"failed: {failure.name}: {failure.reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
