"""``moe-lab compare A B``: do two traces of one text hold the same routing, and if not, why."""

import argparse

from moe_lab.commands.options import (
    add_json,
    add_seed,
    examples,
    place,
    print_frame,
    print_json,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = examples(
        "moe-lab compare traces/transformers traces/vllm",
        "moe-lab compare traces/bf16 traces/float32 --as-given --json",
    )
    parser.add_argument("first", type=place, help="a trace, or its URL")
    parser.add_argument("second", type=place, help="a trace of the same text, or its URL")
    parser.add_argument(
        "--as-given",
        action="store_true",
        help="do not undo shifted positions and layers, and experts with other ids",
    )
    add_seed(parser)
    add_json(parser)


def main(args: argparse.Namespace) -> int:
    from moe_lab.trace import open_trace
    from moe_lab.trace.reader import fetched_once
    from moe_lab.worth.agreement import drift_sentence, find_conventions, routing_agreement

    with fetched_once([open_trace(args.first), open_trace(args.second)]) as (first, second):
        found = find_conventions(first, second)
        undone = None if args.as_given else found
        frame = routing_agreement(first, second, undone, seed=args.seed)
    drift = drift_sentence(frame)
    if args.json:
        print_json({"sentence": str(found), "drift": drift, "agreement": frame.to_dicts()})
        return 0
    print_frame(frame)
    print(found)
    print(drift)
    return 0
