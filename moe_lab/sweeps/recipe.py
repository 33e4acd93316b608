"""Recipes: Python files with ``PRESETS`` and ``sweep(preset, *, seed, device) -> SweepConfig``.

Each mistake in one gives one line.
"""

import importlib.util
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from moe_lab.errors import MoELabError, RunError, expected, require
from moe_lab.sweeps.config import SweepConfig

DEFAULT_PRESET = "demo"


def load_recipe(
    path: Path | str,
    preset: str | None = None,
    *,
    seed: int = 0,
    device: str = "cpu",
    alternative: str | None = None,
) -> SweepConfig:
    """Import the recipe file at ``path`` and ask it for the sweep of ``preset``.

    Args:
        preset: one of the recipe's ``PRESETS``; None takes "demo", else the first.
        alternative: one of the recipe's ``ALTERNATIVES``, for recipes whose ``sweep`` takes one.

    Raises ``RunError`` where the file is missing, does not import, has no ``sweep`` or ``PRESETS``,
    does not know the preset or the alternative, fails, or returns something else. A recipe is code
    of the user's and runs as such.
    """
    path = Path(path)
    module, names = _defined(path)
    if preset is None:
        preset = DEFAULT_PRESET if DEFAULT_PRESET in names else str(next(iter(names), ""))
    require(
        preset in names,
        f"a preset of {path.name} ({', '.join(names)})",
        repr(preset),
        error=RunError,
        field="preset",
    )
    known = tuple(getattr(module, "ALTERNATIVES", ()))
    if alternative is not None and alternative not in known:
        raise RunError(
            expected(
                f"an alternative of {path.name} ({', '.join(known) or 'it has none'})",
                repr(alternative),
            ),
            field="alternative",
        )
    chosen = {} if alternative is None else {"alternative": alternative}
    sweep = _within(path, lambda: module.sweep(preset, seed=seed, device=device, **chosen))
    if not isinstance(sweep, SweepConfig):
        raise RunError(expected(f"a SweepConfig from sweep() in {path}", type(sweep).__name__))
    return sweep


def presets(path: Path | str) -> tuple[str, ...]:
    """The presets of the recipe file at ``path``. Raises ``RunError`` as ``load_recipe``."""
    return _defined(Path(path))[1]


def _defined(path: Path) -> tuple[ModuleType, tuple[str, ...]]:
    """The recipe's module and its presets."""
    module = _import(path)
    make, names = getattr(module, "sweep", None), getattr(module, "PRESETS", None)
    if not callable(make) or names is None:
        missing = "sweep(preset, *, seed, device)" if not callable(make) else "PRESETS"
        raise RunError(
            expected(f"a recipe that defines sweep and PRESETS in {path}", f"no {missing}")
        )
    return module, tuple(names)


def _import(path: Path) -> ModuleType:
    require(
        path.is_file(),
        "a recipe file",
        f"{path}, which is {'a folder' if path.is_dir() else 'missing'}",
        "experiments/*.py",
        error=RunError,
        field="recipe",
    )
    name = f"moe_lab_recipe_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise RunError(expected("a recipe file ending in .py", path), field="recipe")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickles inside a recipe look their module up
    loader = spec.loader
    _within(path, lambda: loader.exec_module(module))
    return module


def _within(path: Path, action: Callable[[], Any]) -> Any:
    """``action()``, whose exceptions become one line with the recipe's line number; our own errors
    already are one.
    """
    try:
        return action()
    except MoELabError:
        raise
    except (Exception, SystemExit) as error:
        message = " ".join(str(error).split())
        why = f"{type(error).__name__}{message and ': '}{message}"
        raise RunError(f"recipe {path}{_line(error, path)} failed: {why}") from error


def _line(error: BaseException, path: Path) -> str:
    """``:12`` where the innermost frame of the recipe (or its syntax error) stands."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return f":{error.lineno}"
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename == str(path)
    ]
    return f":{lines[-1]}" if lines else ""
