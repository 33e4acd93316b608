"""Fixtures of the cluster tests: a text, the losses of this machine, and the grid as a process."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from grid_process import Driver
from tiny_grid import results, write_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of text, and a token cache of the tests' own for every process they start."""
    folder = tmp_path_factory.mktemp("text")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOE_LAB_CACHE", str(folder / "cache"))
        yield write_corpus(folder / "corpus")


@pytest.fixture
def start(corpus: Path) -> Iterator[Callable[..., Driver]]:
    """Starts the grid; whatever still runs at the end of the test is killed."""
    drivers: list[Driver] = []

    def begin(out: Path, *words: str) -> Driver:
        drivers.append(Driver(corpus, out, *words))
        return drivers[-1]

    yield begin
    for driver in drivers:
        if driver.process.poll() is None:
            driver.kill()


@pytest.fixture(scope="session")
def local_results(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Result by run of ``--launcher local``, undisturbed."""
    out = tmp_path_factory.mktemp("local") / "out"
    assert Driver(corpus, out, "local").end() == 0
    return results(out)
