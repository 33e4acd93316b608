"""Attributes and methods of a module replaced until an ``ExitStack`` closes."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from typing import Any

_MISSING = object()


def set_until(stack: ExitStack, module: Any, name: str, value: Any) -> None:
    """Set an attribute until ``stack`` closes; a method of the class comes back by deletion."""
    before = vars(module).get(name, _MISSING)

    def restore() -> None:
        if before is _MISSING:
            delattr(module, name)
        else:
            setattr(module, name, before)

    setattr(module, name, value)
    stack.callback(restore)


def wrap_until(stack: ExitStack, module: Any, name: str, around: Callable[..., Any]) -> None:
    """Put ``around(method, args, kwargs)`` in the place of a method until ``stack`` closes."""
    method = getattr(module, name)

    @wraps(method)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return around(method, args, kwargs)

    set_until(stack, module, name, wrapped)
