"""``requirements.lock`` from ``constraints.txt``: the pinned set with a SHA-256 of each file.

    python .ci/lock.py

pip resolves everything that ``pyproject.toml`` names (extras, groups, build requirements) under
the constraints and says which files it would take on this machine; a line ``name==version`` for
each package that ``constraints.txt`` lacks yet is added there. The hashes are those of the files
for this Python and processor. torch, and Triton with it, is left out: which of its builds fits
depends on the machine.
"""

import json
import platform
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONSTRAINTS, LOCK = ROOT / "constraints.txt", ROOT / "requirements.lock"
APART = {"moe-lab", "torch", "triton"}  # triton is the one that torch brings
BESIDE = ("pip", "editables", "duckdb")
"""What setup, an editable install and a benchmark need and ``pyproject.toml`` does not name."""
HEAD = """\
# The files of constraints.txt for CPython {python} on {machine}; written by .ci/lock.py.
#   pip install --require-hashes --no-deps -r requirements.lock
# torch is apart, because its build depends on the machine: install that of constraints.txt first.
"""


def plain(name: str) -> str:
    """The name of a package as pip compares it."""
    return name.lower().replace("_", "-").replace(".", "-")


def pinned() -> dict[str, str]:
    """Package -> line ``name==version`` of ``constraints.txt``."""
    lines = CONSTRAINTS.read_text().splitlines()
    return {plain(line.partition("==")[0]): line for line in lines if "==" in line}


def resolved() -> list[dict]:
    """What pip would install for every name of ``pyproject.toml``."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project = settings["project"]
    groups = [word for name in settings["dependency-groups"] for word in ("--group", name)]
    extras = ",".join(project["optional-dependencies"])
    wanted = [*settings["build-system"]["requires"], *BESIDE, f"{ROOT}[{extras}]"]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed"]
        command += ["--quiet", "--report", str(report), "-c", str(CONSTRAINTS), *groups]
        subprocess.run([*command, *wanted], check=True, cwd=ROOT)
        return json.loads(report.read_text())["install"]


def main() -> None:
    pins, locked = pinned(), {}
    for entry in resolved():
        name, version = entry["metadata"]["name"], entry["metadata"]["version"]
        if plain(name) in APART:
            continue
        pins.setdefault(plain(name), f"{name}=={version}")
        digest = entry["download_info"]["archive_info"]["hashes"]["sha256"]
        locked[plain(name)] = f"{name}=={version} --hash=sha256:{digest}"
    unused = set(pins) - set(locked) - APART
    head = CONSTRAINTS.read_text().splitlines()[0]
    lines = [line for name, line in sorted(pins.items()) if name not in unused]
    CONSTRAINTS.write_text("\n".join([head, *lines]) + "\n")
    head = HEAD.format(python=f"{sys.version_info[0]}.{sys.version_info[1]}", machine=machine())
    LOCK.write_text(head + "".join(f"{line}\n" for _, line in sorted(locked.items())))
    print(f"{len(locked)} packages in {LOCK.name}; no longer needed: {sorted(unused) or 'none'}")


def machine() -> str:
    """Such as ``Linux x86_64``."""
    return f"{platform.system()} {platform.machine()}"


if __name__ == "__main__":
    main()
