"""The structure that docs/design.md promises: no circle of imports, and paths that exist."""

import ast
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "moe_lab"
PAGES = [
    REPOSITORY / "README.md",
    REPOSITORY / "CONTRIBUTING.md",
    *sorted((REPOSITORY / "docs").glob("*.md")),
    REPOSITORY / "experiments" / "README.md",
]
CODE = re.compile(r"`([^`\n]+)`")
OWN_FOLDERS = ("moe_lab", "experiments", "notebooks", "tests", "docs", "examples")


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")


def imported_modules(path: Path, modules: dict[str, Path]) -> set[Path]:
    """Files of the package that a file imports, inside functions and for type checkers too.

    A name taken from a package counts as an import of that package's ``__init__`` unless it is
    itself a module.
    """
    targets = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in modules else node.module for name in inside]
        else:
            continue
        targets |= {modules[name] for name in names if name in modules}
    return targets - {path}


def circles(edges: dict[Path, set[Path]]) -> list[list[str]]:
    """Strongly connected groups of more than one file (Tarjan)."""
    index: dict[Path, int] = {}
    low: dict[Path, int] = {}
    stack: list[Path] = []
    groups = []

    def visit(node: Path) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in sorted(edges[node]):
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            group = [stack.pop()]
            while group[-1] != node:
                group.append(stack.pop())
            if len(group) > 1:
                groups.append(sorted(str(path.relative_to(REPOSITORY)) for path in group))

    for node in sorted(edges):
        if node not in index:
            visit(node)
    return groups


def test_no_files_import_each_other_in_a_circle() -> None:
    modules = {module_name(path): path for path in PACKAGE.rglob("*.py")}
    edges = {path: imported_modules(path, modules) for path in modules.values()}
    # A package's __init__ lists what its files define; the lists are reached lazily.
    lists = {path for path in edges if path.name == "__init__.py"}
    plain = {path: targets - lists for path, targets in edges.items() if path not in lists}
    assert circles(plain) == []


def test_the_search_for_circles_sees_a_circle() -> None:
    first, second, third = (PACKAGE / name for name in ("a.py", "b.py", "c.py"))
    edges = {first: {second}, second: {third}, third: {second}}
    assert circles(edges) == [["moe_lab/b.py", "moe_lab/c.py"]]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_every_path_that_a_page_names_exists(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    links = [
        link.split("#")[0]
        for link in re.findall(r"\]\(([^)\s]+)\)", text)
        if "://" not in link and not link.startswith(("#", "mailto:"))
    ]
    missing = [link for link in links if link and not (page.parent / link).exists()]
    for code in CODE.findall(text):
        path = code.split(":")[0].strip()
        if re.fullmatch(rf"({'|'.join(OWN_FOLDERS)})/[\w./-]+", path):
            missing += [] if (REPOSITORY / path).exists() else [path]
    assert missing == []
