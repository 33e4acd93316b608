"""Options of launchers as texts, and what launchers of extra packages share."""

import dataclasses
import importlib
import os
import sys
from collections.abc import Mapping
from typing import Any, TypeVar

from moe_lab.config import Config
from moe_lab.errors import ConfigError, RunError, expected, require

Options = TypeVar("Options", bound=Config)


def import_path() -> str:
    """This process's own import path, so that a worker finds what the driver found (a trainer in a
    script's folder, say).
    """
    return os.pathsep.join(path or os.getcwd() for path in sys.path)


def read_options(kind: type[Options], options: Mapping[str, str]) -> Options:
    """A launcher's options from ``key=value`` texts.

    Raises ``ConfigError`` for one that it has not or cannot read.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    values: dict[str, Any] = dict(options)
    for key in options:
        what = f"a launcher option among {', '.join(defaults)}"
        require(key in defaults, what, repr(key), field=key)
    for key in set(options) & set(defaults):
        if not isinstance(defaults[key], str):
            try:
                values[key] = type(defaults[key])(options[key])
            except ValueError:
                raise ConfigError(
                    expected(f"the launcher option {key} as a number", repr(options[key])),
                    field=key,
                ) from None
    return kind.from_dict(values)


def extra(module: str, name: str) -> Any:
    """A module of the optional extra ``name``. Raises ``RunError`` where it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise RunError(
            expected(
                f"the package {module.partition('.')[0]}", "none", f"pip install 'moe_lab[{name}]'"
            )
        ) from error


def last_line(error: BaseException | str) -> str:
    """The last line of an error's text: cluster libraries put the cause there."""
    name = error if isinstance(error, str) else type(error).__name__
    return next(
        (line.strip() for line in reversed(str(error).strip().splitlines()) if line.strip()), name
    )
