"""Pages of every kind as readers meet them: wide, narrow, light, dark and in print, no text lies on
other text or on data, none is cut, each can be read against its background, no figure is empty and
nothing scrolls sideways. One browser, one load of each page.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("selenium", reason="the page tests need selenium")
from report_browser import binary, console, open_page, refit, resize, show
from report_fixtures import PAGES
from selenium.webdriver import Chrome

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        not (binary() and shutil.which("chromedriver")),
        reason="chromium and chromedriver are not installed",
    ),
]
WIDE, NARROW, PAPER = 1400, 400, 720
FAULTS = Path(__file__).with_name("page_checks.js").read_text() + "return faults();"
LOOKS = [
    (WIDE, "light"),
    (WIDE, "dark"),
    (NARROW, "dark"),
    (NARROW, "light"),
]
"""Width in pixels and theme, in an order in which each differs from the last by little."""


SLOW = pytest.param("demo", marks=pytest.mark.slow)


@pytest.mark.parametrize("kind", ["failures", SLOW, *(kind for kind in PAGES if kind != "demo")])
def test_a_page_can_be_read_at_every_width_in_both_themes_and_in_print(
    driver: Chrome, page_of: Callable[[str], Path], kind: str
) -> None:
    resize(driver, WIDE)
    open_page(driver, page_of(kind))
    found = {}
    for width, theme in LOOKS:
        resize(driver, width)
        show(driver, theme)
        refit(driver)
        found[f"{width} {theme}"] = driver.execute_script(FAULTS)
    found["print"] = printed(driver)
    assert {look: faults for look, faults in found.items() if faults} == {}
    assert console(driver) == []


def printed(driver: Chrome) -> list[str]:
    """The faults of the open page in print: the layout changes without a resize event."""
    resize(driver, WIDE)
    refit(driver)
    driver.execute_script("dispatchEvent(new Event('beforeprint'))")
    show(driver, media="print")
    resize(driver, PAPER)
    faults = driver.execute_script(FAULTS)
    show(driver)
    driver.execute_script("dispatchEvent(new Event('afterprint'))")
    return faults


BROKEN = """<!doctype html><body style="margin:0;height:400px;background:#fff">
<p style="position:absolute;top:0">one text</p><p style="position:absolute;top:4px">another</p>
<p style="position:absolute;top:90px;color:#999">faint</p>
<p style="position:absolute;top:120px;width:3000px">wide</p>
<div class="plot" data-figure="map" data-plot="0" style="position:absolute;top:200px;width:300px">
<svg width="300" height="100" style="overflow:visible"><rect class="nsewdrag" width="200"
height="80" fill="#eee"/><text class="xtitle" x="20" y="50">title</text><text x="290" y="50">cut
off</text><text x="20" y="95">tick</text><text x="24" y="97">tock</text></svg></div>"""


def test_the_checks_find_each_fault(driver: Chrome, tmp_path: Path) -> None:
    (tmp_path / "broken.html").write_text(BROKEN)
    resize(driver, WIDE)
    driver.get((tmp_path / "broken.html").as_uri())
    assert driver.execute_script(FAULTS) == [
        "map0: empty",
        "map0: clipped: cut off",
        "map0: tick on tock",
        "map0: over the data: title",
        "text: one text on another",
        "contrast 2.85: faint (rgb(153, 153, 153)|rgb(255, 255, 255))",
        "the page scrolls sideways by 1600",
    ]
