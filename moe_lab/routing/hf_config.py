"""``RouterConfig.from_hf``: the router of a Hugging Face model from its configuration
(``hf_weights`` copies its parameters).

One entry of ``FAMILIES`` says what the router of a ``model_type`` does; experts, slots and names of
fields come from ``moe_lab.hf``. Nothing is guessed: a missing value or an unknown model type is an
error. transformers itself is not imported.

What is reproduced is the router module. Beam, Laguna and MiniMax-M3 multiply by their scaling
factor after the experts, outside it.
"""

from collections.abc import Callable
from typing import Any

from moe_lab.errors import ConfigError, expected
from moe_lab.hf.architectures import find, row_name
from moe_lab.hf.configuration import language_model, model_type, plain
from moe_lab.hf.fields import Fields
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


class Source:
    """The configuration of one layer; nothing that is missing is guessed."""

    def __init__(self, fields: Fields, layer: int | None) -> None:
        self.fields, self.layer = fields if layer is None else fields.at(layer), layer

    def get(self, name: str) -> Any:
        """A value under any of its names; ``ConfigError`` where there is none."""
        return self._of_layer(name, self.fields.get(name))

    def optional(self, name: str, otherwise: Any = None) -> Any:
        """A value whose absence is normal and means ``otherwise``."""
        return self._of_layer(name, self.fields.optional(name, otherwise))

    def _of_layer(self, name: str, value: Any) -> Any:
        if not isinstance(value, list) or not value:
            return value
        if self.layer is None and any(item != value[0] for item in value):
            raise ConfigError(
                expected(f"the layer whose {name} is wanted", None, "from_hf(config, layer=0)")
            )
        return self.fields.entry(name, value) if self.layer is not None else value[0]


def _softmax(norm: bool | None) -> Family:
    """``norm`` None: as the configuration's flag says."""
    return lambda source: {
        "kind": "softmax_topk",
        "norm_topk_prob": bool(source.get("norm_topk_prob")) if norm is None else norm,
    }


def _selected_softmax(bias: bool = False, mean: bool = False) -> Family:
    return lambda source: {
        "kind": "topk_softmax",
        "router_bias": bias,
        "routed_scaling_factor": 1.0 / source.get("num_experts_per_tok") if mean else 1.0,
    }


def _sigmoid(norm: bool | None, eps: float = 0.0, scale: bool = True, bias: bool = True) -> Family:
    def fields(source: Source) -> Values:
        normalise = bool(source.get("norm_topk_prob")) if norm is None else norm
        return {
            "kind": "sigmoid_topk",
            "norm_topk_prob": normalise,
            "norm_eps": eps if normalise else None,
            "routed_scaling_factor": float(source.get("routed_scaling_factor")) if scale else 1.0,
            "controller": ControllerConfig() if bias else None,
        }

    return fields


def _deepseek_v3(fill: GroupFill | None = None, scale: bool = True) -> Family:
    def fields(source: Source) -> Values:
        norm = bool(source.get("norm_topk_prob"))
        return {
            "kind": "deepseek_v3",
            "norm_topk_prob": norm,
            "routed_scaling_factor": float(source.get("routed_scaling_factor")) if scale else 1.0,
            "controller": ControllerConfig(),
            **_groups(source, fill),
        }

    return fields


def _groups(source: Source, fill: GroupFill | None = None) -> Values:
    """One group of all experts limits nothing, unless what is left out is filled with zeros."""
    groups = source.optional("n_group", 1)
    if groups == 1:
        return {}
    return {"num_groups": groups, "topk_groups": source.get("topk_group"), "group_fill": fill}


def _deepseek_v2(source: Source) -> Values:
    limited = source.get("topk_method") == "group_limited_greedy"
    fields = {
        "kind": "deepseek_v2",
        "routed_scaling_factor": float(source.get("routed_scaling_factor")),
    }
    # The release fills with zeros and weighs with the filled scores; -inf selects the same experts.
    return fields | (_groups(source) if limited else {})


def _mistral(always_norm: bool) -> Family:
    def fields(source: Source) -> Values:
        norm = always_norm or bool(source.get("norm_topk_prob"))
        return {
            "kind": "deepseek_v2",
            "norm_topk_prob": norm,
            "norm_eps": 1e-20 if norm else None,
            "routed_scaling_factor": float(source.get("routed_scaling_factor")),
            **({"group_score": GroupScore.BEST_TWO} if source.optional("n_group", 1) > 1 else {}),
            **_groups(source, GroupFill.ZERO),
        }

    return fields


def _scored(source: Source) -> Values:
    """DeepSeek-V4 and Inkling 2: the score function is named in the configuration; V4's first
    layers look their experts up.
    """
    name = source.get("scoring_func")
    if name not in SCORING:
        raise ConfigError(expected(f"scoring_func among {', '.join(SCORING)}", repr(name)))
    fields: Values = {
        "routed_scaling_factor": float(source.get("routed_scaling_factor")),
        "norm_topk_prob": True,
        "norm_eps": 1e-20,
        "score_func": SCORING[name],
    }
    if source.layer is not None and source.optional("mlp_layer_types", None) == "hash_moe":
        return fields | {"kind": "scored_hash", "vocab_size": source.get("vocab_size")}
    return fields | {"kind": "token_choice", "controller": ControllerConfig()}


