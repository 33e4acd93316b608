"""JSON from outside: parsed within limits, and checked against a small declarative schema.

A schema is a function of (value, name for messages) that returns the value or raises. The factories
here make them, and can be nested:

    answer = record(token_ids=optional(list_of(whole())), text=optional(text()))
    answer(json_value, "dump.json, record 3")

Every error is a ``ConfigError`` of one line; callers with an error type of their own convert it.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from reprlib import repr as short
from typing import Any

from moe_lab.errors import ConfigError, expected, require
from moe_lab.files import read_regular

Schema = Callable[[Any, str], Any]

MAX_BYTES = 2**27
"""Of one JSON document: its values take up to ten times as much memory."""
MAX_DIGITS = 40
"""Of one whole number in a document."""
_TOO_LONG = b"0" * (MAX_DIGITS + 1)
_DIGITS_AS_ZERO = bytes.maketrans(b"123456789", b"000000000")


def parse_json(data: bytes, where: str, unique_keys: bool = True) -> Any:
    """The value of a JSON document (a byte-order mark is allowed).

    Raises:
        ConfigError: no JSON (as in an empty file), an object that names a key twice (if
            ``unique_keys``), a number of more than ``MAX_DIGITS`` digits, more than ``MAX_BYTES``,
            values nested too deep.
    """
    require(
        len(data) <= MAX_BYTES,
        f"at most {MAX_BYTES >> 20} MiB of JSON in {where}",
        f"{len(data) >> 20} MiB",
        "several smaller files",
    )
    require(data.strip(), f"JSON in {where}", "nothing: it is empty", "the file written again")
    hook = _object if unique_keys else None
    # Numbers are looked at one by one, which takes longer than all else, only where one may be
    # too long.
    look = _whole if _TOO_LONG in data.translate(_DIGITS_AS_ZERO) else None
    try:
        return json.loads(data.decode("utf-8-sig"), parse_int=look, object_pairs_hook=hook)
    except json.JSONDecodeError as error:
        got = f"an error in line {error.lineno}: {error.msg}"
        raise ConfigError(expected(f"JSON in {where}", got)) from None
    except UnicodeDecodeError:
        raise ConfigError(expected(f"JSON in {where}", "bytes that are not UTF-8 text")) from None
    except RecursionError:
        raise ConfigError(expected(f"JSON in {where}", "values nested too deep")) from None
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def read_json_file(path: Path, what: str = "file", unique_keys: bool = True) -> Any:
    """The value of a JSON file; raises ``ConfigError`` as ``parse_json`` does, and for a file that
    cannot be read.
    """
    try:
        data = read_regular(path, MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(expected(f"a readable {what}", f"{path} ({error.strerror})")) from None
    return parse_json(data, path.name, unique_keys)


def _whole(digits: str) -> int:
    require(
        len(digits) <= MAX_DIGITS,
        f"whole numbers of at most {MAX_DIGITS} digits",
        f"one of {len(digits)}",
    )
    return int(digits)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ConfigError(expected("each key of an object once", f"{short(twice)} twice"))
    return values


# ------------------------------------------------------------------------------------------------
# schemas


def wrong(where: str, what: str, value: Any) -> ConfigError:
    """The error for a value that does not fit."""
    return ConfigError(expected(f"{where} as {what}", short(value)), where)


def whole(least: int = 0, most: int = 2**53) -> Schema:
    """A whole number, also as a float without a fraction; true and false are none."""

    def check(value: Any, where: str) -> int:
        number = int(value) if type(value) is float and value.is_integer() else value
        if type(number) is not int or not least <= number <= most:
            raise wrong(where, f"a whole number from {least} to {most}", value)
        return number

    return check


def number(least: float = -1e30, most: float = 1e30) -> Schema:
    """A finite number, as a float; true and false are none."""

    def check(value: Any, where: str) -> float:
        if type(value) not in (int, float) or not least <= value <= most:
            raise wrong(where, f"a number from {least:g} to {most:g}", value)
        return float(value)

    return check


def flag(value: Any, where: str) -> bool:
    """True or false, also as 1 or 0."""
    if value not in (True, False):
        raise wrong(where, "true or false", value)
    return bool(value)


def text(most: int = 2**20) -> Schema:
    """Text that can be written as UTF-8."""

    def check(value: Any, where: str) -> str:
        if not isinstance(value, str) or len(value) > most or not _encodes(value):
            raise wrong(where, f"text of at most {most} characters", value)
        return value

    return check


def _encodes(value: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in value)


def list_of(item: Schema, most: int = 2**26) -> Schema:
    """A list, each entry checked."""

    def check(value: Any, where: str) -> list[Any]:
        if not isinstance(value, list | tuple) or len(value) > most:
            raise wrong(where, f"a list of at most {most} entries", value)
        return [item(entry, f"{where}[{place}]") for place, entry in enumerate(value)]

    return check


def optional(schema: Schema, otherwise: Any = None) -> Schema:
    """A value that may be absent or null, which means ``otherwise``."""
    return lambda value, where: otherwise if value is None else schema(value, where)


def one_of(*schemas: Schema) -> Schema:
    """The first schema that fits; the error is the last one's."""

    def check(value: Any, where: str) -> Any:
        for schema in schemas[:-1]:
            try:
                return schema(value, where)
            except ConfigError:
                continue
        return schemas[-1](value, where)

    return check


def mapping(values: Any, where: str) -> dict[str, Any]:
    """An object, its values unchecked."""
    if not isinstance(values, Mapping) or not all(isinstance(key, str) for key in values):
        raise wrong(where, "an object with named fields", values)
    return dict(values)


def record(**fields: Schema) -> Schema:
    """An object with these fields; an absent one is null, others are left as they are."""

    def check(value: Any, where: str) -> dict[str, Any]:
        values = mapping(value, where)
        checked = {
            name: schema(values.get(name), f"{where}: {name}") for name, schema in fields.items()
        }
        return values | checked

    return check


def anything(value: Any, where: str) -> Any:
    """A value that is checked elsewhere."""
    return value
