"""Which transformers classes stand for each MoE directory of the library, and which sizes go
together in them.

``FAMILIES`` is the text configuration and the class that owns what is counted; ``WRAPPERS`` the
multimodal models around some of them; ``RAW`` the layer patterns of released ``config.json`` files.
"""

import importlib.util
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

NOT_COVERED = {
    "vitpose_backbone": "an image backbone: its experts are chosen by data set, not by token, "
    "and there is no vocabulary",
}


@dataclass(frozen=True)
class Family:
    """
    Attributes:
        config: class of the text configuration.
        model: class that owns everything that is counted; ``head`` adds a separate output matrix
            where this is only the text model.
        fixed: fields that are not drawn.
        choices: fields drawn from other values than usual; for a list with one entry per layer, the
            entries as one text.
        adjust: changes what was drawn where fields depend on each other.
        directory: where the model class is, if the configuration's directory has none.
    """

    config: str
    model: str
    head: bool = False
    fixed: Mapping[str, Any] = field(default_factory=dict)
    choices: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    adjust: Callable[[dict[str, Any], random.Random], None] | None = None
    directory: str = ""


def causal(stem: str, **extra: Any) -> Family:
    return Family(f"{stem}Config", f"{stem}ForCausalLM", **extra)


def text_causal(stem: str, **extra: Any) -> Family:
    return Family(f"{stem}TextConfig", f"{stem}ForCausalLM", **extra)


def text_part(stem: str, model: str = "", **extra: Any) -> Family:
    return Family(f"{stem}TextConfig", model or f"{stem}TextModel", head=True, **extra)


def equal_heads(drawn: dict[str, Any], rng: random.Random) -> None:
    drawn["num_key_value_heads"] = drawn["num_attention_heads"]


def nested_dbrx(drawn: dict[str, Any], rng: random.Random) -> None:
    drawn["attn_config"] = {"kv_n_heads": rng.choice((1, 2)), "rope_theta": 10000.0}
    drawn["ffn_config"] = {
        "ffn_hidden_size": rng.choice((24, 40)),
        "moe_num_experts": rng.choice((4, 6)),
        "moe_top_k": 2,
    }


def shared_cache(drawn: dict[str, Any], rng: random.Random) -> None:
    """The layers that keep a cache must show every type that the borrowing ones have."""
    layers = drawn["num_hidden_layers"]
    drawn["layer_types"] = [
        ("sliding_attention", "full_attention")[layer % 2] for layer in range(layers)
    ]
    drawn["layer_types"][-1] = "full_attention"
    drawn["num_kv_shared_layers"] = rng.choice((0, 1)) if layers > 3 else 0
    drawn["global_head_dim"] = rng.choice((16, 24))
    drawn["num_global_key_value_heads"] = rng.choice((None, 1))


def borrowed_latents(drawn: dict[str, Any], rng: random.Random) -> None:
    layers = drawn["num_hidden_layers"]
    drawn["no_rope_layers"] = [rng.choice((0, 1)) for _ in range(layers)]
    drawn["kv_source_layers"] = [
        layer - 1 if layer == layers - 1 else layer for layer in range(layers)
    ]
    drawn["no_rope_layers"][-1] = drawn["no_rope_layers"][-2]
    equal_heads(drawn, rng)


def own_sliding_sizes(drawn: dict[str, Any], rng: random.Random) -> None:
    heads = rng.choice((4, 6))
    drawn |= {
        "swa_num_attention_heads": heads,
        "swa_num_key_value_heads": heads,
        "swa_q_lora_rank": 12,
        "swa_kv_lora_rank": 8,
    }
    drawn |= {"swa_qk_nope_head_dim": 6, "swa_v_head_dim": rng.choice((6, 10)), "swa_head_dim": 8}
    equal_heads(drawn, rng)


