"""The 73 router classes of transformers 5.23 that record ``router_logits``, tiny random
configurations, and how their models call them.

The classes that are not reproduced are in ``NOT_REPRODUCED`` with the reason.
"""

import importlib
import inspect
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

CLASSES = {
    "afmoe": "AfmoeTokenChoiceRouter",
    "aria": "AriaTextTopKRouter",
    "axk1": "AXK1TopkRouter",
    "axk2": "AXK2TopkRouter",
    "bailing_hybrid": "BailingHybridTopkRouter",
    "beam": "BeamTopKRouter",
    "cohere2_moe": "Cohere2MoeTopKRouter",
    "dbrx": "DbrxRouter",
    "deepseek_ocr2": "DeepseekOcr2TextTopkRouter",
    "deepseek_v2": "DeepseekV2TopkRouter",
    "deepseek_v3": "DeepseekV3TopkRouter",
    "deepseek_v32": "DeepseekV32TopkRouter",
    "deepseek_v4": "DeepseekV4TopKRouter",
    "diffusion_gemma": "DiffusionGemmaTextRouter",
    "doge": "DogeCDMoE",
    "dots1": "Dots1TopkRouter",
    "dots3_note": "Dots3NoteTextTopkRouter",
    "ernie4_5_moe": "Ernie4_5_MoeTopKRouter",
    "ernie4_5_vl_moe": "Ernie4_5_VLMoeMoeBlock",
    "exaone_moe": "ExaoneMoeTopkRouter",
    "flex_olmo": "FlexOlmoTopKRouter",
    "flint": "FlintTopKRouter",
    "gemma4": "Gemma4TextRouter",
    "glm4_moe": "Glm4MoeTopkRouter",
    "glm4_moe_lite": "Glm4MoeLiteTopkRouter",
    "glm4v_moe": "Glm4vMoeTextTopkRouter",
    "glm5_next": "Glm5NextTextTopkRouter",
    "glm_moe_dsa": "GlmMoeDsaTopkRouter",
    "gpt_oss": "GptOssTopKRouter",
    "granitemoe": "GraniteMoeTopKRouter",
    "granitemoe_swa": "GraniteMoeSWATopKRouter",
    "granitemoehybrid": "GraniteMoeHybridTopKRouter",
    "granitemoeshared": "GraniteMoeSharedTopKRouter",
    "hunyuan_v1_moe": "HunYuanMoEV1Gate",
    "hy_v3": "HYV3TopKRouter",
    "hy_v4": "HYV4TopkRouter",
    "inkling": "InklingTopkRouter",
    "inkling2": "Inkling2TopKRouter",
    "jamba": "JambaTopKRouter",
    "kimi_linear": "KimiLinearTopkRouter",
    "kolibri1": "Kolibri1TopKRouter",
    "laguna": "LagunaTopKRouter",
    "lfm2_moe": "Lfm2MoeTopKRouter",
    "llama4": "Llama4Router",
    "longcat_flash": "LongcatFlashTopkRouter",
    "mellum": "MellumTopKRouter",
    "mimo_v2_flash": "MiMoV2FlashTopkRouter",
    "minimax": "MiniMaxTopKRouter",
    "minimax_m2": "MiniMaxM2TopKRouter",
    "minimax_m3_vl": "MiniMaxM3VLTopKRouter",
    "mistral4": "Mistral4TopkRouter",
    "mistral_large4": "MistralLarge4TextTopkRouter",
    "mixtral": "MixtralTopKRouter",
    "muse_spark": "MuseSparkTopkRouter",
    "nemotron_h": "NemotronHTopkRouter",
    "nllb_moe": "NllbMoeTop2Router",
    "olmoe": "OlmoeTopKRouter",
    "openai_privacy_filter": "OpenAIPrivacyFilterTopKRouter",
    "phimoe": "PhimoeTopKRouter",
    "qwen2_moe": "Qwen2MoeTopKRouter",
    "qwen3_5_moe": "Qwen3_5MoeTopKRouter",
    "qwen3_moe": "Qwen3MoeTopKRouter",
    "qwen3_next": "Qwen3NextTopKRouter",
    "qwen3_omni_moe": "Qwen3OmniMoeTalkerTextTopKRouter Qwen3OmniMoeTextTopKRouter "
    "Qwen3OmniMoeThinkerTextTopKRouter",
    "qwen3_vl_moe": "Qwen3VLMoeTextTopKRouter",
    "qwen4_exp": "Qwen4ExpTextTopKRouter",
    "solar_open": "SolarOpenTopkRouter",
    "step3p7": "Step3p7TopKRouter",
    "switch_transformers": "SwitchTransformersTop1Router",
    "unlimited_ocr": "UnlimitedOcrTextTopkRouter",
    "zaya": "ZayaRouter",
}
PAIRS = [(folder, name) for folder, names in CLASSES.items() for name in names.split()]
SINCE_5_24 = [
    ("hy_v4_vl", "HYV4VLTopkRouter"),
    ("inkling2_loop", "Inkling2LoopTopKRouter"),
    ("lara_mini", "LaraMiniTopKRouter"),
]
"""Classes that 5.23 does not have."""

