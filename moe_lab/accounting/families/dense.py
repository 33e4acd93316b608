"""Dense decoders: the baseline of every ratio of total to active parameters."""

from moe_lab.accounting import layer_types
from moe_lab.accounting.architecture import Architecture
from moe_lab.accounting.block_factories import dense, gqa, norms

_TIES = {"tie_word_embeddings": False, "num_key_value_heads": layer_types.kv_is_heads}

ROWS = {
    "llama": Architecture(
        blocks=(gqa(bias="attention_bias"), dense(bias="mlp_bias"), norms(2)),
        defaults={**_TIES, "attention_bias": False, "mlp_bias": False},
    ),
    "mistral": Architecture(blocks=(gqa(), dense(), norms(2)), defaults=_TIES),
    "olmo2": Architecture(
        blocks=(gqa(bias="attention_bias", norms="width"), dense(), norms(2)),
        defaults={**_TIES, "attention_bias": False},
    ),
    "qwen2": Architecture(
        blocks=(gqa(bias=True, out_bias=False), dense(), norms(2)), defaults=_TIES
    ),
    "qwen3": Architecture(
        blocks=(gqa(bias="attention_bias", norms="head"), dense(), norms(2)),
        defaults={**_TIES, "attention_bias": False, "head_dim": 128},
    ),
}
