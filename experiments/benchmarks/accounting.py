"""Counting a model from its configuration, against building it on the meta device and summing its
parameters (transformers).

Every published model is counted (total, the three active figures, the table of parts) in turn with
the others; the budget is 50 ms. Three of them are also built. A fresh interpreter imports the room
and counts one, to show what a first call costs and that torch is not loaded.

    python experiments/benchmarks/accounting.py [--rounds 9]
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import polars as pl
from measure import save, summary, take_turns

from moe_lab.accounting import count
from moe_lab.accounting.model_names import facts

BUDGET_MS = 50
BUILT = {
    "Qwen/Qwen3-30B-A3B": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM"),
    "deepseek-ai/DeepSeek-V3": ("DeepseekV3Config", "DeepseekV3ForCausalLM"),
    "mistralai/Mixtral-8x7B": ("MixtralConfig", "MixtralForCausalLM"),
}
FRESH = """
import sys, time
began = time.perf_counter()
from moe_lab.accounting import count
imported = time.perf_counter()
from moe_lab.accounting.model_names import find_model
count(find_model("deepseek-ai/DeepSeek-V3")["config"]).active("A")
assert "torch" not in sys.modules
print(imported - began, time.perf_counter() - imported)
"""


def counting(config: dict[str, Any]) -> Callable[[], object]:
    def run() -> object:
        counted = count(config)
        return counted.total, [counted.active(name) for name in ("A", "B", "C")], counted.by_part

    return run


def building(config: dict[str, Any], config_class: str, model_class: str) -> Callable[[], int]:
    import torch
    import transformers

    def run() -> int:
        with torch.device("meta"):
            model = getattr(transformers, model_class)(
                getattr(transformers, config_class)(**config)
            )
        return model.num_parameters()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    configs = {entry["name"]: entry["config"] for entry in facts()}
    seconds = take_turns({name: counting(config) for name, config in configs.items()}, rounds)
    table = summary(seconds, against="mistralai/Mixtral-8x7B").sort("ms", descending=True)
    print(table.select("name", "ms", "ms_q1", "ms_q3").head(8))
    slowest = table.row(0, named=True)
    print(
        f"slowest of {len(table)}: {slowest['name']}, median {slowest['ms']:.1f} ms (budget "
        f"{BUDGET_MS} ms)"
    )
    against = []
    for name, classes in BUILT.items():
        pair = take_turns(
            {"count": counting(configs[name]), "build": building(configs[name], *classes)},
            max(rounds // 3, 3),
        )
        against.append(
            summary(pair, against="count")
            .filter(pl.col("name") == "build")
            .with_columns(name=pl.lit(f"build {name}"))
        )
    print(pl.concat(against).select("name", "ms", "ratio", "ratio_q1", "ratio_q3"))
    began = time.perf_counter()
    fresh = subprocess.run(
        [sys.executable, "-c", FRESH], check=True, capture_output=True, text=True
    )
    imported, counted = map(float, fresh.stdout.split())
    process = time.perf_counter() - began
    print(
        f"fresh interpreter: import {imported * 1e3:.0f} ms, first count {counted * 1e3:.0f} ms, "
        f"process {process:.2f} s"
    )
    print(save(pl.concat([table, *against]), "accounting"))


if __name__ == "__main__":
    main()
