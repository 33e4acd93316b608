"""Fixtures of the cluster tests: a text, the losses of this machine, and the grid as a process."""

import importlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from filelock import FileLock
from grid_process import Driver
from tiny_grid import results, write_corpus


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all processes of this test session see: what is in it is made once."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "tiny-grid"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def corpus(shared: Path) -> Iterator[Path]:
    """A folder of text, and a token cache of the tests' own for every process they start."""
    with FileLock(shared / "corpus.lock"):
        folder = shared / "corpus"
        if not folder.exists():
            write_corpus(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOE_LAB_CACHE", str(shared / "cache"))
        yield folder


@pytest.fixture
def start(corpus: Path) -> Iterator[Callable[..., Driver]]:
    """Starts the grid; whatever still runs at the end of the test is killed."""
    drivers: list[Driver] = []

    def begin(out: Path, *words: str, **options: Any) -> Driver:
        drivers.append(Driver(corpus, out, *words, **options))
        return drivers[-1]

    yield begin
    for driver in drivers:
        if driver.process.poll() is None:
            driver.kill()


@pytest.fixture(scope="session")
def local_results(corpus: Path, shared: Path) -> dict[str, dict[str, Any]]:
    """Result by run of ``--launcher local``, undisturbed."""
    out = shared / "local"
    with FileLock(shared / "local.lock"):
        assert Driver(corpus, out, "local").end() == 0  # which for a whole grid does nothing
    return results(out)


@pytest.fixture
def stubs(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """``tests/sweeps/stub_trainer.py``, importable here and by whatever is started from here."""
    folder = str(Path(__file__).parents[1] / "sweeps")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", folder, prepend=os.pathsep)
    return importlib.import_module("stub_trainer")
