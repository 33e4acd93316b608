"""Pages that several tests look at, built once."""

from pathlib import Path

import pytest
from report_fixtures import CODE, HOSTILE, PROSE, Shape, make_sweep, make_trace

from moe_lab.report import write_report


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
