"""Tiny random transformers models on the meta device: the oracle that counts are compared with.

``draw`` picks sizes and switches at random, so that the same code also meets configurations that
nobody wrote down.
"""

import dataclasses
import importlib
import random
from typing import Any

from hf_tiny_families import DENSE, FAMILIES, RAW, WRAPPERS, Family, equal_heads, no_rotation

COMMON: dict[str, tuple[Any, ...]] = {
    "vocab_size": (96, 131),
    "hidden_size": (48, 96),
    "d_model": (48, 96),
    "intermediate_size": (40, 72),
    "intermediate_size_mlp": (40, 88),
    "dense_intermediate_size": (56, 64),
    "moe_intermediate_size": (24, 36),
    "expert_ffn_hidden_size": (24, 36),
    "ffn_hidden_size": (40, 72),
    "shared_expert_intermediate_size": (20, 44),
    "moe_shared_expert_intermediate_size": (20, 44),
    "shared_experts_intermediate_size": (20, 44),
    "shared_intermediate_size": (20, 44),
    "share_expert_dim": (20, 44),
    "moe_hidden_size": (32, 40),
    "num_hidden_layers": (3, 4, 6),
    "num_layers": (2, 4),
    "n_layers": (2, 4),
    "num_attention_heads": (4, 6, 12),
    "n_heads": (4, 6),
    "num_key_value_heads": (1, 2),
    "head_dim": (8, 12, 16),
    "kv_channels": (8, 12),
    "num_experts": (4, 6, 9),
    "n_routed_experts": (4, 6, 9),
    "num_local_experts": (4, 6, 9),
    "moe_num_experts": (4, 6, 9),
    "num_experts_per_tok": (1, 2, 3),
    "top_k_experts": (1, 2, 3),
    "moe_topk": (1, 2, 3),
    "moe_k": (1, 2, 3),
    "n_shared_experts": (0, 1, 2),
    "num_shared_experts": (0, 1, 2),
    "moe_num_shared_experts": (0, 1, 2),
    "zero_expert_num": (0, 2, 5),
    "q_lora_rank": (20, 28),
    "kv_lora_rank": (12, 16),
    "o_lora_rank": (12, 16),
    "o_groups": (2,),
    "qk_nope_head_dim": (8, 10),
    "qk_rope_head_dim": (4, 8),
    "v_head_dim": (6, 12),
    "index_n_heads": (2, 4),
    "index_head_dim": (8, 16),
    "index_topk": (4, 8),
    "index_kpool": (2, 4),
    "gated_norm_rank": (4, 6),
    "linear_head_dim": (8, 12),
    "linear_num_heads": (2, 4),
    "linear_conv_kernel_dim": (2, 4),
    "linear_key_head_dim": (8, 12),
    "linear_value_head_dim": (8, 16),
    "linear_num_key_heads": (2, 4),
    "linear_num_value_heads": (4, 8),
    "mamba_d_state": (4, 8),
    "mamba_d_conv": (2, 4),
    "mamba_expand": (1, 2),
    "mamba_n_heads": (4, 6),
    "mamba_n_groups": (1, 2),
    "mamba_dt_rank": ("auto", 5),
    "mamba_num_heads": (4, 6),
    "mamba_head_dim": (8, 12),
    "ssm_state_size": (4, 8),
    "n_groups": (1, 2),
    "conv_kernel": (2, 4),
    "conv_L_cache": (2, 3),
    "conv_kernel_size": (2, 4),
    "hc_mult": (2, 4),
    "hc_count": (2, 4),
    "hc_lowrank": (6, 10),
    "router_hidden_size": (12, 20),
    "cca_time0": (2, 3),
    "cca_time1": (2, 3),
    "d_rel": (4, 6),
    "rel_extent": (8, 16),
    "swa_num_attention_heads": (4, 6),
    "swa_num_key_value_heads": (1, 2),
    "swa_head_dim": (8, 12),
    "sliding_window": (4, 8),
    "sliding_window_size": (4, 8),
    "decoder_sparse_step": (1, 2),
    "num_dense_layers": (0, 1, 2),
    "first_k_dense_replace": (0, 1, 2),
    "moe_layer_start_index": (0, 1),
    "moe_layer_interval": (1, 2),
    "interleave_moe_layer_step": (1, 2),
    "expert_layer_period": (2, 3),
    "attn_layer_period": (2, 3),
    "expert_layer_offset": (0, 1),
    "attn_layer_offset": (0, 1),
    "vocab_size_per_layer_input": (32, 48),
    "hidden_size_per_layer_input": (0, 8),
    "encoder_layers": (2, 4),
    "decoder_layers": (2, 3),
    "encoder_ffn_dim": (40, 72),
    "decoder_ffn_dim": (40, 56),
    "encoder_attention_heads": (4, 6),
    "decoder_attention_heads": (4, 6),
    "encoder_sparse_step": (0, 2, 3),
    "decoder_sparse_step_": (2,),
    "d_kv": (8, 12),
    "d_ff": (40, 72),
    "num_heads": (4, 6),
    "num_decoder_layers": (2, 4),
    "num_sparse_encoder_layers": (1, 2),
    "num_sparse_decoder_layers": (0, 1, 2),
    "short_conv_kernel_size": (2, 4),
    "layer_group_size": (2, 3),
    "n_layers_per_attn_res_block": (2,),
    "indexer_n_heads": (2, 4),
    "indexer_kv_heads": (1,),
    "indexer_head_dim": (8,),
    "indexer_budget": (8,),
    "indexer_compress_ratio": (4,),
    "ngram_vocab_size_base": (50, 101),
    "heads_per_ngram": (2, 4),
    "ngram_size": (2, 3),
    "ple_conv_kernel_size": (2, 4),
    "make_ngram_vocab_size_divisible_by": (1, 16),
    "prefix_dense_intermediate_size": (None, 56),
    "num_kv_shared_layers": (0, 2),
    **dict.fromkeys(
        (
            "tie_word_embeddings",
            "attention_bias",
            "mlp_bias",
            "use_bias",
            "qkv_bias",
            "lm_head_bias",
            "use_qk_norm",
            "router_bias",
            "mamba_conv_bias",
            "mamba_proj_bias",
            "use_conv_bias",
            "conv_bias",
            "is_moe",
            "enable_moe_block",
            "attention_k_eq_v",
            "use_double_wide_mlp",
        ),
        (False, True),
    ),
}
"""Field -> values that ``draw`` picks from; a field that a configuration class does not have is
left out.
"""


