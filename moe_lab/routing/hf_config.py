"""``RouterConfig.from_hf``: the router of a Hugging Face model from its configuration
(``hf_weights`` copies its parameters).

One entry of ``FAMILIES`` says what the router of a ``model_type`` does; experts, slots and names of
fields come from ``moe_lab.hf``. Nothing is guessed: a missing value or an unknown model type is an
error. transformers itself is not imported.

What is reproduced is the router module. Beam, Laguna and MiniMax-M3 multiply by their scaling
factor after the experts, outside it.
"""

from collections.abc import Callable, Sequence
from typing import Any

from moe_lab.errors import ConfigError, expected, require
from moe_lab.hf.architectures import find, row_name
from moe_lab.hf.configuration import text_fields
from moe_lab.hf.fields import Fields
from moe_lab.json_input import Schema, flag, number, whole
from moe_lab.routing.config import (
    CapacityScope,
    GroupFill,
    GroupScore,
    RouterConfig,
    ScoreFunc,
    SecondPolicy,
    SelectOn,
)
from moe_lab.routing.controllers import ControllerConfig

SCORING = {"sigmoid": ScoreFunc.SIGMOID, "sqrtsoftplus": ScoreFunc.SQRT_SOFTPLUS}

Values = dict[str, Any]
Family = Callable[["Source"], Values]


_REQUIRED = object()


class Source:
    """The configuration of one layer; nothing that is missing is guessed."""

    def __init__(self, fields: Fields, layer: int | None) -> None:
        self.fields, self.layer = fields if layer is None else fields.at(layer), layer

    def get(self, name: str) -> Any:
        """A value under any of its names; ``ConfigError`` if it has none."""
        return self._of_layer(name, self.fields.get(name))

    def optional(self, name: str, otherwise: Any = None) -> Any:
        """A value whose absence is normal and means ``otherwise``."""
        return self._of_layer(name, self.fields.optional(name, otherwise))

    def _read(self, name: str, otherwise: Any, schema: Schema) -> Any:
        value = self.get(name) if otherwise is _REQUIRED else self.optional(name)
        if value is None and otherwise is _REQUIRED:
            raise self.fields.missing(name)
        return otherwise if value is None else schema(value, name)

    def whole(self, name: str, otherwise: Any = _REQUIRED) -> Any:
        return self._read(name, otherwise, whole())

    def number(self, name: str, otherwise: Any = _REQUIRED) -> Any:
        return self._read(name, otherwise, number())

    def flag(self, name: str, otherwise: Any = _REQUIRED) -> bool:
        return self._read(name, otherwise, flag)

    def _of_layer(self, name: str, value: Any) -> Any:
        if not isinstance(value, list) or not value:
            return value
        if self.layer is None and any(item != value[0] for item in value):
            raise ConfigError(
                expected(f"the layer whose {name} is wanted", None, "from_hf(config, layer=0)"),
                field=name,
            )
        return self.fields.entry(name, value) if self.layer is not None else value[0]


def _choice(source: Source, name: str, choices: Sequence[str]) -> str:
    value = source.get(name)
    require(value in choices, f"{name} among {', '.join(choices)}", repr(value)[:80])
    return value


def _softmax(norm: bool | None) -> Family:
    """``norm`` None: as the configuration's flag says."""
    return lambda source: {
        "kind": "softmax_topk",
        "norm_topk_prob": source.flag("norm_topk_prob") if norm is None else norm,
    }


def _selected_softmax(bias: bool = False, mean: bool = False) -> Family:
    return lambda source: {
        "kind": "topk_softmax",
        "router_bias": bias,
        "routed_scaling_factor": 1.0 / source.whole("num_experts_per_tok") if mean else 1.0,
    }


def _sigmoid(norm: bool | None, eps: float = 0.0, scale: bool = True, bias: bool = True) -> Family:
    def fields(source: Source) -> Values:
        normalise = source.flag("norm_topk_prob") if norm is None else norm
        return {
            "kind": "sigmoid_topk",
            "norm_topk_prob": normalise,
            "norm_eps": eps if normalise else None,
            "routed_scaling_factor": source.number("routed_scaling_factor") if scale else 1.0,
            "controller": ControllerConfig() if bias else None,
        }

    return fields


def _deepseek_v3(fill: GroupFill | None = None, scale: bool = True) -> Family:
    def fields(source: Source) -> Values:
        norm = source.flag("norm_topk_prob")
        return {
            "kind": "deepseek_v3",
            "norm_topk_prob": norm,
            "routed_scaling_factor": source.number("routed_scaling_factor") if scale else 1.0,
            "controller": ControllerConfig(),
            **_groups(source, fill),
        }

    return fields


