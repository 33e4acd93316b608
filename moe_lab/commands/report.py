"""``moe-lab report``: the page of a sweep, of single runs, or of a bare trace."""

import argparse
import shlex
from contextlib import ExitStack
from pathlib import Path

from moe_lab.commands.options import add_json, add_out, examples, place, print_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = examples(
        "moe-lab report runs/small",
        'moe-lab report runs/x traces/y --out page.html --title "Two models"',
    )
    parser.add_argument(
        "source", nargs="+", type=place, help="a sweep's folder or URL, run folders, or a trace"
    )
    add_out(
        parser, None, "the page (default: report.html in the first folder; of a URL, in this one)"
    )
    parser.add_argument("--title", default=None, help="heading of the page")
    add_json(parser)


def main(args: argparse.Namespace) -> int:
    from moe_lab.report import write_report

    first = args.source[0]
    out = args.out or (first / "report.html" if isinstance(first, Path) else Path("report.html"))
    sources = map(str, args.source)
    command = shlex.join(["moe-lab", "report", *sources, "--out", str(out)])
    urls = [source for source in args.source if not isinstance(source, Path)]
    with ExitStack() as stack:
        folders = args.source
        if urls:
            from moe_lab.sweeps import readable

            folders = [
                stack.enter_context(readable(source)) if source in urls else source
                for source in args.source
            ]
        title = args.title or (f"moe_lab report: {urls[0]}" if urls else None)
        page = write_report(folders, out, title=title, command=command)
    if args.json:
        print_json({"report": page, "bytes": page.stat().st_size})
    else:
        print(f"report: {page}")
    return 0
