"""What every configuration has in common: it is a frozen dataclass that round-trips through JSON
and has a content hash.

A configuration checks itself in ``__post_init__`` with ``require``; nested configurations are
rebuilt from their field types.
"""

import dataclasses
import enum
import types
import typing
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Self, TypeVar

from moe_lab.errors import ConfigError, expected
from moe_lab.files import canonical_json, content_hash, digest


def require(condition: bool, what: str, got: object, hint: str = "") -> None:
    """Raise ``ConfigError("expected <what>, got <got>; try <hint>")`` unless ``condition``."""
    if not condition:
        raise ConfigError(expected(what, got, hint))


E = TypeVar("E", bound=enum.StrEnum)


def choice(options: type[E], value: str, what: str) -> E:
    """The member of ``options`` that ``value`` names, so that configurations take plain strings.

    Raises ``ConfigError`` for another.
    """
    try:
        return options(value)
    except ValueError:
        names = ", ".join(item.value for item in options)
        raise ConfigError(expected(f"{what} {names}", repr(value))) from None


class Config:
    """Mixin of frozen dataclasses: ``to_dict``, ``from_dict``, ``hash``, ``replace``."""

    def written(self) -> tuple[str, ...]:
        """Names of the fields that ``to_dict`` and ``hash`` have: all, unless a class leaves one
        out where it means nothing.
        """
        return _names(type(self))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values only: nested configurations become dictionaries, enums strings, tuples
        lists.
        """
        return {name: _plain(getattr(self, name)) for name in self.written()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The inverse of ``to_dict``. Unknown names raise; missing ones take their default."""
        hints = typing.get_type_hints(cls)
        known = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        unknown = sorted(set(values) - known)
        if unknown:
            raise ConfigError(
                expected(
                    f"fields of {cls.__name__} ({', '.join(sorted(known))})", ", ".join(unknown)
                )
            )
        try:
            return cls(**{name: _rebuild(hints[name], value) for name, value in values.items()})
        except TypeError as error:
            raise ConfigError(f"{cls.__name__}: {error}") from error

    def hash(self) -> str:
        """12 hex digits that change whenever a field does."""
        return content_hash({"class": type(self).__name__, **self.to_dict()})

    def replace(self, **changes: Any) -> Self:
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]


def hashes(configs: Sequence[Config]) -> tuple[str, ...]:
    """The ``hash`` of each.

    Thousands of runs share a few models and texts: an object that several configurations hold is
    encoded once.
    """
    known: dict[int, str] = {}

    def encoded(value: Any) -> str:
        if type(value) in _PLAIN:
            return canonical_json(value)
        if id(value) not in known:
            known[id(value)] = canonical_json(_plain(value))
        return known[id(value)]

    found = []
    for config in configs:
        if type(config).to_dict is not Config.to_dict:  # it writes itself in its own way
            found.append(config.hash())
            continue
        parts = {name: encoded(getattr(config, name)) for name in config.written()} | {
            "class": canonical_json(type(config).__name__)
        }
        found.append(
            digest("{" + ",".join(f'"{name}":{parts[name]}' for name in sorted(parts)) + "}")
        )
    return tuple(found)


_PLAIN = frozenset({str, int, float, bool, type(None)})


@lru_cache
def _names(kind: type) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(kind))


def _plain(value: Any) -> Any:
    """As ``dataclasses.asdict``, which copies every leaf: ten thousand configurations of a sweep
    would take half a minute.
    """
    kind = type(value)
    if kind in _PLAIN:
        return value
    if dataclasses.is_dataclass(kind):
        return {name: _plain(getattr(value, name)) for name in _names(kind)}
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.value if isinstance(value, enum.Enum) else value


def _rebuild(hint: Any, value: Any) -> Any:
    if value is None:
        return None
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        hint = next(option for option in typing.get_args(hint) if option is not type(None))
        origin = typing.get_origin(hint)
    if origin is tuple:
        return tuple(_rebuild(typing.get_args(hint)[0], item) for item in value)
    if isinstance(hint, type) and issubclass(hint, Config):
        return value if isinstance(value, hint) else hint.from_dict(value)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        try:
            return hint(value)
        except ValueError:
            raise ConfigError(
                expected(f"one of {', '.join(item.value for item in hint)}", value)
            ) from None
    return value
