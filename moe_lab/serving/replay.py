"""Replays of a stream of expert sets through a cache of experts.

The rule of all caches is that of an engine with streamed experts: hits of a set are judged before
it, then its missing experts are read, then experts are dropped, one by one in the policy's order
but those of the set last, until the budget holds. ``Order.BOUND`` alone may drop an expert of the
set before others. A set without experts changes nothing.

``LruStack`` and ``KeyedCache`` run in C++ (``replay.cpp``, compiled once per machine by
``moe_lab.compiled``), or in plain Python where it cannot be had or ``MOE_LAB_NATIVE=0``: the same
numbers, some hundred times slower. An item is an expert of a layer, numbered over all layers.
Shape letters: S sets, R requests of all sets, I items.
"""

import ctypes
import functools
from collections.abc import Callable
from enum import IntEnum
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_lab import compiled

SOURCE = Path(__file__).with_name("replay.cpp")
FLAGS = ("-O3", "-std=c++17", "-march=native", "-fPIC", "-shared")
FIRST_USE = -1
"""Distance of a request that no budget serves."""
NEVER = 2**31 - 1
MAX_USES = 2**24

Ints = NDArray[np.int64]
Items = NDArray[np.int32]


class Order(IntEnum):
    """The rule by which a ``KeyedCache`` drops experts."""

    LFU = 0
    """The one used least often so far; of equal ones the one not used for longest."""
    RANKED = 1
    """The one of the lowest rank (``KeyedCache.rank``)."""
    CLAIRVOYANT = 2
    """The one whose next use is farthest."""
    BOUND = 3
    """The same, also where the last set used it: no cache of experts of one size finds more."""


@functools.cache
def library() -> ctypes.CDLL | str:
    """The compiled source, or the reason why there is none."""
    loaded = compiled.load(SOURCE, FLAGS, "the replays")
    if isinstance(loaded, str):
        return loaded
    loaded.lru_new.restype = loaded.cache_new.restype = ctypes.c_void_p
    return loaded


def _pointer(array: NDArray[Any]) -> ctypes.c_void_p:
    assert array.flags.c_contiguous
    return ctypes.c_void_p(array.ctypes.data)


class LruStack:
    """The smallest budget under which least-recently-used finds each request, for all budgets in
    one pass (stack distances of Mattson et al. 1970, in bytes).

    What LRU holds within a budget is the longest run of the most recently used experts that fits,
    so a larger budget holds all that a smaller one does, whatever the sizes of the experts.

    Args:
        bytes_I: bytes of each item.
        group_I: items of one group share a stack (all of them, or those of a layer).
    """

    def __init__(self, bytes_I: Ints, group_I: Items) -> None:
        self._library = library()
        self._bytes = np.ascontiguousarray(bytes_I, np.int64)
        self._group = np.ascontiguousarray(group_I, np.int32)
        groups = int(self._group.max(initial=0)) + 1
        if isinstance(self._library, str):
            self._stacks: list[dict[int, None]] = [{} for _ in range(groups)]
            return
        sizes = ctypes.c_int64(len(self._bytes)), ctypes.c_int64(groups)
        pointers = _pointer(self._bytes), _pointer(self._group)
        self._state = _State(
            self._library.lru_new(sizes[0], *pointers, sizes[1]), self._library.lru_free
        )

    def feed(self, starts: Ints, items: Items) -> Ints:
        """[R] bytes: a request is a hit if the budget is at least that; ``FIRST_USE`` if no budget
        helps.

        Args:
            starts: [S + 1] where each set begins in ``items``.
            items: [R], each once in a set; those of a set are of one group.
        """
        if isinstance(self._library, str):
            return self._feed_plain(starts.tolist(), items.tolist())
        distance = np.empty(len(items), np.int64)
        self._library.lru_feed(
            self._state.pointer,
            ctypes.c_int64(len(starts) - 1),
            *map(_pointer, (starts, items, distance)),
        )
        return distance

    def _feed_plain(self, starts: list[int], items: list[int]) -> Ints:
        distance = np.full(len(items), FIRST_USE)
        sizes, group_of = self._bytes.tolist(), self._group.tolist()
        for start, end in pairwise(starts):
            if start == end:
                continue
            stack = self._stacks[group_of[items[start]]]
            wanted = {item: place for place, item in enumerate(items[start:end], start)}
            above = 0
            for item in reversed(stack):
                above += sizes[item]
                if item in wanted:
                    distance[wanted[item]] = above
            for item in wanted:  # the oldest use first
                stack.pop(item, None)
                stack[item] = None
        return distance