def _groups(source: Source, fill: GroupFill | None = None) -> Values:
    """One group of all experts limits nothing, unless what is left out is filled with zeros."""
    groups = source.whole("n_group", 1)
    if groups == 1:
        return {}
    return {"num_groups": groups, "topk_groups": source.whole("topk_group"), "group_fill": fill}


def _deepseek_v2(source: Source) -> Values:
    limited = source.get("topk_method") == "group_limited_greedy"
    fields = {
        "kind": "deepseek_v2",
        "routed_scaling_factor": source.number("routed_scaling_factor"),
    }
    # The release fills with zeros and weighs with the filled scores; -inf selects the same experts.
    return fields | (_groups(source) if limited else {})


def _mistral(always_norm: bool) -> Family:
    def fields(source: Source) -> Values:
        norm = always_norm or source.flag("norm_topk_prob")
        return {
            "kind": "deepseek_v2",
            "norm_topk_prob": norm,
            "norm_eps": 1e-20 if norm else None,
            "routed_scaling_factor": source.number("routed_scaling_factor"),
            **({"group_score": GroupScore.BEST_TWO} if source.whole("n_group", 1) > 1 else {}),
            **_groups(source, GroupFill.ZERO),
        }

    return fields


def _scored(source: Source) -> Values:
    """DeepSeek-V4 and Inkling 2: the score function is named in the configuration; V4's first
    layers look their experts up.
    """
    name = _choice(source, "scoring_func", list(SCORING))
    fields: Values = {
        "routed_scaling_factor": source.number("routed_scaling_factor"),
        "norm_topk_prob": True,
        "norm_eps": 1e-20,
        "score_func": SCORING[name],
    }
    if source.layer is not None and source.optional("mlp_layer_types", None) == "hash_moe":
        return fields | {"kind": "scored_hash", "vocab_size": source.whole("vocab_size")}
    return fields | {"kind": "token_choice", "controller": ControllerConfig()}


def _cohere2(source: Source) -> Values:
    if _choice(source, "expert_selection_fn", ["softmax", "sigmoid"]) == "softmax":
        return {"kind": "topk_softmax"}
    return {
        "kind": "sigmoid_topk",
        "select_on": SelectOn.LOGITS,
        "norm_topk_prob": source.flag("norm_topk_prob"),
    }


def _dbrx(source: Source) -> Values:
    p = source.number("moe_normalize_expert_weights", None)
    return {"kind": "softmax_topk"} if p is None else {"kind": "pnorm_topk", "norm_p": p}


def _ernie(source: Source) -> Values:
    return {
        "kind": "softmax_topk",
        "norm_topk_prob": True,
        "norm_min": source.number("moe_norm_min"),
        "controller": ControllerConfig(),
    }


def _lfm2(source: Source) -> Values:
    return _sigmoid(norm=None, eps=1e-6, bias=source.flag("use_expert_bias"))(source)


def _laguna(source: Source) -> Values:
    cap = source.number("moe_router_logit_softcapping", 0.0)
    return _sigmoid(norm=True, scale=False)(source) | {"logit_softcap": cap if cap > 0 else None}


def _muse_spark(source: Source) -> Values:
    return _sigmoid(norm=True, eps=1e-15)(source) | {
        "logit_scale": source.number("output_multiplier")
    }


def _kolibri(source: Source) -> Values:
    return _sigmoid(norm=None, scale=False)(source) | {"select_on": SelectOn.LOGITS}


def _gemma(source: Source) -> Values:
    return {"kind": "gemma", "rms_norm_eps": source.number("rms_norm_eps")}


def _inkling(source: Source) -> Values:
    return {
        "kind": "inkling",
        "num_shared_gates": source.whole("n_shared_experts"),
        "routed_scaling_factor": source.number("routed_scaling_factor"),
        "controller": ControllerConfig(),
    }


def _longcat(source: Source) -> Values:
    return {
        "kind": "longcat",
        "routed_scaling_factor": source.number("routed_scaling_factor"),
        "controller": ControllerConfig(),
    }


def _phimoe(source: Source) -> Values:
    return {
        "kind": "sparsemixer",
        "sparsemixer_eps": source.number("router_jitter_noise"),
        "jitter_eps": source.number("input_jitter_noise", 0.0) or None,
    }


def _switch(source: Source) -> Values:
    return {
        "kind": "switch",
        "expert_capacity": source.whole("expert_capacity"),
        "capacity_scope": CapacityScope.SEQUENCE,
        "jitter_eps": source.number("router_jitter_noise") or None,
        "router_bias": source.flag("router_bias", False),
    }


def _nllb(source: Source) -> Values:
    fraction = source.number("moe_eval_capacity_token_fraction")
    return {
        "kind": "gshard_top2",
        "expert_capacity": source.whole("expert_capacity", None),
        "eval_capacity_fraction": fraction if fraction > 0 else None,
        "batch_prioritized": source.flag("batch_prioritized_routing"),
        "norm_before_drop": source.flag("normalize_router_prob_before_dropping"),
        "second_expert_policy": _choice(source, "second_expert_policy", list(SecondPolicy)),
        "router_bias": source.flag("router_bias", False),
    }


