"""``capture``: the routing decisions of any torch model, as it makes them.

    with capture(model, "traces/run"):
        model(input_ids, attention_mask=attention_mask)

Hooks take references to what routers return; a second thread turns them into rows and a third
writes them, so the model waits only where it is faster than both. Nothing is recomputed that the
model gives; what does not fit raises and names the module. Shape letters: B batch, S sequence, T
tokens, K slots, E experts.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import polars as pl
import torch
from torch import Tensor, nn

from moe_lab.errors import TraceError, expected
from moe_lab.routing.config import ScoreFunc
from moe_lab.trace.background import Background
from moe_lab.trace.capturing.find_routers import Site, find_sites
from moe_lab.trace.capturing.fingerprints import (
    Pieces,
    corpus_hash,
    model_hash,
    model_name,
    rank_folder,
    tokenizer_hash,
)
from moe_lab.trace.capturing.generation import Generation
from moe_lab.trace.capturing.hooks import Hooks, Pass, unchanged
from moe_lab.trace.capturing.numbering import Labels, Numbering
from moe_lab.trace.capturing.router_output import Reader, Reading, as_reading, describe
from moe_lab.trace.capturing.token_loss import TokenLoss
from moe_lab.trace.rows import slot_rows
from moe_lab.trace.schema import OUTPUT_RATIO, LayerMeta, TraceMeta
from moe_lab.trace.score_spread import Spread, infer_score_func, spread_of_logits, spread_of_scores
from moe_lab.trace.writer import BUFFER_BYTES, TraceWriter

CHUNK_TOKENS = 8192
CHUNK_BYTES = 2**25
"""Passes are converted together until they hold that much: one decode step is a few tokens, and
each conversion has a fixed cost.
"""


@dataclass
class _Recorded:
    """One pass as it waits to be converted: [n] labels of the tokens that count, their places in
    the pass, and a reading per router.
    """

    doc: np.ndarray
    pos: np.ndarray
    keep: Tensor | None
    readings: list[Reading]
    ratios: list[Tensor]
    tokens: dict[str, Any]
    size: int
    documents: list[int] = field(default_factory=list)


class Capture:
    """What ``capture`` gives: ``documents`` numbers the next pass, ``folder`` is where the trace
    will be.

    Attributes:
        sites: the routers that were found.
        finished: documents that an interrupted trace already holds (``resume=True``).
        num_tokens: tokens recorded so far in each layer.
    """

    def __init__(
        self,
        model: nn.Module,
        folder: Path | str,
        options: "_Options",
        sites: list[Site],
        left_out: list[str],
    ) -> None:
        self.folder = rank_folder(Path(folder))
        self.sites = sites
        self.num_tokens = 0
        self._model, self._options, self._left_out = model, options, left_out
        self._numbering = Numbering()
        self._columns: dict[str, np.ndarray] | None = None
        self._writer: TraceWriter | None = None
        self._background = Background(2 * CHUNK_BYTES)
        self._chunk: list[_Recorded] = []
        self._previous: list[int] = []
        self._phases: set[str] = set()
        self._pieces = None if options.tokenizer is None else Pieces(options.tokenizer)
        self._loss = TokenLoss() if options.losses else None
        self._generation = Generation(model, self._numbering)
        self._hooks: Hooks | None = None

    @property
    def finished(self) -> set[int]:
        return set() if self._writer is None else self._writer.finished

    def __enter__(self) -> Self:
        self._hooks = Hooks(self._model, self.sites, self._pass_ended, self._options.output_ratio)
        self._generation.watch()
        try:
            if all(site.num_experts and site.top_k for site in self.sites):
                self._open([site.top_k or 0 for site in self.sites])
        except BaseException:
            self._unhook()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._unhook()
        try:
            if kind is None:
                self._submit()
                self._background.drain()
                if self._writer is None or not self._phases:
                    raise TraceError(
                        expected("a forward pass of the model inside capture()", "none")
                    )
        except BaseException as failure:
            self._close(type(failure), failure, failure.__traceback__)
            raise
        self._close(kind, error, traceback)

    def documents(self, doc: Any, pos: Any = None, **columns: Any) -> None:
        """Number the tokens of the next forward pass.

        Args:
            doc: [B] or [B, S] document of each row or token.
            pos: [B] position of the first token of each row, or [B, S] of each token; from 0 on if
                None.
            columns: [B, S] further columns of the token table; the same names in every pass.
        """
        self._numbering.given = (_array(doc), None if pos is None else _array(pos))
        self._columns = {name: np.asarray(values) for name, values in columns.items()}

    def _unhook(self) -> None:
        self._generation.leave()
        if self._hooks is not None:
            self._hooks.remove()

    def _pass_ended(self, running: Pass, output: Any) -> None:
        """In the thread of the model, at the end of a pass: read, check what costs nothing, label,
        queue.
        """
        missing = [site.name for place, site in enumerate(self.sites) if place not in running.calls]
        if missing:
            got = f"none from {missing[0]!r}" + (
                f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            )
            raise TraceError(
                expected(
                    "a decision from every router in a forward pass",
                    got,
                    "only='<pattern of names>' to trace a part",
                )
            )
        unchanged(running, self.sites)
        if running.inputs.shape is None:
            raise TraceError(
                expected("token ids or hidden states among the inputs of the model", "neither")
            )
        tokens = running.inputs.shape[0] * running.inputs.shape[1]
        readings = [
            self._read(site, running.calls[place], tokens) for place, site in enumerate(self.sites)
        ]
        if self._writer is None:
            self._open([reading.indices.shape[1] for reading in readings], readings)
        elif not self._phases:
            self._writer.meta = self._writer.meta.replace(**self._recorded(readings))
        labels = self._numbering.label(running.inputs, self._model.training)
        self._phases.add(labels.phase)
        losses = None if self._loss is None else self._loss.of(output, running.inputs, labels)
        self._queue(running, readings, labels, losses)

    def _read(self, site: Site, calls: Sequence[Mapping[str, Any]], tokens: int) -> Reading:
        try:
            parts = [
                as_reading(site.read(call["module"], call), site.num_choices, site.top_k)
                for call in calls
            ]
            reading = parts[0] if len(parts) == 1 else _joined(parts)
            if reading.indices.shape[0] != tokens:
                hint = (
                    "text inputs alone, or documents of one stack"
                    if len(calls) == 1
                    else "a reader that takes one of its calls"
                )
                raise TraceError(
                    expected(
                        f"one decision for each of {tokens} tokens",
                        f"{reading.indices.shape[0]} in {len(calls)} calls",
                        hint,
                    )
                )
            self._fits(site, reading)
        except TraceError as error:
            raise TraceError(f"{site.name} ({type(site.module).__name__}): {error}") from error
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
            seen = describe(calls[0].get("output"))
            problem = f"its output {seen} does not fit: {type(error).__name__}: {error}"
            raise TraceError(
                f"{site.name} ({type(site.module).__name__}): {problem}; try readers={{'{site.name}': reader}}"
            ) from error
        return reading

    def _fits(self, site: Site, reading: Reading) -> None:
        width = next(
            (item.shape[1] for item in (reading.logits, reading.scores) if item is not None), None
        )
        if site.num_experts is None:
            if width is None:
                raise TraceError(
                    expected(
                        "the number of experts from the configuration or from logits", "neither"
                    )
                )
            site.num_experts = width - site.num_zero_experts
        if width is not None and width != site.num_choices:
            raise TraceError(expected(f"logits of {site.num_choices} experts as configured", width))
        if reading.indices.shape[1] > (site.top_k or reading.indices.shape[1]):
            raise TraceError(
                expected(
                    f"at most top_k = {site.top_k} slots as configured", reading.indices.shape[1]
                )
            )
        if (
            site.score_func is None
            and reading.logits is not None
            and reading.scores is None
            and reading.weights is not None
        ):
            logits = reading.logits.float()
            if not _are_probabilities(logits) and int(reading.indices.max()) < logits.shape[1]:
                site.score_func = (
                    infer_score_func(logits, reading.weights.float(), reading.indices)
                    or ScoreFunc.SOFTMAX
                )

    def _recorded(self, readings: Sequence[Reading]) -> dict[str, bool]:
        scored = all(
            reading.logits is not None or reading.scores is not None or reading.spread is not None
            for reading in readings
        )
        return {
            "has_weights": self._options.weights
            and all(reading.weights is not None for reading in readings),
            "has_scores": self._options.statistics and scored,
        }

    def _open(self, slots: Sequence[int], readings: Sequence[Reading] = ()) -> None:
        options = self._options
        layers = tuple(
            LayerMeta(
                layer=site.layer,
                num_experts=site.num_experts or 0,
                num_zero_experts=site.num_zero_experts,
                top_k=site.top_k or slots[place],
                module=site.name,
                zero_kinds=site.zero_kinds,
            )
            for place, site in enumerate(self.sites)
        )
        left_out = (
            (f"Routers that do not see the text were left out: {', '.join(self._left_out)}.",)
            if self._left_out
            else ()
        )
        vocabulary = getattr(getattr(self._model, "config", None), "vocab_size", None)
        recorded = self._recorded(readings)
        meta = TraceMeta(
            layers=layers,
            model=options.model or model_name(self._model),
            model_hash=model_hash(self._model),
            tokenizer_hash=tokenizer_hash(options.tokenizer),
            corpus_hash=corpus_hash(options.text),
            vocab_size=vocabulary if isinstance(vocabulary, int) else None,
            created_from=options.created_from,
            has_output_ratio=options.output_ratio,
            notes=left_out,
            has_weights=recorded["has_weights"],
            has_scores=recorded["has_scores"],
        )
        self._writer = TraceWriter(
            self.folder, meta, buffer_bytes=options.buffer_bytes, resume=options.resume
        ).__enter__()
        self._numbering.next_doc = max(self._writer.finished, default=-1) + 1

    def _queue(
        self, running: Pass, readings: list[Reading], labels: Labels, losses: np.ndarray | None
    ) -> None:
        keep = labels.keep
        known = next((reading.valid for reading in readings if reading.valid is not None), None)
        if known is not None and not bool(known.all()):
            mask = known.cpu().numpy().reshape(-1)
            keep = mask if keep is None else keep & mask
        places = None if keep is None else np.flatnonzero(keep)
        chosen = slice(None) if places is None else places
        doc, pos = labels.doc[chosen], labels.pos[chosen]
        columns: dict[str, Any] = {
            "ids": running.inputs.ids,
            "places": places,
            "phase": labels.phase,
            "loss": losses,
        }
        columns["further"], self._columns = self._columns, None
        size = sum(_bytes(reading) for reading in readings)
        ratios = (
            [torch.cat(running.ratios[place]) for place in range(len(self.sites))]
            if self._options.output_ratio
            else []
        )
        index = None if places is None else torch.from_numpy(places)
        record = _Recorded(doc, pos, index, readings, ratios, columns, size)
        present = np.unique(doc).tolist()
        record.documents = [number for number in self._previous if number not in set(present)]
        self._previous = present
        self.num_tokens += len(doc)
        self._chunk.append(record)
        if (
            sum(len(item.doc) for item in self._chunk) >= CHUNK_TOKENS
            or sum(item.size for item in self._chunk) >= CHUNK_BYTES
        ):
            self._submit()

    def _submit(self) -> None:
        if self._chunk:
            chunk, self._chunk = self._chunk, []
            stream = (
                torch.cuda.current_stream()
                if torch.cuda.is_available() and torch.cuda.is_initialized()
                else None
            )
            event = None if stream is None else stream.record_event()
            self._background.submit(
                lambda: self._convert(chunk, event), sum(record.size for record in chunk)
            )

    def _convert(self, chunk: list[_Recorded], event: Any) -> None:
        """In the second thread: passes to rows of every layer, and to rows of the token table."""
        assert self._writer is not None
        if event is not None:
            event.synchronize()
        doc = _numbers([record.doc for record in chunk])
        pos = _numbers([record.pos for record in chunk])
        meta = self._writer.meta
        for place, site in enumerate(self.sites):
            reading = _joined([_kept(record.readings[place], record.keep) for record in chunk])
            ids = reading.indices.cpu().numpy()
            layer = meta.layer(site.layer)
            assert layer is not None
            weights = (
                reading.weights.detach().float().cpu().numpy()
                if meta.has_weights and reading.weights is not None
                else None
            )
            dropped = (
                None
                if reading.selected is None
                else ((reading.selected >= 0) & (reading.indices < 0)).sum(dim=1).cpu().numpy()
            )
            spread = (
                (lambda reading=reading, site=site: spread_of_reading(reading, site.score_func))
                if meta.has_scores
                else None
            )
            try:
                rows = slot_rows(layer, doc, pos, ids, weights, dropped, spread)
                if self._options.output_ratio:
                    rows[OUTPUT_RATIO] = (
                        torch.cat([_rows(record.ratios[place], record.keep) for record in chunk])
                        .cpu()
                        .numpy()
                    )
                used = ids[ids >= 0]
                self._writer.write_rows(
                    site.layer, rows, np.bincount(used, minlength=layer.num_choices)
                )
            except TraceError as error:
                raise TraceError(f"{site.name} ({type(site.module).__name__}): {error}") from error
        for record in chunk:
            self._write_tokens(record)
        self._writer.finish_documents([number for record in chunk for number in record.documents])

    def _write_tokens(self, record: _Recorded) -> None:
        ids = record.tokens["ids"]
        if ids is None:
            return
        assert self._writer is not None
        places = record.tokens["places"]
        chosen = slice(None) if places is None else places
        token_id = ids.reshape(-1).cpu().numpy()[chosen]
        losses = record.tokens["loss"]
        frame = pl.DataFrame(
            {"doc": record.doc, "pos": record.pos, "token_id": token_id}
        ).with_columns(
            phase=pl.lit(record.tokens["phase"]),
            loss=pl.lit(None, pl.Float32)
            if losses is None
            else pl.Series(losses.reshape(-1)[chosen], dtype=pl.Float32).fill_nan(None),
            **({} if self._pieces is None else {"text": self._pieces.of(token_id)}),
            **{
                name: pl.Series(values.reshape(-1)[chosen])
                for name, values in (record.tokens["further"] or {}).items()
            },
        )
        self._writer.write_tokens(frame)

    def _close(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is not None and self._chunk and self._writer is not None:
            try:  # what an interruption left is worth keeping
                self._submit()
                self._background.drain()
            except BaseException:
                self._chunk = []
        self._background.stop()
        if self._writer is None:
            return
        phase = (
            "train"
            if self._phases == {"train"}
            else "generate"
            if "decode" in self._phases
            else "eval"
        )
        names = {
            site.layer: (
                site.score_func.value if site.score_func and self._writer.meta.has_scores else ""
            )
            for site in self.sites
        }
        layers = tuple(
            layer.replace(score_func=names[layer.layer]) for layer in self._writer.meta.layers
        )
        self._writer.meta = self._writer.meta.replace(phase=phase, layers=layers)
        self._writer.__exit__(kind, error, traceback)


@dataclass(frozen=True)
class _Options:
    tokenizer: Any
    text: Any
    losses: bool
    weights: bool
    statistics: bool
    output_ratio: bool
    resume: bool
    model: str
    created_from: str
    buffer_bytes: int


def capture(
    model: nn.Module,
    folder: Path | str,
    *,
    tokenizer: Any = None,
    text: str | Iterable[str] | None = None,
    readers: Mapping[str, Reader] | None = None,
    only: str | None = None,
    losses: bool = False,
    weights: bool = True,
    statistics: bool = True,
    output_ratio: bool = False,
    resume: bool = False,
    model_id: str = "",
    created_from: str = "",
    buffer_bytes: int = BUFFER_BYTES,
) -> Capture:
    """Record every routing decision of ``model`` while the ``with`` block runs; see
    ``docs/trace.md``.

    Each row of each forward pass is a document, numbered in the order of the passes; passes that go
    on from a cache (decode steps of ``generate``) go on with the documents. Padding, told by the
    attention mask, is not recorded.

    Args:
        model: any torch module with routers: ours, any MoE of transformers 5, or others by
            ``readers``.
        folder: where the trace will appear. Under ``torch.distributed`` each rank writes
            ``<folder>.rank-<r>`` (see ``merge_traces``).
        tokenizer: its hash goes into the metadata, and each token's text into the column ``text``.
        text: the documents that will be run, for their hash.
        readers: module name (or a pattern that matches it whole) -> function of (module, seen) that
            returns a ``Reading``, a ``Routing`` or a triple of logits, weights and indices in any
            order. ``seen`` holds "output" and "input" of it, and "experts input" of the module
            ``experts`` beside it.
        only: trace the routers whose names contain this regular expression.
        losses: record the loss of each token in nats, from the model's logits.
        weights, statistics: record gate weights; entropy and margin.
        output_ratio: record the norm of the experts' output over that of their input.
        resume: go on with an interrupted trace; ``finished`` then names the documents to leave out.
        model_id: name of the model in the metadata, where it has none of its own.
        created_from: the command that made the trace.
        buffer_bytes: memory for rows that wait to be written.

    Raises:
        TraceError: routers that are not found, do not run, or return what does not fit, by name;
            counts that do not add up.
    """
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        model = model.module
    sites, left_out = find_sites(model, readers, only)
    options = _Options(
        tokenizer,
        text,
        losses,
        weights,
        statistics,
        output_ratio,
        resume,
        model_id,
        created_from,
        buffer_bytes,
    )
    return Capture(model, folder, options, sites, left_out)


def spread_of_reading(reading: Reading, score_func: ScoreFunc | None) -> Spread:
    if reading.spread is not None:
        return reading.spread
    if reading.scores is not None:
        return spread_of_scores(reading.scores.detach().float(), reading.indices)
    assert reading.logits is not None
    logits = reading.logits.detach().float()
    if _are_probabilities(logits):
        return spread_of_scores(logits, reading.indices)
    return spread_of_logits(logits, reading.indices, score_func or ScoreFunc.SOFTMAX)


def _are_probabilities(values_TE: Tensor) -> bool:
    """Whether rows are non-negative and sum to one: some models return those under the name of
    logits.
    """
    sums = values_TE.sum(dim=1)
    return (
        bool((values_TE >= 0).all()) and bool((sums - 1).abs().max() < 1e-3)
        if values_TE.numel()
        else False
    )


def _joined(readings: Sequence[Reading]) -> Reading:
    if len(readings) == 1:
        return readings[0]

    def join(name: str) -> Any:
        values = [getattr(reading, name) for reading in readings]
        return None if any(value is None for value in values) else torch.cat(values)

    names = ("indices", "weights", "logits", "scores", "selected", "valid")
    spreads = [reading.spread for reading in readings]
    spread = (
        Spread(*(torch.cat(columns) for columns in zip(*spreads, strict=True)))
        if all(spreads)
        else None
    )  # type: ignore[arg-type]
    return Reading(**{name: join(name) for name in names}, spread=spread)  # type: ignore[arg-type]


def _kept(reading: Reading, keep: Tensor | None) -> Reading:
    """The tokens that count."""
    if keep is None:
        return reading
    names = ("indices", "weights", "logits", "scores", "selected")
    chosen = {
        name: None if (value := getattr(reading, name)) is None else _rows(value, keep)
        for name in names
    }
    spread = (
        None
        if reading.spread is None
        else Spread(*(_rows(column, keep) for column in reading.spread))
    )
    return Reading(**chosen, spread=spread)  # type: ignore[arg-type]


def _rows(tensor: Tensor, keep: Tensor | None) -> Tensor:
    return tensor if keep is None else tensor[keep.to(tensor.device)]


def _bytes(reading: Reading) -> int:
    tensors = (reading.indices, reading.weights, reading.logits, reading.scores)
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def _array(values: Any) -> np.ndarray:
    array = np.asarray(values.cpu() if isinstance(values, Tensor) else values)
    if array.dtype.kind not in "iu" or array.ndim not in (1, 2):
        raise TraceError(
            expected(
                "integers [batch] or [batch, sequence]",
                f"{array.dtype} of shape {list(array.shape)}",
            )
        )
    return array


def _numbers(parts: Sequence[np.ndarray]) -> np.ndarray:
    """[T] u32."""
    joined = np.concatenate(parts)
    if len(joined) and (joined.min() < 0 or joined.max() >= 2**32):
        raise TraceError(
            expected(
                f"documents and positions between 0 and {2**32 - 1}",
                f"{joined.min()}..{joined.max()}",
            )
        )
    return joined.astype(np.uint32)
