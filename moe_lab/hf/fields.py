"""``Fields``: a configuration read by name, with every alias accepted, every default noted and
every gap an error that names the field.

A field is asked for by its most common Hugging Face name. A value that is absent comes from the
architecture's own defaults and is then written to ``assumed``; where the architecture has none, a
``ConfigError`` names the field. ``Fields.at(layer)`` is the same configuration as one layer sees
it: ``per_layer_config`` overrides and lists with one value per layer are resolved. A view remembers
on which of its layer's own values it was asked for, so that layers that agree in these are counted
once (``Fields.holds``).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from reprlib import repr as short
from typing import Any

from moe_lab.errors import ConfigError, expected, require

ALIASES: dict[str, tuple[str, ...]] = {
    "hidden_size": ("d_model", "n_embd"),
    "num_hidden_layers": ("num_layers", "n_layers", "n_layer"),
    "num_attention_heads": ("n_heads", "num_heads", "n_head"),
    "num_key_value_heads": ("kv_n_heads", "num_attention_groups", "num_kv_heads"),
    "head_dim": ("attention_head_dim", "kv_channels", "d_kv"),
    "intermediate_size": ("ffn_hidden_size",),
    "moe_intermediate_size": ("expert_ffn_hidden_size", "d_expert"),
    "num_experts": ("n_routed_experts", "num_local_experts", "moe_num_experts"),
    "num_experts_per_tok": (
        "moe_topk",
        "moe_k",
        "moe_top_k",
        "num_experts_per_token",
        "top_k_experts",
    ),
    "n_shared_experts": ("num_shared_experts", "moe_num_shared_experts", "num_shared_expert"),
    "zero_expert_num": ("num_zero_experts",),
    "num_nextn_predict_layers": (
        "num_mtp_layers",
        "mtp_num_layers",
        "num_mtp_modules",
        "mtp_num_hidden_layers",
    ),
    "shared_expert_intermediate_size": (
        "moe_shared_expert_intermediate_size",
        "shared_intermediate_size",
        "share_expert_dim",
        "share_expert_dims",
    ),
    "tie_word_embeddings": ("tie_embedding", "tie_embeddings"),
    "layer_types": ("layers_block_type",),
    "sliding_window": ("sliding_window_size",),
    "routed_expert_hidden_size": ("moe_latent_size",),
    "routed_scaling_factor": ("router_scaling_factor", "route_scale"),
    "norm_topk_prob": ("moe_renormalize",),
    "n_group": ("num_expert_group",),
}
"""Canonical name -> the other names that public configurations give the same field."""

MOST = 10_000
"""The most layers, modules or tables of one model: they are made one by one, and an absurd number
must not fill the memory.
"""

LARGEST = 10**10
"""No size of a model is larger: its totals would overflow what tables hold."""

_MISSING = object()

Condition = tuple[str | Callable[["Fields"], Sequence[Any]], Any]
"""A field (or "overrides", or a rule) and its value in one layer."""


def names_of(name: str) -> tuple[str, ...]:
    return (name, *ALIASES.get(name, ()))


def canonical(name: str) -> str:
    """The name under which a field is known here: ``n_routed_experts`` -> ``num_experts``; an
    unknown name stays itself.
    """
    return next((field for field, aliases in ALIASES.items() if name in aliases), name)


class Fields:
    """Reads one configuration.

    Args:
        values: the configuration as plain values.
        family: the architecture's name, for messages.
        defaults: field -> value (or function of the ``Fields``) that the architecture takes where
            the configuration is silent.
    """

    def __init__(self, values: Mapping[str, Any], family: str, defaults: Mapping[str, Any]) -> None:
        self.values, self.family, self.defaults = dict(values), family, defaults
        self.assumed: dict[str, str] = {}
        self.read: set[str] = set()
        self.layer: int | None = None
        self.root = self
        self.conditions: list[Condition] = []
        self._found: dict[str, Any] = {}
        self._overrides = _overrides(values.get("per_layer_config"))
        self._layers: dict[int, Fields] = {}
        self._derived: dict[Any, Any] = {}

    def override(self, layers: Mapping[int, Mapping[str, Any]]) -> None:
        """Let layers have fields of their own, before any layer was looked at."""
        self._overrides.update({layer: dict(fields) for layer, fields in layers.items()})

    def at(self, layer: int) -> "Fields":
        """The configuration of one layer; ``assumed`` is shared."""
        if layer not in self._layers:
            view = Fields.__new__(Fields)
            view.__dict__.update(self.__dict__)
            view.layer, view.conditions = layer, [("overrides", self._overrides.get(layer))]
            if layer in self._overrides:
                view.values, view._found = {**self.values, **self._overrides[layer]}, {}
            self._layers[layer] = view
        return self._layers[layer]

    def find(self, name: str) -> Any:
        """The value under any of its names, None where absent. Two names with two values raise."""
        try:
            return self._found[name]
        except KeyError:
            value = self._found[name] = self._look_up(name)
            return value

    def _look_up(self, name: str) -> Any:
        self.read.add(name)
        found = [
            (alias, self.values[alias])
            for alias in names_of(name)
            if self.values.get(alias) is not None
        ]
        if not found:
            return None
        if any(value != found[0][1] for _, value in found[1:]):
            both = ", ".join(f"{alias}={value}" for alias, value in found)
            require(
                name in _FIRST_WINS,
                f"one value of {name} in the {self.family} configuration",
                both,
                "removing one of them",
            )
            self.note(name, f"{found[0][0]} = {found[0][1]} (the configuration has {both})")
        value = found[0][1]
        return list(value) if isinstance(value, tuple) else value

    def entry(self, name: str, value: Any) -> Any:
        """This layer's entry of ``value`` if it is a list with one value for each layer.

        Anything else is the same in all layers.
        """
        if self.layer is None or not isinstance(value, list):
            return value
        require(
            self.layer < len(value),
            f"{name} with one entry for each layer (at least {self.layer + 1})",
            f"{len(value)} entries",
        )
        self.conditions.append((name, value[self.layer]))
        return value[self.layer]

    def given(self, name: str) -> bool:
        """Whether the configuration has the field, null included."""
        return any(alias in self.values for alias in names_of(name))

    def get(self, name: str) -> Any:
        """The value, or the architecture's default (noted in ``assumed``), or a ``ConfigError``
        that names the field.
        """
        value = self.find(name)
        if value is not None:
            return value
        default = self.default(name)
        if default is _MISSING or default is None:
            raise self.missing(name)
        return default

    def default(self, name: str) -> Any:
        """The value that the architecture takes where the configuration does not state one.

        A rule notes for itself what it had to assume.
        """
        if name not in self.defaults:
            return _MISSING
        value = self.defaults[name]
        if isinstance(value, Callable):
            return value(self)
        self.assume(name, value)
        return value

    def assume(self, name: str, value: Any, why: str = "") -> None:
        """Record a default in ``assumed``."""
        self.assumed.setdefault(
            name,
            f"{name} = {value} (not in the configuration; "
            f"{why or f'the usual value of {self.family}'})",
        )

    def note(self, key: str, sentence: str) -> None:
        """Record any other assumption under ``key``."""
        self.assumed.setdefault(key, sentence)

    def missing(self, name: str) -> ConfigError:
        others = ALIASES.get(name, ())
        hint = f"adding it (also read as {', '.join(others)})" if others else "adding it"
        what = f"a field {name} in the {self.family} configuration"
        return ConfigError(expected(what, "none", hint), name)

    def nullable(self, name: str) -> Any:
        """A field that may be null, which means that there is none. An absent field takes the
        default, or raises.
        """
        value = self.find(name)
        if value is None and not self.given(name):
            value = self.default(name)
            if value is _MISSING:
                raise self.missing(name)
        return value

    def optional(self, name: str, otherwise: Any = None) -> Any:
        """The value of a field that may be absent; then ``otherwise``."""
        value = self.find(name)
        return otherwise if value is None else value

    def size(self, name: str, least: int = 1, most: int = LARGEST) -> int:
        """A whole number; a list is resolved to this layer's entry."""
        return self.check_size(name, self.entry(name, self.get(name)), least, most)

    def check_size(self, name: str, value: Any, least: int = 1, most: int = LARGEST) -> int:
        if type(value) is float and value.is_integer():
            value = int(value)
        if type(value) is not int or value < least:
            what = f"{name} as a whole number of at least {least}"
            raise ConfigError(expected(what, short(value)), field=name)
        require(value <= most, f"{name} of at most {most:,}", short(value))
        return value

    def size_or(self, name: str, otherwise: int, least: int = 0, most: int = LARGEST) -> int:
        """A whole number that may be absent; then ``otherwise``."""
        value = self.find(name)
        return (
            otherwise
            if value is None
            else self.check_size(name, self.entry(name, value), least, most)
        )

    def truth(self, name: str, otherwise: bool = False) -> bool:
        """A boolean that may be absent; then ``otherwise``."""
        return otherwise if self.find(name) is None else self.flag(name)

    def table(self, name: str) -> Mapping[str, Any]:
        """A nested configuration; absent, an empty one."""
        return nested(self.values, name) if self.find(name) is not None else {}

    def numbers(self, name: str, otherwise: Sequence[int] = ()) -> Sequence[int]:
        """A list of whole numbers; absent, ``otherwise``."""
        value = self.find(name)
        if value is None:
            return self.default(name) if name in self.defaults else otherwise
        if not isinstance(value, list) or not all(type(number) is int for number in value):
            raise ConfigError(expected(f"{name} as a list of whole numbers", short(value)))
        return value

    def text(self, name: str) -> str:
        value = self.get(name)
        if not isinstance(value, str):
            raise ConfigError(expected(f"{name} as text", short(value)))
        return value

    def flag(self, name: str) -> bool:
        """A boolean.

        Only true and false: a word that describes the bias says nothing about its size.
        """
        value = self.get(name)
        if not isinstance(value, bool | int):
            raise ConfigError(
                expected(
                    f"{name} as true or false in the {self.family} configuration", short(value)
                )
            )
        return bool(value)

    def number(self, name: str) -> float:
        """A number, also as the first word of a text such as "8 (assumed)"."""
        value = self.get(name)
        if isinstance(value, str) and (match := re.match(r"\s*\d+(\.\d+)?", value)):
            return float(match.group())
        numeric = isinstance(value, int | float)
        if not numeric or isinstance(value, bool) or not abs(value) <= LARGEST:
            raise ConfigError(expected(f"{name} as a number up to {LARGEST:,}", short(value)))
        return float(value)

    @property
    def num_layers(self) -> int:
        return self.size("num_hidden_layers", most=MOST)

    def per_layer(self, name: str) -> list[Any]:
        """A list with one entry per layer; entries beyond the last layer may describe MTP modules
        and are left out.
        """
        value, layers = self.get(name), self.num_layers
        extra = self.size_or("num_nextn_predict_layers", 0)
        if not isinstance(value, list | tuple) or not layers <= len(value) <= layers + extra:
            size = len(value) if isinstance(value, list | tuple) else short(value)
            raise ConfigError(
                expected(
                    f"{name} with num_hidden_layers = {layers} entries",
                    size,
                    "changing both together",
                )
            )
        return list(value[:layers])

    def once(self, rule: Callable[["Fields"], Any]) -> Any:
        """The result of ``rule`` for the whole configuration, computed once for all layers."""
        if rule not in self._derived:
            self._derived[rule] = rule(self.root)
        return self._derived[rule]

    def mark(self, rule: Callable[["Fields"], Sequence[Any]]) -> Any:
        """This layer's entry of the list that ``rule`` makes of the whole configuration."""
        assert self.layer is not None
        value = self.once(rule)[self.layer]
        self.conditions.append((rule, value))
        return value

    def holds(self, layer: int, conditions: Sequence[Condition]) -> bool:
        """Whether ``layer`` has the values that ``conditions`` recorded of another layer."""
        return all(self._seen(layer, key) == value for key, value in conditions)

    def _seen(self, layer: int, key: str | Callable[["Fields"], Sequence[Any]]) -> Any:
        if key == "overrides":
            return self._overrides.get(layer)
        values = self.find(key) if isinstance(key, str) else self.once(key)
        return values[layer] if layer < len(values) else None


def nested(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A configuration inside ``values``; absent or null, an empty one."""
    value = values.get(name)
    if value is not None and not isinstance(value, Mapping):
        raise ConfigError(expected(f"{name} as a nested configuration", short(value)))
    return value or {}


def _overrides(config: Any) -> dict[int, dict[str, Any]]:
    """``per_layer_config``: layer -> the fields that are different there.

    A layer that skips a module has no closed form here.
    """
    try:
        read = {int(layer): dict(fields) for layer, fields in (config or {}).items()}
    except (AttributeError, TypeError, ValueError):
        raise ConfigError(expected("per_layer_config as layer -> fields", short(config))) from None
    for layer, fields in read.items():
        require(
            not fields.get("skip"),
            "per_layer_config without skip",
            f"skip = {fields.get('skip')} in layer {layer}",
        )
    return read


_FIRST_WINS = frozenset({"num_nextn_predict_layers"})
"""Fields that public configurations are known to give twice, with different meanings."""
