"""Plugins: Python files and modules outside the package that add routers, losses, controllers,
dispatch backends and analyses by registering them when they are imported.

A plugin is named by ``--plugin FILE_OR_MODULE`` on the command line, by ``load`` in Python, by the
environment variable ``MOE_LAB_PLUGINS`` (names separated as in ``PATH``), or by an installed
package's entry point in the group ``moe_lab.plugins``. ``load`` writes the variable, so the
processes that a sweep starts (local, Ray, SLURM) have the same plugins: a name that a registry does
not know makes it ask ``load_named`` before it gives up. A plugin is trusted code, as a recipe is.
"""

import hashlib
import importlib
import importlib.util
import os
import sys
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType

from moe_lab.errors import ConfigError, MoELabError

VARIABLE = "MOE_LAB_PLUGINS"
ENTRY_POINTS = "moe_lab.plugins"

_modules: dict[str, ModuleType | None] = {}
"""What was asked for -> its module; None while it is being imported."""


def load(source: str | Path) -> ModuleType | None:
    """Import a plugin, once per process, for this process and those that it starts.

    Args:
        source: a ``.py`` file, or the name of an importable module.

    Returns:
        The module; None for a plugin that is being imported (it asked for itself).

    Raises:
        ConfigError: there is no such file or module, or importing it fails.

    Example:
        >>> moe_lab.plugins.load("my_router.py")
        >>> RouterConfig(kind="mine", num_experts=8, top_k=2)
    """
    path = Path(source)
    name = str(path.resolve()) if path.suffix == ".py" else str(source)
    if name in _modules:
        return _modules[name]
    _modules[name] = None
    try:
        module = _from_file(Path(name)) if path.suffix == ".py" else importlib.import_module(name)
    except MoELabError:
        del _modules[name]
        raise
    except Exception as error:  # whatever a user's module raises is one line
        del _modules[name]
        reason = (str(error).strip().splitlines() or ["no message"])[0]
        raise ConfigError(
            f"cannot load the plugin {source}: {type(error).__name__}: {reason}; "
            "try importing it in Python"
        ) from error
    _modules[name] = module
    named = _named()
    if name not in named:
        os.environ[VARIABLE] = os.pathsep.join([*named, name])
    return module


def load_named() -> None:
    """Load what the environment variable and the entry points name and was not loaded yet.

    Raises ``ConfigError`` as ``load``.
    """
    for name in _named():
        load(name)
    for entry in entry_points(group=ENTRY_POINTS):
        load(entry.module)


def _named() -> list[str]:
    return [name for name in os.environ.get(VARIABLE, "").split(os.pathsep) if name]


def _from_file(path: Path) -> ModuleType:
    """The module of a file, under a name of its own."""
    digest = hashlib.sha256(str(path).encode()).hexdigest()[:8]
    spec = importlib.util.spec_from_file_location(f"moe_lab_plugin_{path.stem}_{digest}", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise FileNotFoundError(f"no Python file at {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[spec.name]
        raise
    return module
