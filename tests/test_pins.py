"""``constraints.txt`` pins every package that the project names, ``requirements.lock`` files."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", re.split(r"[ <>=!~;\[]", name)[0]).lower()


def pins(name: str) -> dict[str, str]:
    """Package -> version of a file of pins."""
    lines = [line.split() for line in (ROOT / name).read_text().splitlines() if line[:1] != "#"]
    return {plain(first): first.partition("==")[2] for first, *_ in lines}


def test_every_package_of_the_project_is_pinned() -> None:
    project = PROJECT["project"]
    named = [
        *PROJECT["build-system"]["requires"],
        *project["dependencies"],
        *(name for extra in project["optional-dependencies"].values() for name in extra),
        *(name for group in PROJECT["dependency-groups"].values() for name in group),
    ]
    assert not {plain(name) for name in named} - set(pins("constraints.txt"))


def test_the_lock_holds_a_hash_of_every_pin_but_torch() -> None:
    wanted = pins("constraints.txt")
    del wanted["torch"]
    assert pins("requirements.lock") == wanted
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    packages = [line for line in lines if not line.startswith("#")]
    hashed = [re.fullmatch(r"\S+==\S+ --hash=sha256:[0-9a-f]{64}", line) for line in packages]
    assert all(hashed)


def test_no_pin_names_a_server() -> None:
    for name in ("constraints.txt", "requirements.lock"):
        assert "://" not in (ROOT / name).read_text()
