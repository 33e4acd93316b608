"""Headless Chromium for the page tests."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.common.exceptions import WebDriverException
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.support.ui import WebDriverWait

ARGUMENTS = (
    "--headless=new",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)
PATIENCE = 600
"""Seconds for what a busy machine makes slow."""


def binary() -> str | None:
    return next(
        (
            found
            for name in ("chromium", "chromium-browser", "google-chrome")
            if (found := shutil.which(name))
        ),
        None,
    )


@contextmanager
def chromium(width: int = 1280, height: int = 900) -> Iterator[webdriver.Chrome]:
    """A driver whose viewport is ``width`` CSS pixels, logging console and network."""
    options = Options()
    options.binary_location = binary() or ""
    for argument in (*ARGUMENTS, *(("--no-sandbox",) if os.geteuid() == 0 else ())):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = _started(options)
    driver.command_executor.client_config.timeout = PATIENCE
    driver.set_page_load_timeout(PATIENCE)
    driver.set_script_timeout(PATIENCE)
    try:
        resize(driver, width, height)
        yield driver
    finally:
        driver.quit()


def _started(options: Options) -> webdriver.Chrome:
    """Once more where the machine was too busy: chromedriver gives the browser a minute."""
    for last in (False, False, True):
        try:
            return webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
        except WebDriverException:
            if last:
                raise
    raise AssertionError


def resize(driver: webdriver.Chrome, width: int, height: int = 900) -> None:
    """Set the viewport itself: a window cannot be narrower than about 500 pixels."""
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def open_page(driver: webdriver.Chrome, path: Path, theme: str = "light") -> None:
    """Open a page under a system theme and wait until every figure is drawn in it."""
    _emulate(driver, theme)
    driver.get(path.resolve().as_uri())
    _wait_until_drawn(driver, theme)


def console(driver: webdriver.Chrome) -> list[str]:
    return [f"{entry['level']}: {entry['message']}" for entry in driver.get_log("browser")]


def requests(driver: webdriver.Chrome) -> list[str]:
    """Addresses that the page asked for since the last call."""
    messages: list[dict[str, Any]] = [
        json.loads(entry["message"])["message"] for entry in driver.get_log("performance")
    ]
    return [
        message["params"]["request"]["url"]
        for message in messages
        if message["method"] == "Network.requestWillBeSent"
    ]


def forget(driver: webdriver.Chrome) -> None:
    """Leave the open page, which may still ask for something, with what it asked for and said."""
    driver.get("about:blank")
    requests(driver)
    console(driver)


def show(driver: webdriver.Chrome, theme: str = "light", media: str = "") -> None:
    """Turn the open page to a theme, or to ``media`` "print", and wait for its figures."""
    _emulate(driver, theme, media)
    _wait_until_drawn(driver, theme)


def _emulate(driver: webdriver.Chrome, theme: str, media: str = "") -> None:
    features = {"prefers-color-scheme": theme, "prefers-reduced-motion": "reduce"}
    values = [{"name": name, "value": value} for name, value in features.items()]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": values})


def _wait_until_drawn(driver: webdriver.Chrome, theme: str) -> None:
    ready = "return document.documentElement.dataset.ready"
    WebDriverWait(driver, PATIENCE).until(lambda page: page.execute_script(ready) == theme)


def refit(driver: webdriver.Chrome) -> None:
    """Wait until every figure is drawn anew in the width that it has now."""
    script = """const done = arguments[arguments.length - 1];
      const shown = [...document.querySelectorAll('.plot')].filter(plot => plot.offsetParent);
      Promise.all(shown.map(plot => Plotly.Plots.resize(plot))).then(() => done());"""
    driver.execute_async_script(script)
