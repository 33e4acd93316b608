"""A sweep of two tiny real runs, as a recipe and as a process to kill: ``python real_sweep.py
CORPUS OUT``.
"""

import sys
from pathlib import Path

from moe_lab.model import DecoderConfig, MoEConfig
from moe_lab.routing import RouterConfig
from moe_lab.sweeps import SweepConfig, run
from moe_lab.text import TextConfig
from moe_lab.training import RunConfig


def real_sweep(corpus: Path) -> SweepConfig:
    runs = []
    for num_experts in (4, 8):
        moe = MoEConfig(
            d_model=32, d_expert=16, router=RouterConfig(num_experts=num_experts, top_k=2)
        )
        model = DecoderConfig(
            vocab_size=257, num_layers=2, d_model=32, num_heads=2, context_length=32, moe=moe
        )
        text = TextConfig(corpus=str(corpus), tokenizer="byte")  # type: ignore[arg-type]
        runs.append(
            RunConfig(
                name=f"E{num_experts}",
                model=model,
                text=text,
                batch_size=4,
                seq_length=32,
                train_tokens=120 * 128,
                checkpoint_every=10,
            )
        )
    return SweepConfig(name="real", question="Is it the same?", runs=tuple(runs))


if __name__ == "__main__":
    outcome = run(real_sweep(Path(sys.argv[1])), Path(sys.argv[2]), workers=2)
    print("outcome", len(outcome.finished), len(outcome.failed), len(outcome.interrupted))
