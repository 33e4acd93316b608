"""``moe-lab place TRACE``: which device holds which experts, judged on text that the placement was
not chosen on.
"""

import argparse

from moe_lab.commands.options import (
    add_json,
    add_number,
    add_seed,
    add_workers,
    examples,
    output_file,
    print_frame,
    print_json,
    read_by_workers,
)
from moe_lab.commands.options import (
    place as location,
)
from moe_lab.errors import StorageError, require
from moe_lab.terminal import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = examples(
        "moe-lab place traces/x --devices 8 --slots 72 --by domain",
        "moe-lab place traces/x --devices 16 --nodes 2 --vllm map.json",
    )
    from moe_lab.serving.policies import METHODS

    parser.add_argument("trace", type=location, help="a trace, also one of counts, or its URL")
    add_number(parser, "--devices", 8, whole=True, required=True, help="number of devices")
    add_number(
        parser,
        "--slots",
        288,
        whole=True,
        default=None,
        help="experts of a layer on all devices with replicas (default: no replica)",
    )
    parser.add_argument("--method", choices=METHODS, default="eplb", help="method of placement")
    add_number(
        parser, "--nodes", 1, whole=True, default=1, help="number of nodes (groups of devices)"
    )
    add_number(
        parser, "--groups", 1, whole=True, default=1, help="number of groups of experts (n_group)"
    )
    parser.add_argument(
        "--by",
        default="documents",
        help="documents (one half, the other), time (first half, second), or a token column",
    )
    parser.add_argument(
        "--tokens-needed", action="store_true", help="also say how many tokens a placement needs"
    )
    parser.add_argument(
        "--vllm", type=output_file, default=None, metavar="PATH", help="write vLLM's expert map"
    )
    parser.add_argument(
        "--sglang", type=output_file, default=None, metavar="PATH", help="write SGLang's locations"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace files that --vllm or --sglang name"
    )
    add_workers(parser)
    add_seed(parser)
    add_json(parser)


@read_by_workers
def main(args: argparse.Namespace) -> int:
    from moe_lab.serving import (
        place,
        placement_sentence,
        placement_transfer,
        tokens_needed,
        write_sglang_locations,
        write_vllm_expert_map,
    )
    from moe_lab.trace import open_trace
    from moe_lab.trace.reader import fetched_once

    files = [path for path in (args.vllm, args.sglang) if path is not None]
    require(files or not args.overwrite, "--overwrite with --vllm or --sglang", "it alone")
    require(len({*files}) == len(files), "two files for --vllm and --sglang", "one")
    for path in files:
        require(
            args.overwrite or not path.exists(),
            "a file that is not there yet",
            path,
            "--overwrite to replace it",
            error=StorageError,
        )
    machine = {"nodes": args.nodes, "groups": args.groups}
    options, needed = (args.devices, args.slots, args.method), None
    with fetched_once([open_trace(args.trace)]) as (trace,):
        frame = placement_transfer(trace, *options, by=args.by, seed=args.seed, **machine)
        if args.tokens_needed:
            needed = tokens_needed(trace, *options, seed=args.seed, **machine)
        whole = place(trace.counts(), *options, **machine)
    sentence = placement_sentence(frame)
    written = {
        str(path): write
        for path, write in (
            (args.vllm, write_vllm_expert_map),
            (args.sglang, write_sglang_locations),
        )
        if path is not None
    }
    for path, write in written.items():
        write(whole, path)
    if args.json:
        tables = {"transfer": frame} | ({} if needed is None else {"tokens_needed": needed})
        print_json(
            {
                "sentence": sentence,
                "written": list(written),
                **{name: one.to_dicts() for name, one in tables.items()},
            }
        )
        return 0
    shown = ("chosen_on", "judged_on", "imbalance", "lo", "hi", "in_sample", "contiguous", "bound")
    optional = ("n_docs", "in_sample", "contiguous", "bound")
    print_frame(frame.select(*shown, "beats", "n_docs"), optional=optional)
    if needed is not None:
        print_frame(needed)
    say(sentence)
    for path in written:
        print(f"placement of the whole trace: {path}")
    return 0
