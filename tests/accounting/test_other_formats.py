"""Configurations that are no ``config.json`` of transformers: GGUF files and their metadata,
Mistral's and DeepSeek's own names; sizes that files state; architectures of which transformers has
no class.
"""

import json
import random
import struct
from pathlib import Path
from typing import Any

import pytest

from moe_lab.accounting import count, find_model
from moe_lab.accounting.stored import INDEX, stored_size
from moe_lab.cli import main
from moe_lab.errors import ConfigError
from moe_lab.hf.gguf import MAX_LIST, read_gguf
from moe_lab.hf.native_names import DEEPSEEK

QWEN = {
    "general.architecture": "qwen3moe",
    "general.name": "Qwen3 30B A3B",
    "qwen3moe.block_count": 48,
    "qwen3moe.embedding_length": 2048,
    "qwen3moe.feed_forward_length": 6144,
    "qwen3moe.attention.head_count": 32,
    "qwen3moe.attention.head_count_kv": 4,
    "qwen3moe.attention.key_length": 128,
    "qwen3moe.attention.value_length": 128,
    "qwen3moe.expert_count": 128,
    "qwen3moe.expert_used_count": 8,
    "qwen3moe.expert_feed_forward_length": 768,
    "tokenizer.ggml.tokens": [f"t{number}" for number in range(151_936)],
}
"""Keys of a conversion of Qwen/Qwen3-30B-A3B by llama.cpp."""
TENSORS = {
    "token_embd.weight": (2048, 151_936),
    "output.weight": (2048, 151_936),
    "output_norm.weight": (2048,),
    **{
        f"blk.{layer}.{name}": shape
        for layer in range(48)
        for name, shape in {
            "attn_q.weight": (2048, 4096),
            "attn_k.weight": (2048, 512),
            "attn_v.weight": (2048, 512),
            "attn_output.weight": (4096, 2048),
            "attn_q_norm.weight": (128,),
            "attn_k_norm.weight": (128,),
            "attn_norm.weight": (2048,),
            "ffn_norm.weight": (2048,),
            "ffn_gate_inp.weight": (2048, 128),
            "ffn_gate_exps.weight": (2048, 768, 128),
            "ffn_up_exps.weight": (2048, 768, 128),
            "ffn_down_exps.weight": (768, 2048, 128),
        }.items()
    },
}


def packed_text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def packed(value: Any) -> bytes:
    """A value and its type."""
    if isinstance(value, str):
        return struct.pack("<I", 8) + packed_text(value)
    if isinstance(value, list):
        return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(packed_text, value))
    return struct.pack("<II", 4, value)


def written(path: Path, metadata: dict[str, Any], tensors: dict[str, tuple[int, ...]]) -> Path:
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    keys = b"".join(packed_text(key) + packed(value) for key, value in metadata.items())
    infos = b"".join(
        packed_text(name)
        + struct.pack("<I", len(shape))
        + struct.pack(f"<{len(shape)}Q", *shape)
        + struct.pack("<IQ", 0, 0)
        for name, shape in tensors.items()
    )
    path.write_bytes(head + keys + infos)
    return path


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("gguf") / "qwen.gguf", QWEN, TENSORS)


def test_a_gguf_file_counts_as_the_model_that_it_is(
    gguf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = find_model("Qwen3-30B-A3B")
    assert entry is not None
    published = count(entry["config"])
    assert count(gguf).total == published.total == read_gguf(gguf).parameters
    assert count(gguf).active() == published.active()
    assert read_gguf(gguf).metadata["tokenizer.ggml.tokens"] == {"len": 151_936}
    assert count(dict(QWEN)).total == published.total  # a dump of the metadata as JSON
    assert main(["count", str(gguf)]) == 0
    assert "qwen.gguf has 30,532,122,624 weights: as many as counted" in capsys.readouterr().out


def test_a_gguf_file_without_a_head_ties_its_embeddings(tmp_path: Path) -> None:
    tied = {name: shape for name, shape in TENSORS.items() if name != "output.weight"}
    path = written(tmp_path / "tied.gguf", QWEN, tied)
    assert count(path).tied
    assert count(path).total == read_gguf(path).parameters


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda data: b"GGML" + data[4:], "expected a GGUF file, got b'GGML'"),
        (lambda data: data[:4] + struct.pack("<I", 9) + data[8:], "version 2 or 3, got 9"),
        (lambda data: data[:8] + struct.pack("<Q", 2**60) + data[16:], "at most 1,000,000 tensors"),
        (lambda data: data[:16] + struct.pack("<Q", 2**60) + data[24:], "at most 10,000 keys"),
        (lambda data: data[:24] + struct.pack("<Q", 2**60) + data[32:], "fits its lengths"),
        (lambda data: data[:200], "fits its lengths"),
        (lambda data: b"", "fits its lengths"),
    ],
)
def test_a_damaged_header_is_one_sentence(
    gguf: Path, tmp_path: Path, change: Any, sentence: str
) -> None:
    (tmp_path / "x.gguf").write_bytes(change(gguf.read_bytes()))
    with pytest.raises(ConfigError, match=sentence):
        count(tmp_path / "x.gguf")


