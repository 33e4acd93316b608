"""The base of every configuration: a frozen dataclass that round-trips through JSON and has a
content hash.

A field's type states what it accepts: a StrEnum takes the text of a member, and
``Annotated[float, above(0)]`` a number in that range. ``__post_init__`` checks the fields; a class
that extends it adds what holds between several of them, with ``require``. Nested configurations
are rebuilt from their field types.
"""

import dataclasses
import enum
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from reprlib import repr as short
from textwrap import indent
from typing import Any, Self, TypeVar

from moe_lab.errors import ConfigError, FieldError, expected, require
from moe_lab.files import content_hash
from moe_lab.html_table import html_table

E = TypeVar("E", bound=enum.StrEnum)


def choice(options: type[E], value: Any, what: str, field: str = "") -> E:
    """The member of ``options`` that ``value`` names, so that configurations take plain strings.

    Raises ``ConfigError`` for another.
    """
    names = [item.value for item in options]
    require(value in names, f"{what} {', '.join(names)}", repr(value), field=field)
    return options(value)


@dataclasses.dataclass(frozen=True)
class Range:
    """A condition on the value of a field, for ``Annotated``: the test, its words in a message, and
    for numbers a value that fits, which an error proposes if the field has no default.
    """

    fits: Callable[[Any], bool]
    words: str
    example: float | None = None


def at_least(low: float) -> Range:
    return Range(lambda value: value >= low, f"of at least {low}", low)


def above(low: float) -> Range:
    return Range(lambda value: value > low, f"above {low}", low + 1)


def below(high: float) -> Range:
    return Range(lambda value: value < high, f"below {high}", high - 1)


def at_most(high: float) -> Range:
    return Range(lambda value: value <= high, f"of at most {high}", high)


def between(low: float, high: float) -> Range:
    """A number from ``low`` to ``high``, both included."""
    return Range(lambda value: low <= value <= high, f"between {low} and {high}", high)


MAX_SEED = 2**63 - 1
"""Of a random generator of torch, and of a column of seeds."""