def heads_per_layer(drawn: dict[str, Any], rng: random.Random) -> None:
    drawn["num_attention_heads_per_layer"] = [
        rng.choice((2, 4)) for _ in range(drawn["num_hidden_layers"])
    ]
    drawn["gating"] = rng.choice((True, "per-head", "per-channel"))


def memories(drawn: dict[str, Any], rng: random.Random) -> None:
    """An n-gram memory stands in a linear layer; layers are counted from 1 there."""
    linear = [layer + 1 for layer in range(drawn["num_hidden_layers"]) if layer % 2 == 0]
    drawn["layer_types"] = [
        ("linear_attention", "indexed_attention")[layer % 2]
        for layer in range(drawn["num_hidden_layers"])
    ]
    drawn["eos_token_id"] = 1
    drawn["ple_layer_ids"] = rng.choice(([], linear[:1], linear))


def no_rotation(drawn: dict[str, Any], rng: random.Random) -> None:
    drawn["qk_rope_head_dim"] = 0
    equal_heads(drawn, rng)


def borrowed_width(drawn: dict[str, Any], rng: random.Random) -> None:
    drawn["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [2, 2, 2],
    }
    drawn["hidden_size"] = 12 * drawn["num_attention_heads"]


def padded_head(drawn: dict[str, Any], rng: random.Random) -> None:
    drawn["unpadded_vocab_size"] = drawn["vocab_size"] - rng.choice((0, 5))


def loop(drawn: dict[str, Any], rng: random.Random) -> None:
    padded_head(drawn, rng)
    drawn |= {"num_hidden_layers": 8, "loop_layer_index_start": 2, "loop_layer_index_end": 6}
    drawn["layer_types"] = [rng.choice(("hybrid", "hybrid_sliding")) for _ in range(8)]
    drawn |= {"loop_num_passes": rng.choice((1, 2, 3)), "loop_gate_rank": rng.choice((4, 6))}


def small_sections(drawn: dict[str, Any], rng: random.Random) -> None:
    half = drawn["qk_rope_head_dim"] // 2
    drawn["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [half, 0, 0],
    }


MLP = {"mlp_layer_types": ("dense sparse",)}
WINDOWS = {"layer_types": ("sliding_attention full_attention",)}
LINEAR = {"layer_types": ("linear_attention full_attention",)}
HYBRID = {"layer_types": ("hybrid hybrid_sliding",)}

DENSE: dict[str, Family] = {
    "llama": causal("Llama"),
    "mistral": causal("Mistral"),
    "olmo2": causal("Olmo2"),
    "qwen2": causal("Qwen2"),
    "qwen3": causal("Qwen3"),
}
"""Directories without experts that are counted too."""