def test_no_mutation_of_a_header_ends_in_another_error(tmp_path: Path) -> None:
    small = {**QWEN, "tokenizer.ggml.tokens": ["a"] * (MAX_LIST + 1)}
    data = written(tmp_path / "m.gguf", small, dict(list(TENSORS.items())[:15])).read_bytes()
    rng, refused = random.Random(0), 0
    for _ in range(300):
        broken = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            broken[rng.randrange(900)] = rng.randrange(256)
        (tmp_path / "m.gguf").write_bytes(broken)
        try:
            assert count(tmp_path / "m.gguf").total > 0
        except ConfigError:
            refused += 1
    assert refused > 100


def test_the_params_of_mistral_are_read(tmp_path: Path) -> None:
    mixtral = {
        **{"dim": 4096, "n_layers": 32, "head_dim": 128, "hidden_dim": 14336, "n_heads": 32},
        **{"n_kv_heads": 8, "norm_eps": 1e-05, "vocab_size": 32000},
        "moe": {"num_experts_per_tok": 2, "num_experts": 8},
    }
    (tmp_path / "params.json").write_text(json.dumps(mixtral))
    entry = find_model("Mixtral-8x7B")
    assert entry is not None
    assert count(tmp_path).total == count(entry["config"]).total == 46_702_792_704
    latent = {
        **{"dim": 64, "n_layers": 3, "hidden_dim": 160, "n_heads": 4, "vocab_size": 100},
        **{"q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4},
        "v_head_dim": 8,
        "moe": {
            **{"num_experts": 8, "num_experts_per_tok": 2, "expert_hidden_dim": 32},
            **{"num_shared_experts": 1, "first_k_dense_replace": 1, "route_every_n": 1},
        },
    }
    assert count(latent).model_type == "deepseek_v3"
    assert len(count(latent).moe_layers) == 2


@pytest.mark.parametrize("name", ["DeepSeek-V4.1-Flash", "DeepSeek-V4-Flash"])
def test_the_own_names_of_deepseek_count_the_same(name: str) -> None:
    entry = find_model(name)
    assert entry is not None
    values = {**entry["config"], **entry["config"].get("text_config", {})}
    for key in ("model_type", "text_config", "architectures"):
        values.pop(key, None)
    native = {DEEPSEEK.get(key, key): value for key, value in values.items()}
    assert count(native).total == count(entry["config"]).total


def test_the_index_beside_a_configuration_checks_the_total(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = find_model("Qwen3-30B-A3B")
    assert entry is not None
    (tmp_path / "config.json").write_text(json.dumps({**entry["config"], "dtype": "bfloat16"}))
    total = count(tmp_path).total
    assert stored_size(tmp_path) is None
    for metadata, sentence in (
        ({"total_size": 2 * total}, "as many as counted"),
        ({"total_parameters": total + 5, "total_size": 7}, "+5 against the count"),
    ):
        (tmp_path / INDEX).write_text(json.dumps({"metadata": metadata, "weight_map": {}}))
        assert main(["count", str(tmp_path)]) == 0
        assert sentence in capsys.readouterr().out
    config = {**entry["config"], "quantization_config": {}, "dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {"total_size": 9}}))
    size = stored_size(tmp_path / "config.json")
    assert size is not None
    assert (size.parameters, size.bytes) == (None, 9)
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {"total_size": "many"}}))
    with pytest.raises(ConfigError, match="total_size"):
        stored_size(tmp_path)


