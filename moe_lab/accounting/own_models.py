"""Counts of this library's own models: the sum of what their configurations say that they cost
(``DecoderConfig.layers_of_pieces``, ``MoEConfig.pieces``).
"""

import copy
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from moe_lab.accounting.architecture import Layer
from moe_lab.config import require
from moe_lab.errors import ConfigError, expected
from moe_lab.hf.fields import MOST, canonical
from moe_lab.model.config import DecoderConfig, MoEConfig

OwnConfig = DecoderConfig | MoEConfig

_LATENT, _SPARSE, _NGRAM = "latent_attention", "sparse_attention", "ngram"
_ROUTER = (
    *("kind", "num_experts", "router_bias", "min_slots", "max_slots", "capacity_factor"),
    *("zero_expert_kinds", "num_shared_gates", "d_router"),
)
_DECODER = ("vocab_size", "head_dim", "context_length", "num_dense_layers", "num_hash_layers")

FIELDS: dict[str, str] = {
    **{name: name for name in (*_DECODER, "wiring", "qk_norm", "amplification")},
    "hidden_size": "d_model",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "tie_word_embeddings": "tie_embeddings",
    "intermediate_size": "d_dense",
    "q_lora_rank": f"{_LATENT}.q_rank",
    "kv_lora_rank": f"{_LATENT}.kv_rank",
    "qk_nope_head_dim": f"{_LATENT}.nope_dim",
    "qk_rope_head_dim": f"{_LATENT}.rope_dim",
    "v_head_dim": f"{_LATENT}.value_dim",
    "index_topk": f"{_SPARSE}.top_k",
    "index_n_heads": f"{_SPARSE}.num_heads",
    "index_head_dim": f"{_SPARSE}.head_dim",
    "index_share": f"{_SPARSE}.share",
    "ngram_max_n": f"{_NGRAM}.max_n",
    "ngram_splits": f"{_NGRAM}.num_splits",
    "ngram_ratio": f"{_NGRAM}.table_ratio",
    "ngram_layers": f"{_NGRAM}.layers",
    "num_nextn_predict_layers": "mtp.num_modules",
    "mtp_intermediate_size": "mtp.d_hidden",
    "moe_intermediate_size": "moe.d_expert",
    "n_shared_experts": "moe.num_shared_experts",
    "routed_expert_hidden_size": "moe.d_latent",
    "zero_expert_num": "moe.router.num_zero_experts",
    "num_experts_per_tok": "moe.router.top_k",
    "target_ffn_count": "moe.router.controller.target_ffn_count",
    "expected_ffn_experts_K_e": "moe.router.controller.target_ffn_count",
    **{name: f"moe.router.{name}" for name in _ROUTER},
}
"""Hugging Face name of a field that a count depends on -> where it stands in a
``DecoderConfig``. A ``MoEConfig`` is its ``moe`` part.
"""


def own_config(config: Any) -> OwnConfig | Mapping[str, Any] | None:
    """The decoder or layer that ``config`` is or holds, as a configuration or as its plain values;
    None for other models'.
    """
    if isinstance(config, OwnConfig):
        return config
    model = config.get("model") if isinstance(config, Mapping) else getattr(config, "model", None)
    if isinstance(model, OwnConfig) or is_decoder(model):
        return model
    return config if is_decoder(config) or is_layer(config) else None


def is_decoder(values: Any) -> bool:
    return isinstance(values, Mapping) and "moe" in values and "context_length" in values


def is_layer(values: Any) -> bool:
    return isinstance(values, Mapping) and {"d_model", "d_expert", "router"} <= values.keys()


def read_own(config: OwnConfig | Mapping[str, Any], edits: Mapping[str, Any]) -> OwnConfig:
    """The configuration with ``edits`` in place of what they name.

    Raises ``ConfigError`` for values that make no model, and for edits that no count depends on.
    """
    if isinstance(config, OwnConfig):
        if not edits:
            return config
        config = config.to_dict()
    layer = not is_decoder(config)
    values: dict[str, Any] = {"moe": config} if layer else dict(config)
    values = copy.deepcopy(values)
    for name, value in edits.items():
        _edit(values, name, value, "moe_lab_layer" if layer else "moe_lab")
    own: OwnConfig = (
        MoEConfig.from_dict(values["moe"]) if layer else DecoderConfig.from_dict(values)
    )
    return own


def _edit(values: dict[str, Any], name: str, value: Any, family: str) -> None:
    path = name if name in FIELDS.values() else FIELDS.get(canonical(name), "")
    *parents, leaf = path.split(".")
    inner: Any = values
    for parent in parents:
        inner = inner.get(parent) if isinstance(inner, Mapping) else None
    if not path or not isinstance(inner, dict):
        near = get_close_matches(name, [*FIELDS, *FIELDS.values()], n=3, cutoff=0.4)
        raise ConfigError(
            expected(f"a field that the count of {family} reads", name, ", ".join(near))
        )
    inner[leaf] = value
    if leaf == "d_model" and isinstance(values.get("moe"), dict):
        values["moe"][leaf] = value


def count_own(
    config: OwnConfig | Mapping[str, Any], edits: Mapping[str, Any]
) -> tuple[str, tuple[Layer, ...], tuple[str, ...], frozenset[str], int | None]:
    """The fields of the ``ParameterCount`` of one of our models: name, layers, assumptions, fields
    that it depends on, context length.

    Raises ``ConfigError`` as ``read_own``, and where there are more layers or zero-compute experts
    than can be made.
    """
    own = read_own(config, edits)
    moe = own if isinstance(own, MoEConfig) else own.moe
    zero = 0 if moe is None else moe.router.num_zero_experts
    require(zero <= 100 * MOST, f"num_zero_experts of at most {100 * MOST:,}", zero)
    sentence = "" if moe is None else moe.router.facts.assumes(moe.router)
    assumed, fields = (sentence,) if sentence else (), frozenset(FIELDS)
    if isinstance(own, MoEConfig):
        return "moe_lab_layer", (Layer(0, own.pieces()),), assumed, fields, None
    require(own.num_layers <= MOST, f"num_layers of at most {MOST:,}", own.num_layers)
    layers = tuple(Layer(number, pieces) for number, pieces in own.layers_of_pieces())
    return "moe_lab", layers, assumed, fields, own.context_length
