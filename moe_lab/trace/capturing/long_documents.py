"""Documents longer than one forward pass may be: their parts, and the cache that joins them.

A part sees the parts before it through a cache of keys and values where the model goes on from
one, which gives what a single pass gives; otherwise each part is a window of its own. Shape
letters: S sequence, D d_model.
"""

import inspect
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

NewCache = Callable[[], Any]

PROBE_TOKENS = 24
MOST_ROUNDING = {torch.float32: 1e-3, torch.float64: 1e-6}
"""Largest norm of the difference between parts and a single pass, over the norm of the latter."""
MOST_ROUNDING_HALF = 5e-2


def parts(length: int, batch_tokens: int, cached: bool) -> Iterator[slice]:
    """Consecutive parts of a document of ``length`` tokens, each of at most ``batch_tokens``.

    With a cache a part also makes at most ``batch_tokens`` squared pairs of token and key, so that
    masks and scores of attention take no more memory than those of one full batch.
    """
    start = 0
    while start < length:
        past = start if cached else 0
        most = (math.isqrt(past * past + 4 * batch_tokens * batch_tokens) - past) // 2
        stop = min(length, start + max(1, most))
        yield slice(start, stop)
        start = stop


@torch.no_grad()
def cache_that_joins(model: Any, body: Any, ids_1S: Tensor) -> NewCache | None:
    """A function that makes an empty cache with which parts of a document give what a single pass
    gives; None if no cache of transformers does.

    Tried on the first tokens of a document, since classes of models differ in what they keep: some
    refuse a cache, some ignore the state of the part before. Equal scores in an indexer of sparse
    attention may still be resolved otherwise than in a single pass.

    Args:
        body: what is run, ``model`` or its part below the head.
    """
    from transformers import DynamicCache

    ids_1S = ids_1S[:, :PROBE_TOKENS]
    cuts = [0, *sorted({-(-ids_1S.shape[1] * third // 3) for third in (1, 2, 3)})]
    slices = [slice(start, stop) for start, stop in itertools.pairwise(cuts)]
    whole_SD = _hidden(body(input_ids=ids_1S, use_cache=False))
    most = MOST_ROUNDING.get(whole_SD.dtype, MOST_ROUNDING_HALF)

    def all_keys() -> Any:
        return DynamicCache()

    def of_the_layers() -> Any:
        return DynamicCache(config=model.config)

    for new_cache in (all_keys, of_the_layers):
        try:
            cache = new_cache()
            made = []
            for part in slices:
                made.append(_hidden(run_part(body, ids_1S, None, part, cache)))
                if cache.get_seq_length() != part.stop:
                    raise ValueError("the model left the cache as it was")
            difference = (torch.cat(made) - whole_SD).float().norm()
        except Exception:  # whatever a model raises that cannot go on from this cache
            continue
        if difference <= most * whole_SD.float().norm():
            return new_cache
    return None


def run_part(body: Any, ids_BS: Tensor, mask_BS: Tensor | None, part: slice, cache: Any) -> Any:
    """One forward pass over the tokens of ``part``, after those that ``cache`` holds (None: after
    nothing).
    """
    mask = None
    if mask_BS is not None:
        mask = mask_BS[:, part] if cache is None else mask_BS[:, : part.stop]
    # transformers 5.24 calls it cache, and warns of past_key_values, the name before.
    takes = inspect.signature(type(body).forward).parameters
    name = next((name for name in ("past_key_values", "cache") if name in takes), "past_key_values")
    given = {} if cache is None else {name: cache}
    return body(
        input_ids=ids_BS[:, part], attention_mask=mask, use_cache=cache is not None, **given
    )


def _hidden(output: Any) -> Tensor:
    """[S, D]: the first tensor of an output, its last hidden states or logits."""
    return output[0][0]
