"""Time of a whole `write_report` beside drawing alone, from frames that are already computed.

    python experiments/benchmarks/report_page.py runs/demo

writes ``results/report_page.parquet``. Without a folder a sweep like the demo's is made up (12 runs
and their traces), which needs no training.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from measure import save, summary, take_turns

from moe_lab.report import write_report
from moe_lab.report.frames import Frames
from moe_lab.report.page import draw_page
from moe_lab.report.sources import gather

FIXTURES = Path(__file__).parents[2] / "tests" / "report"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder, page = args.folder or Path(scratch) / "sweep", Path(scratch) / "page.html"
        if args.folder is None:
            sys.path.insert(0, str(FIXTURES))
            from report_fixtures import make_sweep

            make_sweep(folder, ratios=(1, 2, 4, 8, 16))
        frames, material = Frames(), gather(folder)
        contestants = {
            "whole page": lambda: write_report(folder, page),
            "drawing": lambda: draw_page(material, frames, page, title="page", command=""),
        }
        table = summary(take_turns(contestants, args.rounds), against="whole page")
    print(table)
    print(save(table, "report_page"))


if __name__ == "__main__":
    main()
