"""The minis: published architectures at sizes that train on a laptop, as plain ``DecoderConfig``
values.

Experts, slots, zero-compute and shared experts are the original's own numbers, and the widths of
experts, dense feed-forwards, heads and latents its shares of the model width, so a layer holds and
runs the same fractions. What cannot keep its share: the router (it grows with the width, not its
square), the layers (so one leading dense or hash layer stands for one to three), and embeddings,
which every ratio leaves out. ``preset`` makes their configurations;
``moe_lab.accounting.ratios`` compares them with their originals (docs/decoder.md).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moe_lab.errors import require
from moe_lab.model.config import DecoderConfig


@dataclass(frozen=True)
class Mini:
    """
    Attributes:
        original: identifier of the published model in ``models.json``.
        config: ``DecoderConfig.to_dict()`` without what is left at its default.
        training: ``RunConfig`` fields that the original's report gives, or that stand for what it
            gives.
        left_out: what of the architecture the mini does not have.
    """

    original: str
    config: Mapping[str, Any]
    training: Mapping[str, Any] = field(default_factory=dict)
    left_out: str = ""


def _moe(d_model: int, d_expert: int, shared: int = 0, **router: Any) -> dict[str, Any]:
    return {
        "d_model": d_model,
        "d_expert": d_expert,
        "num_shared_experts": shared,
        "router": router,
    }


def _longcat(experts: int, zero: int, scale: float) -> dict[str, Any]:
    """Twelve slots of which eight are real experts on average (arXiv 2509.01322). The controller's
    rate is not published: with hundreds of experts 0.1 takes some 500 steps to the target, 0.5 a
    hundred.
    """
    controller = {"kind": "proportional", "rate": 0.5, "target_ffn_count": 8.0}
    return {
        "kind": "longcat",
        "num_experts": experts,
        "num_zero_experts": zero,
        "top_k": 12,
        "routed_scaling_factor": scale,
        "controller": controller,
        "device_groups": 8,
    }


def _sigmoid(experts: int, scale: float, **groups: int) -> dict[str, Any]:
    """DeepSeek-V3's router, its bias moved by gamma = 0.001 a step (arXiv 2412.19437)."""
    controller = {"kind": "sign", "rate": 1e-3}
    shape = {
        "num_experts": experts,
        "top_k": 8,
        "norm_topk_prob": True,
        "routed_scaling_factor": scale,
    }
    return {"kind": "deepseek_v3", **shape, "controller": controller, **groups}


_SHARED = {"vocab_size": 2048, "context_length": 128, "tie_embeddings": False}
_DEVICE_LOSS = {
    "router_aux_loss_coef": 0.0,
    "router_z_loss_coef": 0.0,
    "router_own_loss_coef": 1e-3,
}
_SEQUENCE_LOSS = {"router_aux_loss_coef": 1e-4, "router_z_loss_coef": 0.0}

