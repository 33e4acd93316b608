"""``moe-lab list``: every name that other commands take, with a line on what it is."""

import json

import pytest

from moe_lab.cli import main
from moe_lab.commands.list import KINDS
from moe_lab.routing import ROUTERS


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_listed(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", kind, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows
    assert main(["list", kind]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("\t")[0] for line in lines] == [kind, *rows]


def test_every_router_has_a_line_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    main(["list", "routers", "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert set(rows) >= set(ROUTERS)
    assert len(set(rows.values())) == len(rows)
    assert not any(text.startswith("Base of all routers") for text in rows.values())


def test_another_kind_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "rooters"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_the_presets_of_a_recipe_are_listed_with_their_runs(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["list", "presets", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows["demo"] == "12 runs"
    assert main(["list", "laws", "experiments/sparsity_wall.py"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
