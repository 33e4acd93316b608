"""Checkpoints: one safetensors file with model, optimiser and random state, and a digest that shows
whether a file is damaged.

No pickle is read. The file is written under a temporary name and renamed, so ``kill -9`` leaves the
previous checkpoint in place. The file holds whole tensors however many ranks trained them: any
number of ranks can go on with it.
"""

import hashlib
import json
import struct
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from moe_lab.errors import CheckpointError, require
from moe_lab.files import atomic_path, open_regular

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


_ADVICE = "try deleting it, or --retry-failed, to begin this run again"
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Names in the safetensors format."""


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(_bytes(tensors[name]))
    return digest.hexdigest()


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    """Write tensors (copied to the CPU) with their digest beside ``metadata``; returns the digest.

    Raises ``StorageError`` if the disk is full. Written here, in the safetensors format (8 bytes of
    header length, a JSON header, the data), because the library's writer tells a full disk only in
    words, leaves its own temporary files after a kill, and makes files of mode 0600.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # Wide types first keep every tensor aligned.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    digest = _digest(tensors)
    header: dict[str, Any] = {"__metadata__": metadata | {"digest": digest}}
    end = 0
    for name in names:
        tensor, begin = tensors[name], end
        end += tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            file.write(_bytes(tensors[name]))
    return digest


def _opened(path: Path) -> Any:
    """A safetensors file; raises ``OSError`` at once for what is no regular file."""
    open_regular(path).close()
    return safe_open(path, framework="pt")


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata that ``save_tensors`` wrote. Raises ``CheckpointError``."""
    try:
        with _opened(path) as file:
            return file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"cannot read checkpoint {path}: {error}; {_ADVICE}") from error


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read what ``save_tensors`` wrote. Raises ``CheckpointError`` for a file that is not whole."""
    try:
        with _opened(path) as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (safe_open is no mapping)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"cannot read checkpoint {path}: {error}; {_ADVICE}") from error
    if metadata.get("digest") != _digest(tensors):
        why = f"expected digest {metadata.get('digest')}, got another; {_ADVICE}"
        raise CheckpointError(f"checkpoint {path} is damaged: {why}")
    return tensors, metadata


def _is_sharded(tensor: Tensor) -> "TypeGuard[DTensor]":
    # Importing the module costs a second, and a run on one rank never needs it.
    return "torch.distributed.tensor" in sys.modules and isinstance(
        tensor, sys.modules["torch.distributed.tensor"].DTensor
    )


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor, put together on each rank from the shards that ranks hold (all must call
    this); other tensors unchanged.
    """
    return tensor.full_tensor() if _is_sharded(tensor) else tensor


def _shard_like(value: Tensor, like: Tensor) -> Tensor:
    """The part of ``value`` that this rank holds of ``like``: every rank has read the same file."""
    if not _is_sharded(like):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(
        value.to(like.device), like.device_mesh, like.placements, src_data_rank=None
    )


def whole_state(module: nn.Module, keep: bool = True) -> dict[str, Tensor]:
    """``module.state_dict()`` of whole tensors, on the CPU.

    Ranks that do not ``keep`` it only help the others to gather it.
    """
    state = {}
    for name, value in module.state_dict().items():
        gathered = whole(value)
        if keep:
            state[name] = gathered.cpu()
    return state


def save_checkpoint(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: int,
    config_hash: str,
    *,
    write: bool = True,
    metadata: dict[str, str] | None = None,
) -> None:
    """State after ``step`` finished steps. Of several ranks all call this and one writes."""
    tensors = {f"model.{name}": value for name, value in whole_state(model, write).items()}
    for index, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            gathered = whole(value)
            if write:
                tensors[f"optimizer.{index}.{name}"] = gathered.cpu()
    if not write:
        return
    tensors["rng.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    save_tensors(path, tensors, {"step": str(step), "config": config_hash, **(metadata or {})})


def load_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, config_hash: str
) -> int:
    """Restore and return the number of finished steps.

    Raises ``CheckpointError`` for damage or another configuration.
    """
    tensors, metadata = load_tensors(path)
    require(
        metadata.get("config") == config_hash,
        f"a checkpoint of configuration {config_hash}",
        f"{metadata.get('config')} in {path}",
        error=CheckpointError,
    )
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    held = model.state_dict()
    state: dict[int, dict[str, Tensor]] = {}
    try:
        for name, value in tensors.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".", 2)
                like = parameters[int(index)]
                state.setdefault(int(index), {})[key] = (
                    _shard_like(value, like) if value.shape == like.shape else value
                )
        weights = {
            name.removeprefix("model."): value
            for name, value in tensors.items()
            if name.startswith("model.")
        }
        model.load_state_dict(
            {
                name: _shard_like(value, held[name]) if name in held else value
                for name, value in weights.items()
            }
        )
        optimizer.load_state_dict(
            {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
        )
        torch.set_rng_state(tensors["rng.cpu"])
        if "rng.cuda" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors["rng.cuda"])
        return int(metadata["step"])
    except (RuntimeError, KeyError, IndexError, ValueError) as error:
        why = f"{error}; {_ADVICE}"
        raise CheckpointError(f"checkpoint {path} does not fit its model: {why}") from error
