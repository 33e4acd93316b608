"""Registries as they were before, for tests that add to them in this process."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from moe_lab.registry import Registry
from moe_lab.routing.facts import FACTS, ROUTERS


@contextmanager
def registries_as_before() -> Iterator[None]:
    """Take out what the block adds to a registry. The package's own names stay: their modules add
    them once.
    """
    before = {id(item): set(item._values) for item in _registries()}
    try:
        yield
    finally:
        for item in _registries():
            for name in set(item._values) - before.get(id(item), set()) - set(item._modules):
                del item._values[name], item._origins[name]
        for kind in set(FACTS) - set(ROUTERS):
            del FACTS[kind]


def _registries() -> list[Registry]:
    """Those that modules of the package hold."""
    held = {
        id(value): value
        for name, module in list(sys.modules.items())
        if name.startswith("moe_lab")
        for value in list(vars(module).values())
        if issubclass(type(value), Registry)
    }
    return list(held.values())
