"""Some of the kills and power cuts of ``experiments/kills.py``, which does 60."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

KILLS = Path(__file__).resolve().parents[2] / "experiments" / "kills.py"


@pytest.mark.slow
def test_kills_and_power_cuts_change_nothing_and_leave_nothing_behind() -> None:
    done = subprocess.run(
        [sys.executable, str(KILLS), "--few"],
        capture_output=True,
        text=True,
        timeout=1800,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "6 in all, 0 failures" in done.stdout
