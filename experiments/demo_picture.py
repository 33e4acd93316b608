"""Take the picture of README: the top of a report's page, in the light and the dark theme.

    make demo
    python experiments/demo_picture.py runs/demo/report.html

writes docs/demo.png and docs/demo-dark.png. The page is shown 800 pixels wide, as README shows the
picture, in twice as many dots, and is cut below the last block that is whole within ``HEIGHT``.
Needs chromium and chromedriver.

The committed pictures are of the demo's grid at a fifth of its tokens (40,960 per run), 2026-11-28.
"""

import argparse
import base64
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "tests" / "report"))

from report_browser import chromium, open_page, resize  # noqa: E402

WIDTH, HEIGHT = 800, 1150
"""CSS pixels: the width of the page, and the most of it that is shown."""
LAST_BLOCK = """
const ends = [...document.querySelectorAll('main > section > *, main > section figure > *, h2, h3')]
  .map(block => ({end: block.getBoundingClientRect().bottom + scrollY, block}))
  .filter(({end, block}) => block.getClientRects().length && end <= arguments[0]
    && !/^H[23]$/.test(block.tagName));
return Math.max(...ends.map(({end}) => end));
"""


def take(page: Path, out: Path, theme: str) -> None:
    """Write the top of ``page`` under ``theme`` ("light" or "dark") as a PNG."""
    with chromium(WIDTH, HEIGHT) as driver:
        open_page(driver, page, theme)
        height = float(driver.execute_script(LAST_BLOCK, HEIGHT)) + 12
        resize(driver, WIDTH, round(height))
        clip = {"x": 0, "y": 0, "width": WIDTH, "height": height, "scale": 2}
        picture = driver.execute_cdp_cmd(
            "Page.captureScreenshot", {"clip": clip, "captureBeyondViewport": True}
        )
        out.write_bytes(base64.b64decode(picture["data"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("page", type=Path, nargs="?", default=Path("runs/demo/report.html"))
    parser.add_argument("--out", type=Path, default=REPOSITORY / "docs")
    args = parser.parse_args()
    take(args.page, args.out / "demo.png", "light")
    take(args.page, args.out / "demo-dark.png", "dark")


if __name__ == "__main__":
    main()
