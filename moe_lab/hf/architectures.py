"""``ARCHITECTURES``: model type -> what its configuration says of routed experts, and how it is
written; ``SAME_AS``: model types that stand for another row.

To add one: a row here, its layers in ``moe_lab.accounting.families``, its router in
``moe_lab.routing.hf_config``; tests/test_hf_table.py compares the three.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from moe_lab.errors import ConfigError, expected
from moe_lab.hf import sparse_layers as layers
from moe_lab.hf.fields import Fields, nested

Values = Mapping[str, Any]


@dataclass(frozen=True)
class HFArchitecture:
    """
    Attributes:
        sparse: rule that marks the layers with routed experts.
        defaults: field -> value that the released code takes where a configuration is silent.
        top_k: slots where the router's code fixes them, whatever ``num_experts_per_tok`` says.
        zero_experts: zero-compute experts, or the field that holds their number.
        prepare: rewrites nested sizes and names of its own before anything is read.
        visits: the order in which a token goes through the layers, where some run several times.
    """

    sparse: layers.Rule = layers.every_layer
    defaults: Values = field(default_factory=dict)
    top_k: int | None = None
    zero_experts: str | int = 0
    prepare: Callable[[Values], Values] = dict
    visits: layers.Visits | None = None

    def slots(self, f: Fields) -> int:
        """Slots of one token (K)."""
        if self.top_k is None:
            return f.size("num_experts_per_tok")
        if f.values.get("num_experts_per_tok") != self.top_k:
            sentence = f"num_experts_per_tok = {self.top_k} (fixed by the router of {f.family})"
            f.note("top_k", sentence)
        return self.top_k

    def idle(self, f: Fields) -> int:
        """Zero-compute experts of one layer (Z)."""
        return (
            self.zero_experts
            if isinstance(self.zero_experts, int)
            else f.size_or(self.zero_experts, 0)
        )


# ------------------------------------------------------------------------------------------------
# configurations with nested sizes or names of their own


def _moved(values: Values, inner: Values, names: Mapping[str, str]) -> dict[str, Any]:
    """``values`` with fields of a nested configuration under our names."""
    found = {ours: inner[theirs] for ours, theirs in names.items() if inner.get(theirs) is not None}
    return {**values, **found}


def dbrx(values: Values) -> Values:
    """DBRX keeps the sizes of attention and experts in two sub-configurations."""
    names = ("ffn_hidden_size", "moe_num_experts", "moe_top_k", "moe_normalize_expert_weights")
    found = _moved(values, nested(values, "attn_config"), {"kv_n_heads": "kv_n_heads"})
    return _moved(found, nested(values, "ffn_config"), {name: name for name in names})


def kimi_linear(values: Values) -> Values:
    """``linear_attn_config`` holds the sizes of the linear layers."""
    names = {
        "linear_head_dim": "head_dim",
        "linear_num_heads": "num_heads",
        "linear_conv_kernel_dim": "short_conv_kernel_size",
        "use_full_rank_gate": "use_full_rank_gate",
    }
    return _moved(values, nested(values, "linear_attn_config"), names)


def minimax_m3(values: Values) -> Values:
    """``sparse_attention_config`` holds the indexer's sizes and marks sparse attention with 1."""
    inner = nested(values, "sparse_attention_config")
    names = {
        "index_n_heads": "sparse_num_index_heads",
        "index_head_dim": "sparse_index_dim",
        "index_block_size": "sparse_block_size",
        "index_topk_blocks": "sparse_topk_blocks",
    }
    found = _moved(values, inner, names)
    freq = inner.get("sparse_attention_freq")
    if isinstance(freq, list) and not values.get("layer_types"):
        found["layer_types"] = ["minimax_m3_sparse" if mark else "full_attention" for mark in freq]
    return found


def inkling(values: Values) -> Values:
    """Where there is a ``dense_intermediate_size``, ``intermediate_size`` is an expert's width."""
    dense = values.get("dense_intermediate_size")
    if dense is None:
        return values
    expert = values.get("intermediate_size")
    return {**values, "moe_intermediate_size": expert, "intermediate_size": dense}


def inkling_loop(values: Values) -> Values:
    """``loop_config`` holds the loop of a release."""
    names = {
        "loop_layer_index_start": "core_start",
        "loop_layer_index_end": "core_end",
        "loop_num_passes": "num_passes",
        "loop_gate_rank": "gate_rank",
    }
    return _moved(values, nested(values, "loop_config"), names)


def longcat(values: Values) -> Values:
    """``num_layers`` is the number of layers; transformers also saves ``num_hidden_layers``, twice
    as many: one for each attention block.
    """
    layers_field = values.get("num_layers")
    return values if layers_field is None else {**values, "num_hidden_layers": layers_field}


def ernie_vl(values: Values) -> Values:
    """A field that is a list holds [text, vision]; the value for text is taken, but the widths stay
    a list.
    """
    names = ("moe_num_experts", "moe_k", "moe_layer_start_index", "moe_layer_end_index")
    found = dict(values)
    for name in (*names, "moe_layer_interval"):
        value = values.get(name)
        if isinstance(value, list) and len(value) == 2:
            found[name] = value[0]
            if name == "moe_num_experts":
                found["moe_num_vision_experts"] = value[1]
    return found