def draw(name: str, seed: int) -> tuple[Any, Any]:
    """(configuration, model on the meta device) of one family at a random size."""
    import torch

    family = (FAMILIES | DENSE)[name]
    package = f"transformers.models.{name}"
    config_class = getattr(
        importlib.import_module(f"{package}.configuration_{name}"), family.config
    )
    model_class = getattr(model_classes(name), family.model)
    config = config_class(**fields_of(config_class, family, random.Random(f"{name}-{seed}")))
    with torch.device("meta"):
        return config, model_class(wrapped(name, config) if name in WRAPPED else config)


def model_classes(name: str) -> Any:
    """The module with the model classes of a family."""
    directory = (FAMILIES | DENSE)[name].directory or name
    return importlib.import_module(f"transformers.models.{directory}.modeling_{directory}")


def fields_of(config_class: Any, family: Family, rng: random.Random) -> dict[str, Any]:
    known = {entry.name for entry in dataclasses.fields(config_class)} | set(family.choices)
    choices = {**COMMON, **family.choices}
    drawn = {key: rng.choice(values) for key, values in choices.items() if key in known}
    drawn |= {"pad_token_id": 0, **family.fixed}
    for key in ("layer_types", "layers_block_type", "mlp_layer_types"):
        kinds = drawn.get(key)
        if isinstance(kinds, str):
            drawn[key] = [rng.choice(kinds.split()) for _ in range(drawn["num_hidden_layers"])]
    if family.adjust is not None:
        family.adjust(drawn, rng)
    return {key: value for key, value in drawn.items() if value is not None or key == "q_lora_rank"}


WRAPPED: dict[str, str] = {"diffusion_gemma": "DiffusionGemmaConfig"}


def wrapped(name: str, config: Any) -> Any:
    """Some text models are built from the whole multimodal configuration."""
    module = importlib.import_module(f"transformers.models.{name}.configuration_{name}")
    return getattr(module, WRAPPED[name])(text_config=config)


def parameters(name: str, config: Any, model: Any) -> int:
    """What a checkpoint holds: ``num_parameters()``, the output matrix where the text model has
    none, and what one version of transformers leaves out and another does not: padded rows of the
    head (5.24), a learned scale that is a buffer (5.23).
    """
    head = (FAMILIES | DENSE)[name].head and not getattr(config, "tie_word_embeddings", False)
    rows = config.vocab_size if head else 0
    if name in ("inkling2", "inkling2_loop"):
        rows += config.vocab_size - model.lm_head.out_features
    scales = (buffer for key, buffer in model.named_buffers() if key == "rotary_emb.alpha")
    return (
        model.num_parameters()
        + rows * config.hidden_size
        + sum(buffer.numel() for buffer in scales)
    )


def wrapper_of(name: str, tied: bool) -> tuple[Any, Any]:
    """(multimodal configuration, model on the meta device): the wrapper and its text part disagree
    on tied embeddings.
    """
    import torch

    configurations = importlib.import_module(f"transformers.models.{name}.configuration_{name}")
    classes = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    text_class = getattr(configurations, FAMILIES[name].config)
    text = text_class(
        **{
            **fields_of(text_class, FAMILIES[name], random.Random(name)),
            "tie_word_embeddings": not tied,
        }
    )
    config = getattr(configurations, WRAPPERS[name][0])(
        text_config=text.to_dict(), tie_word_embeddings=tied
    )
    with torch.device("meta"):
        return config, getattr(classes, WRAPPERS[name][1])(config)


def raw(name: str) -> tuple[dict[str, Any], Any, Any]:
    """(raw configuration, the library's reading of it, model on the meta device)."""
    import torch

    family = (FAMILIES | DENSE)[name]
    configurations = importlib.import_module(f"transformers.models.{name}.configuration_{name}")
    classes = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    config_class = getattr(configurations, family.config)
    patterned = {
        key: values
        for key, values in family.choices.items()
        if not key.endswith(("layer_types", "block_type"))
    }
    adjust = {"dots3_note": equal_heads, "glm5_next": no_rotation}.get(name)
    drawn = fields_of(
        config_class,
        dataclasses.replace(family, choices=patterned, adjust=adjust),
        random.Random(f"raw {name}"),
    )
    values = {key: value for key, value in {**drawn, **RAW[name]}.items() if value is not None}
    config = config_class(
        **{key: list(value) if isinstance(value, list) else value for key, value in values.items()}
    )
    with torch.device("meta"):
        return (
            {**values, "model_type": config_class.model_type},
            config,
            getattr(classes, family.model)(config),
        )
