"""From a Hugging Face configuration to the layers of its architecture and its fields."""

from collections.abc import Mapping
from typing import Any

from moe_lab.accounting.architecture import Architecture
from moe_lab.accounting.families import ARCHITECTURES
from moe_lab.hf.architectures import row_name
from moe_lab.hf.configuration import text_fields, unknown_type
from moe_lab.hf.fields import Fields


def resolve(config: Any, edits: Mapping[str, Any]) -> tuple[Architecture, Fields]:
    """The architecture of a configuration and its fields, with ``edits`` in place of what they name
    (under any alias).

    Raises ``ConfigError`` naming ``model_type`` where it is not known.
    """
    fields = text_fields(config, edits)
    layers = ARCHITECTURES.get(row_name(fields.family))
    if layers is None:
        raise unknown_type(fields.family)
    fields.defaults = {**fields.defaults, **layers.defaults}
    return layers, fields
