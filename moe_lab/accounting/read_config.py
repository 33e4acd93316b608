"""From a Hugging Face configuration to the layers of its architecture and its fields."""

from collections.abc import Mapping
from typing import Any

from moe_lab.accounting.architecture import Architecture
from moe_lab.accounting.families import ARCHITECTURES
from moe_lab.hf import architectures as hf
from moe_lab.hf.configuration import edited, language_model, model_type, unknown_type
from moe_lab.hf.fields import Fields


def resolve(config: Mapping[str, Any], edits: Mapping[str, Any]) -> tuple[Architecture, Fields]:
    """The architecture of a configuration and its fields, with ``edits`` in place of what they name
    (under any alias).

    Raises ``ConfigError`` naming ``model_type`` where it is not known.
    """
    values = language_model(config)
    name = model_type(values)
    row, layers = hf.find(name), ARCHITECTURES.get(hf.row_name(name))
    if layers is None:
        raise unknown_type(name, *ARCHITECTURES)
    values = layers.prepare(values) if row is None else row.prepare(values)
    defaults = {**({} if row is None else row.defaults), **layers.defaults}
    return layers, Fields(edited(values, edits), name, defaults)