@pytest.mark.hf
def test_defaults_of_transformers_fill_what_is_left_out_and_say_so() -> None:
    pytest.importorskip("transformers", reason="needs the extra hf")
    silent = {"model_type": "mixtral", "vocab_size": 32000, "num_local_experts": 8}
    with pytest.raises(ConfigError, match="expected a field num_hidden_layers"):
        count(silent)
    counted = count(silent, defaults="hf")
    assert counted.total == 46_702_792_704
    assert any("hidden_size = 4096" in sentence for sentence in counted.assumed)
    assert not any("vocab_size" in sentence for sentence in counted.assumed)
    assert not any("rope" in sentence for sentence in counted.assumed)
    with pytest.raises(ConfigError, match="a model_type that transformers has, got 'longcat2'"):
        count({"model_type": "longcat2"}, defaults="hf")


# Sizes of xai-org/grok-2 as its Hugging Face discussion 6 states them
GROK = {
    **{"hidden_size": 8192, "intermediate_size": 32768, "moe_intermediate_size": 16384},
    **{"num_local_experts": 8, "num_experts_per_tok": 2, "num_hidden_layers": 64, "head_dim": 128},
    **{"num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 131072},
    **{"residual_moe": True, "architectures": ["Grok1ForCausalLM"], "model_type": "git"},
}
# config.json of mlx-community/Klear-46B-A2.5B-Instruct-3bit
KLEAR = {
    **{"model_type": "Klear", "hidden_size": 2048, "num_hidden_layers": 32, "num_experts": 256},
    **{"num_experts_per_tok": 8, "n_shared_experts": 1, "moe_intermediate_size": 896},
    **{"intermediate_size": 8064, "num_attention_heads": 32, "num_key_value_heads": 4},
    **{"vocab_size": 151936, "mlp_only_layers": [], "decoder_sparse_step": 1},
}
# The defaults of the configuration beside Ring-mini-linear-2.0; groups of five, arXiv 2510.19338
RING = {
    **{"model_type": "bailing_moe_linear", "hidden_size": 2048, "num_hidden_layers": 20},
    **{"num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 256},
    **{"num_experts_per_tok": 8, "num_shared_experts": 1, "moe_intermediate_size": 512},
    **{"intermediate_size": 5120, "first_k_dense_replace": 1, "vocab_size": 157184},
    "layer_group_size": 5,
}
# config.json of nomic-embed-text-v2-moe, and the sizes on the card of its GGUF conversion
NOMIC = {
    **{"model_type": "nomic_bert", "n_embd": 768, "n_layer": 12, "n_head": 12, "n_inner": 3072},
    **{"num_experts": 8, "moe_top_k": 2, "moe_every_n_layers": 2, "vocab_size": 250048},
}


@pytest.mark.parametrize(
    ("config", "total", "active", "convention"),
    [
        pytest.param(GROK, "270B", "115B", "A", id="xai-org/grok-2"),
        pytest.param(KLEAR, "46B", "2.5B", "A", id="Kwai-Klear/Klear-46B-A2.5B"),
        pytest.param(RING, "16.4B", "1.6B", "A", id="inclusionAI/Ring-mini-linear-2.0"),
        pytest.param(NOMIC, "475M", "305M", "A", id="nomic-ai/nomic-embed-text-v2-moe"),
    ],
)
def test_models_with_code_of_their_own_have_their_published_size(
    config: dict[str, Any], total: str, active: str, convention: Any
) -> None:
    from moe_lab.accounting.published import figure, rounds_to

    counted = count(config)
    published = figure(total)
    assert counted.total == pytest.approx(published, rel=0.012)
    assert rounds_to(counted.active(convention), active)


def test_a_large_file_counts_as_a_small_one(tmp_path: Path) -> None:
    """5 MB of a field that nobody reads."""
    entry = find_model("Qwen3-30B-A3B")
    assert entry is not None
    config = {**entry["config"], "id2label": {str(number): "x" * 30 for number in range(110_000)}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert (tmp_path / "config.json").stat().st_size > 4_500_000
    assert count(tmp_path).total == count(entry["config"]).total
