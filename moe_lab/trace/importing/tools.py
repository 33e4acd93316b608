"""Readers of what analysis tools record: moe-atlas, stratamoe, and tables of expert counts without
tokens.

Shape letters: T tokens, L layers, K slots, E experts, D domains.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moe_lab.errors import TraceError, expected
from moe_lab.trace.importing.source import Document, Sizes, Source
from moe_lab.trace.importing.untrusted import integers, read_arrays, read_json, read_lines

MADE_UP = "Only counts were recorded. Its token rows were made up to have them: load can be read, nothing about tokens or pairs of experts."


def moe_atlas(src: Path, sizes: Sizes) -> Source:
    """A JSON trace: model_id, num_layers, num_experts, top_k, token_ids, and activations of layer,
    token_idx, expert_idx, gate_weight.

    A trace that its writer cut (it keeps at most 500,000 activations) does not conserve and is
    refused.
    """
    header, activations = _atlas(src)
    experts, slots, number = (
        _positive(header, name) for name in ("num_experts", "top_k", "num_layers")
    )
    token_ids = integers(f"{src.name}: token_ids", header.get("token_ids", []), 1)
    try:
        columns = [
            np.array([item[name] for item in activations])
            for name in ("layer", "token_idx", "expert_idx", "gate_weight")
        ]
        layer, token, expert = (
            integers(f"{src.name}: activations", column, 1) for column in columns[:3]
        )
        weight = columns[3].astype(np.float32)
    except (KeyError, TypeError, ValueError) as error:
        what = "activations with layer, token_idx, expert_idx and gate_weight"
        raise TraceError(
            expected(f"{what} in {src.name}", f"{type(error).__name__} {error}")
        ) from error
    layers = tuple(np.unique(layer).tolist())
    tokens = len(token_ids) or (int(token.max()) + 1 if len(token) else 0)
    wanted = tokens * slots * len(layers)
    if len(layer) != wanted or not len(layer):
        raise TraceError(
            expected(
                f"{wanted} activations ({tokens} tokens x {slots} slots x {len(layers)} layers) in {src.name}",
                len(layer),
            )
        )
    if layer.min() < 0 or layer.max() >= number or token.min() < 0 or token.max() >= tokens:
        raise TraceError(
            expected(
                f"layers below {number} and tokens below {tokens} in {src.name}",
                f"{layer.max()} and {token.max()}",
            )
        )
    order = np.lexsort((-weight, token, layer))
    shape = (len(layers), tokens, slots)
    if (
        np.bincount(np.searchsorted(layers, layer) * tokens + token, minlength=len(layers) * tokens)
        != slots
    ).any():
        raise TraceError(
            expected(f"{slots} activations for each token and layer in {src.name}", "other numbers")
        )
    ids, weights = (values[order].reshape(shape).transpose(1, 0, 2) for values in (expert, weight))
    document = Document(0, 0, ids, weights, token_ids if len(token_ids) else None)
    model = str(header.get("model_id", ""))
    return Source([document], experts, slots, layers, model=model, has_weights=True)


def stratamoe(src: Path, sizes: Sizes) -> Source:
    """``router-trace.v2.json``: selections [tokens][layers][slots] with the source's model,
    revisions, software and workload hash.
    """
    folder = src if src.is_dir() else src.parent
    path = src / "router-trace.v2.json" if src.is_dir() else src
    values = read_json(path)
    if not isinstance(values, dict) or values.get("version") != 2:
        raise TraceError(expected(f"a router trace of version 2 in {path.name}", repr(values)[:40]))
    ids = integers(f"{path.name}: selections", values.get("selections"), 3)
    experts, slots, layers, tokens = (
        _positive(values, name) for name in ("expertsPerLayer", "topK", "layers", "tokens")
    )
    if ids.shape != (tokens, layers, slots):
        raise TraceError(
            expected(
                f"selections of shape {[tokens, layers, slots]} in {path.name}", list(ids.shape)
            )
        )
    source = values.get("source") or {}
    model, workload, software = (
        source.get(name) or {} for name in ("model", "workload", "software")
    )
    versions = {str(name): str(value) for name, value in software.items()}
    revision = str((source.get("tokenizer") or {}).get("revision", ""))
    return Source(
        list(_spans(folder, ids)),
        experts,
        slots,
        model="@".join(str(model[name]) for name in ("id", "revision") if name in model),
        tokenizer_hash=revision,
        corpus_hash=str(workload.get("sha256", "")),
        seed=values.get("seed") if isinstance(values.get("seed"), int) else None,
        versions=versions,
        notes=(f"Scenario {values['scenario']!r}.",)
        if isinstance(values.get("scenario"), str)
        else (),
    )


def counts(src: Path, sizes: Sizes) -> Source:
    """Slots of each expert in each layer, by domain or not: .json (OLMoE's tables too), .npz or
    .npy.
    """
    tables, slots = _tables(src, sizes)
    return source_of_counts(tables, sizes, slots)


def source_of_counts(
    tables: Mapping[str, np.ndarray], sizes: Sizes, top_k: int | None = None
) -> Source:
    """Rows that have the given counts, one document for each domain.

    Args:
        tables: domain -> [L, E] slots.
        sizes: of the model; ``top_k`` is needed where ``top_k`` is None.

    Raises:
        TraceError: negative counts; layers of a domain with different sums, or sums that are no
            multiple of k: a count was lost.
    """
    slots = top_k or sizes.top_k
    if slots is None:
        raise TraceError(
            expected("the number of slots behind the counts", "none", "config= or top_k=")
        )
    shapes = {table.shape for table in tables.values()}
    if len(shapes) != 1:
        raise TraceError(expected("tables of one size", sorted(shapes)))
    for domain, table in tables.items():
        _check_conservation(domain, table, slots)
    layers, experts = next(iter(shapes))
    named = tuple(sizes.layers) if sizes.layers and len(sizes.layers) == layers else None
    zero = sizes.num_zero_experts
    return Source(
        _made_up(tables, slots),
        experts - zero,
        slots,
        named,
        model=sizes.model,
        per_token=False,
        notes=(MADE_UP,),
    )


def _check_conservation(domain: str, table: np.ndarray, slots: int) -> None:
    where = f"{domain}: " if domain else ""
    if table.size == 0 or table.min() < 0:
        raise TraceError(
            where
            + expected("counts of at least 0", "an empty table" if table.size == 0 else table.min())
        )
    sums = table.sum(axis=1)
    tokens = int(np.median(sums)) // slots
    off = np.flatnonzero(sums != sums[0])
    if len(off) or sums[0] % slots:
        spread = f"{int(sums.min())}..{int(sums.max())} in {len(sums)} layers ({int((sums != tokens * slots).sum())} off {slots} x {tokens})"
        raise TraceError(
            where
            + expected(
                f"the same sum of {slots} x tokens in every layer",
                spread,
                "the integer counts before rounding",
            )
        )
    if (table.max(axis=1) > sums // slots).any():
        raise TraceError(
            where
            + expected(
                f"at most one slot of each token on an expert ({int(sums[0] // slots)} tokens)",
                int(table.max()),
            )
        )


def _made_up(tables: Mapping[str, np.ndarray], slots: int) -> Iterator[Document]:
    """Slots sorted by expert and dealt to the tokens in turn: no token gets an expert twice,
    because none has more slots than tokens.
    """
    for number, (domain, table) in enumerate(tables.items()):
        tokens = int(table[0].sum()) // slots
        ids = [np.repeat(np.arange(table.shape[1]), row).reshape(slots, tokens).T for row in table]
        columns = {"domain": [domain] * tokens} if domain else {}
        yield Document(
            number, 0, np.stack(ids, axis=1), token_ids=np.zeros(tokens, np.int64), columns=columns
        )


def _tables(src: Path, sizes: Sizes) -> tuple[dict[str, np.ndarray], int | None]:
    """Domain -> [L, E], and k where the file tells it."""
    if src.suffix in (".npz", ".npy"):
        arrays = read_arrays(src)
        named = next(
            (array for array in arrays.values() if array.dtype.kind == "U" and array.ndim == 1),
            None,
        )
        table = next(
            (
                array
                for array in arrays.values()
                if array.dtype.kind in "iu" and array.ndim in (2, 3)
            ),
            None,
        )
        if table is None:
            raise TraceError(
                expected(
                    f"integer counts [layers, experts] or [domains, layers, experts] in {src.name}",
                    "none",
                )
            )
        if table.ndim == 2:
            return {"": table.astype(np.int64)}, None
        names = (
            [str(name) for name in named]
            if named is not None and len(named) == len(table)
            else [str(n) for n in range(len(table))]
        )
        return dict(zip(names, table.astype(np.int64), strict=True)), None
    values = read_json(src)
    if isinstance(values, list):
        return {"": integers(src.name, values, 2)}, None
    if not isinstance(values, dict):
        raise TraceError(expected(f"tables of counts in {src.name}", type(values).__name__))
    if "counts" in values:
        return {"": integers(f"{src.name}: counts", values["counts"], 2)}, values.get("top_k")
    return _by_domain(src.name, values, sizes.model)


def _by_domain(
    name: str, values: dict[str, Any], model: str
) -> tuple[dict[str, np.ndarray], int | None]:
    """Tables as OLMoE has them: model -> kind -> domain -> layer -> counts, where outer levels may
    be missing.
    """
    if _is_table(values):
        return {"": _layered(name, values)}, None
    if "expert_counts" in values:
        tables, _ = _by_domain(name, values["expert_counts"], model)
        first, _ = (
            _by_domain(name, values["expert_counts_top1"], model)
            if "expert_counts_top1" in values
            else ({}, None)
        )
        ratios = {
            int(tables[domain].sum()) / int(table.sum())
            for domain, table in first.items()
            if domain in tables and table.sum()
        }
        ratio = next(iter(ratios), 0.0)
        return tables, int(ratio) if len(ratios) == 1 and ratio == int(ratio) else None
    if all(isinstance(value, dict) and _is_table(value) for value in values.values()):
        return {
            str(domain): _layered(f"{name}: {domain}", table) for domain, table in values.items()
        }, None
    if not isinstance(values.get(model), dict):
        raise TraceError(
            expected(f"model= one of {', '.join(map(str, values))[:200]} in {name}", repr(model))
        )
    return _by_domain(name, values[model], model)


def _is_table(values: dict[str, Any]) -> bool:
    return bool(values) and all(re.fullmatch(r"(layer_?)?\d+", str(key)) for key in values)


def _layered(where: str, table: dict[str, Any]) -> np.ndarray:
    numbers = sorted(table, key=lambda key: int(re.sub(r"\D", "", key)))
    return integers(where, [table[key] for key in numbers], 2)


def _spans(folder: Path, ids: np.ndarray) -> Iterator[Document]:
    """The prompts of a capture as documents, where the metadata beside it tells them."""
    path = folder / "capture-metadata.json"
    metadata = read_json(path) if path.is_file() else {}
    spans = [
        (int(span["token_start"]), int(span["token_end_exclusive"]))
        for span in metadata.get("prompt_spans", [])
    ]
    starts, ends = [start for start, _ in spans], [end for _, end in spans]
    if not spans or starts != [0, *ends[:-1]] or ends[-1] != len(ids):
        spans = [(0, len(ids))]
    for number, (start, end) in enumerate(spans):
        yield Document(number, 0, ids[start:end])


def _atlas(src: Path) -> tuple[dict[str, Any], list[Any]]:
    if src.suffix == ".jsonl":
        lines = [record for _, record in read_lines(src)]
        header = next(
            (record for record in lines if "model_id" in record or "num_experts" in record), {}
        )
        return header, [record for record in lines if "expert_idx" in record]
    values = read_json(src)
    if not isinstance(values, dict) or not isinstance(values.get("activations"), list):
        raise TraceError(expected(f"a trace with activations in {src.name}", type(values).__name__))
    return values, values["activations"]


def _positive(values: dict[str, Any], name: str) -> int:
    value = values.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise TraceError(expected(f"{name} as an integer of at least 1", repr(value)[:40]))
    return value
