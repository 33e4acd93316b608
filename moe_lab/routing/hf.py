"""``RouterConfig.from_hf``: the router of a Hugging Face model from its configuration
(``hf_weights`` copies its parameters).

One entry of ``FAMILIES`` says what the router of a ``model_type`` does; names differ between
models, so every value is looked up under all names in use. Nothing is guessed: a missing value or
an unknown model type is an error. transformers itself is not imported.

What is reproduced is the router module. Beam, Laguna and MiniMax-M3 multiply by their scaling
factor after the experts, outside it.
"""

from collections.abc import Callable, Mapping
from typing import Any

from moe_lab.errors import ConfigError, expected
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

NAMES: dict[str, tuple[str, ...]] = {
    "num_experts": ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts"),
    "top_k": (
        "num_experts_per_tok",
        "num_experts_per_token",
        "moe_topk",
        "moe_top_k",
        "moe_k",
        "top_k_experts",
    ),
    "routed_scaling_factor": ("routed_scaling_factor", "router_scaling_factor", "route_scale"),
    "norm_topk_prob": ("norm_topk_prob", "moe_renormalize"),
    "num_groups": ("n_group", "num_expert_group"),
    "topk_groups": ("topk_group",),
}
"""Our field -> names it has in Hugging Face configurations, in the order they are tried."""

SCORING = {"sigmoid": ScoreFunc.SIGMOID, "sqrtsoftplus": ScoreFunc.SQRT_SOFTPLUS}


class Source:
    """A configuration under either of its forms, with lookups that fail loudly."""

    def __init__(self, config: Any, layer: int | None) -> None:
        self.config, self.layer = config, layer
        self.model_type = str(self.get("model_type", default="")) or (
            "dbrx_ffn" if self.has("moe_normalize_expert_weights") else ""
        )

    def has(self, name: str) -> bool:
        return (
            name in self.config if isinstance(self.config, Mapping) else hasattr(self.config, name)
        )

    def get(self, *names: str, default: Any = ...) -> Any:
        """The first of ``names`` that is present and not None; lists are per layer."""
        for name in names:
            value = (
                self.config.get(name)
                if isinstance(self.config, Mapping)
                else getattr(self.config, name, None)
            )
            if isinstance(value, list | tuple):
                value = self._of_layer(name, value)
            if value is not None:
                return value
        if default is ...:
            raise ConfigError(
                expected(
                    f"one of {', '.join(names)} in the {self.model_type} configuration",
                    "none of them",
                )
            )
        return default

    def ours(self, name: str, default: Any = ...) -> Any:
        return self.get(*NAMES[name], default=default)

    def _of_layer(self, name: str, values: list | tuple) -> Any:
        if self.layer is None and len(set(values)) > 1:
            raise ConfigError(
                expected(f"the layer whose {name} is wanted", None, "from_hf(config, layer=0)")
            )
        return values[self.layer or 0]


Fields = dict[str, Any]
Family = Callable[[Source], Fields]


def _softmax(norm: bool | None) -> Family:
    """``norm`` None: as the configuration's flag says."""
    return lambda source: {
        "kind": "softmax_topk",
        "norm_topk_prob": bool(source.ours("norm_topk_prob")) if norm is None else norm,
    }


def _selected_softmax(bias: bool = False, mean: bool = False) -> Family:
    return lambda source: {
        "kind": "topk_softmax",
        "router_bias": bias,
        "routed_scaling_factor": 1.0 / source.ours("top_k") if mean else 1.0,
    }


def _sigmoid(norm: bool | None, eps: float = 0.0, scale: bool = True, bias: bool = True) -> Family:
    def fields(source: Source) -> Fields:
        normalise = bool(source.ours("norm_topk_prob")) if norm is None else norm
        return {
            "kind": "sigmoid_topk",
            "norm_topk_prob": normalise,
            "norm_eps": eps if normalise else None,
            "routed_scaling_factor": float(source.ours("routed_scaling_factor")) if scale else 1.0,
            "controller": ControllerConfig() if bias else None,
        }

    return fields


def _deepseek_v3(fill: GroupFill | None = None, scale: bool = True) -> Family:
    def fields(source: Source) -> Fields:
        norm = bool(source.ours("norm_topk_prob"))
        return {
            "kind": "deepseek_v3",
            "norm_topk_prob": norm,
            "routed_scaling_factor": float(source.ours("routed_scaling_factor")) if scale else 1.0,
            "controller": ControllerConfig(),
            **_groups(source, fill),
        }

    return fields


def _groups(source: Source, fill: GroupFill | None = None) -> Fields:
    """One group of all experts limits nothing, unless what is left out is filled with zeros."""
    groups = source.ours("num_groups", default=1)
    if groups == 1:
        return {}
    return {"num_groups": groups, "topk_groups": source.ours("topk_groups"), "group_fill": fill}


def _deepseek_v2(source: Source) -> Fields:
    limited = source.get("topk_method") == "group_limited_greedy"
    fields = {
        "kind": "deepseek_v2",
        "routed_scaling_factor": float(source.ours("routed_scaling_factor")),
    }
    # The release fills with zeros and weighs with the filled scores; -inf selects the same experts.
    return fields | (_groups(source) if limited else {})


def _mistral(always_norm: bool) -> Family:
    def fields(source: Source) -> Fields:
        norm = always_norm or bool(source.ours("norm_topk_prob"))
        return {
            "kind": "deepseek_v2",
            "norm_topk_prob": norm,
            "norm_eps": 1e-20 if norm else None,
            "routed_scaling_factor": float(source.ours("routed_scaling_factor")),
            **(
                {"group_score": GroupScore.BEST_TWO}
                if source.ours("num_groups", default=1) > 1
                else {}
            ),
            **_groups(source, GroupFill.ZERO),
        }

    return fields


