import subprocess
import sys
from pathlib import Path

import pytest
from refusals import refused

from moe_lab.errors import RunError
from moe_lab.sweeps import load_recipe

GOOD = """
from stub_trainer import StubRun, stub_sweep
PRESETS = ("demo", "small")
def sweep(preset, *, seed=0, device="cpu"):
    return stub_sweep(StubRun(name=preset, seed=seed, device=device))
"""


def recipe(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.py"
    path.write_text(text)
    return path


def test_a_recipe_gets_preset_seed_and_device(tmp_path: Path):
    run = load_recipe(recipe(tmp_path, GOOD), "small", seed=7, device="cuda:1").runs[0]
    assert (run.name, run.seed, run.device) == ("small", 7, "cuda:1")


def test_a_recipe_may_define_dataclasses(tmp_path: Path):
    text = (
        "from __future__ import annotations\nfrom dataclasses import "
        "dataclass\n@dataclass\nclass Shape:\n    width: int = 1\n" + GOOD
    )
    assert load_recipe(recipe(tmp_path, text), "demo").name == "stub"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "import no_such_module_here\n",
            r"recipe .*recipe\.py:1 failed: ModuleNotFoundError: No module named "
            r"'no_such_module_here'",
        ),
        ("x = 1\ny = (\n", r"recipe .*recipe\.py:2 failed: SyntaxError: '\(' was never closed"),
        (
            "def f():\n    return 1 / 0\nf()\n",
            r"recipe .*recipe\.py:2 failed: ZeroDivisionError: division by zero",
        ),
        (
            "raise SystemExit('two\\nlines')\n",
            r"recipe .*recipe\.py:1 failed: SystemExit: two lines",
        ),
        (
            "PRESETS = ('demo',)\n",
            r"expected a recipe that defines sweep and PRESETS in .*, got no "
            r"sweep\(preset, \*, seed, device\)",
        ),
        (
            "def sweep(preset, **_): ...\n",
            r"expected a recipe that defines sweep and PRESETS in .*, got no PRESETS",
        ),
        (
            GOOD.replace('("demo", "small")', '("big", "small")'),
            r"expected a preset of recipe\.py \(big, small\), got 'demo'",
        ),
        (GOOD.replace("return stub_sweep", "return list"), r"failed: TypeError"),
        (
            "PRESETS = ('demo',)\ndef sweep(preset, *, seed, device): return [1]\n",
            r"expected a SweepConfig from sweep\(\) in .*, got list",
        ),
        ("PRESETS = ('demo',)\ndef sweep(): ...\n", r"recipe .* failed: TypeError: sweep\(\) "),
    ],
)
def test_each_mistake_in_a_recipe_gives_one_line(tmp_path: Path, text: str, message: str):
    with pytest.raises(RunError, match=message) as caught:
        load_recipe(recipe(tmp_path, text), "demo")
    assert "\n" not in str(caught.value)


def test_a_bad_configuration_in_a_recipe_keeps_its_own_words(tmp_path: Path):
    text = GOOD.replace(
        "return stub_sweep(StubRun(name=preset, seed=seed, device=device))", "return stub_sweep()"
    )
    with refused("runs"):
        load_recipe(recipe(tmp_path, text), "demo")


def test_a_missing_recipe_and_a_folder_are_told_apart(tmp_path: Path):
    with refused("recipe", RunError):
        load_recipe(tmp_path / "nothing.py", "demo")
    with refused("recipe", RunError):
        load_recipe(tmp_path, "demo")


def test_a_file_that_is_no_python_file_is_refused(tmp_path: Path):
    (tmp_path / "recipe.txt").write_text(GOOD)
    with refused("recipe", RunError):
        load_recipe(tmp_path / "recipe.txt", "demo")


def test_sweeps_import_no_torch():
    code = (
        "import sys, moe_lab.sweeps; print('torch' in sys.modules, 'rich' in "
        "sys.modules, 'polars' in sys.modules)"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.split()
        == ["False"] * 3
    )