NOT_REPRODUCED = {
    "DogeCDMoE": "splits its output across tokens (a view to [2, T, keys]), so a token's experts "
    "depend on the other tokens of the batch",
}

CONFIGS = {
    "dbrx": "DbrxFFNConfig",
    "qwen3_omni_moe:Qwen3OmniMoeTalkerTextTopKRouter": "Qwen3OmniMoeTalkerTextConfig",
    "qwen3_omni_moe": "Qwen3OmniMoeTextConfig",
}
"""Where the class name is not that of the configuration with ``num_experts`` in its fields."""

ALIASES = {
    "hidden": ("hidden_size",),
    "experts": ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts"),
    "top_k": ("num_experts_per_tok", "moe_topk", "moe_top_k", "moe_k", "top_k_experts"),
    "scale": ("routed_scaling_factor", "router_scaling_factor", "route_scale"),
    "norm": ("norm_topk_prob",),
    "groups": ("n_group",),
    "kept_groups": ("topk_group",),
}


def hf_config(folder: str, router_class: str) -> Any:
    module = importlib.import_module(f"transformers.models.{folder}.configuration_{folder}")
    name = CONFIGS.get(f"{folder}:{router_class}", CONFIGS.get(folder))
    if name is None:
        candidates = [
            (name, cls)
            for name, cls in vars(module).items()
            if inspect.isclass(cls)
            and name.endswith("Config")
            and cls.__module__ == module.__name__
            and "Vision" not in name
        ]
        name = next(
            name
            for name, cls in candidates
            if any(hasattr(cls(), alias) for alias in ALIASES["experts"])
        )
    return getattr(module, name)()


def set_first(config: Any, what: str, value: Any) -> None:
    """Set the value under the name that this configuration has."""
    for name in ALIASES[what]:
        if hasattr(config, name):
            setattr(config, name, value)
            return


