"""Readers of what serving and training engines record: vLLM, SGLang, TensorRT-LLM, Megatron-LM.

None of them records weights or scores. An answer's last token is never fed, so it has no route; its
token row says so. Shape letters: T tokens, L layers, K slots.
"""

import base64
import binascii
import hashlib
import re
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from moe_lab.errors import TraceError, expected
from moe_lab.trace.importing.source import Document, Sizes, Source
from moe_lab.trace.importing.untrusted import (
    integers,
    read_arrays,
    read_json,
    read_lines,
    read_torch,
)

ROUTES = ("routed_experts", "expert_ids", "routing")
TOKENS = ("token_ids", "input_ids")


def vllm(src: Path, sizes: Sizes) -> Source:
    """``CompletionOutput.routed_experts``: [tokens, layers, slots] for each request, in .npy, .npz,
    .json or .jsonl.
    """
    return Source(_requests(src, sizes), top_k=sizes.top_k, aliases_zero_experts=True)


def trtllm(src: Path, sizes: Sizes) -> Source:
    """[tokens - 1, MoE layers, slots] for each request, in the same files."""
    return Source(_requests(src, sizes), top_k=sizes.top_k, aliases_zero_experts=True)


def sglang(src: Path, sizes: Sizes) -> Source:
    """Responses with ``meta_info.routed_experts`` (base64 of int32 [tokens - 1, layers, slots]), or
    the recorder's ``.pt`` of counts.
    """
    if _files(src, (".pt",), missing=False):
        from moe_lab.trace.importing.tools import source_of_counts

        return source_of_counts(_recorded_counts(_files(src, (".pt",))), sizes)
    return Source(_requests(src, sizes), top_k=sizes.top_k, aliases_zero_experts=True)


def megatron(src: Path, sizes: Sizes) -> Source:
    """``router_trace_rank<r>.jsonl`` of each rank: one record for each step and layer, with
    ``top_indices`` [tokens, slots].

    A record knows no sequences: the tokens of one step of one rank are one document.
    Tensor-parallel ranks that recorded the same tokens are told by equal records and counted once.
    Multi-token-prediction layers are left out.
    """
    files = _files(src, (".jsonl",))
    layers = sorted({layer for path in files for layer in next(_megatron_steps(path), (0, {}))[1]})
    notes = (
        ("A document is one step of one rank.", f"Merged from {len(files)} ranks.")
        if len(files) > 1
        else ("A document is one step.",)
    )
    return Source(_megatron_documents(files), layers=tuple(layers), notes=notes)


def _requests(src: Path, sizes: Sizes) -> Iterator[Document]:
    number = 0
    for path in _files(src, (".npy", ".npz", ".json", ".jsonl")):
        for where, routes, token_ids in _of_file(path):
            ids = _routes(where, routes, token_ids, sizes)
            tokens = None if token_ids is None else integers(where, token_ids, 1)
            if tokens is not None and len(tokens) - len(ids) not in (0, 1):
                raise TraceError(
                    f"{where}: "
                    + expected(f"routes of {len(tokens)} tokens, or of all but the last", len(ids))
                )
            yield Document(number, 0, ids, token_ids=tokens)
            number += 1


def _of_file(path: Path) -> Iterator[tuple[str, Any, Any]]:
    """(name for messages, routes, token ids or None) of each request in a file."""
    if path.suffix in (".npy", ".npz"):
        arrays = read_arrays(path)
        names = [
            name for name in arrays if arrays[name].ndim == 3 and arrays[name].dtype.kind in "iu"
        ]
        if not names:
            raise TraceError(
                expected(
                    f"an integer array [tokens, layers, slots] in {path.name}", _shapes(arrays)
                )
            )
        for name in sorted(names, key=_natural):
            suffix = name.partition("routed_experts")[2] if "routed_experts" in name else name
            tokens = next((arrays[key + suffix] for key in TOKENS if key + suffix in arrays), None)
            yield f"{path.name} {name}".strip(), arrays[name], tokens
        return
    records = (
        read_lines(path)
        if path.suffix == ".jsonl"
        else enumerate(_listed(read_json(path)), start=1)
    )
    for number, record in records:
        for answer in _answers(record):
            yield f"{path.name}, record {number}", *answer


