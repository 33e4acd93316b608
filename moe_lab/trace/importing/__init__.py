"""``import_trace``: the routing records of serving engines and other tools as a trace of ours.
Formats in ``docs/trace.md``.

What the source does not say stays missing: weights, scores, the route of a last token, which slots
were zero-compute experts. The number of experts comes from the source's own header, a
configuration, or the caller; never from the largest id.
Shape letters: T tokens, L layers, K slots.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from enum import StrEnum
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from moe_lab.errors import ArgumentError, ConfigError, TraceError, expected, require
from moe_lab.hf.configuration import router_sizes
from moe_lab.json_input import list_of, whole
from moe_lab.trace.importing.expert_counts import counts
from moe_lab.trace.importing.lookup_tables import llama_cpp, route_trace
from moe_lab.trace.importing.megatron import megatron
from moe_lab.trace.importing.records import Document, Sizes, Source
from moe_lab.trace.importing.request_routes import sglang, trtllm, vllm
from moe_lab.trace.importing.tool_traces import moe_atlas, stratamoe
from moe_lab.trace.opened_trace import Trace
from moe_lab.trace.reader import open_trace
from moe_lab.trace.rows import slot_rows
from moe_lab.trace.schema import (
    MAX_CHOICES,
    MAX_LAYERS,
    MAX_TOP_K,
    ROUTED,
    LayerMeta,
    TraceMeta,
)
from moe_lab.trace.writer import TraceWriter

BLOCK_SLOTS = 2**22
"""Slots [tokens, layers, K] that are turned into rows at a time."""


class ImportKind(StrEnum):
    """The engine or tool that wrote the source."""

    VLLM = "vllm"
    SGLANG = "sglang"
    TRTLLM = "trtllm"
    MEGATRON = "megatron"
    MOE_ATLAS = "moe-atlas"
    STRATAMOE = "stratamoe"
    ROUTE_TRACE = "route-trace"
    LLAMA_CPP = "llama-cpp"
    COUNTS = "counts"


READERS: dict[ImportKind, Callable[[Path, Sizes], Source]] = {
    ImportKind.VLLM: vllm,
    ImportKind.SGLANG: sglang,
    ImportKind.TRTLLM: trtllm,
    ImportKind.MEGATRON: megatron,
    ImportKind.MOE_ATLAS: moe_atlas,
    ImportKind.STRATAMOE: stratamoe,
    ImportKind.ROUTE_TRACE: route_trace,
    ImportKind.LLAMA_CPP: llama_cpp,
    ImportKind.COUNTS: counts,
}
"""Each opens the file or folder of its kind."""
GENERATED = frozenset(
    (
        ImportKind.VLLM,
        ImportKind.SGLANG,
        ImportKind.TRTLLM,
        ImportKind.ROUTE_TRACE,
        ImportKind.LLAMA_CPP,
    )
)
"""Kinds whose records are of prompts with the tokens that followed them."""


def import_trace(
    kind: ImportKind | str,
    src: Path | str,
    path: Path | str,
    *,
    config: Any = None,
    num_experts: int | None = None,
    num_zero_experts: int | None = None,
    top_k: int | None = None,
    layers: Iterable[int] | None = None,
    tokens: int | None = None,
    model: str = "",
    overwrite: bool = False,
) -> Trace:
    """Write the records at ``src`` as a trace at ``path`` and open it.

    Args:
        kind: who wrote them; one of ``ImportKind``.
        src: a file, or a folder of files (one for each rank or request).
        path: where the trace will be.
        config: a Hugging Face configuration (object, dictionary, config.json or its folder) that
            tells the sizes.
        num_experts, num_zero_experts, top_k, layers: the sizes where neither the source nor
            ``config`` has them.
        tokens: how many tokens counts were taken over, where a layer may have used fewer than
            ``top_k`` slots of each.
        model: name in the metadata; where the source holds several models, the one to take.
        overwrite: replace a finished trace at ``path``.

    Raises:
        TraceExistsError: a finished trace at ``path`` without ``overwrite``.
        TraceError: a source that is damaged, does not conserve its counts, or does not say how many
            experts there are.
    """
    try:
        chosen = ImportKind(kind)
    except ValueError:
        raise TraceError(
            expected(f"a source among {', '.join(ImportKind)}", repr(kind)), field="kind"
        ) from None
    src = Path(src)
    require(src.exists(), f"a file or folder at {src}", "none", error=TraceError)
    given = {
        "num_experts": num_experts,
        "num_zero_experts": num_zero_experts,
        "top_k": top_k,
        "layers": None if layers is None else list(layers),
        "tokens": tokens,
    }
    try:
        sizes = _sizes(config, given, model)
        _write(chosen, READERS[chosen](src, sizes), sizes, Path(path), overwrite)
    except ConfigError as error:
        raise TraceError(str(error)) from error
    except OSError as error:
        raise TraceError(f"cannot read {src}: {error.strerror or error}") from error
    return open_trace(path, verify=False)


_SIZES = {
    "num_experts": whole(1, MAX_CHOICES),
    "num_zero_experts": whole(0, MAX_CHOICES),
    "top_k": whole(1, MAX_TOP_K),
    "layers": list_of(whole(0, 99_999), MAX_LAYERS),
    "tokens": whole(1, 2**40),
}


def _sizes(config: Any, given: dict[str, Any], model: str) -> Sizes:
    """What the caller and the configuration say; the caller goes first."""
    known = Sizes()
    if config is not None:
        try:
            known = Sizes(*router_sizes(config))
        except ConfigError as error:
            raise TraceError(f"cannot take the sizes from the configuration: {error}") from error
    checked = {
        name: _SIZES[name](value, name) for name, value in given.items() if value is not None
    }
    if "layers" in checked:
        numbers = tuple(checked["layers"])
        require(
            numbers and len(set(numbers)) >= len(numbers),
            "layers that are different numbers",
            list(numbers)[:20],
            error=TraceError,
        )
        checked["layers"] = numbers
    return replace(known, model=model, **checked)


def _write(kind: ImportKind, source: Source, sizes: Sizes, path: Path, overwrite: bool) -> None:
    documents = iter(source.documents)
    first = next(documents, None)
    if first is None:
        raise TraceError(expected("at least one document with routes", "none"))
    layers, places = _layers(source, sizes, first.ids.shape[1], first.ids.shape[2])
    aliased = source.aliases_zero_experts and sizes.num_zero_experts > 0
    alias_note = (
        f"{kind.value} records zero-compute experts as expert 0: its counts, ffn_count and "
        "zero_count are not the model's."
    )
    generated = kind in GENERATED
    meta = TraceMeta(
        layers=layers,
        model=source.model or sizes.model,
        model_hash=source.model_hash,
        tokenizer_hash=source.tokenizer_hash,
        corpus_hash=source.corpus_hash,
        seed=source.seed,
        phase="generate" if generated else "eval",
        created_from=f"import {kind.value}",
        has_weights=source.has_weights,
        has_scores=False,
        zero_experts_known=not aliased,
        per_token=source.per_token,
        has_token_ids=source.has_token_ids,
        notes=(*source.notes, *((alias_note,) if aliased else ())),
    )
    versions = {f"source {name}": value for name, value in source.versions.items()}
    meta = meta.replace(versions={**meta.versions, **versions})
    with TraceWriter(path, meta, overwrite=overwrite) as writer:
        unfinished = first.doc
        for document in chain([first], documents):
            if document.ids.shape[1] != first.ids.shape[1]:
                what = f"routes of {first.ids.shape[1]} layers as in the first document"
                raise TraceError(f"{document.where}: " + expected(what, document.ids.shape[1]))
            if document.doc != unfinished:
                writer.finish_documents([unfinished])
            unfinished = document.doc
            for block in _blocks(document):
                _write_block(writer, block, places, aliased)
        writer.finish_documents([unfinished])


def _blocks(document: Document) -> Iterator[Document]:
    """A document in parts that fit in memory with all that is made of them."""
    tokens, size = len(document.ids), max(1, BLOCK_SLOTS // max(document.ids[:1].size, 1))
    if tokens <= size:
        yield document
        return
    for start in range(0, tokens, size):
        part = slice(start, start + size)
        # token ids and columns of the last part hold tokens without a route too
        whole_part = part if start + size < tokens else slice(start, None)
        yield replace(
            document,
            pos=document.pos + start,
            ids=document.ids[part],
            weights=None if document.weights is None else document.weights[part],
            token_ids=None if document.token_ids is None else document.token_ids[whole_part],
            columns={name: values[whole_part] for name, values in document.columns.items()},
        )


def _write_block(writer: TraceWriter, document: Document, places: list[int], aliased: bool) -> None:
    tokens = len(document.ids)
    doc = np.full(tokens, document.doc, np.uint32)
    pos = (document.pos + np.arange(tokens)).astype(np.uint32)
    for place, layer in zip(places, writer.meta.layers, strict=True):
        ids = document.ids[:, place].astype(np.int32)
        ids = _without_aliases(ids) if aliased else ids
        weights = document.weights
        weights = None if weights is None else weights[:, place].astype(np.float32)
        try:
            rows = slot_rows(layer, doc, pos, ids, weights, None, None)
        except TraceError as error:
            raise TraceError(
                f"{document.where}: {error}" if document.where else str(error)
            ) from error
        counts = np.bincount(ids[ids >= 0], minlength=layer.num_choices)
        writer.write_rows(layer.layer, rows, counts)
    if document.token_ids is None and not document.columns:
        return
    number = tokens if document.token_ids is None else len(document.token_ids)
    frame = pl.DataFrame(
        {
            "doc": np.full(number, document.doc, np.uint32),
            "pos": document.pos + np.arange(number),
            "token_id": document.token_ids,
            ROUTED: np.arange(number) < tokens,
            **document.columns,
        }
    )
    writer.write_tokens(frame)


def _without_aliases(ids: np.ndarray) -> np.ndarray:
    """Expert 0 once: further slots with its id can only have been zero-compute experts."""
    zero = ids == 0
    return np.where(zero & (np.cumsum(zero, axis=1) > 1), -1, ids)


def _layers(
    source: Source, sizes: Sizes, rows: int, slots: int
) -> tuple[tuple[LayerMeta, ...], list[int]]:
    """The layers' metadata, and for each its place on the layer axis of the source."""
    experts = source.num_experts or sizes.num_experts
    if experts is None:
        what = "the number of experts, which this source does not hold"
        raise ArgumentError(what, "none", "{config} or {num_experts}")
    require(
        not source.num_experts or not sizes.num_experts or source.num_experts == sizes.num_experts,
        f"{sizes.num_experts} experts as configured",
        f"a source of {source.num_experts}",
        error=TraceError,
    )
    top_k = source.top_k or sizes.top_k or slots
    require(
        slots <= top_k,
        f"at most top_k = {top_k} slots as configured",
        f"a source of {slots}",
        error=TraceError,
    )
    require(0 < rows <= MAX_LAYERS, f"routes of 1 to {MAX_LAYERS} layers", rows, error=TraceError)
    looped = sizes.visits if rows == len(sizes.visits) and not source.layers else ()
    numbers = source.layers or (None if looped else sizes.layers) or tuple(range(rows))
    places = list(range(rows)) if len(numbers) == rows else sizes.places(rows)
    if places is None:
        every = f" or of all {sizes.num_layers} layers" if sizes.num_layers else ""
        raise TraceError(expected(f"routes of {len(numbers)} MoE layers{every}", f"{rows}"))
    layers = tuple(
        LayerMeta(
            layer=number,
            num_experts=experts,
            num_zero_experts=sizes.num_zero_experts,
            top_k=top_k,
            expert_bytes=size,
            model_layer=looped[number] if looped else None,
            pass_number=looped[:number].count(looped[number]) if looped else 0,
        )
        for number, size in zip(numbers, source.expert_bytes or [0] * len(numbers), strict=True)
    )
    return layers, places
