"""``moe-lab demo``: the demo preset of the sparsity-wall recipe, then its report."""

import argparse
from pathlib import Path

from moe_lab.commands import sweep
from moe_lab.commands.options import examples
from moe_lab.errors import RunError, expected


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = examples(
        "moe-lab demo",
        "moe-lab demo --workers 2 --out runs/demo",
    )
    sweep.add_run_arguments(parser, out="runs/demo")


def main(args: argparse.Namespace) -> int:
    args.recipe, args.preset = demo_recipe(), "demo"
    return sweep.run(args)


def demo_recipe() -> Path:
    """The demo's recipe: in a clone's ``experiments/``, or carried in the installed package."""
    package = Path(__file__).resolve().parents[1]
    for candidate in (
        package.parent / "experiments" / "sparsity_wall.py",
        package / "recipes" / "sparsity_wall.py",
    ):
        if candidate.exists():
            return candidate
    what = "experiments/sparsity_wall.py beside the package"
    raise RunError(expected(what, "none", "running from a clone of the project"))
