"""``Registry``: named objects that a file outside the package may add (routers, controllers,
losses, dispatch backends, analyses).

What the package itself has is imported on first use, so a registry can be listed and checked
without its dependencies. Adding is a decorator:

    @ROUTERS.register("mine")
    class Mine(Router): ...
"""

import importlib
from collections.abc import Callable, Iterator, Mapping
from difflib import get_close_matches
from typing import Any, TypeVar

from moe_lab.errors import ConfigError, expected, require
from moe_lab.plugins import load_named

T = TypeVar("T")


class Registry(Mapping[str, Any]):
    """
    Args:
        what: the kind of thing with its article, for messages: "a router kind".
        modules: name -> module of the package whose import adds it.
    """

    def __init__(self, what: str, modules: Mapping[str, str] | None = None) -> None:
        self.what = what
        self._modules = dict(modules or {})
        self._values: dict[str, Any] = {}
        self._origins: dict[str, tuple[str, str]] = {}

    def expect(self, modules: Mapping[str, str]) -> None:
        """Name the modules of the package that add these names when they are imported."""
        self._modules.update(modules)

    def add(self, name: str, value: Any, defined_by: Any = None) -> None:
        """Add ``value`` as ``name``; ``defined_by`` is the class or function that it is made of, if
        it is not one itself.

        Raises:
            ConfigError: something else has the name. (The same definition may come again, as when
                a notebook cell or a plugin is run twice.)
        """
        origin = _origin(value if defined_by is None else defined_by)
        taken = self._origins.get(name, origin) != origin
        require(
            not taken and self._modules.get(name, origin[0]) == origin[0],
            f"{self.what} that is not taken",
            repr(name),
            "another name",
            field=self.what,
        )
        self._values[name], self._origins[name] = value, origin

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that adds a class or function as ``name``."""

        def file(value: T) -> T:
            self.add(name, value)
            return value

        return file

    def find(self, name: str) -> Any:
        """The value of a name. If the name is unknown, plugins are loaded first.

        Raises ``ConfigError`` naming those there are.
        """
        if name not in self:
            load_named()
        if name not in self:
            near = get_close_matches(str(name), list(self), n=3, cutoff=0.6)
            hint = " or ".join([*near, "the --plugin that adds it"])
            hint += f"; there are {', '.join(self)}"
            raise ConfigError(expected(self.what, repr(name), hint), field=self.what)
        return self[name]

    def __getitem__(self, name: str) -> Any:
        if name not in self._values and name in self._modules:
            importlib.import_module(self._modules[name])
        return self._values[name]

    def __setitem__(self, name: str, value: Any) -> None:
        self.add(name, value)

    def __contains__(self, name: object) -> bool:
        return name in self._values or name in self._modules

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys((*self._modules, *self._values)))

    def __len__(self) -> int:
        return len(self._modules.keys() | self._values.keys())


def _origin(value: Any) -> tuple[str, str]:
    """Where a class or function was defined."""
    return getattr(value, "__module__", ""), getattr(value, "__qualname__", repr(value))
