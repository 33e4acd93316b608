"""``read_gguf``: the metadata and the tensor shapes at the beginning of a ``.gguf`` file, and what
they say as a configuration. Weights are not read.

Format: github.com/ggml-org/ggml docs/gguf.md, versions 2 and 3, little endian. The file is not
trusted: every length is compared with what is left of the header before anything is made of it.
"""

import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from moe_lab.errors import ConfigError, expected
from moe_lab.files import open_regular

MAX_HEADER = 2**28
"""Bytes at the beginning of a file that may be looked at: the tokenizers of large models are some
ten megabytes.
"""
BLOCK = 2**22
"""The first block of a header that is read."""
MAX_KEYS, MAX_TENSORS, MAX_DIMS, MAX_LIST, MAX_TEXT = 10_000, 1_000_000, 8, 10_000, 10_000
_NUMBERS = {
    **{0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?"},
    **{10: "<Q", 11: "<q", 12: "<d"},
}
_TEXT, _LIST = 8, 9
MODEL_TYPES = {
    "deepseek2": "deepseek_v3",
    "dots1": "dots1",
    "glm4moe": "glm4_moe",
    "gpt-oss": "gpt_oss",
    "granitemoe": "granitemoe",
    "llama": "mixtral",
    "minimax-m2": "minimax_m2",
    "olmoe": "olmoe",
    "qwen2moe": "qwen2_moe",
    "qwen3moe": "qwen3_moe",
}
"""``general.architecture`` -> model type, where the keys below say all that a count needs."""
FIELDS = {
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "moe_intermediate_size": "expert_feed_forward_length",
    "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "sliding_window": "attention.sliding_window",
    "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "n_shared_experts": "expert_shared_count",
    "first_k_dense_replace": "leading_dense_block_count",
    "num_nextn_predict_layers": "nextn_predict_layers",
    "q_lora_rank": "attention.q_lora_rank",
    "kv_lora_rank": "attention.kv_lora_rank",
    "routed_scaling_factor": "expert_weights_scale",
    "norm_topk_prob": "expert_weights_norm",
    "vocab_size": "vocab_size",
}


@dataclass(frozen=True)
class GGUF:
    """
    Attributes:
        metadata: key -> value; of a list longer than ``MAX_LIST`` only {"len": its length}.
        tensors: name -> shape, as the file writes it (innermost dimension first).
    """

    metadata: dict[str, Any]
    tensors: dict[str, tuple[int, ...]]

    @property
    def parameters(self) -> int:
        """Weights of the file. Split files hold a part each."""
        return sum(prod(shape) for shape in self.tensors.values())


class _Header:
    """The beginning of a file, read in blocks as far as it is asked for."""

    def __init__(self, path: Path) -> None:
        self.path, self.place, self.data = path, 0, b""
        self.limit = min(self._on_file(lambda file: file.seek(0, os.SEEK_END)), MAX_HEADER)

    def _on_file(self, read: Callable[[BinaryIO], Any]) -> Any:
        try:
            with open_regular(self.path) as file:
                return read(file)
        except OSError as error:
            raise ConfigError(f"cannot read {self.path}: {error.strerror or error}") from error

    def wrong(self, what: str, got: object) -> ConfigError:
        return ConfigError(f"{self.path.name}: " + expected(what, got))

    def take(self, size: int) -> int:
        """The place of the next ``size`` bytes, which are there."""
        start, self.place = self.place, self.place + size
        if self.place > self.limit:
            raise self.wrong("a header that fits its lengths", f"{size:,} bytes past its end")
        if self.place > len(self.data):
            size = min(self.limit, max(BLOCK, 2 * self.place))
            self.data = self._on_file(lambda file: file.read(size))
            if self.place > len(self.data):
                raise self.wrong("a whole header", "a file that became shorter")
        return start

    def number(self, kind: int) -> Any:
        form = _NUMBERS[kind]
        return struct.unpack_from(form, self.data_from(struct.calcsize(form)))[0]

    def data_from(self, size: int) -> bytes:
        start = self.take(size)
        return self.data[start : start + size]

    def size(self, what: str, most: int) -> int:
        value = self.number(10)
        if value > most:
            raise self.wrong(f"at most {most:,} {what}", f"{value:,}")
        return value

    def text(self) -> str:
        length = self.number(10)
        start = self.take(length)
        return self.data[start : start + min(length, MAX_TEXT)].decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        if kind == _TEXT:
            return self.text()
        if kind != _LIST:
            if kind not in _NUMBERS:
                raise self.wrong("a known type of value", kind)
            return self.number(kind)
        inner, count = self.number(4), self.number(10)
        if inner != _TEXT and inner not in _NUMBERS:
            raise self.wrong("a list of numbers or texts", f"type {inner}")
        least = 8 if inner == _TEXT else struct.calcsize(_NUMBERS[inner])
        if count * least > self.limit - self.place:
            raise self.wrong("a list within the header", f"one of {count:,} values")
        if count <= MAX_LIST:
            return [self.value(inner) for _ in range(count)]
        if inner == _TEXT:
            for _ in range(count):
                self.take(self.number(10))
        else:
            self.take(count * least)
        return {"len": count}


def read_gguf(path: Path | str) -> GGUF:
    """The header of a ``.gguf`` file.

    Raises:
        ConfigError: another format or version, a header that is cut or does not fit its lengths.
    """
    header = _Header(Path(path))
    magic = header.data_from(4)
    if magic != b"GGUF":
        raise header.wrong("a GGUF file", repr(magic))
    version = header.number(4)
    if version not in (2, 3):
        raise header.wrong("GGUF version 2 or 3", version)
    tensors, keys = header.size("tensors", MAX_TENSORS), header.size("keys", MAX_KEYS)
    metadata: dict[str, Any] = {}
    for _ in range(keys):
        key = header.text()
        metadata[key] = header.value(header.number(4))
    shapes: dict[str, tuple[int, ...]] = {}
    for _ in range(tensors):
        name, dims = header.text(), header.number(4)
        if dims > MAX_DIMS:
            raise header.wrong(f"tensors of at most {MAX_DIMS} dimensions", dims)
        shapes[name] = tuple(header.number(10) for _ in range(dims))
        header.number(4)  # type
        header.number(10)  # offset
    return GGUF(metadata, shapes)


def gguf_config(metadata: Mapping[str, Any], tensors: Mapping[str, Any] | None = None) -> Any:
    """The configuration that metadata of a GGUF file describe, under Hugging Face's names.

    Args:
        metadata: key -> value, as ``read_gguf`` or a dump of it as JSON gives.
        tensors: names of the tensors, which tell tied embeddings, biases and norms of heads; None:
            not known, embeddings then are two matrices.

    Raises:
        ConfigError: an architecture that is not in ``MODEL_TYPES``, or one without experts.
    """
    name = metadata.get("general.architecture")
    if name not in MODEL_TYPES:
        known = ", ".join(sorted(MODEL_TYPES))
        raise ConfigError(
            expected("a general.architecture with experts that is known", repr(name), known)
        )
    prefix = f"{name}."
    values: dict[str, Any] = {
        ours: metadata[prefix + theirs]
        for ours, theirs in FIELDS.items()
        if metadata.get(prefix + theirs) is not None
    }
    values["model_type"] = MODEL_TYPES[name]
    if name == "llama" and not values.get("num_experts"):
        values["model_type"] = "llama"  # dense
    tokens = metadata.get("tokenizer.ggml.tokens")
    if "vocab_size" not in values and tokens is not None:
        values["vocab_size"] = tokens["len"] if isinstance(tokens, Mapping) else len(tokens)
    if name in ("llama", "gpt-oss", "granitemoe", "olmoe", "minimax-m2"):
        # these models keep an expert's width in intermediate_size
        values["intermediate_size"] = values.pop(
            "moe_intermediate_size", values.get("intermediate_size")
        )
    if name == "deepseek2":
        values |= _latent(metadata, prefix)
    names = set(tensors or ())
    values["tie_word_embeddings"] = bool(names) and "output.weight" not in names
    if names:
        values["attention_bias"] = any(".attn_q.bias" in tensor for tensor in names)
        values["use_qk_norm"] = any(".attn_q_norm." in tensor for tensor in names)
    return values


def _latent(metadata: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Sizes of latent attention; newer files write the compressed ones beside them (``_mla``)."""

    def size(name: str) -> Any:
        return metadata.get(f"{prefix}{name}_mla", metadata.get(f"{prefix}{name}"))

    rope, key = metadata.get(f"{prefix}rope.dimension_count"), size("attention.key_length")
    heads = metadata.get(f"{prefix}attention.head_count")
    if type(rope) is not int or type(key) is not int:
        raise ConfigError(expected(f"{prefix}rope.dimension_count and key_length", "none"))
    return {
        "qk_rope_head_dim": rope,
        "qk_nope_head_dim": key - rope,
        "v_head_dim": size("attention.value_length"),
        "num_key_value_heads": heads,
        "q_lora_rank": metadata.get(f"{prefix}attention.q_lora_rank"),
        "head_dim": rope,
    }
