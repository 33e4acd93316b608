"""Every notebook runs from top to bottom as a plain script: one thread, no network, in under a
minute on an idle machine.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebook_runs(path: Path, tmp_path: Path) -> None:
    threads = {"OMP_NUM_THREADS": "1", "POLARS_MAX_THREADS": "1"}
    environment = os.environ | threads | {"HF_HUB_OFFLINE": "1", "MPLBACKEND": "agg"}
    done = subprocess.run(
        [sys.executable, str(path)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebook_is_paired_and_begins_with_a_title(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert "formats: ipynb,py:percent" in text
    assert "\n# %% [markdown]\n# # " in text


def test_there_are_notebooks() -> None:
    assert len(NOTEBOOKS) >= 3