def tally(
    starts: Ints,
    distance_R: Ints,
    cell_S: Items,
    place_S: Items,
    limits_PB: Ints,
    bytes_P: Ints,
    hits_CB: Ints,
    found_CB: Ints,
) -> None:
    """Add up hits, and bytes of hits, of distances within budgets.

    Args:
        starts, distance_R: as ``LruStack.feed``.
        cell_S: row of the sums that a set belongs to. place_S: row of its limits.
        limits_PB: rising budgets of each place. bytes_P: of an item of each place.
        hits_CB, found_CB: hits and bytes of hits that the budget b serves and b - 1 does not.
    """
    loaded, budgets = library(), limits_PB.shape[1]
    if not isinstance(loaded, str):
        sizes = ctypes.c_int64(len(starts) - 1), ctypes.c_int64(budgets)
        arrays = starts, distance_R, cell_S, place_S, limits_PB, hits_CB, bytes_P, found_CB
        loaded.tally(*sizes, *map(_pointer, arrays))
        return
    set_R = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
    rank_R = (limits_PB[place_S[set_R]] < distance_R[:, None]).sum(axis=1)
    kept = (distance_R != FIRST_USE) & (rank_R < budgets)
    cells = cell_S[set_R[kept]], rank_R[kept]
    np.add.at(hits_CB, cells, 1)
    np.add.at(found_CB, cells, bytes_P[place_S[set_R[kept]]])


class KeyedCache:
    """One cache of one budget that drops experts in the order of a key.

    Args:
        order: which expert goes first.
        bytes_I: bytes of each item.
        budget: bytes.
    """

    def __init__(self, order: Order, bytes_I: Ints, budget: int) -> None:
        self._library, self._order, self._budget = library(), order, int(budget)
        self._bytes = np.ascontiguousarray(bytes_I, np.int64)
        if isinstance(self._library, str):
            self._keys: dict[int, tuple[int, int]] = {}
            self._rank = [0] * len(bytes_I)
            self._uses = [0] * len(bytes_I)
            self._time = self._total = 0
            return
        self._state = _State(
            self._library.cache_new(
                ctypes.c_int64(order),
                ctypes.c_int64(len(bytes_I)),
                _pointer(self._bytes),
                ctypes.c_int64(self._budget),
            ),
            self._library.cache_free,
        )

    def rank(self, rank_I: Ints) -> None:
        """Set the rank of every item, also of those in the cache."""
        rank_I = np.ascontiguousarray(rank_I, np.int64)
        if not isinstance(self._library, str):
            self._library.cache_rank(self._state.pointer, _pointer(rank_I))
            return
        self._rank = rank_I.tolist()
        self._keys = {item: (self._rank[item], item) for item in self._keys}

    def feed(self, starts: Ints, items: Items, next_R: Items | None = None) -> NDArray[np.uint8]:
        """[R] 1 where the item was in the cache; ``next_R`` as ``next_uses``, for the last two
        orders.
        """
        hit = np.zeros(len(items), np.uint8)
        if isinstance(self._library, str):
            self._feed_plain(starts.tolist(), items.tolist(), next_R, hit)
            return hit
        following = np.zeros(0, np.int32) if next_R is None else next_R
        self._library.cache_feed(
            self._state.pointer,
            ctypes.c_int64(len(starts) - 1),
            *map(_pointer, (starts, items, following, hit)),
        )
        return hit

    def _feed_plain(
        self, starts: list[int], items: list[int], next_R: Items | None, hit: NDArray[np.uint8]
    ) -> None:
        sizes, keys = self._bytes.tolist(), self._keys
        for start, end in pairwise(starts):
            if start == end:
                continue
            chosen = items[start:end]
            used = set(chosen)
            for place, item in enumerate(chosen, start):
                hit[place] = item in keys
                if item not in keys:
                    self._total += sizes[item]
                    keys[item] = (0, item)
            if self._order != Order.BOUND:
                self._drop(keys.keys() - used)
            for place, item in enumerate(chosen, start):
                keys[item] = (self._key(item, place, next_R), item)
            self._drop(set(keys))

    def _drop(self, free: set[int]) -> None:
        for item in sorted(free, key=self._keys.__getitem__) if self._total > self._budget else ():
            if self._total <= self._budget:
                return
            del self._keys[item]
            self._total -= int(self._bytes[item])

    def _key(self, item: int, place: int, next_R: Items | None) -> int:
        if self._order >= Order.CLAIRVOYANT:
            assert next_R is not None
            return -int(next_R[place])
        if self._order == Order.RANKED:
            return self._rank[item]
        self._uses[item] += 1
        self._time += 1
        return (min(self._uses[item], MAX_USES) << 38) + self._time


def next_uses(starts: Ints, items: Items, num_items: int) -> Items:
    """[R] the number of the set in which each request's item is asked for next, or ``NEVER``."""
    loaded, following = library(), np.full(len(items), NEVER, np.int32)
    if not isinstance(loaded, str):
        sizes = ctypes.c_int64(len(starts) - 1), ctypes.c_int64(num_items)
        loaded.next_uses(*sizes, *map(_pointer, (starts, items, following)))
        return following
    set_R = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
    order = np.argsort(items, kind="stable")
    same = items[order[1:]] == items[order[:-1]]
    following[order[:-1][same]] = set_R[order[1:][same]]
    return following


class _State:
    """Memory of the library, freed with the object that holds it."""

    def __init__(self, address: int, free: Callable[[ctypes.c_void_p], None]) -> None:
        self.pointer, self._free = ctypes.c_void_p(address), free

    def __del__(self) -> None:
        self._free(self.pointer)
