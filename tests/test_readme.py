"""What the README promises: its Python runs, its links and files exist, so do its commands."""

import re
from pathlib import Path

import pytest

from moe_lab.cli import COMMANDS

REPOSITORY = Path(__file__).resolve().parents[1]
README = (REPOSITORY / "README.md").read_text()


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL))
def test_the_python_of_the_readme_runs(code: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(code, "README.md", "exec"), {})
    assert "tensor" in capsys.readouterr().out


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#:]+)\)", README))))
def test_every_link_of_the_readme_leads_somewhere(target: str) -> None:
    assert (REPOSITORY / target).exists()


def test_every_command_and_target_of_the_readme_exists() -> None:
    assert set(re.findall(r"^moe-lab (\w+)", README, flags=re.MULTILINE)) <= set(COMMANDS)
    targets = set(
        re.findall(r"^(\w+):.*##", (REPOSITORY / "Makefile").read_text(), flags=re.MULTILINE)
    )
    assert set(re.findall(r"^make (\w+)", README, flags=re.MULTILINE)) <= targets