def _scored(source: Source) -> Fields:
    """DeepSeek-V4 and Inkling 2: the score function is named in the configuration; V4's first
    layers look their experts up.
    """
    name = source.get("scoring_func")
    if name not in SCORING:
        raise ConfigError(expected(f"scoring_func among {', '.join(SCORING)}", repr(name)))
    fields: Fields = {
        "routed_scaling_factor": float(source.ours("routed_scaling_factor")),
        "norm_topk_prob": True,
        "norm_eps": 1e-20,
        "score_func": SCORING[name],
    }
    if source.layer is not None and source.get("mlp_layer_types", default=None) == "hash_moe":
        return fields | {"kind": "scored_hash", "vocab_size": source.get("vocab_size")}
    return fields | {"kind": "token_choice", "controller": ControllerConfig()}


def _cohere2(source: Source) -> Fields:
    function = source.get("expert_selection_fn")
    if function == "softmax":
        return {"kind": "topk_softmax"}
    if function != "sigmoid":
        raise ConfigError(expected("expert_selection_fn softmax or sigmoid", repr(function)))
    return {
        "kind": "sigmoid_topk",
        "select_on": SelectOn.LOGITS,
        "norm_topk_prob": bool(source.ours("norm_topk_prob")),
    }


def _dbrx(source: Source) -> Fields:
    p = source.get("moe_normalize_expert_weights", default=None)
    return {"kind": "softmax_topk"} if p is None else {"kind": "pnorm_topk", "norm_p": float(p)}


def _ernie(source: Source) -> Fields:
    return {
        "kind": "softmax_topk",
        "norm_topk_prob": True,
        "norm_min": float(source.get("moe_norm_min")),
        "controller": ControllerConfig(),
    }


def _lfm2(source: Source) -> Fields:
    return _sigmoid(norm=None, eps=1e-6, bias=bool(source.get("use_expert_bias")))(source)


def _laguna(source: Source) -> Fields:
    cap = float(source.get("moe_router_logit_softcapping", default=0.0))
    return _sigmoid(norm=True, scale=False)(source) | {"logit_softcap": cap if cap > 0 else None}


def _muse_spark(source: Source) -> Fields:
    return _sigmoid(norm=True, eps=1e-15)(source) | {
        "logit_scale": float(source.get("output_multiplier"))
    }


def _kolibri(source: Source) -> Fields:
    return _sigmoid(norm=None, scale=False)(source) | {"select_on": SelectOn.LOGITS}


def _gemma(source: Source) -> Fields:
    return {"kind": "gemma", "rms_norm_eps": float(source.get("rms_norm_eps"))}


def _inkling(source: Source) -> Fields:
    return {
        "kind": "inkling",
        "num_shared_gates": source.get("n_shared_experts"),
        "routed_scaling_factor": float(source.ours("routed_scaling_factor")),
        "controller": ControllerConfig(),
    }


def _longcat(source: Source) -> Fields:
    return {
        "kind": "longcat",
        "num_zero_experts": source.get("zero_expert_num", default=0),
        "routed_scaling_factor": float(source.ours("routed_scaling_factor")),
        "controller": ControllerConfig(),
    }


def _phimoe(source: Source) -> Fields:
    # The release makes two picks whatever num_experts_per_tok says.
    return {
        "kind": "sparsemixer",
        "top_k": 2,
        "sparsemixer_eps": float(source.get("router_jitter_noise")),
        "jitter_eps": float(source.get("input_jitter_noise", default=0.0)) or None,
    }


def _switch(source: Source) -> Fields:
    return {
        "kind": "switch",
        "top_k": 1,
        "expert_capacity": source.get("expert_capacity"),
        "capacity_scope": CapacityScope.SEQUENCE,
        "jitter_eps": float(source.get("router_jitter_noise")) or None,
        "router_bias": bool(source.get("router_bias", default=False)),
    }


def _nllb(source: Source) -> Fields:
    fraction = float(source.get("moe_eval_capacity_token_fraction"))
    return {
        "kind": "gshard_top2",
        "top_k": 2,
        "expert_capacity": source.get("expert_capacity", default=None),
        "eval_capacity_fraction": fraction if fraction > 0 else None,
        "batch_prioritized": bool(source.get("batch_prioritized_routing")),
        "norm_before_drop": bool(source.get("normalize_router_prob_before_dropping")),
        "second_expert_policy": SecondPolicy(source.get("second_expert_policy")),
        "router_bias": bool(source.get("router_bias", default=False)),
    }


def _zaya(source: Source) -> Fields:
    return {
        "kind": "zaya",
        "num_zero_experts": 1,
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
    **_family(_dbrx, "dbrx_ffn"),
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
"""``model_type`` -> the fields of its router."""  # fmt: skip

NESTED = ("text_config", "thinker_config", "ffn_config", "language_config", "llm_config")


def router_config(config: Any, layer: int | None = None) -> RouterConfig:
    """See ``RouterConfig.from_hf``."""
    source = Source(config, layer)
    family = FAMILIES.get(source.model_type)
    if family is None:
        inner = next(
            (value for name in NESTED if (value := source.get(name, default=None)) is not None),
            None,
        )
        if inner is not None:
            return router_config(inner, layer)
        known = ", ".join(sorted(FAMILIES))
        raise ConfigError(
            expected(
                f"a model_type among {known}",
                repr(source.model_type),
                "building a RouterConfig by hand",
            )
        )
    common: Fields = {
        "num_experts": lambda: source.ours("num_experts"),
        "top_k": lambda: source.ours("top_k"),
    }
    fields = family(source)
    return RouterConfig(
        **{name: read() for name, read in common.items() if name not in fields} | fields
    )