FAMILIES: dict[str, Family] = {
    "afmoe": causal("Afmoe", choices=WINDOWS),
    "aria": Family("AriaTextConfig", "AriaTextForCausalLM"),
    "axk1": causal("AXK1", choices=MLP),
    "axk2": causal("AXK2", choices=MLP),
    "bailing_hybrid": causal("BailingHybrid", choices={**LINEAR, **MLP}),
    "bamba": causal("Bamba", choices={"attn_layer_indices": ([], [1], [0, 2])}),
    "beam": causal("Beam", choices={**WINDOWS, **MLP}),
    "cohere2_moe": causal("Cohere2Moe", choices={**WINDOWS, **MLP}),
    "dbrx": causal("Dbrx", fixed={"tie_word_embeddings": False}, adjust=nested_dbrx),
    "deepseek_ocr2": text_part("DeepseekOcr2", choices=MLP),
    "deepseek_v2": causal("DeepseekV2", choices={"q_lora_rank": (None, 20)}),
    "deepseek_v3": causal("DeepseekV3", choices={"q_lora_rank": (None, 20)}),
    "deepseek_v32": causal("DeepseekV32", choices=MLP),
    "deepseek_v4": causal(
        "DeepseekV4",
        choices={
            "layer_types": (
                "sliding_attention compressed_sparse_attention heavily_compressed_attention",
            )
        },
    ),
    "diffusion_gemma": text_part(
        "DiffusionGemma",
        "DiffusionGemmaDecoderModel",
        fixed={"tie_word_embeddings": True},
        adjust=shared_cache,
    ),
    "doge": causal("Doge"),
    "dots1": causal("Dots1", choices=WINDOWS),
    "dots3_note": text_causal(
        "Dots3Note",
        choices={
            **MLP,
            "n_shared_experts": (1, 2),
            "layer_types": ("sliding_attention indexed_attention",),
        },
        adjust=own_sliding_sizes,
    ),
    "ernie4_5_moe": causal("Ernie4_5_Moe"),
    "ernie4_5_vl_moe": text_part(
        "Ernie4_5_VLMoe",
        choices={**MLP, "moe_intermediate_size": ([24, 12], [36, 20])},
        adjust=borrowed_width,
    ),
    "exaone_moe": causal("ExaoneMoe", choices={**WINDOWS, **MLP}),
    "flex_olmo": causal("FlexOlmo"),
    "flint": causal("Flint", choices={**WINDOWS, "mlp_only_layers": ([], [0], [0, 1])}),
    "gemma4": text_causal("Gemma4", adjust=shared_cache),
    "gemma4_unified": text_causal("Gemma4Unified", adjust=shared_cache),
    "glm4_moe": causal("Glm4Moe"),
    "glm4_moe_lite": causal("Glm4MoeLite", choices={**MLP, "q_lora_rank": (None, 20)}),
    "glm4v_moe": text_part("Glm4vMoe"),
    "glm5_next": text_part(
        "Glm5Next",
        choices={**MLP, "layer_types": ("linear_attention indexed_attention",)},
        adjust=no_rotation,
    ),
    "glm_moe_dsa": causal("GlmMoeDsa", choices={**MLP, "index_topk_freq": (1, 2)}),
    "gpt_oss": causal("GptOss", choices=WINDOWS),
    "granite_docling": text_part("GraniteDocling"),
    "granitemoe": causal("GraniteMoe"),
    "granitemoe_swa": causal("GraniteMoeSWA", choices=WINDOWS),
    "granitemoehybrid": causal(
        "GraniteMoeHybrid", choices={**LINEAR, "num_local_experts": (0, 4, 6)}
    ),
    "granitemoeshared": causal("GraniteMoeShared", choices={"shared_intermediate_size": (0, 20)}),
    "hunyuan_v1_moe": causal("HunYuanMoEV1"),
    "hy_v3": causal("HYV3", choices={**MLP, "num_shared_experts": (1, 2)}),
    "hy_v4": causal("HYV4", choices=MLP),
    "inkling": text_causal("Inkling", choices={**HYBRID, **MLP}),
    "inkling2": text_causal("Inkling2", choices=HYBRID, adjust=padded_head),
    "jamba": causal("Jamba"),
    "jetmoe": causal("JetMoe"),
    "kimi_linear": causal("KimiLinear", choices={**LINEAR, **MLP, "q_lora_rank": (None, 20)}),
    "kolibri1": causal("Kolibri1", choices=WINDOWS),
    "laguna": causal("Laguna", choices={**WINDOWS, **MLP}, adjust=heads_per_layer),
    "lfm2_moe": causal("Lfm2Moe", choices={"layer_types": ("conv full_attention",)}),
    "llama4": text_causal("Llama4"),
    "longcat_flash": causal("LongcatFlash"),
    "mellum": causal("Mellum", choices={**WINDOWS, **MLP}),
    "mimo_v2_flash": causal("MiMoV2Flash", choices={**WINDOWS, **MLP}),
    "minimax": causal("MiniMax", choices=LINEAR),
    "minimax_m2": causal("MiniMaxM2"),
    "minimax_m3_vl": text_causal(
        "MiniMaxM3VL", choices={**MLP, "layer_types": ("minimax_m3_sparse full_attention",)}
    ),
    "mistral4": causal("Mistral4"),
    "mistral_large4": text_part("MistralLarge4", choices=MLP, adjust=borrowed_latents),
    "mixtral": causal("Mixtral"),
    "muse_spark": text_part(
        "MuseSpark", choices={**WINDOWS, **MLP}, fixed={"tie_word_embeddings": False}
    ),
    "nemotron_h": causal(
        "NemotronH",
        choices={
            "layers_block_type": ("linear_attention full_attention moe mlp",),
            "moe_latent_size": (None, 20),
        },
        fixed={"num_hidden_layers": 5},
    ),
    "nllb_moe": Family("NllbMoeConfig", "NllbMoeForConditionalGeneration"),
    "olmoe": causal("Olmoe"),
    "openai_privacy_filter": Family("OpenAIPrivacyFilterConfig", "OpenAIPrivacyFilterModel"),
    "phimoe": causal("Phimoe"),
    "qwen2_moe": causal("Qwen2Moe", choices={"mlp_only_layers": ([], [0], [1, 2])}),
    "qwen3_5_moe": text_causal("Qwen3_5Moe", choices=LINEAR),
    "qwen3_moe": causal(
        "Qwen3Moe", choices={"mlp_only_layers": ([], [0], [1, 2]), "head_dim": (None, 8, 20)}
    ),
    "qwen3_next": causal("Qwen3Next", choices={**LINEAR, "mlp_only_layers": ([], [0])}),
    "qwen3_omni_moe": Family("Qwen3OmniMoeTextConfig", "Qwen3OmniMoeThinkerTextModel", head=True),
    "qwen3_vl_moe": text_part("Qwen3VLMoe"),
    "qwen4_exp": text_causal(
        "Qwen4Exp",
        choices={"head_dim": (16,), "indexer_head_dim": (16, 24)},
        adjust=memories,
    ),
    "solar_open": causal("SolarOpen"),
    "step3p7": Family(
        "Step3p7TextConfig",
        "Step3p7TextModel",
        head=True,
        choices={**WINDOWS, **MLP, "num_sliding_attention_heads": (2, 4)},
    ),
    "switch_transformers": Family(
        "SwitchTransformersConfig", "SwitchTransformersForConditionalGeneration"
    ),
    "unlimited_ocr": text_part("UnlimitedOcr", choices=MLP),
    "zaya": causal("Zaya", choices=HYBRID, fixed={"num_experts_per_tok": 1}),
}

