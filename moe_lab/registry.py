"""``Registry``: name -> thing, for everything that a file outside the package may add to by name
(routers, controllers, losses, dispatch backends, analyses).

What the package itself has is imported on first use, so a registry can be listed and checked
without its dependencies. Adding is a decorator:

    @ROUTERS.register("mine")
    class Mine(Router): ...
"""

import importlib
from collections.abc import Callable, Iterator, Mapping
from difflib import get_close_matches
from typing import Any, TypeVar

from moe_lab.errors import ConfigError, expected

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

    def expect(self, modules: Mapping[str, str]) -> None:
        """Name the modules of the package that add these names when they are imported."""
        self._modules.update(modules)

    def add(self, name: str, value: Any) -> None:
        """File ``value`` under ``name``.

        Raises:
            ConfigError: something else has the name. (The same definition may come again, as when
                a notebook cell or a plugin is run twice.)
        """
        known = self._values.get(name)
        taken = known is not None and _origin(known) != _origin(value)
        if taken or (name in self._modules and _origin(value)[0] != self._modules[name]):
            raise ConfigError(
                expected(f"{self.what} that is not taken", repr(name), "another name")
            )
        self._values[name] = value

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator: ``add`` what it decorates."""

        def file(value: T) -> T:
            self.add(name, value)
            return value

        return file

    def find(self, name: str) -> Any:
        """The value of a name. Raises ``ConfigError`` naming those there are."""
        if name not in self:
            near = get_close_matches(str(name), list(self), n=3, cutoff=0.6)
            raise ConfigError(
                expected(f"{self.what} among {', '.join(self)}", repr(name), ", ".join(near))
            )
        return self[name]

    def __getitem__(self, name: str) -> Any:
        if name not in self._values and name in self._modules:
            importlib.import_module(self._modules[name])
        return self._values[name]

    def __contains__(self, name: object) -> bool:
        return name in self._values or name in self._modules

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys((*self._modules, *self._values)))

    def __len__(self) -> int:
        return len(self._modules.keys() | self._values.keys())


def _origin(value: Any) -> tuple[str, str]:
    """Where a class or function was defined."""
    return getattr(value, "__module__", ""), getattr(value, "__qualname__", repr(value))
