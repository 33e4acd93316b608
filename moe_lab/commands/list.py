"""``moe-lab list KIND``: the names that other commands take, each with what it is."""

import argparse
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from moe_lab.commands.options import add_json, print_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("kind", choices=KINDS, help="what to list")
    add_json(parser)


def main(args: argparse.Namespace) -> int:
    rows = dict(KINDS[args.kind]())
    if args.json:
        print_json(rows)
    else:
        width = max(map(len, rows), default=0)
        print("\n".join(f"{name:{width}}  {text}".rstrip() for name, text in rows.items()))
    return 0


def _summaries(values: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """Name -> the first paragraph of its own docstring, or of its file where it has none."""
    for name in sorted(values):
        value = values[name]
        text = vars(value).get("__doc__") if isinstance(value, type) else value.__doc__
        text = text or inspect.getdoc(inspect.getmodule(value)) or ""
        yield name, " ".join(text.partition("\n\n")[0].split())


def _routers() -> Iterable[tuple[str, str]]:
    from moe_lab.routing import ROUTERS

    return _summaries(ROUTERS)


def _losses() -> Iterable[tuple[str, str]]:
    from moe_lab.routing.losses import LOSSES

    return _summaries(LOSSES)


def _controllers() -> Iterable[tuple[str, str]]:
    from moe_lab.routing import CONTROLLERS

    return _summaries(CONTROLLERS)


def _backends() -> Iterable[tuple[str, str]]:
    from moe_lab.model.dispatch import BACKENDS

    return ((name, "") for name in sorted(BACKENDS))


def _laws() -> Iterable[tuple[str, str]]:
    from moe_lab.scaling import LAWS

    return ((name, f"{law.title} ({law.source})") for name, law in LAWS.items())


def _models() -> Iterable[tuple[str, str]]:
    from moe_lab.accounting.model_names import dense_facts, facts

    yield from ((entry["name"], entry["date"]) for entry in facts())
    yield from ((entry["name"], "dense") for entry in dense_facts())


def _minis() -> Iterable[tuple[str, str]]:
    from moe_lab.model.minis import MINIS, find_mini

    return ((name, f"{find_mini(name).original} in small") for name in MINIS)


KINDS: dict[str, Callable[[], Iterable[tuple[str, str]]]] = {
    "routers": _routers,
    "losses": _losses,
    "controllers": _controllers,
    "backends": _backends,
    "laws": _laws,
    "models": _models,
    "minis": _minis,
}
