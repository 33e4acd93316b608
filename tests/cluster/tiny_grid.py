"""A small real grid as a process: ``python tiny_grid.py CORPUS OUT LAUNCHER [key=value ...]``, to begin and to continue.

Decoders of two ratios, of a few seconds each, trained on the bytes of a folder of text. ``steps=``, ``seeds=`` and ``workers=`` are the
grid's, other pairs the launcher's.
"""

import json
import sys
from pathlib import Path
from typing import Any

from moe_lab.errors import MoELabError
from moe_lab.model import DecoderConfig, MoEConfig
from moe_lab.routing import RouterConfig
from moe_lab.sweeps import SweepConfig, run
from moe_lab.text import TextConfig
from moe_lab.training import RunConfig

STEP_TOKENS = 4 * 32
STEPS = 300
VOLATILE = ("seconds", "tokens_per_second")
"""Of a result: what depends on the clock."""


def write_corpus(folder: Path) -> Path:
    folder.mkdir()
    for index in range(40):
        (folder / f"{index}.txt").write_text("".join(f"{index} times {n} is {index * n}.\n" for n in range(40)))
    return folder


def tiny_grid(corpus: Path, steps: int, seeds: int) -> SweepConfig:
    runs = []
    for num_experts in (4, 8):
        moe = MoEConfig(d_model=32, d_expert=16, router=RouterConfig(num_experts=num_experts, top_k=2))
        model = DecoderConfig(vocab_size=257, num_layers=2, d_model=32, num_heads=2, context_length=32, moe=moe)
        text = TextConfig(corpus=str(corpus), tokenizer="byte")  # type: ignore[arg-type]
        common: dict[str, Any] = {"batch_size": 4, "seq_length": 32, "train_tokens": steps * STEP_TOKENS, "checkpoint_every": 10}
        runs += [RunConfig(name=f"E{num_experts} seed {seed}", seed=seed, model=model, text=text, **common) for seed in range(seeds)]
    return SweepConfig(name="tiny", question="Is it the same wherever it runs?", runs=tuple(runs))


def results(out: Path) -> dict[str, dict[str, Any]]:
    """Result by run, without what depends on the clock."""
    found = {path.parent.name: json.loads(path.read_text()) for path in out.glob("*/result.json")}
    return {name: {key: value for key, value in values.items() if key not in VOLATILE} for name, values in found.items()}


def main(corpus: str, out: str, launcher: str, *pairs: str) -> int:
    """As ``moe-lab sweep run``, without its report."""
    options = dict(pair.split("=", 1) for pair in pairs)
    steps, seeds, workers = (int(options.pop(name, default)) for name, default in (("steps", STEPS), ("seeds", 2), ("workers", 0)))
    try:
        outcome = run(tiny_grid(Path(corpus), steps, seeds), Path(out), workers or None, launcher=launcher, launcher_options=options)
    except MoELabError as error:
        print(f"moe-lab: {error}", file=sys.stderr)
        return 2
    print("outcome", len(outcome.finished), len(outcome.failed), len(outcome.interrupted))
    for failure in outcome.failed:
        print(f"failed: {failure.name}: {failure.reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
