"""Does the plan of ``moe-lab ablate`` predict what the measurement takes? A model of 16 layers with
64 experts, of the width of the preset ``small``, random weights, 50k tokens.

Minutes are of the processor (``time.process_time``) and of the clock: on a machine that others use
only the first say what the measurement costs. Each layer is a row, written when it is done; layers
that the table holds are not measured again.

    python experiments/ablation/plan_bar.py --layers 0,5,10,15 --threads 1
"""

import argparse
import os
from datetime import date
from pathlib import Path
from time import perf_counter, process_time
from unittest.mock import patch

import numpy as np
import polars as pl
import torch

from moe_lab.files import write_parquet
from moe_lab.model import Decoder, DecoderConfig, MoEConfig
from moe_lab.routing import RouterConfig
from moe_lab.worth import EditKind, expert_losses, expert_minutes, measures

TABLE = Path(__file__).parent / "plan_bar.parquet"
LAYERS, EXPERTS, WIDTH, VOCABULARY, CONTEXT, TOKENS = 16, 64, 96, 2048, 128, 50_000


def small_model() -> Decoder:
    """1,024 experts; width, experts per token and vocabulary of the preset small."""
    torch.manual_seed(0)
    moe = MoEConfig(
        d_model=WIDTH, d_expert=WIDTH, router=RouterConfig(num_experts=EXPERTS, top_k=2)
    )
    return Decoder(
        DecoderConfig(
            num_layers=LAYERS,
            d_model=WIDTH,
            num_heads=3,
            vocab_size=VOCABULARY,
            context_length=CONTEXT,
            moe=moe,
        )
    ).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", default="0,5,10,15")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--edit", type=EditKind, default=EditKind.FORBID)
    parser.add_argument("--out", type=Path, default=TABLE)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, layers = small_model(), [int(layer) for layer in args.layers.split(",")]
    lengths = [CONTEXT] * (TOKENS // CONTEXT)
    generator = np.random.default_rng(0)
    documents = [generator.integers(0, VOCABULARY, length) for length in lengths]
    facts = {"edit": args.edit.value, "threads": args.threads, "tokens": sum(lengths)}
    held = pl.read_parquet(args.out) if args.out.exists() else pl.DataFrame()

    def keep(row: dict) -> None:
        nonlocal held
        load, today = os.getloadavg()[0], date.today().isoformat()
        new = pl.DataFrame([facts | row | {"load": load, "date": today}])
        held = pl.concat([held, new], how="diagonal")
        write_parquet(args.out, held)

    def planned(**options) -> dict[str, float]:
        minutes = {"minutes": expert_minutes(model, documents, edit=args.edit, **options)}
        with patch.object(measures, "perf_counter", process_time):
            seconds = expert_minutes(model, documents, edit=args.edit, **options)
        return minutes | {"cpu_minutes": seconds}

    done = set()
    if held.height:
        same = held.filter(edit=args.edit.value, threads=args.threads)
        done = set(same.filter(what="measured")["layers"].explode().to_list())
    left = [layer for layer in layers if layer not in done]
    keep({"what": "planned", "layers": list(range(LAYERS)), **planned()})
    keep({"what": "planned", "layers": layers, **planned(layers=layers)})
    for layer in left:
        start, cpu = perf_counter(), process_time()
        expert_losses(model, documents, layers=[layer], edit=args.edit)
        minutes = {
            "minutes": (perf_counter() - start) / 60,
            "cpu_minutes": (process_time() - cpu) / 60,
        }
        keep({"what": "measured", "layers": [layer], **minutes})


if __name__ == "__main__":
    main()
