"""An environment with the lowest or the newest versions that ``pyproject.toml`` admits, for ``make
test-lowest`` and ``make test-newest``.

    python tests/ends.py lowest FOLDER

torch stays that of the environment that runs this, which the new one sees: its wheel is gigabytes
on some platforms. What the new environment has of its own comes first.
"""

import subprocess
import sys
import sysconfig
import tempfile
import tomllib
import venv
from importlib.metadata import version
from pathlib import Path

from packaging.requirements import Requirement

PROJECT = Path(__file__).parents[1] / "pyproject.toml"
SHARED = "torch"


def requirements() -> list[Requirement]:
    """What moe_lab needs at run time, with the extra ``hf``."""
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"]["hf"]]
    return [Requirement(line) for line in lines]


def lowest(requirement: Requirement) -> str:
    """The lower bound of a requirement."""
    return next(item.version for item in requirement.specifier if item.operator == ">=")


def pins(end: str) -> list[str]:
    """Lines of a constraints file: every requirement at its lower bound, or only torch."""
    needed = [item for item in requirements() if item.name != SHARED]
    low = [f"{item.name}=={lowest(item)}" for item in needed] if end == "lowest" else []
    return [f"{SHARED}=={version(SHARED).partition('+')[0]}", *low]


def make(end: str, folder: Path) -> None:
    """Make the environment, or bring it up to date."""
    venv.create(folder, with_pip=False)
    site = sysconfig.get_path("purelib", vars={"base": str(folder)})
    Path(site, "shared.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    names = [str(item) for item in requirements() if item.name != SHARED]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(pins(end)))
        file.flush()
        pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python")]
        options = ["--quiet", "--upgrade", "--upgrade-strategy", "eager", "-c", file.name]
        subprocess.run([*pip, "install", *options, *names], check=True)
    project = ["--quiet", "--no-deps", "--editable", str(PROJECT.parent)]
    subprocess.run([*pip, "install", *project], check=True)


if __name__ == "__main__":
    make(sys.argv[1], Path(sys.argv[2]))
