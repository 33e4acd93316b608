"""``moe-lab cache TRACE``: hit rate and reads of a cache of experts within a budget of memory."""

import argparse

from moe_lab.commands.options import (
    BYTE_UNITS,
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
from moe_lab.errors import require
from moe_lab.terminal import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = examples(
        "moe-lab cache traces/x --budget 4GiB --config Qwen/Qwen3-30B-A3B",
        "moe-lab cache traces/x --policy lru --expert-bytes 18MiB --prefetch",
    )
    from moe_lab.serving.policies import POLICIES

    parser.add_argument("trace", type=place, help="a trace of tokens in their order, or its URL")
    add_number(
        parser,
        "--budget",
        "4GiB",
        units=BYTE_UNITS,
        action="append",
        metavar="SIZE",
        help="memory for experts, such as 4GiB (repeatable; default: ten shares of all experts)",
    )
    parser.add_argument(
        "--policy",
        action="append",
        choices=POLICIES,
        help="policy of the cache; repeatable (default: all)",
    )
    add_expert_sizes(parser)
    add_number(
        parser,
        "--bandwidth",
        "50GB",
        units=BYTE_UNITS,
        default=None,
        help="bytes per second at which an expert is read",
    )
    add_number(
        parser,
        "--compute",
        0.01,
        least=0,
        default=None,
        help="seconds that a decoded token takes without reads",
    )
    parser.add_argument(
        "--prefetch",
        action="store_true",
        help="also measure predictors that name experts before they are needed",
    )
    parser.add_argument(
        "--per-document",
        action="store_true",
        help="a cache that is empty at the start of each document; workers need it",
    )
    add_workers(parser)
    add_seed(parser)
    add_json(parser)


@read_by_workers
def main(args: argparse.Namespace) -> int:
    import polars as pl

    from moe_lab.serving import expert_cache, prefetch
    from moe_lab.serving.policies import POLICIES
    from moe_lab.serving.sentences import cache_sentences
    from moe_lab.trace import open_trace
    from moe_lab.trace.reader import fetched_once

    alone = args.workers is None and args.launcher == "local"
    require(
        alone or args.per_document,
        "--per-document with workers: a cache that goes on is replayed in one process",
        "none",
        field="per_document",
    )
    with fetched_once([open_trace(args.trace)]) as (trace,):
        frame = expert_cache(
            trace,
            args.budget,
            args.policy or POLICIES,
            **expert_sizes(args, trace),
            bandwidth=args.bandwidth,
            compute=args.compute,
            per_document=args.per_document,
            seed=args.seed,
        )
        named = prefetch(trace, seed=args.seed) if args.prefetch else None
    sentences = cache_sentences(frame)
    if args.json:
        tables = {"cache": frame} | ({} if named is None else {"prefetch": named})
        print_json(
            {"sentences": sentences, **{name: one.to_dicts() for name, one in tables.items()}}
        )
        return 0
    speed = [] if args.bandwidth is None else [pl.col("^tokens_per_second.*$")]
    shown = frame.filter(pl.col("requests") > 0).select(
        "budget", "policy", "phase", pl.col("^hit_rate.*$"), "bytes_per_token", *speed
    )
    print_frame(shown)
    if named is not None:
        print_frame(named.filter(pl.col("layer").is_null()).drop("layer", "note"))
    say("\n".join(sentences))
    for note in frame["note"].unique().sort().to_list():
        if note:
            say(f"note: {note}")
    return 0