def sarvam(values: Values) -> Values:
    """``use_qkv_bias`` is what other configurations call ``attention_bias``."""
    return _moved(values, values, {"attention_bias": "use_qkv_bias"})


def no_head_dim(values: Values) -> Values:
    """A head is hidden_size / num_attention_heads wide, whatever ``head_dim`` says."""
    return {name: value for name, value in values.items() if name != "head_dim"}


# ------------------------------------------------------------------------------------------------
# the table


def _dense(first: int | None, **facts: Any) -> HFArchitecture:
    """``first`` leading dense layers where the configuration does not say; None: it must."""
    defaults = {} if first is None else {"first_k_dense_replace": first}
    return HFArchitecture(layers.leading_dense(), defaults, **facts)


def _steps(**defaults: Any) -> HFArchitecture:
    usual = {"decoder_sparse_step": 1, "mlp_only_layers": ()}
    return HFArchitecture(layers.sparse_step, {**usual, **defaults})


_EVERY = HFArchitecture()
_LONGCAT = HFArchitecture(zero_experts="zero_expert_num", prepare=longcat)
_ERNIE = {"moe_layer_start_index": 1, "moe_layer_end_index": -1, "moe_layer_interval": 1}
_SARVAM = {"first_k_dense_replace": 1, "norm_topk_prob": True}
_NEMOTRON = {
    "layer_types": layers.nemotron_types,
    "num_hidden_layers": layers.nemotron_layers,
}

ARCHITECTURES: dict[str, HFArchitecture] = {
    **dict.fromkeys(
        [
            "aria_text",
            "dbrx_ffn",
            "deepseek_v4",
            "deepseek_v41_text",
            "flex_olmo",
            "gpt_oss",
            "granitemoe",
            "grok1",
            "granitemoe_swa",
            "granitemoeshared",
            "hunyuan",
            "hunyuan_v1_moe",
            "inkling2_text",
            "jetmoe",
            "kolibri1",
            "lara_mini",
            "minimax",
            "minimax_m2",
            "mixtral",
            "olmoe",
            "openai_privacy_filter",
            "qwen3_5_moe_text",
            "qwen4_exp_text",
            "diffusion_gemma_text",
            "solar_open",
        ],
        _EVERY,
    ),
    **dict.fromkeys(
        [
            "bailing_moe",
            "bailing_moe_linear",
            "deepseek_v2",
            "deepseek_v3",
            "deepseek_v32",
            "glm4_moe",
            "glm4v_moe_text",
        ],
        _dense(None),
    ),
    **dict.fromkeys(["cohere2_moe", "dots1", "mistral4"], _dense(0)),
    **dict.fromkeys(
        [
            "axk1",
            "axk2",
            "dots3_note_text",
            "exaone_moe",
            "glm4_moe_lite",
            "hy_v3",
            "hy_v4",
            "laguna",
            "mimo_v2_flash",
            "mistral_large4_text",
        ],
        _dense(1),
    ),
    **dict.fromkeys(("beam", "glm_moe_dsa"), _dense(3)),
    **dict.fromkeys(("mellum", "muse_spark_text"), HFArchitecture(layers.leading_dense(None))),
    **dict.fromkeys(("deepseek_ocr2_text", "unlimited_ocr_text"), _dense(1, prepare=no_head_dim)),
    **dict.fromkeys(
        [
            "klear",
            "qwen2_moe",
            "qwen3_moe",
            "qwen3_next",
            "qwen3_omni_moe_talker_text",
            "qwen3_omni_moe_text",
            "qwen3_vl_moe_text",
        ],
        _steps(),
    ),
    **dict.fromkeys(
        ("afmoe", "lfm2_moe"), HFArchitecture(layers.leading_dense("num_dense_layers"))
    ),
    **dict.fromkeys(("longcat_flash", "longcat_flash_ngram", "longcat2"), _LONGCAT),
    **dict.fromkeys(
        ("bamba", "granite_docling_text", "llama", "mistral", "olmo2", "qwen2", "qwen3"),
        HFArchitecture(lambda f: [False] * f.num_layers),
    ),
    **dict.fromkeys(
        ("gemma4_text", "gemma4_unified_text"),
        HFArchitecture(layers.where("enable_moe_block")),
    ),
    "bailing_hybrid": _dense(2),
    "dbrx": HFArchitecture(prepare=dbrx),
    "doge": HFArchitecture(layers.where("is_moe")),
    "ernie4_5_moe": HFArchitecture(layers.ernie, _ERNIE),
    "ernie4_5_vl_moe_text": HFArchitecture(layers.ernie, _ERNIE, prepare=ernie_vl),
    "flint": _steps(mlp_only_layers=(0, 1)),
    "glm5_next_text": _dense(3, prepare=kimi_linear),
    "granitemoehybrid": HFArchitecture(layers.some_experts),
    "inkling_text": HFArchitecture(
        layers.leading_dense("dense_mlp_idx"), {"dense_mlp_idx": 0}, prepare=inkling
    ),
    "inkling2_loop_text": HFArchitecture(prepare=inkling_loop, visits=layers.looped),
    "jamba": HFArchitecture(layers.jamba),
    "kimi_linear": _dense(1, prepare=kimi_linear),
    "llama4_text": HFArchitecture(layers.llama4),
    "minimax_m3_vl_text": HFArchitecture(layers.leading_dense(None), prepare=minimax_m3),
    "nemotron_h": HFArchitecture(layers.nemotron, _NEMOTRON),
    "nllb-moe": HFArchitecture(layers.nllb, top_k=2),
    "nomic_bert": HFArchitecture(layers.every_nth, {"moe_every_n_layers": 0}),
    "phimoe": HFArchitecture(top_k=2),
    "sarvam_mla": HFArchitecture(layers.leading_dense(), _SARVAM),
    "sarvam_moe": HFArchitecture(layers.leading_dense(), _SARVAM, prepare=sarvam),
    "step3p5": HFArchitecture(layers.step3, {"first_k_dense_replace": 3}),
    "switch_transformers": HFArchitecture(
        layers.switch, {"num_decoder_layers": lambda f: f.num_layers}, top_k=1
    ),
    "zaya": HFArchitecture(zero_experts=1),
}

