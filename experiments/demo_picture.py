"""Take the picture of README: the top of a report's page, in the light and the dark theme.

    python experiments/demo_picture.py                            # the committed sweep
    python experiments/demo_picture.py runs/demo/report.html      # another page

writes docs/demo.png and docs/demo-dark.png. The committed sweep is ``sparsity_wall/runs.parquet``
(preset small, 78 runs): its runs become folders again, and their page is drawn. The page is shown
800 pixels wide, as README shows the picture, in twice as many dots, and is cut below the last block
that is whole within ``HEIGHT``. Needs chromium and chromedriver.
"""

import argparse
import base64
import json
import sys
import tempfile
from pathlib import Path

import polars as pl

from moe_lab.report import write_report
from moe_lab.runs.layout import CONFIG, DONE, PLAN, RESULT

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "tests" / "report"))

from report_browser import chromium, open_page, resize  # noqa: E402

RUNS = REPOSITORY / "experiments" / "sparsity_wall" / "runs.parquet"
QUESTION = "Does the loss still fall as experts are added at fixed active parameters?"
WIDTH, HEIGHT = 800, 860
"""CSS pixels: the width of the page, and the most of it that is shown."""
LAST_BLOCK = """
return Math.max(...[...document.querySelectorAll('main section > *, main figure > *')]
  .filter(block => block.getClientRects().length && !/^H\\d$/.test(block.tagName))
  .map(block => block.getBoundingClientRect().bottom + scrollY)
  .filter(end => end <= arguments[0]));
"""


def page_of(runs: pl.DataFrame, folder: Path) -> Path:
    """The page of a sweep whose results are the rows of ``runs``."""
    runs = runs.rename({"tokens": "train_tokens"})
    for row in runs.iter_rows(named=True):
        run = folder / row["run"]
        run.mkdir(parents=True)
        (run / CONFIG).write_text("{}")
        (run / RESULT).write_text(json.dumps(row))
        (run / DONE).write_text("")
    sweep = {"hash": "0", "name": "sparsity_wall_small", "question": QUESTION, "preset": "small"}
    planned = {
        row["run"]: {**{name: row[name] for name in ("name", "arm", "ratio", "seed")}, "config": {}}
        for row in runs.iter_rows(named=True)
    }
    plan = {"schema_version": 1, "sweeps": [{**sweep, "runs": list(planned)}], "runs": planned}
    (folder / PLAN).write_text(json.dumps(plan))
    return write_report(folder, folder / "report.html", title="Is there a sparsity wall?")


def take(page: Path, out: Path, theme: str) -> None:
    """Write the top of ``page`` under ``theme`` ("light" or "dark") as a PNG."""
    with chromium(WIDTH, HEIGHT) as driver:
        driver.execute_cdp_cmd("Emulation.setScrollbarsHidden", {"hidden": True})
        open_page(driver, page, theme)
        height = float(driver.execute_script(LAST_BLOCK, HEIGHT)) + 12
        resize(driver, WIDTH, round(height))
        clip = {"x": 0, "y": 0, "width": WIDTH, "height": height, "scale": 2}
        picture = driver.execute_cdp_cmd("Page.captureScreenshot", {"clip": clip})
        out.write_bytes(base64.b64decode(picture["data"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("page", type=Path, nargs="?")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "docs")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        page = args.page or page_of(pl.read_parquet(RUNS), Path(scratch) / "small")
        take(page, args.out / "demo.png", "light")
        take(page, args.out / "demo-dark.png", "dark")


if __name__ == "__main__":
    main()
