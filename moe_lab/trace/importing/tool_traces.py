"""Traces of analysis tools: moe-atlas and stratamoe.

Shape letters: T tokens, L layers, K slots.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from moe_lab.errors import TraceError, expected, require
from moe_lab.json_input import anything, list_of, mapping, optional, record, text, whole
from moe_lab.trace.importing.read_files import ids, read_json, read_lines
from moe_lab.trace.importing.records import Document, Sizes, Source

_ATLAS = record(
    model_id=optional(text(), ""),
    num_layers=whole(1, 100_000),
    num_experts=whole(1, 65_535),
    top_k=whole(1, 255),
    token_ids=optional(list_of(whole(0, 2**32 - 1)), []),
    activations=list_of(mapping),
)
_NAMED = optional(mapping, {})
_STRATAMOE = record(
    expertsPerLayer=whole(1, 65_535),
    topK=whole(1, 255),
    layers=whole(1, 4096),
    tokens=whole(1, 2**31),
    selections=anything,
    source=optional(record(model=_NAMED, workload=_NAMED, software=_NAMED, tokenizer=_NAMED)),
)
_SPANS = record(
    prompt_spans=optional(list_of(record(token_start=whole(), token_end_exclusive=whole())), [])
)


def moe_atlas(src: Path, sizes: Sizes) -> Source:
    """A JSON trace: model_id, num_layers, num_experts, top_k, token_ids, and activations of layer,
    token_idx, expert_idx, gate_weight.

    A trace that its writer cut (it keeps at most 500,000 activations) does not conserve and is
    refused.
    """
    header = _ATLAS(_atlas_values(src), src.name)
    experts, slots, number = (header[name] for name in ("num_experts", "top_k", "num_layers"))
    layer, token, expert, weight = _columns(src.name, header["activations"])
    layers, token_ids = tuple(np.unique(layer).tolist()), np.array(header["token_ids"], np.int64)
    tokens = len(token_ids) or (int(token.max()) + 1 if len(token) else 0)
    wanted = tokens * slots * len(layers)
    if len(layer) != wanted or not len(layer):
        sums = f"{tokens} tokens x {slots} slots x {len(layers)} layers"
        raise TraceError(
            expected(f"{wanted} activations ({sums}) in {src.name}", len(layer)),
            field="activations",
        )
    if min(layers) < 0 or max(layers) >= number or token.min() < 0 or token.max() >= tokens:
        what = f"layers below {number} and tokens below {tokens} in {src.name}"
        raise TraceError(expected(what, f"{layer.max()} and {token.max()}"))
    row = np.searchsorted(layers, layer) * tokens + token
    require(
        not (np.bincount(row, minlength=len(layers) * tokens) != slots).any(),
        f"{slots} activations for each token and layer in {src.name}",
        "other numbers",
        error=TraceError,
    )
    order, shape = np.lexsort((-weight, token, layer)), (len(layers), tokens, slots)
    chosen, weights = (
        values[order].reshape(shape).transpose(1, 0, 2) for values in (expert, weight)
    )
    document = Document(
        0, 0, chosen, weights, token_ids if len(token_ids) else None, where=src.name
    )
    return Source([document], experts, slots, layers, model=header["model_id"], has_weights=True)


def _atlas_values(src: Path) -> Any:
    if src.suffix != ".jsonl":
        return read_json(src)
    lines = [values for _, values in read_lines(src)]
    header = next((line for line in lines if "model_id" in line or "num_experts" in line), {})
    return {**header, "activations": [line for line in lines if "expert_idx" in line]}


def _columns(name: str, activations: list[dict[str, Any]]) -> list[np.ndarray]:
    """[layer, token, expert, weight] of the activations."""
    columns = []
    for field in ("layer", "token_idx", "expert_idx", "gate_weight"):
        values, where = [item.get(field) for item in activations], f"{name}: {field}"
        if field != "gate_weight":
            columns.append(ids(where, values, 1))
            continue
        require(
            all(type(value) in (int, float) for value in values),
            f"a number as gate_weight of each activation in {name}",
            "others",
            error=TraceError,
        )
        columns.append(np.array(values, np.float64).astype(np.float32))
    return columns


def stratamoe(src: Path, sizes: Sizes) -> Source:
    """``router-trace.v2.json``: selections [tokens][layers][slots] with the source's model,
    revisions, software and workload hash.
    """
    path = src / "router-trace.v2.json" if src.is_dir() else src
    raw = mapping(read_json(path), path.name)
    require(
        raw.get("version") == 2,
        f"a router trace of version 2 in {path.name}",
        repr(raw.get("version"))[:40],
        error=TraceError,
    )
    values = _STRATAMOE(raw, path.name)
    selections = ids(f"{path.name}: selections", values["selections"], 3)
    experts, slots, layers, tokens = (
        values[name] for name in ("expertsPerLayer", "topK", "layers", "tokens")
    )
    require(
        selections.shape == (tokens, layers, slots),
        f"selections of shape {[tokens, layers, slots]} in {path.name}",
        list(selections.shape),
        error=TraceError,
    )
    source = values["source"] or {"model": {}, "workload": {}, "software": {}, "tokenizer": {}}
    model, scenario, seed = source["model"], values.get("scenario"), values.get("seed")
    return Source(
        list(_spans(path.parent, selections)),
        experts,
        slots,
        model="@".join(str(model[name]) for name in ("id", "revision") if name in model),
        tokenizer_hash=str(source["tokenizer"].get("revision", "")),
        corpus_hash=str(source["workload"].get("sha256", "")),
        seed=seed if type(seed) is int and abs(seed) < 2**63 else None,
        versions={name: str(value) for name, value in source["software"].items()},
        notes=(f"Scenario {scenario!r}.",) if isinstance(scenario, str) else (),
    )


def _spans(folder: Path, selections: np.ndarray) -> Iterator[Document]:
    """The prompts of a capture as documents, where the metadata beside it has their spans."""
    path, where = folder / "capture-metadata.json", "router-trace.v2.json"
    spans = _SPANS(read_json(path), path.name)["prompt_spans"] if path.is_file() else []
    bounds = [(span["token_start"], span["token_end_exclusive"]) for span in spans]
    starts, ends = [start for start, _ in bounds], [end for _, end in bounds]
    if not bounds or starts != [0, *ends[:-1]] or ends[-1] != len(selections):
        bounds = [(0, len(selections))]
    for number, (start, end) in enumerate(bounds):
        yield Document(number, 0, selections[start:end], where=where)
