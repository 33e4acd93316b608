"""Tiny random transformers models that run, for every MoE directory that has a router: sizes as the
accounting tests draw them, and what a forward pass needs beyond them.
"""

import importlib
import random
import sys
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "accounting"))

_families = importlib.import_module("hf_tiny_families")
_models = importlib.import_module("hf_tiny_models")
FAMILIES: dict[str, Any] = _families.FAMILIES
SINCE_5_24: dict[str, Any] = _families.SINCE_5_24

WITHOUT_ROUTER = {
    "bamba": "dense: its configuration has no experts in use",
    "gemma4_unified": "dense text model",
    "granite_docling": "dense text model; its one router picks a vision path for a whole image",
    "vitpose_backbone": "an image backbone whose experts are chosen by data set, not by a router",
}
"""Directories of the 77 in which nothing routes tokens."""

LATENT = (
    *(
        "axk1",
        "axk2",
        "bailing_hybrid",
        "deepseek_v2",
        "deepseek_v3",
        "deepseek_v32",
        "glm4_moe_lite",
        "glm_moe_dsa",
        "kimi_linear",
        "hy_v4_vl",
        "sarvam_mla",
    ),
    *("mistral4", "longcat_flash", "minimax_m3_vl"),
)
"""Families with latent attention: as many key heads as query heads."""


LAST = {"glm5_next": "indexed_attention"}
"""The kind of attention beside the linear one, of which a model needs at least one layer."""


def build(name: str, seed: int, **changes: Any) -> tuple[Any, nn.Module]:
    """(configuration, model in evaluation mode) of a family at a random size, with random weights
    and correction biases.
    """
    family = FAMILIES[name]
    model_name: str = MODELS.get(name) or family.model
    package = f"transformers.models.{name}"
    config_class = getattr(
        importlib.import_module(f"{package}.configuration_{name}"), family.config
    )
    model_class = getattr(_models.model_classes(name), model_name)
    rng = random.Random(f"capture {name} {seed}")
    fields = _models.fields_of(config_class, family, rng)
    if name in LATENT:
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    if set(fields.get("layer_types") or ["full"]) == {"linear_attention"}:
        fields["layer_types"][-1] = LAST.get(name, "full_attention")
    RUNNABLE.get(name, lambda fields, rng: None)(fields, rng)
    config = config_class(**{**fields, **changes})
    torch.manual_seed(seed)
    model = model_class(
        _models.wrapped(name, config) if name in _models.WRAPPED and name not in MODELS else config
    ).eval()
    randomise(model)
    return config, model


def randomise(model: nn.Module) -> None:
    """Biases that change the selection, and tables that name an expert once for each token."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, buffer in [*model.named_buffers(), *model.named_parameters()]:
            last = name.rpartition(".")[2]
            if last in ("e_score_correction_bias", "expert_bias", "balancing_biases"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.2)
            elif last == "tid2eid":
                gate = cast(Any, model.get_submodule(name.rpartition(".")[0]))
                order = torch.rand(buffer.shape[0], gate.num_experts, generator=generator).argsort(
                    dim=1
                )
                buffer.copy_(order[:, : buffer.shape[1]])
            elif buffer.dim() == 2 and (
                "router" in name or name.endswith(("gate.weight", "gate.classifier.weight"))
            ):
                buffer.copy_(
                    torch.randn(buffer.shape, generator=generator)
                )  # scores so far apart that rounding decides nothing


def _groups(fields: dict[str, Any], rng: random.Random) -> None:
    """Eight experts in two or four groups, as many kept as the slots need."""
    name = next(
        name for name in ("n_routed_experts", "num_experts", "num_local_experts") if name in fields
    )
    fields |= {name: 8, "n_group": rng.choice((2, 4)), "topk_group": 2}
    fields["num_experts_per_tok"] = rng.choice((1, 2, 3))


def _rotations(fields: dict[str, Any], rng: random.Random) -> None:
    fields |= {
        "qk_rope_head_dim": 8,
        "head_dim": 8,
        "q_lora_rank": 20,
        "zero_expert_num": rng.choice((2, 5)),
        "moe_topk": rng.choice((2, 3)),
    }


def _per_layer(fields: dict[str, Any], rng: random.Random) -> None:
    fields |= {"vocab_size_per_layer_input": fields["vocab_size"], "enable_moe_block": True}


def _clip(fields: dict[str, Any], rng: random.Random) -> None:
    fields["attn_config"]["clip_qkv"] = 8.0


def _sections(fields: dict[str, Any], rng: random.Random) -> None:
    fields |= {
        "head_dim": 16,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.5,
        },
    }
    fields["rope_parameters"]["mrope_section"] = [2, 1, 1]


def _shared(fields: dict[str, Any], rng: random.Random) -> None:
    fields["n_shared_experts"] = rng.choice((1, 2, 3))


def _every_kind(fields: dict[str, Any], rng: random.Random) -> None:
    fields["layers_block_type"] = ["linear_attention", "moe", "full_attention", "moe", "mlp"]


def _same_windows(fields: dict[str, Any], rng: random.Random) -> None:
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "v_head_dim": 8}
    fields |= sizes | {f"swa_{name}": size for name, size in sizes.items()}


def _two(fields: dict[str, Any], rng: random.Random) -> None:
    fields["num_experts_per_tok"] = 2


RUNNABLE: dict[str, Any] = {
    **dict.fromkeys(
        (
            "axk1",
            "bailing_hybrid",
            "beam",
            "deepseek_v3",
            "deepseek_v32",
            "exaone_moe",
            "dots1",
            "glm4_moe",
        ),
        _groups,
    ),
    "longcat_flash": _rotations,
    "gemma4": _per_layer,
    "diffusion_gemma": _per_layer,
    "dbrx": _clip,
    "glm4v_moe": _sections,
    "inkling": _shared,
    "phimoe": _two,
    "mimo_v2_flash": _same_windows,
    "nemotron_h": _every_kind,
}
MODELS = {"diffusion_gemma": "DiffusionGemmaEncoderTextModel"}
"""Where the class with the parameters does not take token ids by itself."""
