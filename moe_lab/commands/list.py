"""``moe-lab list KIND``: the names that other commands take, each with what it is."""

import argparse
import inspect
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from moe_lab.commands.options import add_json, examples, print_json
from moe_lab.errors import require
from moe_lab.number_format import count_of
from moe_lab.terminal import print_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = examples(
        "moe-lab list routers",
        "moe-lab list laws --json",
        "moe-lab list presets experiments/router_shootout.py",
    )
    parser.add_argument("kind", choices=KINDS, help="what to list")
    parser.add_argument(
        "recipe",
        nargs="?",
        type=Path,
        help="of presets: the recipe that has them (default: that of moe-lab demo)",
    )
    add_json(parser)


def main(args: argparse.Namespace) -> int:
    require(args.recipe is None or args.kind == "presets", "a recipe of presets", args.recipe)
    rows = dict(_presets(args.recipe) if args.kind == "presets" else KINDS[args.kind]())
    if args.json:
        print_json(rows)
    else:
        print_table((args.kind, "what it is"), rows.items())
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
    from moe_lab.scaling.laws import LAW_ALIASES, LAWS

    yield from ((name, f"{law.title} ({law.source})") for name, law in LAWS.items())
    yield from ((alias, f"another name of {name}") for alias, name in LAW_ALIASES.items())


def _models() -> Iterable[tuple[str, str]]:
    from moe_lab.accounting.model_names import dense_facts, facts

    yield from ((entry["name"], entry["date"]) for entry in facts())
    yield from ((entry["name"], "dense") for entry in dense_facts())


def _minis() -> Iterable[tuple[str, str]]:
    from moe_lab.model.minis import MINIS, find_mini

    return ((name, f"{find_mini(name).original} in small") for name in MINIS)


def _presets(recipe: Path | None = None) -> Iterable[tuple[str, str]]:
    from moe_lab.commands.demo import demo_recipe
    from moe_lab.sweeps.recipe import load_recipe, presets

    path = recipe or demo_recipe()
    for name in presets(path):
        yield name, count_of(len(load_recipe(path, name).runs), "run")


KINDS: dict[str, Callable[[], Iterable[tuple[str, str]]]] = {
    "routers": _routers,
    "losses": _losses,
    "controllers": _controllers,
    "backends": _backends,
    "laws": _laws,
    "models": _models,
    "minis": _minis,
    "presets": _presets,
}
