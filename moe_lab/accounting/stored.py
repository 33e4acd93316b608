"""``stored_size``: what the files of a release say of its size, as a check of the count.

``model.safetensors.index.json`` beside a ``config.json`` has the bytes of all weights, and in newer
releases their number; the tensors at the beginning of a GGUF file have shapes.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_lab.hf.configuration import plain
from moe_lab.hf.gguf import read_gguf
from moe_lab.json_input import optional, read_json_file, record, whole

INDEX = "model.safetensors.index.json"
BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}

_METADATA = record(total_size=optional(whole(1, 2**60)), total_parameters=optional(whole(1, 2**60)))


@dataclass(frozen=True)
class StoredSize:
    """
    Attributes:
        source: the name of the file that says so.
        parameters: weights in the files, MTP modules and other towers among them; None where the
            bytes do not tell (quantized weights, an unknown dtype).
        bytes: of all weights, or None.
    """

    source: str
    parameters: int | None
    bytes: int | None = None

    def sentence(self, total: int, mtp: int) -> str:
        """A sentence that compares the count with the stored size."""
        if self.parameters is None:
            return (
                f"{self.source} has {self.bytes:,} bytes, which do not tell the number of weights"
            )
        rest = self.parameters - total
        beside = f" (with the modules of multi-token prediction {rest - mtp:+,})" if mtp else ""
        same = "as many as counted" if not rest else f"{rest:+,} against the count{beside}"
        return f"{self.source} has {self.parameters:,} weights: {same}"


def stored_size(path: Path | str) -> StoredSize | None:
    """The size that the files at ``path`` state; None where nothing does.

    Args:
        path: a folder, a ``config.json`` in one, or a ``.gguf`` file.

    Raises:
        ConfigError: an index or a header that cannot be read.
    """
    path = Path(path)
    if path.suffix == ".gguf":
        return StoredSize(path.name, read_gguf(path).parameters)
    index = (path if path.is_dir() else path.parent) / INDEX
    if not index.is_file():
        return None
    values: Any = read_json_file(index, INDEX)
    metadata = values.get("metadata") if isinstance(values, dict) else None
    found = _METADATA(metadata or {}, "metadata")
    size, parameters = found.get("total_size"), found.get("total_parameters")
    if parameters is None and size is None:
        return None
    if parameters is None:
        config = plain(path)
        width = BYTES.get(str(config.get("dtype") or config.get("torch_dtype")))
        if width and "quantization_config" not in config:
            parameters = size // width
    return StoredSize(INDEX, parameters, size)
