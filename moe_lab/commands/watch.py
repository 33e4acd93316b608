"""``moe-lab watch``: a page of runs while they train."""

import argparse
import os

from moe_lab.commands.options import add_number, examples, output_page, refuse_ignored
from moe_lab.commands.options import place as place_of
from moe_lab.terminal import say

HOST, PORT = "127.0.0.1", 8642


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = examples(
        "moe-lab watch runs/small",
        "moe-lab watch runs/small --once now.html",
        "moe-lab watch s3://bucket/sweep --port 9000",
    )
    parser.add_argument(
        "place", type=place_of, help="a run, a sweep, or a folder of runs; or the URL of a sweep"
    )
    parser.add_argument(
        "--once", type=output_page, metavar="FILE", help="write the page as one file, as it is now"
    )
    parser.add_argument(
        "--host",
        default=HOST,
        help="address to listen on; another than loopback gets a random token in its URL",
    )
    add_number(
        parser, "--port", PORT, whole=True, least=0, most=65535, default=PORT, help="0: a free one"
    )


def main(args: argparse.Namespace) -> int:
    os.environ.setdefault("POLARS_MAX_THREADS", "1")  # small frames, beside runs that train
    from moe_lab.watch import Board, WatchServer, open_place, write_page

    place = open_place(args.place)
    if args.once is not None:
        refuse_ignored(args, add_arguments, {"host", "port"}, "--once")
        page = write_page(Board(place), args.once)
        say(f"page: {page} ({page.stat().st_size / 1e6:.1f} MB)")
        return 0
    with WatchServer(place, args.host, args.port) as server:
        print(f"watching {args.place} at {server.url} (Ctrl-C ends it)", flush=True)
        try:
            server.serve_forever(poll_interval=2.0)
        except KeyboardInterrupt:
            return 0
    return 0
