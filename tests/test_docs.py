"""README and the pages of docs/: their commands and snippets run, their links lead somewhere."""

import re
import shutil
import sys
from pathlib import Path

import pytest
from markdown_pages import REPOSITORY, SHOWN, Snippet, run_page, snippets, words_of

from moe_lab.cli import COMMANDS, main
from moe_lab.errors import MoELabError

PAGES = [page for page in SHOWN if page.name != "README.md"]
LINKED = (*SHOWN, REPOSITORY / "CONTRIBUTING.md", REPOSITORY / "experiments" / "README.md")
OF_THE_SHELL = ("moe-lab", "make", "python", "pip", "torchrun", ". ", "curl", "MOE_LAB_")


def name(page: Path) -> str:
    return str(page.relative_to(REPOSITORY))


def of_all_pages() -> list[Snippet]:
    return [snippet for page in SHOWN for snippet in snippets(page)]


def test_the_tests_that_pages_name_exist() -> None:
    there = {path: path.read_text() for path in (REPOSITORY / "tests").rglob("*.py")}
    defined = {word for text in there.values() for word in re.findall(r"def (test_\w+)", text)}
    named = {word for page in SHOWN for word in re.findall(r"`(test_\w+)`", page.read_text())}
    assert len(named) > 10
    assert not named - defined - {path.stem for path in there}


@pytest.fixture(scope="session")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like a clone in which README was followed: ``runs/first``, a run, and
    ``traces/first``, a trace of it.
    """
    folder = tmp_path_factory.mktemp("clone")
    for part in ("moe_lab", "experiments", "examples", "tests"):
        (folder / part).symlink_to(REPOSITORY / part)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train = "--experts 8 --top-k 2 --zero-experts 4 --text moe_lab/text --tokenizer byte"
        small = "--tokens 4k --set eval_tokens=2000 --set eval_excerpt_tokens=64 --out runs/first"
        assert main(["train", *train.split(), *small.split()]) == 0
        trace = "runs/first --text moe_lab/routing/losses --max-tokens 300 --out traces/first"
        assert main(["trace", *trace.split()]) == 0
    return folder


@pytest.fixture
def here(clone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of ``clone``, and the current folder."""
    folder = tmp_path / "clone"
    shutil.copytree(clone, folder, symlinks=True)
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(snippets(page))], ids=lambda page: page.stem
)
def test_what_a_page_says_to_run_runs(page: Path, here: Path) -> None:
    code = "".join(snippet.code for snippet in snippets(page) if snippet.is_run)
    if "from transformers import" in code:
        pytest.importorskip("transformers", reason="needs the extra hf")
    run_page(page)


def test_every_block_names_its_language_and_every_one_that_is_not_run_has_a_reason() -> None:
    for snippet in of_all_pages():
        assert snippet.language in ("python", "sh", "text"), snippet.where
        if snippet.mark:
            reason = snippet.mark.removeprefix("not run: ")
            assert reason != snippet.mark, snippet.where
            assert len(reason.split()) >= 3, snippet.where
        if snippet.language == "text":
            shown = [line for line in snippet.code.splitlines() if line.startswith(OF_THE_SHELL)]
            assert not shown, f"{snippet.where}: a command in a block that is not run: {shown}"


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_a_command_that_is_not_run_has_options_that_exist(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every ``moe-lab`` line that no test runs is at least accepted by the command's parser."""
    module = sys.modules.get(COMMANDS[command][0]) or __import__(COMMANDS[command][0], fromlist="x")

    class ParsedError(MoELabError):
        """Raised in place of the command."""

    def parsed(args: object) -> int:
        raise ParsedError("")

    monkeypatch.setattr(module, "main", parsed)
    for snippet in of_all_pages():
        if snippet.language == "sh" and snippet.mark:
            for line in snippet.commands():
                words = words_of(line.partition(" | ")[0])
                if "moe-lab" in words and words[words.index("moe-lab") + 1] == command:
                    try:
                        code = main(words[words.index("moe-lab") + 1 :])
                    except SystemExit:
                        pytest.fail(f"{snippet.where}: {line}")
                    assert code == 2, f"{snippet.where}: {line}"


@pytest.mark.parametrize("page", LINKED, ids=name)
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.S | re.M)
    targets = set(re.findall(r"\]\(([^)\s]+)\)", text))
    targets |= set(re.findall(r"(?:src|srcset)=\"([^\"]+)\"", text))
    for target in targets:
        if re.match(r"https?://|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), target
        if name(page).startswith("docs/"):
            assert found.is_relative_to(REPOSITORY / "docs"), f"{target}: not part of the site"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", found.read_text(), flags=re.M)
            assert anchor in {anchor_of(title) for title in titles}, target


def anchor_of(title: str) -> str:
    """The name that GitHub and mkdocs give to a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-")


def test_every_command_that_a_page_mentions_exists() -> None:
    for page in LINKED:
        for command in re.findall(r"`moe-lab (\w+)", page.read_text()):
            assert command in COMMANDS or command == "COMMAND", name(page)


def test_every_page_is_in_the_navigation() -> None:
    listed = set(re.findall(r": ([\w/]+\.md)$", (REPOSITORY / "mkdocs.yml").read_text(), re.M))
    assert listed == {str(page.relative_to(REPOSITORY / "docs")) for page in PAGES}
