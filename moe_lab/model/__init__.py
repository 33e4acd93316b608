"""The MoE layer and the small decoder around it: ``MoEConfig`` -> ``MoELayer``, ``DecoderConfig``
-> ``Decoder``.
"""

from moe_lab.model import dispatch
from moe_lab.model.config import (
    Amplification,
    DecoderConfig,
    LatentAttentionConfig,
    MoEConfig,
    MTPConfig,
    NgramConfig,
    QKNorm,
    SparseAttentionConfig,
    Wiring,
)
from moe_lab.model.decoder import IGNORE, Decoder, DecoderOutput
from moe_lab.model.experts import ExpertBank, SwiGLU
from moe_lab.model.layer import MoELayer
from moe_lab.model.presets import PRESETS, preset

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