SINCE_5_24: dict[str, Family] = {
    "hy_v4_vl": text_part("HYV4VL", choices=MLP, adjust=small_sections),
    "inkling2_loop": text_causal("Inkling2Loop", adjust=loop),
    "lara_mini": causal(
        "LaraMini",
        choices={"layer_types": ("linear_attention sliding_attention full_attention",)},
    ),
    "sarvam_mla": Family(
        "SarvamMLAConfig",
        "DeepseekV3ForCausalLM",
        choices={"q_lora_rank": (None, 20)},
        directory="deepseek_v3",
    ),
    "sarvam_moe": Family("SarvamMoEConfig", "Glm4MoeForCausalLM", directory="glm4_moe"),
}
"""Families that transformers 5.23 does not have."""
if importlib.util.find_spec("transformers.models.sarvam_moe") is not None:
    FAMILIES |= SINCE_5_24

WRAPPERS = {
    "aria": ("AriaConfig", "AriaForConditionalGeneration"),
    "ernie4_5_vl_moe": ("Ernie4_5_VLMoeConfig", "Ernie4_5_VLMoeForConditionalGeneration"),
    "gemma4": ("Gemma4Config", "Gemma4ForConditionalGeneration"),
    "llama4": ("Llama4Config", "Llama4ForConditionalGeneration"),
    "qwen3_5_moe": ("Qwen3_5MoeConfig", "Qwen3_5MoeForConditionalGeneration"),
    "qwen3_vl_moe": ("Qwen3VLMoeConfig", "Qwen3VLMoeForConditionalGeneration"),
    "qwen3_omni_moe": ("Qwen3OmniMoeThinkerConfig", "Qwen3OmniMoeThinkerForConditionalGeneration"),
    "step3p7": ("Step3p7Config", "Step3p7ForConditionalGeneration"),
    "unlimited_ocr": ("UnlimitedOcrConfig", "UnlimitedOcrForConditionalGeneration"),
}

