"""Versions and hardware, recorded with each result."""

import datetime
import os
import platform
import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from moe_lab import __version__

PACKAGES = ("torch", "numpy", "polars", "tokenizers")
TESTED = {
    "python": ("3.11", "3.11"),
    "torch": ("2.13.0", "2.13.0"),
    "numpy": ("2.0.0", "2.4.6"),
    "scipy": ("1.15.0", "1.17.1"),
    "polars": ("2.0.0", "2.1.0"),
    "plotly": ("7.0.0", "7.1.0"),
    "tokenizers": ("0.23.1", "0.23.3"),
    "safetensors": ("0.8.0", "0.8.0"),
    "transformers": ("5.23.0", "5.24.0"),
}
"""Lowest and newest version that the tests ran with (``make test-lowest``, ``make test-newest``).
Of torch and Python only one was there: the lower bounds of ``pyproject.toml`` are not tried.
"""


def versions() -> dict[str, str]:
    """Versions that a number may depend on."""
    return {
        "moe_lab": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
    }


def older_than(name: str, oldest: str) -> bool:
    """Whether the installed distribution has a release before ``oldest``, or there is none."""
    try:
        installed = version(name)
    except PackageNotFoundError:
        return True
    return _release(installed) < _release(oldest)


def _release(name: str) -> tuple[int, ...]:
    """``"2.13.0+cpu"`` -> (2, 13, 0)."""
    return tuple(int(part) for part in re.findall(r"\d+", name.split("+")[0])[:3])


def machine() -> str:
    """The processor's name and its number of cores."""
    return f"{_processor()}, {os.cpu_count()} cores"


def provenance() -> dict[str, str]:
    """Columns of a committed result: date, command as typed, machine, versions."""
    script = os.path.relpath(sys.argv[0]) if sys.argv[0] else "-"
    command = " ".join(["python", script, *sys.argv[1:]])
    return {
        "date": datetime.date.today().isoformat(),
        "command": command,
        "machine": machine(),
        **versions(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