def randomised(config: Any, folder: str, draw: random.Random) -> Any:
    experts = draw.choice([8, 12, 16, 24, 32, 64])
    groups = draw.choice([1, 2, 4]) if hasattr(config, "n_group") else 1
    kept = draw.randint(1, groups)
    top_k = draw.randint(1, min(6, kept * experts // groups))
    values = {
        "hidden": draw.choice([8, 20, 33]),
        "experts": experts,
        "top_k": top_k,
        "scale": draw.choice([1.0, 2.5, 0.7]),
        "norm": draw.random() < 0.5,
        "groups": groups,
        "kept_groups": kept,
    }
    for what, value in values.items():
        set_first(config, what, value)
    FLAGS.get(folder, lambda config, draw: None)(config, draw)
    return config


def flag(**options: list) -> Callable[[Any, random.Random], None]:
    def apply(config: Any, draw: random.Random) -> None:
        for name, values in options.items():
            setattr(config, name, draw.choice(values))

    return apply


def deepseek_v2_flags(config: Any, draw: random.Random) -> None:
    config.topk_method = (
        "group_limited_greedy"
        if config.n_group > 1
        else draw.choice(["greedy", "group_limited_greedy"])
    )


def axk2_flags(config: Any, draw: random.Random) -> None:
    if config.n_group == 1 and draw.random() < 0.5:
        config.n_group = config.topk_group = None


FLAGS: dict[str, Callable[[Any, random.Random], None]] = {
    "axk2": axk2_flags,
    "deepseek_v2": deepseek_v2_flags,
    "deepseek_ocr2": deepseek_v2_flags,
    "unlimited_ocr": deepseek_v2_flags,
    "cohere2_moe": flag(expert_selection_fn=["softmax", "sigmoid"]),
    "dbrx": flag(moe_normalize_expert_weights=[None, 1.0, 2.0]),
    "deepseek_v4": flag(scoring_func=["sqrtsoftplus", "sigmoid"]),
    "inkling2_loop": flag(scoring_func=["sqrtsoftplus", "sigmoid"]),
    "inkling2": flag(scoring_func=["sqrtsoftplus", "sigmoid"]),
    "inkling": flag(n_shared_experts=[1, 2, 3]),
    "ernie4_5_moe": flag(moe_norm_min=[1e-12, 0.6]),
    "ernie4_5_vl_moe": flag(moe_norm_min=[1e-12, 0.6]),
    "kolibri1": flag(norm_topk_prob=[True, False]),
    "laguna": flag(moe_router_logit_softcapping=[0.0, 0.8]),
    "lfm2_moe": flag(use_expert_bias=[True, False]),
    "longcat_flash": flag(zero_expert_num=[0, 4, 7], router_bias=[True, False]),
    "muse_spark": flag(output_multiplier=[0.18, 1.3]),
    "nllb_moe": flag(
        expert_capacity=[3, 64],
        moe_eval_capacity_token_fraction=[0.0, 0.1, 1.0],
        normalize_router_prob_before_dropping=[True, False],
        batch_prioritized_routing=[True, False],
        router_bias=[True, False],
    ),
    "phimoe": flag(router_jitter_noise=[0.01, 0.3]),
    "switch_transformers": flag(expert_capacity=[1, 3, 64], router_bias=[True, False]),
    "zaya": flag(router_hidden_size=[6, 11]),
}


def build_hf(folder: str, name: str, config: Any) -> nn.Module:
    module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    if folder == "dbrx":
        return module.DbrxFFN(SimpleNamespace(ffn_config=config))
    if folder == "ernie4_5_vl_moe":
        config.moe_intermediate_size, config.moe_num_shared_experts = [4, 4], 0
        return getattr(module, name)(config)
    if folder == "zaya":
        return getattr(module, name)(config, 1)
    return getattr(module, name)(config)


def randomise_parameters(router: nn.Module) -> None:
    with torch.no_grad():
        for tensor in [*router.parameters(), *router.buffers()]:
            if tensor.is_floating_point():
                tensor.normal_(std=0.5)


class Answer(SimpleNamespace):
    """[T, E] dense weights and selection of a Hugging Face router, and what ours needs besides the
    tokens.
    """

    weights: Tensor
    selected: Tensor


def dense(weights: Tensor, indices: Tensor, experts: int) -> Answer:
    tokens = indices.shape[0]
    return Answer(
        weights=torch.zeros(tokens, experts).scatter(1, indices, weights.float()),
        selected=torch.zeros(tokens, experts, dtype=torch.bool).scatter(1, indices, True),
    )


def ask_hf(folder: str, router: nn.Module, x_BSD: Tensor, bias: Tensor, experts: int) -> Answer:
    """Run the module as its model does."""
    flat = x_BSD.reshape(-1, x_BSD.shape[-1])
    if folder == "afmoe":
        _, weights, indices = router(x_BSD, bias)
    elif folder in ("minimax_m2", "hy_v3", "lfm2_moe"):
        _, weights, indices = router(flat, bias)
    elif folder == "dbrx":
        weights, indices = router.route_tokens_to_experts(router.router(flat))
    elif folder == "ernie4_5_vl_moe":
        _, weights, indices = router.text_moe.gate(flat)
    elif folder == "llama4":
        scores, logits = router(flat)
        return Answer(weights=scores, selected=scores > 0, logits=logits)
    elif folder == "switch_transformers":
        mask, probability, _ = router(x_BSD)
        mask = mask.reshape(-1, experts)
        return Answer(weights=mask * probability.reshape(-1, 1), selected=mask.bool())
    elif folder == "nllb_moe":
        _, weights, _ = router(flat)
        return Answer(weights=weights, selected=weights > 0)
    elif folder == "inkling":
        _, weights, indices, shared = router(x_BSD)
        return Answer(**vars(dense(weights, indices, experts)), shared=shared)
    else:
        _, weights, indices = router(flat)[:3]
    return dense(weights, indices, experts)