RAW: dict[str, dict[str, Any]] = {
    "axk1": {"num_hidden_layers": 6, "first_k_dense_replace": 1, "moe_layer_freq": 2},
    "bamba": {"num_hidden_layers": 4, "attn_layer_indices": [1]},
    "cohere2_moe": {"num_hidden_layers": 4, "first_k_dense_replace": 2},
    "deepseek_v4": {
        "num_hidden_layers": 5,
        "compress_ratios": [128, 128, 4, 128, 4, 0],
        "num_hash_layers": 2,
        "num_nextn_predict_layers": 1,
    },
    "dots3_note": {
        "num_hidden_layers": 6,
        "swa_num_attention_heads": 2,
        "swa_num_key_value_heads": 2,
        "swa_q_lora_rank": 10,
    },
    "ernie4_5_moe": {"num_hidden_layers": 4, "moe_layer_start_index": 1, "moe_layer_end_index": 2},
    "gemma4": {
        "num_hidden_layers": 6,
        "global_head_dim": 24,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
    },
    "glm5_next": {
        "num_hidden_layers": 6,
        "linear_attn_config": {"head_dim": 10, "num_heads": 3},
        "index_topk_pattern": "FFSSFS",
    },
    "glm_moe_dsa": {
        "num_hidden_layers": 8,
        "first_k_dense_replace": 3,
        "index_topk_freq": 4,
        "index_skip_topk_offset": 3,
    },
    "granitemoehybrid": {
        "num_hidden_layers": 4,
        "layer_types": ["mamba", "attention", "mamba", "mamba"],
    },
    "inkling": {
        "num_hidden_layers": 6,
        "local_layer_ids": [0, 2],
        "dense_mlp_idx": 2,
        "dense_intermediate_size": 56,
    },
    "kimi_linear": {
        "num_hidden_layers": 4,
        "linear_attn_config": {
            "full_attn_layers": [2, 4],
            "kda_layers": [1, 3],
            "head_dim": 10,
            "num_heads": 3,
            "short_conv_kernel_size": 3,
        },
    },
    "llama4": {"num_hidden_layers": 6, "interleave_moe_layer_step": 2},
    "mimo_v2_flash": {"num_hidden_layers": 7},
    "minimax_m3_vl": {
        "num_hidden_layers": 4,
        "moe_layer_freq": [0, 0, 1, 1],
        "sparse_attention_config": {
            "sparse_num_index_heads": 2,
            "sparse_index_dim": 8,
            "sparse_attention_freq": [0, 1, 1, 0],
        },
    },
    "mistral_large4": {"num_hidden_layers": 6, "first_k_dense_replace": 2},
    "nemotron_h": {"num_hidden_layers": 6, "hybrid_override_pattern": "MEM*E-"},
    "qwen3_next": {"num_hidden_layers": 6, "full_attention_interval": 3},
    "qwen4_exp": {
        "num_hidden_layers": 6,
        "full_attention_interval": 3,
        "ple_layer_ids": [1, 4],
        "eos_token_id": 1,
    },
    "step3p7": {
        "num_hidden_layers": 6,
        "moe_layers_enum": "2,3,5",
        "attention_other_setting": {"num_attention_heads": 2},
        "layer_types": ["full_attention", "sliding_attention"] * 3,
        "num_local_experts": None,
    },
    "unlimited_ocr": {"num_hidden_layers": 4, "first_k_dense_replace": 2},
}
"""Layer patterns as ``config.json`` files of releases write them, which the library's classes
translate when they are read.
"""
