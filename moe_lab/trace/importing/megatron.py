"""Megatron-LM's router traces: ``router_trace_rank<r>.jsonl`` of each rank.

One record for each step and layer, with ``top_indices`` [tokens, slots]. A record knows no
sequences: the tokens of one step of one rank are one document. Tensor-parallel ranks that recorded
the same tokens are recognised by equal records and counted once; multi-token-prediction layers are
left out. Shape letters: T tokens, L layers, K slots.
"""

import hashlib
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from reprlib import repr as short

import numpy as np

from moe_lab.errors import TraceError, expected, require
from moe_lab.json_input import anything, record, whole
from moe_lab.trace.importing.read_files import ids, read_lines
from moe_lab.trace.importing.records import Document, Sizes, Source
from moe_lab.trace.importing.request_routes import find_files

Step = tuple[int, dict[int, np.ndarray]]
"""A step's number, and layer -> [T, K]."""

_RECORD = record(
    step=whole(),
    layer=whole(0, 99_999),
    num_tokens=whole(0, 2**31),
    topk=whole(1, 255),
    top_indices=anything,
)


def megatron(src: Path, sizes: Sizes) -> Source:
    """The traces of all ranks at ``src``."""
    files = find_files(src, (".jsonl",))
    first = [next(_steps(path), (0, {}))[1] for path in files]
    layers = sorted({layer for step in first for layer in step})
    notes = ["A document is one step."]
    if len(files) > 1:
        notes = ["A document is one step of one rank.", f"Merged from {len(files)} ranks."]
    return Source(_documents(files), layers=tuple(layers), notes=tuple(notes))


def _documents(files: list[Path]) -> Iterator[Document]:
    """Ranks that hold the same layers are data-parallel; ranks that hold others are stages of a
    pipeline and see the same tokens.
    """
    stages: dict[tuple[int, ...], list[Path]] = {}
    for path in files:
        if (first := next(_steps(path), None)) is not None:
            stages.setdefault(tuple(sorted(first[1])), []).append(path)
    layers = [layer for stage in stages for layer in stage]
    require(
        len(set(layers)) >= len(layers) and len({len(ranks) for ranks in stages.values()}) <= 1,
        "ranks with the same layers, or as many for each stage of a pipeline",
        ", ".join(
            f"{len(ranks)} ranks of layers {short(stage)}" for stage, ranks in stages.items()
        ),
        error=TraceError,
    )
    seen: set[bytes] = set()
    for ranks in zip(*stages.values(), strict=True):
        for steps in zip_longest(*(_steps(path) for path in ranks)):
            chosen = _one_step([path.name for path in ranks], list(stages), steps)
            digest = hashlib.sha256(str(steps[0][0]).encode() + chosen.tobytes()).digest()
            if digest not in seen:  # else another rank of the same tokens
                where = f"{ranks[0].name}, step {steps[0][0]}"
                yield Document(len(seen), 0, chosen, where=where)
                seen.add(digest)


def _one_step(names: list[str], stages: list[tuple[int, ...]], steps: tuple) -> np.ndarray:
    """[T, L, K] of one step, its layers in order over all stages."""
    if any(part is None for part in steps) or len({step for step, _ in steps}) > 1:
        raise TraceError(expected(f"the same steps in {', '.join(names)}", "others"))
    merged: dict[int, np.ndarray] = {}
    for name, stage, (step, layers) in zip(names, stages, steps, strict=True):
        require(
            tuple(sorted(layers)) == stage,
            f"layers {short(stage)} as in the first step",
            short(sorted(layers)),
            error=TraceError,
            where=f"{name}, step {step}",
        )
        merged |= layers
    shapes = {layer: array.shape for layer, array in merged.items()}
    require(
        len(set(shapes.values())) <= 1,
        "the same tokens and slots in every layer",
        short(shapes),
        error=TraceError,
        where=f"{names[0]}, step {steps[0][0]}",
        field="layers",
    )
    return np.stack([merged[layer] for layer in sorted(merged)], axis=1)


def _steps(path: Path) -> Iterator[Step]:
    """The steps of one rank; the micro-batches of a step follow each other."""
    current: int | None = None
    layers: dict[int, list[np.ndarray]] = {}
    for where, values in read_lines(path, _RECORD):
        if values.get("block", "decoder") != "decoder":
            continue
        shape = (values["num_tokens"], values["topk"])
        rows = values["top_indices"] if shape[0] else np.zeros((0, shape[1]), np.int64)
        chosen = ids(where, rows, 2)
        require(
            chosen.shape == shape,
            f"top_indices of shape {list(shape)}",
            list(chosen.shape),
            error=TraceError,
            where=where,
            field="top_indices",
        )
        if values["step"] != current and current is not None:
            yield current, _concatenated(layers)
            layers = {}
        current = values["step"]
        layers.setdefault(values["layer"], []).append(chosen)
    if current is not None:
        yield current, _concatenated(layers)


def _concatenated(layers: dict[int, list[np.ndarray]]) -> dict[int, np.ndarray]:
    return {layer: np.concatenate(parts) for layer, parts in layers.items()}
