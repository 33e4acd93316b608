"""``moe-lab doctor``: what this machine can do."""

import argparse
import importlib.metadata
import os
import platform
import shutil
from typing import Any

from moe_lab import __version__
from moe_lab.commands.options import add_json, examples, print_json
from moe_lab.versions import TESTED

EXTRAS = {
    "hf": ("transformers",),
    "ray": ("ray",),
    "slurm": ("submitit",),
    "store": ("fsspec",),
    "gpu": ("liger-kernel", "quack-kernels"),
    "figures": ("kaleido",),
    "lexers": ("pygments",),
    "track": ("tensorboard", "wandb", "trackio"),
    "notebooks": ("jupytext", "ipykernel", "nbclient"),
}
BASE = (
    "torch",
    "numpy",
    "scipy",
    "polars",
    "plotly",
    "jinja2",
    "tokenizers",
    "safetensors",
    "rich",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = examples(
        "moe-lab doctor",
        "moe-lab doctor --json",
    )
    add_json(parser)


def main(args: argparse.Namespace) -> int:
    findings = diagnose()
    if args.json:
        print_json(findings)
        return 0
    print(f"moe_lab {findings['moe_lab']}   Python {findings['python']}   {findings['platform']}")
    print(
        "packages   "
        + "  ".join(
            f"{name} {version or 'MISSING'}" for name, version in findings["packages"].items()
        )
    )
    print(
        "tested     "
        + "  ".join(
            f"{name} {low}" + (f" to {high}" if high != low else "")
            for name, (low, high) in findings["tested"].items()
        )
    )
    for extra, present in findings["extras"].items():
        found = "  ".join(
            f"{name} {version}" if version else f"{name} missing"
            for name, version in present.items()
        )
        print(f"extra      {extra:10} {found}")
    print(f"device     {findings['device']}")
    print(f"cores      {findings['cores']}")
    print(f"experts    {findings['experts']}")
    print(
        "browser    "
        f"{findings['browser'] or 'none found (page tests and static figures need chromium)'}"
    )
    print(f"corpus     {findings['corpus']}")
    return 0


def diagnose() -> dict[str, Any]:
    """Everything that ``doctor`` prints, as plain values."""
    return {
        "moe_lab": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
        "packages": {name: _version(name) for name in BASE},
        "tested": TESTED,
        "extras": {
            extra: {name: _version(name) for name in names} for extra, names in EXTRAS.items()
        },
        "device": _device(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "experts": _experts(),
        "browser": shutil.which("chromium")
        or shutil.which("chromium-browser")
        or shutil.which("google-chrome"),
        "corpus": _corpus(),
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _device() -> str:
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    return ", ".join(
        f"cuda:{index} {torch.cuda.get_device_name(index)}"
        for index in range(torch.cuda.device_count())
    )


def _experts() -> str:
    """Which dispatch backend the CPU gets, and why it is not the compiled one."""
    from moe_lab.model.dispatch import native

    return (
        "compiled (dispatch native)"
        if native.available()
        else f"not compiled (dispatch cpu, slower): {native.problem()}"
    )


def _corpus() -> str:
    from moe_lab.errors import CorpusError
    from moe_lab.text import load_corpus

    try:
        corpus = load_corpus("stdlib")
    except CorpusError as error:
        return f"none: {error}"
    megabytes = sum(len(document.text) for document in corpus.documents) / 1e6
    size = f"{len(corpus.documents)} documents, {megabytes:.1f} M characters"
    return f"stdlib: {size}, hash {corpus.hash[:12]}"