def _zaya(source: Source) -> Values:
    return {
        "kind": "zaya",
        "d_router": source.whole("router_hidden_size"),
        "rms_norm_eps": source.number("rms_norm_eps"),
        "controller": ControllerConfig(),
    }


def _plain(kind: str) -> Family:
    return lambda source: {"kind": kind}


def _family(family: Family, *model_types: str) -> dict[str, Family]:
    return dict.fromkeys(model_types, family)


FAMILIES: dict[str, Family] = {
    **_family(
        _softmax(norm=True),
        "mixtral",
        "minimax",
        "hunyuan_v1_moe",
        "qwen3_5_moe_text",
        "qwen3_vl_moe_text",
    ),
    **_family(
        _softmax(norm=None),
        "qwen2_moe",
        "qwen3_moe",
        "qwen3_next",
        "lara_mini",
        "olmoe",
        "flex_olmo",
        "mellum",
        "qwen4_exp_text",
        "qwen3_omni_moe_text",
        "qwen3_omni_moe_talker_text",
    ),
    **_family(_softmax(norm=False), "jamba"),
    **_family(_dbrx, "dbrx", "dbrx_ffn"),
    **_family(
        _selected_softmax(),
        "aria_text",
        "granitemoe",
        "granitemoe_swa",
        "granitemoehybrid",
        "granitemoeshared",
        "jetmoe",
    ),
    **_family(_selected_softmax(bias=True), "gpt_oss"),
    **_family(_selected_softmax(bias=True, mean=True), "openai_privacy_filter"),
    **_family(_cohere2, "cohere2_moe"),
    **_family(
        _deepseek_v3(),
        "deepseek_v3",
        "deepseek_v32",
        "axk1",
        "bailing_hybrid",
        "dots1",
        "dots3_note_text",
        "exaone_moe",
        "glm4_moe",
        "glm4_moe_lite",
        "glm4v_moe_text",
        "glm5_next_text",
        "glm_moe_dsa",
        "hy_v4",
        "kimi_linear",
        "mimo_v2_flash",
        "nemotron_h",
        "sarvam_mla",
        "sarvam_moe",
        "solar_open",
    ),
    **_family(_deepseek_v3(fill=GroupFill.ZERO), "axk2"),
    **_family(_deepseek_v3(scale=False), "beam"),
    **_family(_deepseek_v2, "deepseek_v2", "deepseek_ocr2_text", "unlimited_ocr_text"),
    **_family(_mistral(always_norm=False), "mistral4"),
    **_family(_mistral(always_norm=True), "mistral_large4_text"),
    **_family(_scored, "deepseek_v4", "deepseek_v41_text", "inkling2_text", "inkling2_loop_text"),
    **_family(_sigmoid(norm=True, eps=1e-20), "afmoe", "hy_v3"),
    **_family(_sigmoid(norm=True, scale=False), "minimax_m2", "minimax_m3_vl_text", "step3p5"),
    **_family(_sigmoid(norm=None, scale=False, bias=False), "flint"),
    **_family(_lfm2, "lfm2_moe"),
    **_family(_laguna, "laguna"),
    **_family(_muse_spark, "muse_spark_text"),
    **_family(_kolibri, "kolibri1"),
    **_family(_ernie, "ernie4_5_moe", "ernie4_5_vl_moe_text"),
    **_family(_gemma, "gemma4_text", "diffusion_gemma_text"),
    **_family(_inkling, "inkling_text"),
    **_family(_longcat, "longcat_flash"),
    **_family(_plain("llama4"), "llama4_text"),
    **_family(_phimoe, "phimoe"),
    **_family(_switch, "switch_transformers"),
    **_family(_nllb, "nllb-moe"),
    **_family(_zaya, "zaya"),
}
"""``model_type`` -> the fields of its router."""


def router_config(config: Any, layer: int | None = None) -> RouterConfig:
    """See ``RouterConfig.from_hf``."""
    fields = text_fields(config)
    row, family = find(fields.family), FAMILIES.get(row_name(fields.family))
    if row is None or family is None:
        what = f"a model_type among {', '.join(sorted(FAMILIES))}"
        raise ConfigError(expected(what, repr(fields.family), "building a RouterConfig by hand"))
    source = Source(fields, layer)
    sizes = {
        "num_experts": source.whole("num_experts"),
        "top_k": row.top_k or source.whole("num_experts_per_tok"),
        "num_zero_experts": row.idle(source.fields),
    }
    return RouterConfig(**sizes | family(source))
