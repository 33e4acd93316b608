"""``ARCHITECTURES``: model type -> ``Architecture``, gathered from ``families/``, and the names
that stand for another row.
"""

from moe_lab.accounting.architecture import Architecture
from moe_lab.accounting.families import (
    deepseek,
    encoder_decoder,
    grouped,
    grouped_shared,
    inkling,
    latent,
    linear,
    longcat,
    own,
    own_decoder,
    qwen,
    singular,
    state_space,
)

_FAMILIES = (
    deepseek,
    encoder_decoder,
    grouped,
    grouped_shared,
    inkling,
    latent,
    linear,
    longcat,
    own,
    own_decoder,
    qwen,
    singular,
    state_space,
)

ARCHITECTURES: dict[str, Architecture] = {
    name: row for family in _FAMILIES for name, row in family.ROWS.items()
}

SAME_AS: dict[str, str] = {
    "bailing_moe_v2": "bailing_moe",
    "deepseek_vl_v2": "deepseek_v2",
    "deepseek_ocr2": "deepseek_ocr2_text",
    "dots3_note": "dots3_note_text",
    "gemma4": "gemma4_text",
    "gemma4_unified": "gemma4_unified_text",
    "diffusion_gemma": "diffusion_gemma_text",
    "glm4v_moe": "glm4v_moe_text",
    "glm5_next": "glm5_next_text",
    "granite_docling": "granite_docling_text",
    "kimi_k25": "kimi_k2",
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


def find(model_type: str) -> Architecture | None:
    """The row for a model type, or None."""
    return ARCHITECTURES.get(SAME_AS.get(model_type, model_type))