class Config:
    """Mixin of frozen dataclasses: ``to_dict``, ``from_dict``, ``hash``, ``replace``; its ``repr``
    shows the fields that differ from their defaults.
    """

    def __init_subclass__(cls) -> None:
        cls.__repr__ = Config.__repr__  # a dataclass keeps the one that is there

    def __repr__(self) -> str:
        shown = [
            f"{field.name}={_shown(getattr(self, field.name))}"
            for field in dataclasses.fields(self)  # type: ignore[arg-type]
            if getattr(self, field.name) != _default(field)
        ]
        line = f"{type(self).__name__}({', '.join(shown)})"
        if len(line) <= 100 and "\n" not in line:
            return line
        lines = [""]
        for item in shown:  # as many on a line as fit
            fits = "\n" not in lines[-1] + item and len(lines[-1]) + len(item) < 90
            lines[-1:] = [f"{lines[-1]}{item}, "] if fits else [lines[-1], f"{item}, "]
        fields = indent("\n".join(line.rstrip() for line in lines if line), "  ")
        return f"{type(self).__name__}(\n{fields}\n)"

    def _repr_html_(self) -> str:
        """Fields that differ from their defaults, those of nested configurations by dotted name."""
        columns = ("field", "value", "default")
        return html_table(columns, _differing(self, ""), type(self).__name__)

    def __post_init__(self) -> None:
        """Replace texts by the members of their StrEnum.

        Raises ``ConfigError`` with the name of the ``field`` whose value does not fit its type.
        """
        for name, optional, options, ranges in _checked(type(self)):
            value = getattr(self, name)
            if value is None and optional:
                continue
            if options is not None:
                object.__setattr__(self, name, choice(options, value, f"{name} among", name))
            for range in ranges:
                if value is not None and range.fits(value):
                    continue
                if range.example is None:
                    raise ConfigError(expected(f"{name} {range.words}", short(value)), name)
                example = _example(getattr(type(self), name, None), ranges)
                raise FieldError(name, f"a number {range.words}", short(value), example)

    def written(self) -> tuple[str, ...]:
        """Names of the fields that ``to_dict`` and ``hash`` include: all, unless a class leaves out
        fields that have no effect.
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
        what = f"fields of {cls.__name__} as name -> value"
        require(isinstance(values, Mapping), what, short(values))
        hints, known = _hints(cls), _names(cls)
        unknown = sorted(set(values).difference(known))
        what = f"fields of {cls.__name__} ({', '.join(sorted(known))})"
        require(not unknown, what, ", ".join(unknown), field=unknown[0] if unknown else "")
        try:
            return cls(
                **{name: _rebuild(name, hints[name], value) for name, value in values.items()}
            )
        except TypeError as error:
            raise ConfigError(f"{cls.__name__}: {error}") from error

    def hash(self) -> str:
        """12 hex digits that change whenever a field does."""
        return content_hash({"class": type(self).__name__, **self.to_dict()})

    def replace(self, **changes: Any) -> Self:
        """A copy with other values. ``router__top_k=4`` changes field ``top_k`` of ``router``.

        Raises ``ConfigError`` for a field that is not there or a value that does not fit.
        """
        nested: dict[str, dict[str, Any]] = {}
        for name in [name for name in changes if "__" in name]:
            outer, _, inner = name.partition("__")
            nested.setdefault(outer, {})[inner] = changes.pop(name)
        for outer, inside in nested.items():
            held = changes.get(outer, getattr(self, outer, None))
            if not isinstance(held, Config):
                raise ConfigError(expected(f"{outer} as a configuration", short(held)), outer)
            changes[outer] = held.replace(**inside)
        unknown = sorted(set(changes) - set(_names(type(self))))
        require(
            not unknown,
            f"fields of {type(self).__name__} ({', '.join(_names(type(self)))})",
            ", ".join(unknown),
            field=unknown[0] if unknown else "",
        )
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]


def _default(field: "dataclasses.Field[Any]") -> Any:
    made = field.default_factory
    return field.default if made is dataclasses.MISSING else made()


def _differing(config: Any, prefix: str) -> Iterator[tuple[str, str, str]]:
    """Name, value and default as text."""
    for field in dataclasses.fields(config):
        value, default = getattr(config, field.name), _default(field)
        if isinstance(value, Config):
            yield from _differing(value, f"{prefix}{field.name}.")
        elif value != default:
            missing = default is dataclasses.MISSING
            yield prefix + field.name, _shown(value), "" if missing else _shown(default)


def _shown(value: Any) -> str:
    """A number of items in place of a long tuple of configurations (the runs of a sweep)."""
    if isinstance(value, tuple) and len(value) > 3 and isinstance(value[0], Config):
        return f"<{len(value)} {type(value[0]).__name__}>"
    return repr(value.value if isinstance(value, enum.Enum) else value)


_PLAIN = frozenset({str, int, float, bool, type(None)})


def _example(default: Any, ranges: tuple[Range, ...]) -> str:
    """A number within ``ranges``: the default if it is one."""
    numbers = (default, *(one.example for one in ranges))
    return next(
        f"{number:g}"
        for number in numbers
        if isinstance(number, int | float) and all(one.fits(number) for one in ranges)
    )


Check = tuple[str, bool, type[enum.StrEnum] | None, tuple[Range, ...]]


@lru_cache
def _checked(kind: type) -> tuple[Check, ...]:
    """(name, whether None is allowed, StrEnum, ranges) of each field that states one of them."""
    checks: list[Check] = []
    for name, hint in typing.get_type_hints(kind, include_extras=True).items():
        marks = getattr(hint, "__metadata__", ())
        hint = hint.__origin__ if marks else hint
        kinds = typing.get_args(hint) if _is_union(hint) else (hint,)
        enums = [one for one in kinds if isinstance(one, type) and issubclass(one, enum.StrEnum)]
        ranges = tuple(mark for mark in marks if isinstance(mark, Range))
        if enums or ranges:
            checks.append((name, type(None) in kinds, enums[0] if enums else None, ranges))
    return tuple(checks)


@lru_cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


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
        names = value.written() if isinstance(value, Config) else _names(kind)
        return {name: _plain(getattr(value, name)) for name in names}
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, enum.Enum):
        return value.value
    return int(value) if isinstance(value, int) else value


def _rebuild(name: str, hint: Any, value: Any) -> Any:
    """A field's value from plain JSON values. Raises ``ConfigError`` for another type."""
    options = typing.get_args(hint) if _is_union(hint) else (hint,)
    if value is None or hint is Any:
        return value
    hint = next(option for option in options if option is not type(None))
    if typing.get_origin(hint) is tuple:
        require(isinstance(value, list | tuple), f"{name} as a list", short(value), field=name)
        return tuple(_rebuild(name, typing.get_args(hint)[0], item) for item in value)
    if isinstance(hint, type) and issubclass(hint, Config):
        return value if isinstance(value, hint) else hint.from_dict(value)
    if isinstance(hint, type) and issubclass(hint, enum.StrEnum):
        return choice(hint, value, f"{name} among", name)
    fits = [_LEAVES[option](value) for option in options if option in _LEAVES]
    kinds = " or ".join(_SPELT[option] for option in options if option in _LEAVES)
    if fits and not any(fits):
        raise FieldError(name, kinds, short(value), _EXAMPLES[options[0]])
    return value


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (types.UnionType, typing.Union)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


_LEAVES: dict[Any, Callable[[Any], bool]] = {
    # Configurations written with 1e6 tokens keep that value, and so their hash.
    int: lambda value: _is_number(value) and value == value // 1,
    float: lambda value: _is_number(value) and abs(value) < float("inf"),  # else it has no hash
    bool: lambda value: isinstance(value, bool),
    str: lambda value: isinstance(value, str),
}
_SPELT = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
_EXAMPLES = {int: "2", float: "0.1", bool: "true", str: "name"}
