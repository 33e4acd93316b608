"""Pages that several tests look at, built once."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from report_fixtures import CODE, HOSTILE, PAGES, PROSE, Shape, make_sweep, make_trace

from moe_lab.report import write_report


@pytest.fixture(scope="session")
def driver() -> Iterator[Any]:
    """One headless Chromium for all tests of pages."""
    from report_browser import chromium

    with chromium() as driver:
        yield driver


@pytest.fixture(scope="session")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep whose third document tries to break out of the page."""
    return make_sweep(
        tmp_path_factory.mktemp("sweep") / "wall", documents=(CODE, PROSE, HOSTILE + "\n")
    )


@pytest.fixture(scope="session")
def sweep_page(sweep: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(
        sweep, tmp_path_factory.mktemp("page") / "a page.html", title="Wall <i>& co</i>"
    )


@pytest.fixture(scope="session")
def fixed_trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bare trace of a fixed-k model with one document more than is shown."""
    return make_trace(
        tmp_path_factory.mktemp("traces") / "fixed",
        Shape(layers=2, experts=8, documents=4, tokens=120),
    )


@pytest.fixture(scope="session")
def fixed_page(fixed_trace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(fixed_trace, tmp_path_factory.mktemp("page") / "trace.html")


@pytest.fixture(scope="session")
def page_of(tmp_path_factory: pytest.TempPathFactory, sweep_page: Path) -> Callable[[str], Path]:
    """A page of a kind of ``PAGES``, or of a sweep with failures; each is built once."""
    made = {"failures": sweep_page}

    def page(kind: str) -> Path:
        if kind not in made:
            folder = tmp_path_factory.mktemp("kind")
            sources = PAGES[kind](folder / "sources")
            made[kind] = write_report(sources, folder / f"{kind}.html", title=f"Page: {kind}")
        return made[kind]

    return page
