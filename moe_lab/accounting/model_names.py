"""The configuration behind a name: a published model of ``models.json``, or one of the minis.

``models.json`` holds facts only: configuration, published figures, date, and where each comes from.
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
    text = files("moe_lab.accounting").joinpath("models.json").read_text(encoding="utf-8")
    return tuple(json.loads(text))


def find_model(name: str) -> dict[str, Any] | None:
    """The entry of a model by its identifier, or by the part after the slash; letter case does not
    matter.
    """
    wanted = name.lower()
    for entry in facts():
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
    short = {one["name"].partition("/")[2].lower(): one["name"] for one in facts()} | {
        mini: mini for mini in MINIS
    }
    wanted = name.partition("/")[2].lower() or name.lower()
    near = [short[match] for match in get_close_matches(wanted, short, n=4, cutoff=0.4)]
    hint = f"one of {', '.join(near)}" if near else "moe-lab count, which lists the known models"
    raise ConfigError(
        expected("a published model or a path to a config.json", repr(name), hint), field="name"
    )
