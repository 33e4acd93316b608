"""Names of a package that are imported when they are first used (PEP 562): importing torch costs
seconds that most callers need not pay.

A package lists them under ``TYPE_CHECKING`` too, for type checkers and readers.
"""

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def on_first_use(package: str, modules: Mapping[str, Sequence[str]]) -> Callable[[str], Any]:
    """The ``__getattr__`` of ``package`` that imports names when they are first used, from a map of
    submodule -> names.

    The submodules themselves can be reached as if imported.
    """
    places = {name: f"{package}.{module}" for module, names in modules.items() for name in names}

    def get(name: str) -> Any:
        inside = [module for module in modules if module.partition(".")[0] == name]
        for module in inside:
            importlib.import_module(f"{package}.{module}")
        if inside:
            return sys.modules[f"{package}.{name}"]
        if name not in places:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(places[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    return get


def load_name(path: str) -> Any:
    """The object that ``module:name`` names, imported now."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)
