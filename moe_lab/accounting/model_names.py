"""The configuration behind a name: a published MoE model of ``models.json``, a dense one of
``dense_models.json``, or one of the minis.

``models.json`` holds facts only: configuration, published figures, date, and where each comes from.
The dense models are there to compare with.
"""

import json
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from moe_lab.errors import ConfigError, expected
from moe_lab.model.minis import MINIS, mini_config


@cache
def facts() -> tuple[dict[str, Any], ...]:
    """The entries of ``models.json``, unchanged."""
    return _entries("models.json")


@cache
def dense_facts() -> tuple[dict[str, Any], ...]:
    """The entries of ``dense_models.json``: name, config, published total, parameters, source."""
    return _entries("dense_models.json")


def _entries(name: str) -> tuple[dict[str, Any], ...]:
    text = files("moe_lab.accounting").joinpath(name).read_text(encoding="utf-8")
    return tuple(json.loads(text))


def find_model(name: str) -> dict[str, Any] | None:
    """The entry of an MoE or dense model by its identifier, or by the part after the slash; letter
    case does not matter.
    """
    wanted = name.lower()
    for entry in (*facts(), *dense_facts()):
        known = entry["name"].lower()
        if wanted in (known, known.partition("/")[2]):
            return entry
    return None


def named_config(name: str) -> Any:
    """The configuration of a name: the path itself if there is such a file or folder, else that of
    a mini or a published model. Nothing is downloaded.

    Raises ``ConfigError`` for another name, with the nearest ones.
    """
    if Path(name).exists():
        return Path(name)
    if name in MINIS:
        return mini_config(name)
    entry = find_model(name)
    if entry is not None:
        return entry["config"]
    known = [one["name"] for one in (*facts(), *dense_facts())]
    short = {one.partition("/")[2].lower(): one for one in known} | {mini: mini for mini in MINIS}
    wanted = name.partition("/")[2].lower() or name.lower()
    near = [short[match] for match in get_close_matches(wanted, short, n=4, cutoff=0.4)]
    hint = f"one of {', '.join(near)}" if near else "moe-lab count, which lists the known models"
    raise ConfigError(
        expected("a published model or a path to a config.json", repr(name), hint), field="name"
    )
