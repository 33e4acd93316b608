"""``Inputs``: token ids, padding mask, shape and cache of one forward pass, under whatever names a
model takes them.

Shape letters: B batch, S sequence, T = B * S tokens.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

ID_NAMES = ("input_ids", "ids_BS", "token_ids", "tokens", "ids", "idx")
MASK_NAMES = ("attention_mask", "valid_BS", "padding_mask", "mask")
CACHE_NAMES = ("past_key_values", "cache", "cache_params")
EMBEDDING_NAMES = ("inputs_embeds", "hidden_states", "x", "x_TD")

Given = Mapping[str, Any]


@dataclass
class Inputs:
    """The inputs of one forward pass, from the innermost module around the routers that received
    them.

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

    def see(self, module: nn.Module, args: tuple, kwargs: Given) -> None:
        """Read the arguments of the call of one module; later calls are of modules further
        inside.
        """
        given = _arguments(module, args, kwargs)
        if (ids := _token_ids(given)) is not None:
            self._take(ids if ids.dim() == 2 else ids.unsqueeze(0))
        elif self.shape is None and (x := _embeddings(given)) is not None:
            self.shape = (x.shape[0], x.shape[1]) if x.dim() == 3 else (1, x.shape[0])
        mask = _named(given, MASK_NAMES, lambda value: value.dim() == 2)
        self.mask = self.mask if mask is None else mask
        cache = next((given[name] for name in CACHE_NAMES if given.get(name) is not None), None)
        if cache is not None and self.past is None:
            self.past = _length(cache)

    def _take(self, ids: Tensor) -> None:
        known = self.ids
        if known is None or ids.data_ptr() != known.data_ptr() or ids.shape != known.shape:
            self.mask = None  # of other tokens
        self.ids, self.shape = ids, (ids.shape[0], ids.shape[1])

    def real(self) -> np.ndarray | None:
        """[T] bool of the tokens that are not padding, or None where all are."""
        if self.mask is None or self.shape is None:
            return None
        batch, length = self.shape
        if self.mask.shape[0] != batch or self.mask.shape[1] < length:
            return None
        mask = self.mask[:, -length:] != 0
        return None if bool(mask.all()) else mask.reshape(-1).cpu().numpy()


def _token_ids(given: Given) -> Tensor | None:
    """Token ids by their name; where nothing has a known name, the first integers [B, S] or [S]."""
    ids = _named(
        given, ID_NAMES, lambda value: not value.is_floating_point() and value.dim() in (1, 2)
    )
    if ids is not None or any(name in given for name in (*ID_NAMES, *EMBEDDING_NAMES)):
        return ids
    integers = (torch.int64, torch.int32)
    return _any(given, lambda value: value.dtype in integers and value.dim() in (1, 2))


def _embeddings(given: Given) -> Tensor | None:
    """Hidden states [B, S, D] or [T, D] by their name, else the first tensor of that shape."""
    x = _named(
        given, EMBEDDING_NAMES, lambda value: value.is_floating_point() and value.dim() in (2, 3)
    )
    return x if x is not None else _any(given, lambda value: value.dim() in (2, 3))


def _named(given: Given, names: tuple[str, ...], fits: Callable[[Tensor], bool]) -> Tensor | None:
    values = (given.get(name) for name in names)
    return next((value for value in values if isinstance(value, Tensor) and fits(value)), None)


def _any(given: Given, fits: Callable[[Tensor], bool]) -> Tensor | None:
    return _named(given, tuple(given), fits)


def _arguments(module: nn.Module, args: tuple, kwargs: Given) -> dict[str, Any]:
    """Argument name -> value of one call, those of ``*args`` and ``**kwargs`` among them."""
    try:
        bound = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
    except (TypeError, ValueError):
        bound = {"args": args, "kwargs": kwargs}
    given: dict[str, Any] = {}
    for name, value in bound.items():
        if name == "args" and isinstance(value, tuple):
            given |= {f"argument {place}": item for place, item in enumerate(value)}
        elif name in ("kwargs", "super_kwargs") and isinstance(value, Mapping):
            given |= value
        else:
            given[name] = value
    return given


def _length(cache: Any) -> int | None:
    """Tokens in a cache, or None where it does not say."""
    measure = getattr(cache, "get_seq_length", None)
    try:
        return None if measure is None else int(measure())
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError):
        return None
