"""``import_trace``: the routing records of serving engines and other tools as a trace of ours.
Formats in ``docs/trace.md``.

What the source does not say stays missing: weights, scores, the route of a last token, which slots
were zero-compute experts. The number of experts comes from the source's own header, a
configuration, or the caller; never from the largest id.
Shape letters: T tokens, L layers, K slots.
"""

from collections.abc import Callable, Iterable
from enum import StrEnum
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from moe_lab.errors import ConfigError, TraceError, expected
from moe_lab.hf.configuration import router_sizes
from moe_lab.trace.importing.engines import megatron, sglang, trtllm, vllm
from moe_lab.trace.importing.source import Document, Sizes, Source
from moe_lab.trace.importing.tools import counts, moe_atlas, stratamoe
from moe_lab.trace.reader import Trace, open_trace
from moe_lab.trace.rows import slot_rows
from moe_lab.trace.schema import ROUTED, LayerMeta, TraceMeta
from moe_lab.trace.writer import TraceWriter


class ImportKind(StrEnum):
    """Who wrote the source."""

    VLLM = "vllm"
    SGLANG = "sglang"
    TRTLLM = "trtllm"
    MEGATRON = "megatron"
    MOE_ATLAS = "moe-atlas"
    STRATAMOE = "stratamoe"
    COUNTS = "counts"


READERS: dict[ImportKind, Callable[[Path, Sizes], Source]] = {
    ImportKind.VLLM: vllm,
    ImportKind.SGLANG: sglang,
    ImportKind.TRTLLM: trtllm,
    ImportKind.MEGATRON: megatron,
    ImportKind.MOE_ATLAS: moe_atlas,
    ImportKind.STRATAMOE: stratamoe,
    ImportKind.COUNTS: counts,
}
"""Each opens the file or folder of its kind."""


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
    model: str = "",
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
        model: name in the metadata; where the source holds several models, the one to take.

    Raises:
        TraceError: a source that is damaged, does not conserve its counts, or does not say how many
            experts there are.
    """
    try:
        chosen = ImportKind(kind)
    except ValueError:
        raise TraceError(expected(f"a source among {', '.join(ImportKind)}", repr(kind))) from None
    src = Path(src)
    if not src.exists():
        raise TraceError(expected(f"a file or folder at {src}", "none"))
    sizes = _sizes(
        config,
        num_experts,
        num_zero_experts,
        top_k,
        None if layers is None else tuple(layers),
        model,
    )
    try:
        source = READERS[chosen](src, sizes)
        _write(chosen, source, sizes, Path(path))
    except OSError as error:
        raise TraceError(f"cannot read {src}: {error.strerror or error}") from error
    return open_trace(path, verify=False)


def _sizes(
    config: Any,
    experts: int | None,
    zero: int | None,
    top_k: int | None,
    layers: tuple[int, ...] | None,
    model: str,
) -> Sizes:
    known = Sizes()
    if config is not None:
        try:
            found = router_sizes(config)
        except ConfigError as error:
            raise TraceError(f"cannot take the sizes from the configuration: {error}") from error
        known = Sizes(*found)
    return Sizes(
        num_experts=experts or known.num_experts,
        num_zero_experts=known.num_zero_experts if zero is None else zero,
        top_k=top_k or known.top_k,
        layers=layers or known.layers,
        num_layers=known.num_layers,
        model=model,
    )


def _write(kind: ImportKind, source: Source, sizes: Sizes, path: Path) -> None:
    documents = iter(source.documents)
    first = next(documents, None)
    if first is None:
        raise TraceError(expected("at least one document with routes", "none"))
    layers, chosen = _layers(source, sizes, first.ids.shape[1], first.ids.shape[2])
    aliased = source.aliases_zero_experts and sizes.num_zero_experts > 0
    notes = list(source.notes)
    if aliased:
        notes.append(
            f"{kind.value} records zero-compute experts as expert 0: its counts, ffn_count and zero_count are not the model's."
        )
    meta = TraceMeta(
        layers=layers,
        model=source.model or sizes.model,
        model_hash=source.model_hash,
        tokenizer_hash=source.tokenizer_hash,
        corpus_hash=source.corpus_hash,
        seed=source.seed,
        phase="generate"
        if kind in (ImportKind.VLLM, ImportKind.SGLANG, ImportKind.TRTLLM)
        else "eval",
        created_from=f"import {kind.value}",
        has_weights=source.has_weights,
        has_scores=False,
        zero_experts_known=not aliased,
        per_token=source.per_token,
        notes=tuple(notes),
    )
    if source.versions:
        meta = meta.replace(
            versions={
                **meta.versions,
                **{f"source {name}": value for name, value in source.versions.items()},
            }
        )
    with TraceWriter(path, meta) as writer:
        for document in chain([first], documents):
            _write_document(writer, document, chosen, aliased)
            writer.finish_documents([document.doc])


def _write_document(
    writer: TraceWriter, document: Document, chosen: list[int], aliased: bool
) -> None:
    tokens = len(document.ids)
    doc = np.full(tokens, document.doc, np.uint32)
    pos = (document.pos + np.arange(tokens)).astype(np.uint32)
    for place, layer in zip(chosen, writer.meta.layers, strict=True):
        ids = document.ids[:, place]
        if aliased:
            ids = _without_aliases(ids)
        weights = (
            None if document.weights is None else document.weights[:, place].astype(np.float32)
        )
        rows = slot_rows(layer, doc, pos, ids, weights, None, None)
        writer.write_rows(
            layer.layer, rows, np.bincount(ids[ids >= 0], minlength=layer.num_choices)
        )
    if document.token_ids is None:
        return
    number = len(document.token_ids)
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
        raise TraceError(
            expected(
                "the number of experts, which this source does not hold",
                "none",
                "config= or num_experts=",
            )
        )
    if source.num_experts and sizes.num_experts and source.num_experts != sizes.num_experts:
        raise TraceError(
            expected(
                f"{sizes.num_experts} experts as configured", f"a source of {source.num_experts}"
            )
        )
    top_k = source.top_k or sizes.top_k or slots
    if slots > top_k:
        raise TraceError(
            expected(f"at most top_k = {top_k} slots as configured", f"a source of {slots}")
        )
    numbers = source.layers or sizes.layers or tuple(range(rows))
    places = list(range(rows))
    if len(numbers) != rows:
        if rows != sizes.num_layers:
            raise TraceError(
                expected(
                    f"routes of {len(numbers)} MoE layers or of all {sizes.num_layers} layers",
                    f"{rows}",
                )
            )
        places = list(numbers)
    layers = tuple(
        LayerMeta(
            layer=int(number),
            num_experts=experts,
            num_zero_experts=sizes.num_zero_experts,
            top_k=top_k,
        )
        for number in numbers
    )
    return layers, places
