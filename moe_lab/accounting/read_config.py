"""From whatever names a model to plain values: a dictionary, a ``config.json``, a folder with one,
or an object with ``to_dict``.
"""

import json
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from moe_lab.accounting.architecture import Architecture
from moe_lab.accounting.architectures import ARCHITECTURES, SAME_AS, find
from moe_lab.errors import ConfigError, expected
from moe_lab.hf.fields import MOST, Fields, canonical, names_of

TEXT_PARTS = (
    "text_config",
    "llm_config",
    "language_config",
    "thinker_config",
    "language_model_config",
)
"""Where multimodal configurations keep their language model.

An empty one means that the sizes stand beside it.
"""

TIES_ITSELF = frozenset({"llama4_text"})
"""Text parts that are causal models of their own: their own ``tie_word_embeddings`` counts, not the
whole model's.
"""


def plain(config: Any) -> dict[str, Any]:
    """The configuration as a dictionary, with run-length encoded lists written out.

    Raises ``ConfigError`` for anything unreadable.
    """
    if isinstance(config, str | Path):
        config = _read(Path(config))
    elif not isinstance(config, Mapping) and callable(getattr(config, "to_dict", None)):
        config = config.to_dict()
    if not isinstance(config, Mapping):
        what = "a configuration as a dictionary, a path to config.json, or an object with to_dict()"
        raise ConfigError(expected(what, type(config).__name__))
    return {str(key): _expand(value) for key, value in config.items()}


def _read(path: Path) -> Any:
    file = path / "config.json" if path.is_dir() else path
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not text"
        raise ConfigError(
            expected("a readable config.json", f"{file} ({why})", "its path or its folder")
        ) from None
    except json.JSONDecodeError as error:
        raise ConfigError(
            expected(f"JSON in {file}", f"an error in line {error.lineno}: {error.msg}")
        ) from None


def _expand(value: Any) -> Any:
    """``{"len": 3, "rle": [["a", 2], ["b", 1]]}`` is the list a, a, b."""
    if not isinstance(value, Mapping) or set(value) != {"len", "rle"}:
        return value
    try:
        runs = [(item, int(count)) for item, count in value["rle"]]
    except (TypeError, ValueError):
        runs = []
    if sum(count for _, count in runs) != value["len"] or not value["len"] <= MOST:
        raise ConfigError(
            expected(
                'a run-length encoded list {"len": n, "rle": [[value, times], ...]} of n entries',
                repr(value)[:60],
            )
        )
    return [item for item, count in runs for _ in range(count)]


def own_name(values: Mapping[str, Any]) -> str:
    """The row of this library's own configurations: "moe_lab" for a decoder, "moe_lab_layer" for
    one MoE layer, else "".
    """
    if "moe" in values and "context_length" in values:
        return "moe_lab"
    return "moe_lab_layer" if {"d_model", "d_expert", "router"} <= values.keys() else ""


def language_model(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The text part of a multimodal configuration, which ties its embeddings as the whole model
    says.
    """
    for name in TEXT_PARTS:
        inner = values.get(name)
        if callable(getattr(inner, "to_dict", None)):
            inner = inner.to_dict()  # type: ignore[union-attr]
        if isinstance(inner, Mapping) and inner:
            decides = (
                values.get("tie_word_embeddings") is not None
                and inner.get("model_type") not in TIES_ITSELF
            )
            outer = {"tie_word_embeddings": values["tie_word_embeddings"]} if decides else {}
            if "model_type" not in inner and "model_type" in values:
                outer["model_type"] = values["model_type"]
            return language_model({**inner, **outer})
    return values


def resolve(config: Any, edits: Mapping[str, Any] | None = None) -> tuple[Architecture, Fields]:
    """The architecture of a configuration and its fields, with ``edits`` in place of what they name
    (under any alias).

    Raises ``ConfigError`` naming ``model_type`` where it is not known.
    """
    values: Mapping[str, Any] = plain(config)
    if isinstance(values.get("model"), Mapping) and own_name(values["model"]):
        values = values["model"]
    name = own_name(values)
    if not name:
        values = language_model(values)
        values = {key: _expand(value) for key, value in values.items()}
        name = model_type(values)
    architecture = find(name)
    if architecture is None:
        near = get_close_matches(name, [*ARCHITECTURES, *SAME_AS], n=3, cutoff=0.5)
        hint = f"one of {', '.join(near)}" if near else "one that docs/accounting.md lists"
        raise ConfigError(expected("a model_type with a known architecture", repr(name), hint))
    return architecture, Fields(
        edited(architecture.prepare(values), edits or {}), name, architecture.defaults
    )


def edited(values: Mapping[str, Any], edits: Mapping[str, Any]) -> Mapping[str, Any]:
    """``values`` with each edit in the place of every name that its field has."""
    replaced = {name for field in edits for name in names_of(canonical(field))}
    return {**{name: value for name, value in values.items() if name not in replaced}, **edits}


def model_type(values: Mapping[str, Any]) -> str:
    """``model_type``, or what the class name in ``architectures`` says."""
    given = values.get("model_type")
    if given:
        return str(given)
    for class_name in values.get("architectures") or ():
        stem = (
            str(class_name)
            .removesuffix("ForCausalLM")
            .removesuffix("ForConditionalGeneration")
            .lower()
        )
        for name in (*ARCHITECTURES, *SAME_AS):
            if stem == name.replace("_", "").replace("-", ""):
                return name
    raise ConfigError(
        expected("a field model_type in the configuration", "none", "adding it, such as qwen3_moe")
    )
