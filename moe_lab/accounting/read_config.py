"""From a configuration to the row of its architecture and its fields: Hugging Face's by
``moe_lab.hf``, this library's own by the shape of their fields.
"""

from collections.abc import Mapping
from typing import Any

from moe_lab.accounting.architecture import Architecture
from moe_lab.accounting.families import ARCHITECTURES
from moe_lab.hf import architectures as hf
from moe_lab.hf.configuration import edited, language_model, model_type, plain, unknown_type
from moe_lab.hf.fields import Fields


def own_name(values: Mapping[str, Any]) -> str:
    """The row of this library's own configurations: "moe_lab" for a decoder, "moe_lab_layer" for
    one MoE layer, else "".
    """
    if "moe" in values and "context_length" in values:
        return "moe_lab"
    return "moe_lab_layer" if {"d_model", "d_expert", "router"} <= values.keys() else ""


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
        name = model_type(values)
    row, layers = hf.find(name), ARCHITECTURES.get(hf.row_name(name))
    if layers is None:
        raise unknown_type(name, *ARCHITECTURES)
    values = layers.prepare(values) if row is None else row.prepare(values)
    defaults = {**({} if row is None else row.defaults), **layers.defaults}
    return layers, Fields(edited(values, edits or {}), name, defaults)