MINIS: dict[str, Mini] = {
    "longcat_flash_mini": Mini(
        "meituan-longcat/LongCat-Flash-Chat",
        {
            "d_model": 96,
            "num_layers": 2,
            "num_heads": 4,
            "d_dense": 192,
            "wiring": "shortcut",
            "latent_attention": {
                "q_rank": 24,
                "kv_rank": 8,
                "nope_dim": 32,
                "rope_dim": 16,
                "value_dim": 32,
                "scale_latents": True,
            },
            "moe": _moe(96, 32, **_longcat(512, 256, 6.0)),
            "mtp": {"num_modules": 1, "loss_coef": 0.1},
            "hidden_z_loss_coef": 1e-7,
        },
        _DEVICE_LOSS,
        "28 layers are 2",
    ),
    "longcat_2_mini": Mini(
        "meituan-longcat/LongCat-2.0",
        {
            "d_model": 96,
            "num_layers": 2,
            "num_heads": 3,
            "d_dense": 144,
            "wiring": "shortcut",
            "latent_attention": {
                "q_rank": 18,
                "kv_rank": 6,
                "nope_dim": 32,
                "rope_dim": 8,
                "value_dim": 32,
                "scale_latents": True,
            },
            "sparse_attention": {
                "top_k": 32,
                "num_heads": 3,
                "head_dim": 16,
                "initial": 1,
                "local": 16,
                "share": 2,
            },
            "moe": _moe(96, 24, **_longcat(768, 128, 9.0)),
            "ngram": {"max_n": 5, "num_splits": 4, "table_ratio": 5.1},
            "amplification": "sqrt",
            "mtp": {"num_modules": 3, "loss_coef": 0.1},
            "hidden_z_loss_coef": 1e-7,
        },
        _DEVICE_LOSS,
        "38 layers are 2; the tables keep their share of all parameters, not their rows per "
        "vocabulary entry (100.6)",
    ),
    "deepseek_v3_mini": Mini(
        "deepseek-ai/DeepSeek-V3",
        {
            "d_model": 112,
            "num_layers": 6,
            "num_heads": 8,
            "d_dense": 288,
            "num_dense_layers": 1,
            "latent_attention": {
                "q_rank": 24,
                "kv_rank": 8,
                "nope_dim": 32,
                "rope_dim": 16,
                "value_dim": 32,
            },
            "moe": _moe(112, 32, 1, **_sigmoid(256, 2.5, num_groups=8, topk_groups=4)),
            "mtp": {"num_modules": 1, "loss_coef": 0.3},
        },
        _SEQUENCE_LOSS,
        "61 layers, 3 of them dense, are 6 and 1; the MTP module has a dense feed-forward "
        "instead of a MoE",
    ),
    "deepseek_v4_mini": Mini(
        "deepseek-ai/DeepSeek-V4-Flash",
        {
            "d_model": 64,
            "num_layers": 5,
            "num_heads": 5,
            "num_kv_heads": 1,
            "head_dim": 32,
            "num_hash_layers": 1,
            "sparse_attention": {"top_k": 32, "num_heads": 1, "head_dim": 32, "local": 16},
            "moe": _moe(
                64,
                32,
                1,
                kind="sqrt_softplus_topk",
                num_experts=256,
                top_k=6,
                norm_topk_prob=True,
                norm_eps=1e-20,
                routed_scaling_factor=1.5,
                controller={"kind": "sign", "rate": 1e-3},
            ),
            "mtp": {"num_modules": 1, "loss_coef": 0.3},
        },
        _SEQUENCE_LOSS,
        "43 layers, 3 of them hashed, are 5 and 1; grouped-query attention under an indexer stands "
        "for compressed attention; no hyper-connections, no clamp of SwiGLU",
    ),
    "kimi_k2_mini": Mini(
        "moonshotai/Kimi-K2-Instruct",
        {
            "d_model": 112,
            "num_layers": 4,
            "num_heads": 4,
            "d_dense": 288,
            "num_dense_layers": 1,
            "latent_attention": {
                "q_rank": 24,
                "kv_rank": 8,
                "nope_dim": 32,
                "rope_dim": 16,
                "value_dim": 32,
            },
            "moe": _moe(112, 32, 1, **_sigmoid(384, 2.827)),
        },
        _SEQUENCE_LOSS,
        "61 layers, 1 of them dense, are 4 and 1",
    ),
    "qwen3_mini": Mini(
        "Qwen/Qwen3-30B-A3B",
        {
            "d_model": 96,
            "num_layers": 4,
            "num_heads": 8,
            "num_kv_heads": 1,
            "head_dim": 24,
            "qk_norm": "head",
            "moe": _moe(96, 36, kind="softmax_topk", num_experts=128, top_k=8, norm_topk_prob=True),
        },
        {"router_aux_loss_coef": 1e-3, "router_z_loss_coef": 0.0},
        "48 layers are 4",
    ),
    "olmoe_mini": Mini(
        "allenai/OLMoE-1B-7B",
        {
            "d_model": 96,
            "num_layers": 4,
            "num_heads": 4,
            "qk_norm": "width",
            "moe": _moe(96, 48, kind="softmax_topk", num_experts=64, top_k=8),
        },
        {"router_aux_loss_coef": 1e-2, "router_z_loss_coef": 1e-3},
        "16 layers are 4",
    ),
}
"""Name -> mini. ``_SHARED`` is added to every configuration."""


def find_mini(name: str) -> Mini:
    """The mini of that name. Raises ``ConfigError`` for an unknown name."""
    require(name in MINIS, f"a mini among {', '.join(MINIS)}", repr(name), field="mini")
    return MINIS[name]


def mini_config(name: str) -> dict[str, Any]:
    """The plain ``DecoderConfig`` values of a mini."""
    return {**_SHARED, **find_mini(name).config}


PRESETS = tuple(MINIS)


def preset(name: str, **changes: Any) -> DecoderConfig:
    """The decoder of that name, with ``changes`` of its fields (``vocab_size``, ``context_length``,
    ...).

    Raises:
        ConfigError: an unknown name, or changes that make no decoder.
    """
    return DecoderConfig.from_dict({**mini_config(name), **changes})
