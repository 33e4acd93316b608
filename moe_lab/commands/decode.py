"""``moe-lab decode TRACE``: how many experts a batch or a window of tokens touches, and from how
many accepted tokens on speculation pays.
"""

import argparse
from pathlib import Path

from moe_lab.commands.options import (
    add_expert_sizes,
    add_json,
    add_number,
    add_seed,
    add_workers,
    examples,
    expert_sizes,
    place,
    print_frame,
    print_json,
    read_by_workers,
)
from moe_lab.errors import AnalysisError
from moe_lab.terminal import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = examples(
        "moe-lab decode traces/x --window 4 16",
        "moe-lab decode traces/x --batch 8 64 --draft-cost 0.1 --config Qwen/Qwen3-30B-A3B",
    )
    parser.add_argument("trace", type=place, help="a trace of tokens in their order, or its URL")
    add_number(
        parser,
        "--batch",
        8,
        whole=True,
        nargs="+",
        default=[],
        help="requests that decode together",
    )
    add_number(
        parser,
        "--window",
        4,
        whole=True,
        nargs="+",
        default=[],
        help="tokens of one request in a row",
    )
    add_number(
        parser,
        "--draft-cost",
        0.1,
        least=0,
        default=0.0,
        help="time of a draft over that of a token",
    )
    parser.add_argument(
        "--times",
        type=Path,
        default=None,
        help="Parquet of measured MoE layers: fit a roofline and print its error",
    )
    add_expert_sizes(parser)
    add_workers(parser)
    add_seed(parser)
    add_json(parser)


@read_by_workers
def main(args: argparse.Namespace) -> int:
    from dataclasses import asdict

    import polars as pl

    from moe_lab.serving import distinct_experts, fit_roofline, speculation
    from moe_lab.serving.sentences import decode_sentence, speculation_sentence
    from moe_lab.serving.speculation import WINDOWS
    from moe_lab.trace import open_trace
    from moe_lab.trace.reader import fetched_once

    windows = [size for size in args.window if size > 1] or WINDOWS
    with fetched_once([open_trace(args.trace)]) as (trace,):
        frame = distinct_experts(trace, args.batch, args.window, seed=args.seed)
        sentences, tables = [decode_sentence(frame)], {"distinct": frame}
        try:
            sizes = expert_sizes(args, trace)
            tables["speculation"] = speculation(
                trace, windows, **sizes, draft_cost=args.draft_cost, seed=args.seed
            )
            sentences.append(speculation_sentence(tables["speculation"]))
        except AnalysisError as error:  # the size of an expert is not known
            sentences.append(f"What speculation costs is left out: {error}.")
    roofline = None
    if args.times is not None:
        roofline = fit_roofline(args.times)
        sentences.append(
            f"The roofline of {args.times.name} errs by {100 * roofline.error:.1f} % in the median "
            f"and {100 * roofline.error_90:.1f} % at the 90 % point on layer shapes held out: "
            f"{roofline.bandwidth / 1e12:.2f} TB/s, {roofline.speed / 1e12:.0f} TFLOP/s, "
            f"{1e6 * roofline.start:.0f} us to start."
        )
    if args.json:
        values = {name: one.to_dicts() for name, one in tables.items()}
        fitted = None if roofline is None else asdict(roofline)
        print_json({"sentences": sentences, **values, "roofline": fitted})
        return 0
    print_frame(frame.filter(pl.col("layer").is_null()).drop("layer", "note"))
    if "speculation" in tables:
        print_frame(tables["speculation"].drop("note", "everything"))
    say("\n".join(sentences))
    return 0
