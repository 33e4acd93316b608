"""Translate configurations in a laboratory's own names to those of Hugging Face:
``inference/config.json`` of DeepSeek, ``params.json`` of Mistral.
"""

from collections.abc import Mapping
from typing import Any

from moe_lab.hf.fields import nested

Values = Mapping[str, Any]

DEEPSEEK = {
    "hidden_size": "dim",
    "intermediate_size": "inter_dim",
    "moe_intermediate_size": "moe_inter_dim",
    "num_hidden_layers": "n_layers",
    "first_k_dense_replace": "n_dense_layers",
    "num_attention_heads": "n_heads",
    "num_experts_per_tok": "n_activated_experts",
    "n_group": "n_expert_groups",
    "topk_group": "n_limited_groups",
    "routed_scaling_factor": "route_scale",
    "scoring_func": "score_func",
    "num_nextn_predict_layers": "n_mtp_layers",
    "num_hash_layers": "n_hash_layers",
    "qk_rope_head_dim": "rope_head_dim",
    "sliding_window": "window_size",
    "kv_source_layer_ids": "kv_source_layers",
    "index_source_layer_ids": "index_source_layers",
    "dspark_num_experts_per_tok": "dspark_n_activated_experts",
}
MISTRAL = {
    "hidden_size": "dim",
    "intermediate_size": "hidden_dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "tie_word_embeddings": "tied_embeddings",
}
MISTRAL_MOE = {
    "num_experts": "num_experts",
    "num_experts_per_tok": "num_experts_per_tok",
    "moe_intermediate_size": "expert_hidden_dim",
    "n_shared_experts": "num_shared_experts",
    "first_k_dense_replace": "first_k_dense_replace",
    "moe_layer_freq": "route_every_n",
    "routed_scaling_factor": "routed_scale",
    "n_group": "num_expert_groups",
    "topk_group": "num_expert_groups_per_tok",
}


def renamed(values: Values, inner: Values, names: Mapping[str, str]) -> dict[str, Any]:
    """``values`` with fields of ``inner`` (itself, or a nested configuration) under our names."""
    found = {ours: inner[theirs] for ours, theirs in names.items() if inner.get(theirs) is not None}
    return {**values, **found}


def from_native(values: Values) -> Values:
    """The configuration under Hugging Face's names if it uses one of these laboratories' names;
    else unchanged.
    """
    if "model_type" in values or "dim" not in values:
        return values
    if "n_activated_experts" in values:
        return _deepseek(values)
    return _mistral(values) if "moe" in values else values


def _deepseek(values: Values) -> Values:
    """V4 compresses keys (``compress_ratios``), V4.1 makes them in some layers only; of the models
    before, V3.2 has an indexer.
    """
    if "compress_ratios" in values:
        kind = "deepseek_v41_text" if "kv_source_layers" in values else "deepseek_v4"
    elif "kv_lora_rank" in values:
        kind = "deepseek_v32" if "index_topk" in values else "deepseek_v3"
    else:
        return values
    kept = {name: value for name, value in values.items() if name not in DEEPSEEK.values()}
    return {"model_type": kind, "norm_topk_prob": True, **renamed(kept, values, DEEPSEEK)}


def _mistral(values: Values) -> Values:
    """Mixtral, or (with ranks of latent attention) the block of DeepSeek-V3."""
    kept = {name: value for name, value in values.items() if name not in MISTRAL.values()}
    found = renamed(renamed(kept, values, MISTRAL), nested(values, "moe"), MISTRAL_MOE)
    latent = found.get("kv_lora_rank") is not None
    return {"model_type": "deepseek_v3" if latent else "mixtral", **found}
