"""``with_library_defaults``: fields that a configuration leaves out, from transformers' class of
its ``model_type``.
"""

from collections.abc import Mapping
from typing import Any

from moe_lab.errors import ConfigError, expected
from moe_lab.hf.configuration import language_model, plain
from moe_lab.hf.fields import canonical, names_of


def with_library_defaults(config: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """(the text part with what it left out filled in, field -> a sentence for each).

    Raises:
        ConfigError: transformers is not installed, or does not know the ``model_type``.
    """
    values = language_model(plain(config))
    name = str(values.get("model_type"))
    try:
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    except ImportError:
        got = "no transformers"
        raise ConfigError(expected("the extra hf for its defaults", got, "moe-lab[hf]")) from None
    if name not in CONFIG_MAPPING:
        raise ConfigError(expected("a model_type that transformers has", repr(name)))
    defaults: Mapping[str, Any] = CONFIG_MAPPING[name]().to_dict()
    filled, sentences = dict(values), {}
    for field, value in defaults.items():
        known = any(values.get(alias) is not None for alias in names_of(canonical(field)))
        if value is None or known or field == "model_type":
            continue
        filled[field] = value
        sentences[canonical(field)] = (
            f"{field} = {str(value)[:60]} (not in the configuration; the default of transformers)"
        )
    return filled, sentences
