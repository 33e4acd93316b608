"""Which document and position each token of a forward pass is: padding, batches, prefill and
decode.

Each row of a batch is a document, unless the caller numbers them; a pass that continues a cache
continues the documents of the pass before. Shape letters: B batch, S sequence, T = B * S tokens.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moe_lab.errors import TraceError, expected

ID_NAMES = ("input_ids", "ids_BS", "token_ids", "tokens", "ids", "idx")
MASK_NAMES = ("attention_mask", "valid_BS", "padding_mask", "mask")
CACHE_NAMES = ("past_key_values", "cache", "cache_params")
EMBEDDING_NAMES = ("inputs_embeds", "hidden_states", "x", "x_TD")


@dataclass
class Inputs:
    """What one forward pass was given, from the innermost module around the routers that received
    it.

    Attributes:
        ids: [B, S] token ids, or None.
        mask: [B, ...S] 1 where a token is real, or None.
        shape: (B, S).
        past: tokens in the cache before the pass, or None where no cache was given.
    """

    ids: Tensor | None = None
    mask: Tensor | None = None
    shape: tuple[int, int] | None = None
    past: int | None = None

    def see(self, module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> None:
        """Take what the call of one module tells; later calls are further inside."""
        given = _arguments(module, args, kwargs)
        ids = _first(
            given, ID_NAMES, lambda value: not value.is_floating_point() and value.dim() in (1, 2)
        )
        if ids is None and not any(name in given for name in (*ID_NAMES, *EMBEDDING_NAMES)):
            integers = [
                value
                for value in given.values()
                if isinstance(value, Tensor) and value.dtype in (torch.int64, torch.int32)
            ]
            ids = next((value for value in integers if value.dim() in (1, 2)), None)
        mask = _first(given, MASK_NAMES, lambda value: value.dim() == 2)
        if ids is not None:
            ids = ids if ids.dim() == 2 else ids.unsqueeze(0)
            if (
                self.ids is None
                or ids.data_ptr() != self.ids.data_ptr()
                or ids.shape != self.ids.shape
            ):
                self.mask = None  # of other tokens
            self.ids, self.shape = ids, (ids.shape[0], ids.shape[1])
        elif self.shape is None:
            wide = _first(
                given,
                EMBEDDING_NAMES,
                lambda value: value.is_floating_point() and value.dim() in (2, 3),
            )
            if wide is None:
                wide = next(
                    (
                        value
                        for value in given.values()
                        if isinstance(value, Tensor) and value.dim() in (2, 3)
                    ),
                    None,
                )
            if wide is not None:
                self.shape = (
                    (wide.shape[0], wide.shape[1]) if wide.dim() == 3 else (1, wide.shape[0])
                )
        self.mask = mask if mask is not None else self.mask
        cache = next((given[name] for name in CACHE_NAMES if given.get(name) is not None), None)
        if cache is not None and self.past is None:
            self.past = _length(cache)

    def real(self) -> np.ndarray | None:
        """[T] bool of the tokens that are not padding, or None where all are."""
        if (
            self.mask is None
            or self.shape is None
            or self.mask.shape[0] != self.shape[0]
            or self.mask.shape[1] < self.shape[1]
        ):
            return None
        mask = self.mask[:, -self.shape[1] :] != 0
        return None if bool(mask.all()) else mask.reshape(-1).cpu().numpy()


@dataclass
class Rows:
    """The documents that the rows of the last pass belong to, and how far they are: [B] each."""

    doc: np.ndarray
    next_pos: np.ndarray
    finished: np.ndarray
    fed: int
    ids: np.ndarray | None = None


@dataclass
class Labels:
    """[T] doc and pos, [T] bool of the tokens that count (None: all), the phase, and whether the
    rows go on from the last pass.
    """

    doc: np.ndarray
    pos: np.ndarray
    keep: np.ndarray | None
    phase: str
    continues: bool


@dataclass
class Numbering:
    """Gives each token its document and position, pass after pass.

    Attributes:
        next_doc: number of the next document.
        ends: token ids after which a row of ``generate`` is only padding (end of text, padding);
            None outside ``generate``.
    """

    next_doc: int = 0
    ends: frozenset[int] | None = None
    rows: Rows | None = None
    given: tuple[np.ndarray, np.ndarray | None] | None = field(default=None)

    def label(self, inputs: Inputs, training: bool) -> Labels:
        """Number the tokens of one pass.

        Raises:
            TraceError: a cache shorter than what was fed, as after beam search or a rejected draft.
        """
        assert inputs.shape is not None
        batch, length = inputs.shape
        ids = None if inputs.ids is None else inputs.ids.cpu().numpy()
        real = inputs.real()
        real_BS = np.ones((batch, length), bool) if real is None else real.reshape(batch, length)
        rows, continues, replay = self.rows, False, False
        if rows is not None and len(rows.doc) == batch and self.given is None:
            continues = bool(inputs.past)
            replay = not continues and self._is_replay(rows, ids, length)
            if continues and inputs.past is not None and inputs.past < rows.fed:
                got = f"one cut back to {inputs.past}"
                hint = "num_beams=1 and no assistant model: otherwise rows change places"
                raise TraceError(
                    expected(f"a cache of the {rows.fed} tokens that were fed", got, hint)
                )
        if replay:
            real_BS[:, :-1] = False
        if not (continues or replay):
            rows = self._begin(inputs, real_BS)
        assert rows is not None
        decode = replay or (bool(inputs.past) and length == 1)
        if decode and self.ends is not None and ids is not None:
            rows.finished |= np.isin(ids[:, -1], list(self.ends))
            real_BS[rows.finished] = False
        doc_BS, pos_BS = self._numbers(rows, real_BS)
        rows.fed = length if replay else (rows.fed + length)
        rows.ids = ids
        self.rows, self.given = rows, None
        keep = None if real_BS.all() else real_BS.reshape(-1)
        phase = "train" if training else "decode" if decode else "prefill"
        return Labels(doc_BS.reshape(-1), pos_BS.reshape(-1), keep, phase, continues or replay)

    def _is_replay(self, rows: Rows, ids: np.ndarray | None, length: int) -> bool:
        """Without a cache ``generate`` runs the whole text again for each token: all but the last
        were counted before.
        """
        return (
            self.ends is not None
            and ids is not None
            and rows.ids is not None
            and length == rows.ids.shape[1] + 1
            and np.array_equal(ids[:, :-1], rows.ids)
        )

    def _begin(self, inputs: Inputs, real_BS: np.ndarray) -> Rows:
        batch, length = real_BS.shape
        before = np.zeros(batch, np.int64)
        if inputs.past:  # a cache that was filled before the capture began
            mask = inputs.mask
            seen = (
                None
                if mask is None or mask.shape[1] != inputs.past + length
                else mask[:, : inputs.past].sum(dim=1).cpu().numpy()
            )
            before = np.full(batch, inputs.past) if seen is None else seen
        doc = self.next_doc + np.arange(batch)
        if self.given is None:
            self.next_doc += batch
        return Rows(doc, before, np.zeros(batch, bool), inputs.past or 0)

    def _numbers(self, rows: Rows, real_BS: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[B, S] document and position; padding gets the next position without taking it."""
        taken = np.cumsum(real_BS, axis=1)
        pos_BS = rows.next_pos[:, None] + taken - real_BS
        doc_BS = np.broadcast_to(rows.doc[:, None], real_BS.shape)
        rows.next_pos = rows.next_pos + taken[:, -1]
        if self.given is None:
            return doc_BS, pos_BS
        doc, pos = self.given
        doc_BS = np.broadcast_to(doc[:, None] if doc.ndim == 1 else doc, real_BS.shape)
        if pos is not None:
            pos_BS = (
                pos[:, None] + taken - real_BS
                if pos.ndim == 1
                else np.broadcast_to(pos, real_BS.shape)
            )
            rows.next_pos = pos_BS[:, -1] + real_BS[:, -1]
        rows.doc = doc_BS[:, -1].copy()
        self.next_doc = max(self.next_doc, int(doc_BS.max()) + 1)
        return doc_BS, pos_BS


def _arguments(module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    try:
        bound = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
    except (TypeError, ValueError):
        return {**{f"argument {place}": value for place, value in enumerate(args)}, **kwargs}
    given: dict[str, Any] = {}
    for name, value in bound.items():
        if name == "args" and isinstance(value, tuple):
            given |= {f"argument {place}": item for place, item in enumerate(value)}
        elif name in ("kwargs", "super_kwargs") and isinstance(value, dict):
            given |= value
        else:
            given[name] = value
    return given


def _first(given: Mapping[str, Any], names: tuple[str, ...], fits: Any) -> Tensor | None:
    return next(
        (value for name in names if isinstance(value := given.get(name), Tensor) and fits(value)),
        None,
    )


def _length(cache: Any) -> int | None:
    """Tokens in a cache, or None where it does not say."""
    measure = getattr(cache, "get_seq_length", None)
    try:
        return None if measure is None else int(measure())
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError):
        return None
