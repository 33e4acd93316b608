"""``moe-lab report``: the page of a sweep, of single runs, or of a bare trace."""

import argparse
import os
import shlex
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from moe_lab.commands.options import (
    add_json,
    add_workers,
    examples,
    layers_of,
    load_sentence,
    output_page,
    place,
    print_json,
    read_by_workers,
)
from moe_lab.number_format import count_of
from moe_lab.progress import shown
from moe_lab.runs.layout import DONE, PLAN, RESULT, TRACE, TRACE_META, RunState
from moe_lab.runs.record import parse_object
from moe_lab.terminal import say

if TYPE_CHECKING:
    from moe_lab.trace import Trace


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = examples(
        "moe-lab report runs/small",
        'moe-lab report runs/x traces/y --out page.html --title "Two models"',
        "moe-lab report traces/olmoe --worth worth/olmoe",
        "moe-lab report traces/long --workers 8",
        "moe-lab report traces/long --launcher ray --launcher-option address=auto",
    )
    parser.add_argument(
        "source",
        nargs="+",
        type=place,
        help="a sweep or a trace, each a folder or a URL, or run folders",
    )
    parser.add_argument(
        "--out",
        type=output_page,
        default=None,
        metavar="FILE",
        help="the page (default: report.html in the first folder; of a URL, in this one)",
    )
    parser.add_argument("--title", default=None, help="heading of the page")
    parser.add_argument(
        "--worth",
        type=Path,
        default=None,
        metavar="FOLDER",
        help="tables of moe-lab ablate (default: worth in the folder of a run)",
    )
    add_workers(parser)
    add_json(parser)


@read_by_workers
def main(args: argparse.Namespace) -> int:
    from moe_lab.report.second_process import second_process

    first = args.source[0]
    out = args.out or (first / "report.html" if isinstance(first, Path) else Path("report.html"))
    if not isinstance(first, Path) or first.is_dir():
        output_page(out)
    sources = map(str, args.source)
    worth = [] if args.worth is None else ["--worth", str(args.worth)]
    command = shlex.join(["moe-lab", "report", *sources, *worth, "--out", str(out)])
    urls = [source for source in args.source if not isinstance(source, Path)]
    with ExitStack() as stack:
        opened: list[Path | Trace] = [
            _opened(source, stack) if source in urls else source for source in args.source
        ]
        if urls:
            from moe_lab.trace.reader import fetched_once

            opened = stack.enter_context(fetched_once(opened))
        title = args.title or (f"moe_lab report: {urls[0]}" if urls else None)
        mapped = args.workers is not None or args.launcher != "local"
        beside = stack.enter_context(second_process(opened, wanted=not mapped))
        from moe_lab.report import write_report  # takes a second, in which the other one starts

        with shown(not args.json):
            page = write_report(opened, out, title, command, args.worth, beside)
        if args.json:
            print_json({"report": page, "bytes": page.stat().st_size})
            return 0
        for source, one in zip(args.source, opened, strict=True):
            for line in _summary(one, page):
                say(f"{source}: {line}")
        further = _next(opened[0])
    print(f"report: {page} ({page.stat().st_size / 1e6:.1f} MB)")
    if further is not None:
        verb, options = further
        print(f"next: moe-lab {verb} {shlex.quote(str(first))}{options}")
    return 0


def _opened(url: str, stack: ExitStack) -> "Path | Trace":
    """The trace at a URL, or, until ``stack`` closes, a folder with the sweep there."""
    from moe_lab.sweeps import readable
    from moe_lab.trace.reader import is_trace, open_trace

    return open_trace(url) if is_trace(url) else stack.enter_context(readable(url))


def _is_sweep(source: "Path | Trace") -> bool:
    return isinstance(source, Path) and (source / PLAN).is_file()


def _next(source: "Path | Trace") -> tuple[str, str] | None:
    """The command that asks further, and its options; None: a trace of counts, which has no tokens
    to ask about, or a dense run.

    Difficulty has nothing to compare where every token runs as many real experts.
    """
    import polars as pl

    from moe_lab.trace.reader import open_trace

    if _is_sweep(source):
        return "scaling verdict", ""
    is_run, trace = False, source
    if isinstance(source, Path):
        is_run = not (source / TRACE_META).is_file()
        if is_run and not (source / DONE).is_file():
            return "watch", ""
        if is_run and not (source / TRACE / TRACE_META).is_file():
            return None
        trace = open_trace(source / TRACE if is_run else source)
    assert not isinstance(trace, Path)
    if not trace.meta.per_token:
        return None
    real = trace.counts().filter(~pl.col("is_zero")).group_by("layer").agg(pl.col("count").sum())
    most = trace.layers.select("layer", most=trace.num_tokens * pl.col("top_k").cast(pl.Int64))
    varies = not real.join(most, on="layer").filter(pl.col("count") < pl.col("most")).is_empty()
    if varies and trace.meta.zero_experts_known:
        return "difficulty", ""
    return ("ablate", "") if is_run else ("place", " --devices 4")


def _summary(source: "Path | Trace", page: Path) -> Iterator[str]:
    """The loss of a sweep's best run, from the page's own table; of a run or a trace, loss and
    load.
    """
    if not isinstance(source, Path):
        yield load_sentence(layers_of(source))
        return
    folder = source
    if _is_sweep(folder):
        import polars as pl

        from moe_lab.report.page import data_folder

        table = pl.read_parquet(data_folder(page) / "runs.parquet")
        inside = pl.Series([os.path.dirname(run) == str(folder) for run in table["folder"]])
        runs = table.filter(inside, state=RunState.FINISHED.value)
        best = runs.drop_nulls("loss").sort("loss", maintain_order=True).head(1)
        for loss, name in best.select("loss", pl.coalesce("name", "label")).rows():
            number = count_of(runs.height, "finished run")
            yield f"{number}, lowest loss {loss:.4f} nats/token ({name})"
        return
    if (folder / RESULT).is_file():
        loss = parse_object(folder / RESULT).get("loss")
        yield f"loss {loss:.4f} nats/token" if isinstance(loss, float) else "no loss"
    trace = folder if (folder / TRACE_META).is_file() else folder / TRACE
    if (trace / TRACE_META).is_file():
        yield load_sentence(layers_of(trace))
