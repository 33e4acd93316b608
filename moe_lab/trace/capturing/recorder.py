"""``capture``: the routing decisions of any torch model, as it makes them.

    with capture(model, "traces/run"):
        model(input_ids, attention_mask=attention_mask)

Hooks take references to what routers return; a second thread turns them into rows and a third
writes them, so the model waits only where it is faster than both. Nothing is recomputed that the
model gives; what does not fit raises and names the module. Shape letters: B batch, S sequence, T
tokens, K slots, E experts.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from moe_lab.errors import TraceError, expected, require
from moe_lab.trace.background import Background
from moe_lab.trace.capturing.class_columns import Described
from moe_lab.trace.capturing.find_routers import find_sites
from moe_lab.trace.capturing.fingerprints import (
    corpus_hash,
    model_hash,
    model_name,
    rank_folder,
    tokenizer_hash,
)
from moe_lab.trace.capturing.generation import Generation
from moe_lab.trace.capturing.hooks import Hooks, Pass, unchanged
from moe_lab.trace.capturing.numbering import Labels, Numbering
from moe_lab.trace.capturing.pass_rows import PassRows, RecordedPass
from moe_lab.trace.capturing.router_output import Reader, Reading
from moe_lab.trace.capturing.token_loss import Head, TokenLoss
from moe_lab.trace.capturing.token_text import TokenText
from moe_lab.trace.capturing.traced_router import Visit
from moe_lab.trace.existing import refuse_finished
from moe_lab.trace.schema import LayerMeta, TraceMeta
from moe_lab.trace.writer import BUFFER_BYTES, TraceWriter

CHUNK_TOKENS = 8192
CHUNK_BYTES = 2**25
"""Passes are converted together until they hold that much: one decode step is a few tokens, and
each conversion has a fixed cost.
"""


@dataclass(frozen=True)
class CaptureOptions:
    """The arguments of ``capture`` that say what is recorded, and what the metadata holds."""

    tokenizer: Any
    text: str | Iterable[str] | None
    classes: bool
    readers: Mapping[str, Reader] | None
    only: str | None
    losses: bool | Head
    weights: bool
    statistics: bool
    output_ratio: bool
    resume: bool
    overwrite: bool
    max_tokens: int | None
    model_id: str
    created_from: str
    notes: Sequence[str]
    buffer_bytes: int


class Capture:
    """The object that ``capture`` gives: ``documents`` numbers the next pass, ``folder`` is where
    the trace will be.

    Attributes:
        sites: the routers of the model.
        finished: documents that an interrupted trace already holds (``resume=True``).
        num_tokens: tokens recorded so far in each layer.
    """

    def __init__(self, model: nn.Module, folder: Path | str, options: CaptureOptions) -> None:
        self.folder = rank_folder(Path(folder))
        self.sites, self._left_out = find_sites(model, options.readers, options.only)
        self.num_tokens = 0
        self._model, self._options = model, options
        self._model_name = options.model_id or model_name(model)
        self._numbering = Numbering()
        self._generation = Generation(model, self._numbering)
        head = options.losses if callable(options.losses) else None
        self._loss = TokenLoss(head) if options.losses else None
        self._background = Background(2 * CHUNK_BYTES)
        self._columns: dict[str, np.ndarray] = {}
        self._writer: TraceWriter | None = None
        self._rows: PassRows | None = None
        self._chunk: list[RecordedPass] = []
        self._open_documents: set[int] = set()
        self._phases: set[str] = set()
        self._hooks: Hooks | None = None

    @property
    def visits(self) -> list[Visit]:
        """Each router, as many times as a token goes through it."""
        return [
            (site, number, visit) for site in self.sites for number, visit in enumerate(site.visits)
        ]

    @property
    def finished(self) -> set[int]:
        return set() if self._writer is None else self._writer.finished

    def __enter__(self) -> Self:
        self._hooks = Hooks(self._model, self.sites, self._pass_ended, self._options.output_ratio)
        self._generation.watch()
        try:
            if all(site.num_experts and site.top_k for site in self.sites):
                self._open()
            elif not self._options.overwrite:  # the writer opens at the first pass: too late
                refuse_finished(self.folder, {"model": self._model_name})
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
        if self._background.forked:  # the trace is the parent's
            return
        try:
            if kind is None:
                self._submit()
                self._background.drain()
                if self._writer is None or not self._phases:
                    what = "a forward pass of the model inside capture()"
                    raise TraceError(expected(what, "none"), field="model")
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

    # --------------------------------------------------------------------------------------------
    # in the thread of the model

    def _pass_ended(self, running: Pass, output: Any) -> None:
        """At the end of a pass: read, check what costs nothing, label, queue."""
        self._background.check_process()
        self._check_pass(running)
        assert running.inputs.shape is not None
        tokens = running.inputs.shape[0] * running.inputs.shape[1]
        readings = [
            reading
            for place, site in enumerate(self.sites)
            for reading in site.readings(running.calls[place], tokens)
        ]
        if self._writer is None:
            self._open(readings)
        elif not self._phases:
            self._writer.meta = self._writer.meta.replace(**self._recorded(readings))
        labels = self._numbering.label(running.inputs, self._model.training)
        self._phases.add(labels.phase)
        losses = None if self._loss is None else self._loss.of(output, running.inputs, labels)
        self._queue(running, readings, labels, losses)

    def _check_pass(self, running: Pass) -> None:
        missing = [site.name for place, site in enumerate(self.sites) if place not in running.calls]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise TraceError(
                expected(
                    "a decision from every router in a forward pass",
                    f"none from {missing[0]!r}{more}",
                    "only='<pattern of names>' to trace a part",
                ),
                field=missing[0],
            )
        unchanged(running, self.sites)
        if running.inputs.shape is None:
            what = "token ids or hidden states among the inputs of the model"
            raise TraceError(expected(what, "neither"))

    def _recorded(self, readings: Sequence[Reading]) -> dict[str, Any]:
        weighted = all(reading.weights is not None for reading in readings)
        scored = all(reading.has_scores for reading in readings)
        return {
            "has_weights": self._options.weights and weighted,
            "has_scores": self._options.statistics and scored,
        }

    def _open(self, readings: Sequence[Reading] = ()) -> None:
        options = self._options
        looped = any(len(site.visits) > 1 for site in self.sites)
        layers = tuple(
            LayerMeta(
                layer=visit,
                num_experts=site.num_experts or 0,
                num_zero_experts=site.num_zero_experts,
                top_k=site.top_k or readings[place].indices.shape[1],
                module=site.name,
                zero_kinds=site.zero_kinds,
                model_layer=site.layer if looped else None,
                pass_number=number,
            )
            for place, (site, number, visit) in enumerate(self.visits)
        )
        vocabulary = getattr(getattr(self._model, "config", None), "vocab_size", None)
        left_out = ", ".join(self._left_out)
        note = f"Routers that do not see the text were left out: {left_out}."
        loop = "Some layers run several times: layer counts runs, model_layer and pass name them."
        meta = TraceMeta(
            layers=layers,
            model=self._model_name,
            model_hash=model_hash(self._model),
            tokenizer_hash=tokenizer_hash(options.tokenizer),
            corpus_hash=corpus_hash(options.text),
            vocab_size=vocabulary if isinstance(vocabulary, int) else None,
            created_from=options.created_from,
            max_tokens=options.max_tokens,
            has_output_ratio=options.output_ratio,
            notes=(
                *options.notes,
                *((note,) if left_out else ()),
                *((loop,) if looped else ()),
            ),
            **self._recorded(readings),
        )
        writer = TraceWriter(
            self.folder,
            meta,
            buffer_bytes=options.buffer_bytes,
            resume=options.resume,
            overwrite=options.overwrite,
        )
        self._writer = writer.__enter__()
        self._numbering.next_doc = max(self._writer.finished, default=-1) + 1
        pieces = None if options.tokenizer is None else TokenText(options.tokenizer)
        described = Described(options.tokenizer, meta.vocab_size or 0) if options.classes else None
        self._rows = PassRows(self._writer, self.visits, pieces, described)

    def _queue(
        self, running: Pass, readings: list[Reading], labels: Labels, losses: np.ndarray | None
    ) -> None:
        keep = labels.keep
        known = next((reading.valid for reading in readings if reading.valid is not None), None)
        if known is not None and not bool(known.all()):
            mask = known.cpu().numpy().reshape(-1)
            keep = mask if keep is None else keep & mask
        places = None if keep is None else np.flatnonzero(keep)
        doc, pos = (
            values if places is None else values[places] for values in (labels.doc, labels.pos)
        )
        present = set(np.unique(doc).tolist())
        ratios = [
            torch.cat(part)
            for place in sorted(running.ratios)
            for part in self.sites[place].shares(running.ratios[place])
        ]
        self._chunk.append(
            RecordedPass(
                doc=doc,
                pos=pos,
                keep=places,
                readings=readings,
                ratios=ratios,
                ids=running.inputs.ids,
                phase=labels.phase,
                losses=losses,
                further=self._columns,
                finished=sorted(self._open_documents - present),
            )
        )
        self._columns, self._open_documents = {}, present
        self.num_tokens += len(doc)
        tokens, held = (sum(len(item.doc) for item in self._chunk), self._held_bytes())
        if tokens >= CHUNK_TOKENS or held >= CHUNK_BYTES:
            self._submit()

    def _held_bytes(self) -> int:
        return sum(record.num_bytes for record in self._chunk)

    def _submit(self) -> None:
        """Hand what waits to the second thread."""
        if not self._chunk or self._rows is None:
            return
        rows, size, chunk, self._chunk = self._rows, self._held_bytes(), self._chunk, []
        cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
        event = torch.cuda.current_stream().record_event() if cuda else None
        self._background.submit(lambda: rows.write(chunk, event), size)

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
        meta = self._writer.meta
        functions = {visit: site.score_func for site, _, visit in self.visits if meta.has_scores}
        layers = tuple(
            layer.replace(score_func=str(functions.get(layer.layer) or "")) for layer in meta.layers
        )
        only_training = self._phases == {"train"}
        phase = "train" if only_training else "generate" if "decode" in self._phases else "eval"
        self._writer.meta = meta.replace(phase=phase, layers=layers)
        self._writer.__exit__(kind, error, traceback)


def capture(
    model: nn.Module,
    folder: Path | str,
    *,
    tokenizer: Any = None,
    text: str | Iterable[str] | None = None,
    classes: bool = False,
    readers: Mapping[str, Reader] | None = None,
    only: str | None = None,
    losses: bool | Head = False,
    weights: bool = True,
    statistics: bool = True,
    output_ratio: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    max_tokens: int | None = None,
    model_id: str = "",
    created_from: str = "",
    notes: Sequence[str] = (),
    buffer_bytes: int = BUFFER_BYTES,
) -> Capture:
    """Record every routing decision of ``model`` while the ``with`` block runs; see
    ``docs/trace.md``.

    Each row of each forward pass is a document, numbered in the order of the passes; passes that go
    on from a cache (decode steps of ``generate``) go on with the documents. Padding, by the
    attention mask, is not recorded.

    Args:
        model: any torch module with routers: ours, any MoE of transformers 5, or others by
            ``readers``.
        folder: where the trace will appear. Under ``torch.distributed`` each rank writes
            ``<folder>.rank-<r>`` (see ``merge_traces``).
        tokenizer: its hash goes into the metadata, and each token's text into the column ``text``.
        text: the documents that will be run, for their hash.
        classes: record the class columns of each token (``unicode``, ``subword``, ``copy``, ... of
            ``text.token_classes``), for profiles by class; needs ``tokenizer``. They are those of
            the text that the tokens of a document write in one pass, and null for tokens that go
            on from a cache.
        readers: module name (or a pattern that matches it whole) -> function of (module, seen) that
            returns a ``Reading``, a ``Routing`` or a triple of logits, weights and indices in any
            order. ``seen`` holds "output" and "input" of it, and "experts input" of the module
            ``experts`` beside it.
        only: trace the routers whose names contain this regular expression.
        losses: record the loss of each token in nats, from the model's logits; or, where the model
            is run without its head, a function (output, row, positions) -> logits, which is called
            for a few positions at a time.
        weights, statistics: record gate weights; entropy and margin.
        output_ratio: record the norm of the experts' output over that of their input.
        resume: go on with an interrupted trace; ``finished`` then names the documents to leave out.
        overwrite: replace a finished trace at ``folder``, once the new one is whole.
        max_tokens: leading tokens of each document that will be run, for the metadata.
        model_id: name of the model in the metadata, where it has none of its own.
        created_from: the command that made the trace.
        notes: sentences for the metadata.
        buffer_bytes: memory for rows that wait to be written.

    Raises:
        TraceExistsError: a finished trace at ``folder`` without ``overwrite``.
        ConfigError: ``classes`` without a tokenizer.
        TraceError: routers that are not found, do not run, or return what does not fit, by name;
            counts that do not add up.
    """
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        model = model.module
    known = not classes or tokenizer is not None
    require(known, "a tokenizer for classes", None, "tokenizer=", field="tokenizer")
    options = CaptureOptions(
        tokenizer=tokenizer,
        text=text,
        classes=classes,
        readers=readers,
        only=only,
        losses=losses,
        weights=weights,
        statistics=statistics,
        output_ratio=output_ratio,
        resume=resume,
        overwrite=overwrite,
        max_tokens=max_tokens,
        model_id=model_id,
        created_from=created_from,
        notes=notes,
        buffer_bytes=buffer_bytes,
    )
    return Capture(model, folder, options)


def _array(values: Any) -> np.ndarray:
    array = np.asarray(values.cpu() if isinstance(values, Tensor) else values)
    require(
        array.dtype.kind in "iu" and array.ndim in (1, 2),
        "integers [batch] or [batch, sequence]",
        f"{array.dtype} of shape {list(array.shape)}",
        error=TraceError,
    )
    return array