SAME_AS: dict[str, str] = {
    "Klear": "klear",
    "aria": "aria_text",
    "aria_moe_lm": "aria_text",
    "bailing_moe_v2": "bailing_moe",
    "grok": "grok1",
    "deepseek_ocr2": "deepseek_ocr2_text",
    "deepseek_v41": "deepseek_v41_text",
    "deepseek_vl_v2": "deepseek_v2",
    "diffusion_gemma": "diffusion_gemma_text",
    "dots3_note": "dots3_note_text",
    "ernie4_5_moe_vl": "ernie4_5_vl_moe_text",
    "ernie4_5_vl_moe": "ernie4_5_vl_moe_text",
    "gemma4": "gemma4_text",
    "gemma4_unified": "gemma4_unified_text",
    "glm4v_moe": "glm4v_moe_text",
    "glm5_next": "glm5_next_text",
    "granite_docling": "granite_docling_text",
    "hy_v4_vl": "hy_v4",
    "hy_v4_vl_text": "hy_v4",
    "inkling": "inkling_text",
    "inkling2": "inkling2_text",
    "inkling2_loop": "inkling2_loop_text",
    "kimi_k2": "deepseek_v3",
    "kimi_k25": "deepseek_v3",
    "llama4": "llama4_text",
    "minimax_m1": "minimax",
    "minimax_m3": "minimax_m3_vl_text",
    "minimax_m3_vl": "minimax_m3_vl_text",
    "minimax_text_01": "minimax",
    "mistral_large4": "mistral_large4_text",
    "muse_spark": "muse_spark_text",
    "nllb_moe": "nllb-moe",
    "qwen3_5_moe": "qwen3_5_moe_text",
    "qwen3_omni_moe": "qwen3_omni_moe_text",
    "qwen3_vl_moe": "qwen3_vl_moe_text",
    "qwen4_exp": "qwen4_exp_text",
    "step3p7": "step3p5",
    "unlimited_ocr": "unlimited_ocr_text",
}
"""Model types without a row of their own: the text part of a multimodal model, or another name for
the same layers.
"""


NOT_COUNTED: dict[str, str] = {
    "vitpose_backbone": "its experts are chosen by data set and not by token",
}
"""Model types with experts that are refused, and why; ``NAME_text`` is refused with ``NAME``."""


def row_name(model_type: str) -> str:
    """The name of the row that a model type stands for."""
    return SAME_AS.get(model_type, model_type)


def find(model_type: str) -> HFArchitecture | None:
    """The row of a model type, or None."""
    return ARCHITECTURES.get(row_name(model_type))


def experts_and_slots(f: Fields) -> tuple[int, int]:
    """(real experts, slots of a token) in one layer.

    Raises:
        ConfigError: more slots than there are real and zero-compute experts.
    """
    row = find(f.family) or _EVERY
    experts, slots, idle = f.size("num_experts"), row.slots(f), row.idle(f)
    if slots > experts + idle:
        limit = "num_experts" + (" + zero_expert_num" if idle else "")
        what = f"num_experts_per_tok of at most {limit} = {experts + idle}"
        raise ConfigError(expected(what, f"num_experts_per_tok = {slots}"))
    return experts, slots


def sparse(f: Fields) -> list[bool]:
    """The layers that hold routed experts, by the rule of the model type."""
    return (find(f.family) or _EVERY).sparse(f)


def visits(f: Fields) -> list[int]:
    """The layers that a token goes through, in order, if the model runs some layers several times;
    else an empty list.
    """
    rule = (find(f.family) or _EVERY).visits
    return [] if rule is None else rule(f)


def passes(f: Fields) -> list[int]:
    """How often each layer runs, in a model that runs some layers several times."""
    order = f.once(visits)
    return [order.count(layer) for layer in range(f.num_layers)]
