"""What a capture costs: the same forward pass with and without it, in turns; and bytes of the trace
per slot and per token and layer.

    python experiments/benchmarks/capture_overhead.py [--rounds 40] [--threads 1]

Each model exists twice with the same weights; one of the two is under an open capture for the whole
run, so that conversion and writing in the background are paid for. ``wall`` is the paired ratio of
wall-clock times, ``processor`` that of the processor time of all threads, the background's
included. Intervals are 95 % bootstrap intervals of the median ratio over the rounds.
"""

import argparse
import copy
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from measure import save
from torch import nn

from moe_lab.model import Decoder, DecoderConfig, MoEConfig
from moe_lab.routing import RouterConfig
from moe_lab.trace import Trace, capture, open_trace

EXPERTS, SLOTS, BATCH, LENGTH, VOCABULARY = 64, 8, 4, 256, 4096
HF_SIZES = {
    "qwen3_moe, d 512": (512, 256),
    "qwen3_moe, d 256": (256, 128),
    "qwen3_moe, d 64 (toy)": (64, 32),
}


def ours() -> nn.Module:
    moe = MoEConfig(
        d_model=256,
        d_expert=128,
        router=RouterConfig(num_experts=EXPERTS, top_k=SLOTS, norm_topk_prob=True),
    )
    config = DecoderConfig(
        vocab_size=VOCABULARY,
        d_model=256,
        num_layers=6,
        num_heads=8,
        context_length=LENGTH,
        moe=moe,
    )
    return Decoder(config).eval()


def theirs(d_model: int, d_expert: int) -> nn.Module:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes: dict[str, Any] = {
        "hidden_size": d_model,
        "moe_intermediate_size": d_expert,
        "intermediate_size": d_expert,
    }
    sizes |= {
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": d_model // 8,
        "num_hidden_layers": 6,
    }
    sizes |= {
        "vocab_size": VOCABULARY,
        "num_experts": EXPERTS,
        "num_experts_per_tok": SLOTS,
        "norm_topk_prob": True,
    }
    config = Qwen3MoeConfig(**sizes)
    return Qwen3MoeForCausalLM(config).eval()


def paired(
    plain: Callable[[], object], traced: Callable[[], object], rounds: int
) -> dict[str, Any]:
    """Median ratios of traced to plain, with intervals; the first three rounds are not counted."""
    wall, processor, milliseconds = [], [], []
    for number in range(-3, rounds):
        seconds: dict[str, tuple[float, float]] = {}
        for name, call in (
            (("plain", plain), ("traced", traced))
            if number % 2
            else (("traced", traced), ("plain", plain))
        ):
            began = time.perf_counter(), time.process_time()
            call()
            seconds[name] = time.perf_counter() - began[0], time.process_time() - began[1]
        if number >= 0:
            wall.append(seconds["traced"][0] / seconds["plain"][0])
            processor.append(seconds["traced"][1] / seconds["plain"][1])
            milliseconds.append(seconds["plain"][0] * 1e3)
    result: dict[str, Any] = {"rounds": rounds, "plain_ms": float(np.median(milliseconds))}
    for name, ratios in (("wall", wall), ("processor", processor)):
        draws = np.random.default_rng(0).choice(ratios, (2000, len(ratios)))
        low, high = np.quantile(np.median(draws, axis=1), (0.025, 0.975))
        result |= {
            f"{name}_ratio": float(np.median(ratios)),
            f"{name}_low": float(low),
            f"{name}_high": float(high),
        }
    return result


def sizes(trace: Trace) -> dict[str, float]:
    """Bytes of the routing tables per slot and per token and layer."""
    entries = trace.manifest.entries.drop_nulls("layer")
    total, rows = int(entries["bytes"].sum()), int(entries["rows"].sum())
    slots = int(trace.counts()["count"].sum())
    return {"bytes_per_slot": total / slots, "bytes_per_token_layer": total / rows}


def measure(
    name: str, model: nn.Module, rounds: int, folder: Path, weights: bool, statistics: bool
) -> dict[str, Any]:
    traced = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)

    def run(which: nn.Module) -> None:
        which(torch.randint(0, VOCABULARY, (BATCH, LENGTH), generator=generator))

    with torch.no_grad(), capture(traced, folder, weights=weights, statistics=statistics):
        ratios = paired(lambda: run(model), lambda: run(traced), rounds)
    what = "ids" + (", weights" if weights else "") + (", statistics" if statistics else "")
    return {"model": name, "recorded": what} | ratios | sizes(open_trace(folder).check())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    builders: dict[str, Callable[[], nn.Module]] = {"Decoder, d 256": ours}
    builders |= {name: lambda size=size: theirs(*size) for name, size in HF_SIZES.items()}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, build in builders.items():
            model = build()
            every = (
                [(True, True), (True, False), (False, False)]
                if name in ("Decoder, d 256", "qwen3_moe, d 256")
                else [(True, True)]
            )
            for weights, statistics in every:
                rows.append(
                    measure(name, model, args.rounds, Path(folder) / "t", weights, statistics)
                )
                print(rows[-1], flush=True)
    frame = pl.DataFrame(rows)
    with pl.Config(tbl_rows=-1, tbl_cols=-1, tbl_width_chars=200, float_precision=3):
        print(frame)
    print(save(frame, "capture_overhead"))


if __name__ == "__main__":
    main()