def _answers(record: Any) -> Iterator[tuple[Any, Any]]:
    """(routes, token ids) of each answer of one response; a prompt's routes may be beside it."""
    if not isinstance(record, dict):
        raise TraceError(expected("a response with named fields", type(record).__name__))
    prompt = record.get("prompt_token_ids") or record.get("prompt_ids") or record.get("input_ids")
    for answer in record.get("choices") or record.get("outputs") or [record]:
        if not isinstance(answer, dict):
            raise TraceError(expected("an answer with named fields", type(answer).__name__))
        inner = {**answer, **(answer.get("meta_info") or {})}
        routes = next((inner[name] for name in ROUTES if inner.get(name) is not None), None)
        if routes is None:
            raise TraceError(
                expected(
                    "routed_experts in each response",
                    f"fields {', '.join(sorted(map(str, answer)))[:120]}",
                )
            )
        made = (
            answer.get("output_ids")
            or answer.get("output_token_ids")
            or (answer.get("token_ids") if prompt else None)
        )
        whole = answer.get("token_ids") if not prompt else None
        before = record.get("prompt_routed_experts")
        if before is not None and not isinstance(routes, str):
            routes = [*before, *routes]
        yield routes, whole if made is None else [*(prompt or []), *made]


def _routes(where: str, routes: Any, token_ids: Any, sizes: Sizes) -> np.ndarray:
    if not isinstance(routes, str):
        return integers(where, routes, 3)
    try:
        flat = np.frombuffer(base64.b64decode(routes, validate=True), dtype="<i4").astype(np.int64)
    except (binascii.Error, ValueError) as error:
        raise TraceError(
            f"{where}: " + expected("base64 of int32 routes", str(error)[:80])
        ) from error
    slots = sizes.top_k
    if slots is None:
        raise TraceError(
            f"{where}: "
            + expected("the number of slots of encoded routes", "none", "config= or top_k=")
        )
    counts = [count for count in (sizes.num_layers, len(sizes.layers or ())) if count]
    if token_ids is None:
        known = counts[0] if counts else None
    else:
        tokens = [
            number
            for number in (len(token_ids) - 1, len(token_ids))
            if number > 0 and len(flat) % (number * slots) == 0
        ]
        fitting = [len(flat) // (number * slots) for number in tokens]
        known = next(
            (count for count in fitting if count in counts),
            fitting[0] if fitting and not counts else None,
        )
    if not known or len(flat) % (known * slots):
        raise TraceError(
            f"{where}: "
            + expected(
                f"routes [tokens, layers, {slots}]", f"{len(flat)} numbers", "config= or layers="
            )
        )
    return flat.reshape(-1, known, slots)


def _megatron_documents(files: list[Path]) -> Iterator[Document]:
    """Ranks that hold the same layers are data-parallel; ranks that hold others are stages of a
    pipeline and see the same tokens.
    """
    stages: dict[tuple[int, ...], list[Path]] = {}
    for path in files:
        if (first := next(_megatron_steps(path), None)) is not None:
            stages.setdefault(tuple(sorted(first[1])), []).append(path)
    layers = [layer for stage in stages for layer in stage]
    if len(set(layers)) < len(layers) or len({len(ranks) for ranks in stages.values()}) > 1:
        got = ", ".join(
            f"{len(ranks)} ranks of layers {_short(stage)}" for stage, ranks in stages.items()
        )
        raise TraceError(
            expected("ranks with the same layers, or as many for each stage of a pipeline", got)
        )
    seen: set[bytes] = set()
    number = 0
    for ranks in zip(*stages.values(), strict=True):
        for steps in zip_longest(*(_megatron_steps(path) for path in ranks)):
            ids = _one_step([path.name for path in ranks], list(stages), steps)
            digest = hashlib.sha256(str(steps[0][0]).encode() + ids.tobytes()).digest()
            if digest in seen:  # another rank of the same tokens
                continue
            seen.add(digest)
            yield Document(number, 0, ids)
            number += 1


def _one_step(names: list[str], stages: list[tuple[int, ...]], steps: tuple) -> np.ndarray:
    """[T, L, K] of one step, its layers in order over all stages."""
    if any(part is None for part in steps) or len({step for step, _ in steps}) > 1:
        raise TraceError(expected(f"the same steps in {', '.join(names)}", "others"))
    merged: dict[int, np.ndarray] = {}
    for name, stage, (step, layers) in zip(names, stages, steps, strict=True):
        if tuple(sorted(layers)) != stage:
            raise TraceError(
                f"{name}, step {step}: "
                + expected(f"layers {_short(stage)} as in the first step", _short(sorted(layers)))
            )
        merged |= layers
    shapes = {layer: array.shape for layer, array in merged.items()}
    if len(set(shapes.values())) > 1:
        raise TraceError(
            f"{names[0]}, step {steps[0][0]}: "
            + expected("the same tokens and slots in every layer", _short(shapes))
        )
    return np.stack([merged[layer] for layer in sorted(merged)], axis=1)


def _megatron_steps(path: Path) -> Iterator[tuple[int, dict[int, np.ndarray]]]:
    """(step, layer -> [T, K]) of one rank; the micro-batches of a step follow each other."""
    current: int | None = None
    layers: dict[int, list[np.ndarray]] = {}
    for number, record in read_lines(path):
        where = f"{path.name}, line {number}"
        try:
            step, layer, tokens, slots = (
                int(record[name]) for name in ("step", "layer", "num_tokens", "topk")
            )
            ids = (
                integers(where, record["top_indices"], 2)
                if tokens
                else np.zeros((0, slots), np.int64)
            )
        except (KeyError, TypeError, ValueError) as error:
            raise TraceError(
                f"{where}: "
                + expected(
                    "step, layer, num_tokens, topk and top_indices",
                    f"{type(error).__name__} {error}",
                )
            ) from error
        if ids.shape != (tokens, slots):
            raise TraceError(
                f"{where}: " + expected(f"top_indices of shape {[tokens, slots]}", list(ids.shape))
            )
        if record.get("block", "decoder") != "decoder":
            continue
        if step != current and layers:
            assert current is not None
            yield current, {layer: np.concatenate(parts) for layer, parts in layers.items()}
            layers = {}
        current = step
        layers.setdefault(layer, []).append(ids)
    if layers and current is not None:
        yield current, {layer: np.concatenate(parts) for layer, parts in layers.items()}


def _recorded_counts(files: list[Path]) -> dict[str, np.ndarray]:
    """Counts [layers, experts] of SGLang's recorder, summed over its passes and ranks."""
    total: np.ndarray | None = None
    for path in files:
        values = read_torch(path)
        found = values.get("logical_count") if isinstance(values, dict) else None
        if found is None or not hasattr(found, "numpy"):
            raise TraceError(expected(f"logical_count in {path.name}", type(values).__name__))
        counts = integers(path.name, found.reshape(-1, *found.shape[-2:]).sum(dim=0).numpy(), 2)
        total = counts if total is None else total + counts
    assert total is not None
    return {"": total}


def _files(src: Path, suffixes: tuple[str, ...], missing: bool = True) -> list[Path]:
    found = (
        [src]
        if src.is_file()
        else sorted(
            (path for path in src.iterdir() if path.is_file()), key=lambda path: _natural(path.name)
        )
    )
    found = [path for path in found if path.suffix in suffixes]
    if not found and missing:
        raise TraceError(expected(f"{' or '.join(suffixes)} at {src}", "none"))
    return found


def _natural(name: str) -> list[Any]:
    """rank2 before rank10."""
    return [
        (0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name)
    ]


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _shapes(arrays: dict[str, np.ndarray]) -> str:
    return ", ".join(
        f"{name} {array.dtype}{list(array.shape)}" for name, array in list(arrays.items())[:4]
    )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
