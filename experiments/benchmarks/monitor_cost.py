"""What observing the routing costs a training step: the same step with and without it, in turns.

    python experiments/benchmarks/monitor_cost.py [--rounds 40] [--threads 1]

The model is the 0.8M-active decoder of ``training_throughput.py`` at E = 64. Each contestant has a
model of the same weights with its own optimiser, trains on the same batches, and must reach the
same losses to the bit. One is plain; of one every step is observed and written to the tables; of
one ``monitor`` is open and no step is observed. The rows of ``every`` are the means that follow for
a training in which one of so many steps is observed. ``train``: ``read_layers``, the part of a
logged step of ``moe_lab.training`` that reads the layers, over the plain step.

Ratios are of the processor time of all threads of a turn, which other work on the machine disturbs
less than time on the clock; intervals are 95 % bootstrap intervals of the median over turns.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import polars as pl
import torch
from measure import save
from training_throughput import BATCH, LENGTH, SIZES

from moe_lab.model import Decoder
from moe_lab.routing import Routing
from moe_lab.runs.tables import read_tables
from moe_lab.training import OptimizerConfig, keep_freed_memory, monitor
from moe_lab.training.optimizer import build_optimizer, clip_gradients
from moe_lab.training.readings import read_layers

EXPERTS, NEVER, WARM_UP = 64, 10**9, 2
EVERY = (10, 20)
Follow = Callable[[float, list[Routing]], object]


def stepper(after: Callable[[Decoder], Follow] | None) -> Callable[[torch.Tensor], float]:
    """A training step of a new model; ``after(model)`` makes what follows each step."""
    torch.manual_seed(0)
    model = Decoder(SIZES["0.8M"].config(EXPERTS))
    optimizer = build_optimizer(model, OptimizerConfig())
    follow = None if after is None else after(model)

    def step(ids: torch.Tensor) -> float:
        output = model(ids[:, :-1], ids[:, 1:])
        output.loss.backward()
        routings = [routing.detach() for routing in output.routings]
        clip_gradients(model, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss = output.loss.item()
        if follow is not None:
            follow(loss, routings)
        return loss

    return step


def monitored(folder: Path, every: int) -> Callable[[Decoder], Follow]:
    def after(model: Decoder) -> Follow:
        watch = monitor(model, folder, every=every)
        return lambda loss, routings: watch.step(loss=loss)

    return after


def reading(model: Decoder) -> Follow:
    layers = model.moe_layers()
    return lambda loss, routings: read_layers(1, layers, [[routing] for routing in routings])


def take_turns(rounds: int, folder: Path) -> dict[str, np.ndarray]:
    """Processor seconds of each contestant, [rounds]."""
    steps = {
        "plain": stepper(None),
        "not observed": stepper(monitored(folder / "never", NEVER)),
        "observed": stepper(monitored(folder / "each", 1)),
        "train": stepper(reading),
    }
    generator = torch.Generator().manual_seed(1)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for turn in range(rounds + WARM_UP):
        ids = torch.randint(0, 256, (BATCH, LENGTH + 1), generator=generator)
        losses = set()
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            began = time.process_time()
            losses.add(steps[name](ids))
            seconds[name].append(time.process_time() - began)
        assert len(losses) == 1, f"losses differ in turn {turn}: {losses}"
    assert read_tables(folder / "each").layers.height == 4 * (rounds + WARM_UP)
    return {name: np.array(values[WARM_UP:]) for name, values in seconds.items()}


def summary(seconds: Mapping[str, np.ndarray]) -> pl.DataFrame:
    """One row per contestant and interval: median milliseconds and ratio to the plain step."""
    ratios = {name: values / seconds["plain"] for name, values in seconds.items()}
    for every in EVERY:
        others = (every - 1) * ratios["not observed"]
        ratios[f"every {every}"] = (ratios["observed"] + others) / every
    rows = []
    for name, values in ratios.items():
        draws = np.random.default_rng(0).choice(values, (4000, len(values)))
        low, high = np.quantile(np.median(draws, axis=1), (0.025, 0.975))
        rows.append(
            {
                "name": name,
                "turns": len(values),
                "ms": float(np.median(seconds[name]) * 1e3) if name in seconds else None,
                "ratio": float(np.median(values)),
                "ratio_low": float(low),
                "ratio_high": float(high),
            }
        )
    return pl.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        frame = summary(take_turns(args.rounds, Path(folder)))
    with pl.Config(tbl_rows=-1, tbl_cols=-1, tbl_width_chars=120, float_precision=4):
        print(frame)
    print("saved", save(frame, "monitor_cost"))


if __name__ == "__main__":
    main()
