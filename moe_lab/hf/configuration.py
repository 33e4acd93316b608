"""Read a model's configuration as ``Fields``: from a dictionary, a ``config.json``, a folder with
one, or an object with ``to_dict``; of multimodal models the text part.
"""

import re
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

from moe_lab.errors import ConfigError, expected, require
from moe_lab.hf.architectures import (
    ARCHITECTURES,
    NOT_COUNTED,
    SAME_AS,
    experts_and_slots,
    find,
    row_name,
    sparse,
    visits,
)
from moe_lab.hf.fields import MOST, Fields, canonical, names_of
from moe_lab.hf.gguf import gguf_config, read_gguf
from moe_lab.hf.native_names import from_native
from moe_lab.json_input import list_of, one_of, optional, read_json_file, record, text

TEXT_PARTS = (
    "text_config",
    "llm_config",
    "language_config",
    "thinker_config",
    "language_model_config",
)
"""Where multimodal configurations keep their language model.

An empty one means that the sizes are fields of the configuration that holds it.
"""

MOST_NESTED = 16

_NAMES = record(
    model_type=optional(text(200)),
    architectures=one_of(text(200), optional(list_of(text(200), 100))),
)

RECOGNISED_BY = {"moe_normalize_expert_weights": "dbrx_ffn"}
"""A field that only one model has -> its model type, for parts that state none."""

TIES_ITSELF = frozenset({"llama4_text"})
"""Text parts that are causal models of their own: their own ``tie_word_embeddings`` counts, not the
whole model's.
"""


class RouterSizes(NamedTuple):
    """What importing needs of a model: sizes of each router, numbers of the sparse layers, the
    number of all layers, and (of a model that runs some layers several times) the sparse layers in
    the order of their runs.
    """

    num_experts: int
    num_zero_experts: int
    top_k: int
    moe_layers: tuple[int, ...]
    num_layers: int
    visits: tuple[int, ...] = ()


def router_sizes(config: Any) -> RouterSizes:
    """Experts, slots and sparse layers of a model, from its configuration.

    Raises:
        ConfigError: an unknown model type, a missing field, a model without sparse layers.
    """
    f = text_fields(config)
    marks = sparse(f)
    chosen = tuple(layer for layer, mark in enumerate(marks) if mark)
    require(chosen, "a model with sparse layers", f"a dense {f.family}")
    row, view = find(f.family), f.at(chosen[0])
    assert row is not None
    experts, slots = experts_and_slots(view)
    order = tuple(layer for layer in visits(f) if marks[layer])
    return RouterSizes(experts, row.idle(view), slots, chosen, len(marks), order)


def text_fields(config: Any, edits: Mapping[str, Any] | None = None) -> Fields:
    """The fields of a model's text part, with the defaults of its model type.

    Args:
        edits: field -> value, in place of what the configuration says under any of its names.

    Raises:
        ConfigError: a configuration that cannot be read, or a ``model_type`` without a row.
    """
    values = language_model(plain(config))
    name, note = model_type(values)
    row = find(name)
    if row is None:
        raise unknown_type(name)
    fields = Fields(edited(row.prepare(values), edits or {}), name, row.defaults)
    if note:
        fields.note("model_type", note)
    return fields


def unknown_type(name: str) -> ConfigError:
    """The error for a model type that has no row: the reason if one is known, else the nearest
    names.
    """
    if reason := NOT_COUNTED.get(name.removesuffix("_text")):
        got = f"{name!r}: {reason}"
        return ConfigError(expected("a model_type with a known architecture", got))
    near = get_close_matches(name, [*ARCHITECTURES, *SAME_AS], n=3, cutoff=0.5)
    hint = f"one of {', '.join(near)}" if near else "one that docs/accounting.md lists"
    return ConfigError(expected("a model_type with a known architecture", repr(name), hint))


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
    values = {str(key): value for key, value in config.items()}
    if "general.architecture" in values:
        values = gguf_config(values)
    values = dict(from_native(values))
    _NAMES(values, "config")
    return {key: _expand(value) for key, value in values.items()}


def _read(path: Path) -> Any:
    """A configuration from a file (JSON, or the header of a GGUF file), or from the ``config.json``
    (else ``params.json``) of a folder.
    """
    if path.is_dir():
        own = path / "params.json"
        path = (
            own if own.is_file() and not (path / "config.json").exists() else path / "config.json"
        )
    if path.suffix == ".gguf":
        found = read_gguf(path)
        return gguf_config(found.metadata, found.tensors)
    return read_json_file(path, "config.json", unique_keys=False)


def _expand(value: Any) -> Any:
    """``{"len": 3, "rle": [["a", 2], ["b", 1]]}`` is the list a, a, b."""
    if not isinstance(value, Mapping) or len(value) != 2 or set(value) != {"len", "rle"}:
        return value
    try:
        runs = [(item, int(count)) for item, count in value["rle"]]
    except (TypeError, ValueError, OverflowError):
        runs = []
    length = value["len"]
    require(
        type(length) is int and sum(count for _, count in runs) == length and length <= MOST,
        'a run-length encoded list {"len": n, "rle": [[value, times], ...]} of n entries',
        repr(value)[:60],
    )
    return [item for item, count in runs for _ in range(count)]


def language_model(values: Mapping[str, Any], depth: int = 0) -> dict[str, Any]:
    """The text part of a multimodal configuration, which ties its embeddings as the whole model
    says; parts within parts are followed to ``MOST_NESTED``.
    """
    for name in TEXT_PARTS if depth < MOST_NESTED else ():
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
            return language_model({**inner, **outer}, depth + 1)
    return {key: _expand(value) for key, value in values.items()}


def edited(values: Mapping[str, Any], edits: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` with each edit applied under every name of its field."""
    replaced = {name for field in edits for name in names_of(canonical(field))}
    return {**{name: value for name, value in values.items() if name not in replaced}, **edits}


def model_type(values: Mapping[str, Any]) -> tuple[str, str]:
    """(model type, note): ``model_type`` where it is known, else what ``architectures`` says; the
    note is for a configuration that says two things.
    """
    given, classes = values.get("model_type") or "", values.get("architectures") or ()
    classes = [classes] if isinstance(classes, str) else list(classes)
    by_class = next((name for name in map(_of_class, classes) if name), "")
    if given and find(given) is not None:
        if not by_class or row_name(by_class) == row_name(given):
            return given, ""
        sentence = f"model_type = {given} decides, though architectures = {classes[0]} names"
        return given, f"{sentence} {by_class}, which may count otherwise"
    if by_class:
        note = f"{by_class}, by architectures = {classes[0]} (model_type = {given} is not known)"
        return by_class, note if given else ""
    name = given or next((name for field, name in RECOGNISED_BY.items() if field in values), "")
    require(name, "a field model_type in the configuration", "none", "adding it, such as qwen3_moe")
    return name, ""


def _of_class(class_name: str) -> str:
    """The model type of a class of transformers, or ""."""
    stem = class_name.removesuffix("ForCausalLM").removesuffix("ForConditionalGeneration").lower()
    names = (*ARCHITECTURES, *SAME_AS)
    return next((name for name in names if stem == re.sub("[_-]", "", name)), "")