def _cohere2(source: Source) -> Values:
    function = source.get("expert_selection_fn")
    if function == "softmax":
        return {"kind": "topk_softmax"}
    if function != "sigmoid":
        raise ConfigError(expected("expert_selection_fn softmax or sigmoid", repr(function)))
    return {
        "kind": "sigmoid_topk",
        "select_on": SelectOn.LOGITS,
        "norm_topk_prob": bool(source.get("norm_topk_prob")),
    }


def _dbrx(source: Source) -> Values:
    p = source.optional("moe_normalize_expert_weights", None)
    return {"kind": "softmax_topk"} if p is None else {"kind": "pnorm_topk", "norm_p": float(p)}


def _ernie(source: Source) -> Values:
    return {
        "kind": "softmax_topk",
        "norm_topk_prob": True,
        "norm_min": float(source.get("moe_norm_min")),
        "controller": ControllerConfig(),
    }


def _lfm2(source: Source) -> Values:
    return _sigmoid(norm=None, eps=1e-6, bias=bool(source.get("use_expert_bias")))(source)


def _laguna(source: Source) -> Values:
    cap = float(source.optional("moe_router_logit_softcapping", 0.0))
    return _sigmoid(norm=True, scale=False)(source) | {"logit_softcap": cap if cap > 0 else None}


def _muse_spark(source: Source) -> Values:
    return _sigmoid(norm=True, eps=1e-15)(source) | {
        "logit_scale": float(source.get("output_multiplier"))
    }


def _kolibri(source: Source) -> Values:
    return _sigmoid(norm=None, scale=False)(source) | {"select_on": SelectOn.LOGITS}


def _gemma(source: Source) -> Values:
    return {"kind": "gemma", "rms_norm_eps": float(source.get("rms_norm_eps"))}


def _inkling(source: Source) -> Values:
    return {
        "kind": "inkling",
        "num_shared_gates": source.get("n_shared_experts"),
        "routed_scaling_factor": float(source.get("routed_scaling_factor")),
        "controller": ControllerConfig(),
    }


def _longcat(source: Source) -> Values:
    return {
        "kind": "longcat",
        "routed_scaling_factor": float(source.get("routed_scaling_factor")),
        "controller": ControllerConfig(),
    }


def _phimoe(source: Source) -> Values:
    return {
        "kind": "sparsemixer",
        "sparsemixer_eps": float(source.get("router_jitter_noise")),
        "jitter_eps": float(source.optional("input_jitter_noise", 0.0)) or None,
    }


def _switch(source: Source) -> Values:
    return {
        "kind": "switch",
        "expert_capacity": source.get("expert_capacity"),
        "capacity_scope": CapacityScope.SEQUENCE,
        "jitter_eps": float(source.get("router_jitter_noise")) or None,
        "router_bias": bool(source.optional("router_bias", False)),
    }


def _nllb(source: Source) -> Values:
    fraction = float(source.get("moe_eval_capacity_token_fraction"))
    return {
        "kind": "gshard_top2",
        "expert_capacity": source.optional("expert_capacity", None),
        "eval_capacity_fraction": fraction if fraction > 0 else None,
        "batch_prioritized": bool(source.get("batch_prioritized_routing")),
        "norm_before_drop": bool(source.get("normalize_router_prob_before_dropping")),
        "second_expert_policy": SecondPolicy(source.get("second_expert_policy")),
        "router_bias": bool(source.optional("router_bias", False)),
    }


def _zaya(source: Source) -> Values:
    return {
        "kind": "zaya",
        "d_router": source.get("router_hidden_size"),
        "rms_norm_eps": float(source.get("rms_norm_eps")),
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
        "kimi_k2",
        "kimi_linear",
        "mimo_v2_flash",
        "nemotron_h",
        "solar_open",
    ),
    **_family(_deepseek_v3(fill=GroupFill.ZERO), "axk2"),
    **_family(_deepseek_v3(scale=False), "beam"),
    **_family(_deepseek_v2, "deepseek_v2", "deepseek_ocr2_text", "unlimited_ocr_text"),
    **_family(_mistral(always_norm=False), "mistral4"),
    **_family(_mistral(always_norm=True), "mistral_large4_text"),
    **_family(_scored, "deepseek_v4", "inkling2_text"),
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
    values = language_model(plain(config))
    name = model_type(values)
    row, family = find(name), FAMILIES.get(row_name(name))
    if row is None or family is None:
        known = ", ".join(sorted(FAMILIES))
        raise ConfigError(
            expected(f"a model_type among {known}", repr(name), "building a RouterConfig by hand")
        )
    source = Source(Fields(row.prepare(values), name, row.defaults), layer)
    sizes = {
        "num_experts": source.get("num_experts"),
        "top_k": row.top_k or source.get("num_experts_per_tok"),
        "num_zero_experts": row.idle(source.fields),
    }
    return RouterConfig(**sizes | family(source))
