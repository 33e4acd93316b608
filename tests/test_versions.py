"""The bounds of ``pyproject.toml``, the pins of ``constraints.txt`` and what doctor says was tested
are one thing.
"""

from pathlib import Path

from ends import SHARED, lowest, pins, requirements

from moe_lab.versions import TESTED, older_than

ROOT = Path(__file__).parents[1]


def padded(version: str) -> list[str]:
    return [*version.split("."), "0", "0"][:3]


def test_the_lowest_tested_version_is_the_lower_bound() -> None:
    bounds = {item.name: lowest(item) for item in requirements() if item.name in TESTED}
    assert set(bounds) == set(TESTED) - {"python"}
    for name in set(bounds) - {SHARED}:
        assert padded(TESTED[name][0]) == padded(bounds[name]), name


def test_the_newest_tested_version_is_the_pinned_one() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if "==" in line)
    assert {name: pinned[name] for name in TESTED if name in pinned} == {
        name: newest for name, (_, newest) in TESTED.items() if name in pinned
    }


def test_torch_is_never_replaced_by_the_environments_of_the_two_ends() -> None:
    assert all(any(line.startswith(f"{SHARED}==") for line in pins(end)) for end in ("lowest", "x"))
    assert "transformers==5.23" in pins("lowest")


def test_a_package_that_is_missing_counts_as_older() -> None:
    assert older_than("no-such-package-of-moe-lab", "0.1")
    assert older_than("torch", "1000")
    assert not older_than("torch", "2.9")  # 2.13 is newer, though "2.13" sorts before "2.9"
