"""README in a new clone: every line and every snippet of it, as written, in a new shell."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from markdown_pages import REPOSITORY, snippets

README = REPOSITORY / "README.md"
SCRIPT = """#!{python}
import sys

from moe_lab.cli import main
sys.exit(main())
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """The tracked files as they are now, with an environment ``.venv`` as ``make setup`` makes it:
    it imports moe_lab from the clone, and everything else from the environment of the tests.
    """
    listed = subprocess.run(
        ["git", "-C", REPOSITORY, "ls-files", "-z"], capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("needs the repository: an installed copy has no list of its files")
    folder = tmp_path / "clone"
    for name in filter(None, listed.stdout.split("\0")):
        if (REPOSITORY / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, folder / name)
    environment = folder / ".venv"
    venv.create(environment, with_pip=False, symlinks=True)
    paths = sysconfig.get_paths(vars={"base": str(environment), "platbase": str(environment)})
    packages = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (Path(paths["purelib"]) / "clone.pth").write_text("\n".join([str(folder), *packages]) + "\n")
    command = environment / "bin" / "moe-lab"
    command.write_text(SCRIPT.format(python=environment / "bin" / "python"))
    command.chmod(0o755)
    return folder


@pytest.mark.slow
def test_every_line_of_the_readme_works_in_a_new_clone(clone: Path, tmp_path: Path) -> None:
    script = ["set -eu", "trap 'echo \"fails: $BASH_COMMAND\" >&2' ERR"]
    for snippet in snippets(README):
        if snippet.language == "python":
            script.append(f"python - <<'END'\n{snippet.code}END")
        elif snippet.language == "sh" and not snippet.mark:
            script += snippet.commands()
    assert sum(line.startswith("moe-lab ") for line in script) == 10
    ended = subprocess.run(
        ["bash", "--noprofile", "--norc", "-c", "\n".join(script)],
        cwd=clone,
        env={"PATH": os.defpath, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert (clone / "runs" / "first" / "report.html").is_file()
    assert (clone / "traces" / "first" / "meta.json").is_file()


def test_every_target_of_make_that_the_readme_names_exists() -> None:
    targets = (REPOSITORY / "Makefile").read_text()
    named = [
        line.split()[1]
        for snippet in snippets(README)
        for line in snippet.commands()
        if line.startswith("make ")
    ]
    assert named
    for target in named:
        assert f"\n{target}: " in targets, target
