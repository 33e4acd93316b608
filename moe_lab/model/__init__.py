"""The MoE layer and the small decoder around it: ``MoEConfig`` -> ``MoELayer``, ``DecoderConfig``
-> ``Decoder``.

Configurations, with what they cost, import without torch; modules on first use.

Shape letters of this package: B sequences, S positions, T tokens = B S, D d_model, E experts,
K slots, F d_expert, H heads, G key-value heads, V vocabulary. Tensors carry them as suffix:
``x_TD``.
"""

from typing import TYPE_CHECKING

from moe_lab.lazy import on_first_use
from moe_lab.model.attention_config import LatentAttentionConfig, QKNorm, SparseAttentionConfig
from moe_lab.model.config import Amplification, DecoderConfig, MoEConfig, MTPConfig, Wiring
from moe_lab.model.minis import PRESETS, preset
from moe_lab.model.ngram_config import NgramConfig

if TYPE_CHECKING:
    from moe_lab.model import dispatch
    from moe_lab.model.decoder import IGNORE, Decoder, DecoderOutput
    from moe_lab.model.experts import ExpertBank, SwiGLU
    from moe_lab.model.layer import MoELayer

__all__ = [
    "IGNORE",
    "PRESETS",
    "Amplification",
    "Decoder",
    "DecoderConfig",
    "DecoderOutput",
    "ExpertBank",
    "LatentAttentionConfig",
    "MTPConfig",
    "MoEConfig",
    "MoELayer",
    "NgramConfig",
    "QKNorm",
    "SparseAttentionConfig",
    "SwiGLU",
    "Wiring",
    "dispatch",
    "preset",
]

__getattr__ = on_first_use(
    __name__,
    {
        "decoder": ("IGNORE", "Decoder", "DecoderOutput"),
        "experts": ("ExpertBank", "SwiGLU"),
        "layer": ("MoELayer",),
        "dispatch": (),
    },
)
