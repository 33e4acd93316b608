"""What a page of documentation holds: its snippets, in order, and how one page is run.

A fence names its language: ``python`` and ``sh`` are run, ``text`` is shown. A comment before a
fence says why it is not run, ``<!-- not run: needs SLURM -->``. What a snippet needs and a reader
need not see is a comment of its own, ``<!-- hidden python`` or ``<!-- hidden sh`` and its lines.
"""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from registries import registries_as_before

from moe_lab.cli import main

REPOSITORY = Path(__file__).resolve().parents[1]
SHOWN = (REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md")))
"""The pages whose snippets are run."""
_SNIPPET = re.compile(
    r"^(?:<!-- (?P<mark>[^\n]+) -->\n)?```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^```$"
    r"|^<!-- hidden (?P<hidden>\w+)\n(?P<unseen>.*?)^-->$",
    flags=re.S | re.M,
)


@dataclass(frozen=True)
class Snippet:
    """One block of code of a page.

    Attributes:
        mark: the comment before it, "" without one.
        language: python, sh or text.
    """

    page: Path
    line: int
    language: str
    code: str
    mark: str

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(REPOSITORY)}:{self.line}"

    @property
    def is_run(self) -> bool:
        return self.language != "text" and not self.mark.startswith("not run: ")

    def commands(self) -> list[str]:
        """The lines of a shell block, those that end in a backslash joined with the next."""
        lines = self.code.replace("\\\n", " ").splitlines()
        return [line for line in lines if line.strip() and not line.startswith("#")]


def snippets(page: Path) -> Iterator[Snippet]:
    """The snippets of a page in their order, those that are not shown included."""
    text = page.read_text()
    for match in _SNIPPET.finditer(text):
        yield Snippet(
            page,
            text.count("\n", 0, match.start()) + 1,
            match["hidden"] or match["language"],
            match["unseen"] or match["code"] or "",
            match["mark"] or "",
        )


def words_of(command: str) -> list[str]:
    """A shell line as its words, without its comment."""
    return shlex.split(command, comments=True)


def run_page(page: Path) -> None:
    """Run what a page says to run, in the current folder; what it registers is taken out again."""
    with registries_as_before():
        _run_snippets(page)


def _run_snippets(page: Path) -> None:
    names: dict[str, Any] = {"__name__": "page"}
    for snippet in snippets(page):
        if not snippet.is_run:
            continue
        if snippet.language == "python":
            lines = "\n" * snippet.line + snippet.code  # line numbers of the page
            exec(compile(lines, str(page), "exec"), names)
        else:
            for command in snippet.commands():
                run_command(command, snippet.where)


def run_command(command: str, where: str) -> None:
    """Run one shell line; ``moe-lab`` alone runs in this process."""
    if re.match(r"moe-lab [^|<>&;$]*(#.*)?$", command):
        try:
            code = main(words_of(command)[1:])
        except SystemExit as end:
            code = int(end.code or 0)
    else:
        paths = (str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath))
        environment = {**os.environ, "PATH": os.pathsep.join(paths), "PYTHONPATH": str(REPOSITORY)}
        code = subprocess.run(["bash", "-euc", command], env=environment, check=False).returncode
    assert code == 0, f"{where}: {command} ends with {code}"
