"""Replays of caches against plain simulators and the optimum by exhaustion; compiled and plain."""

from itertools import chain

import numpy as np
import plain_cache
import pytest

from moe_lab.compiled import SWITCH
from moe_lab.serving import replay
from moe_lab.serving.replay import KeyedCache, LruStack, Order, next_uses


@pytest.fixture(params=["compiled", "plain"])
def way(request, monkeypatch):
    """Both ways of running; the compiled one is skipped where there is no compiler."""
    replay.library.cache_clear()
    if request.param == "plain":
        monkeypatch.setenv(SWITCH, "0")
    elif isinstance(found := replay.library(), str):
        pytest.skip(found)
    yield request.param
    replay.library.cache_clear()


def steps_of(generator, number, items, most=3):
    return [
        generator.choice(items, generator.integers(0, most + 1), replace=False).tolist()
        for _ in range(number)
    ]


def arrays(steps):
    return np.cumsum([0, *map(len, steps)]), np.array([*chain(*steps)], np.int32)


def flat(hits):
    return np.array([*chain(*hits)], bool)


@pytest.mark.parametrize("sizes", ["equal", "unequal"])
def test_one_pass_of_stack_distances_is_lru_at_every_budget(way, sizes):
    for seed in range(40):
        generator = np.random.default_rng(seed)
        steps = steps_of(generator, 40, 7)
        size = np.ones(7, int) if sizes == "equal" else generator.integers(1, 6, 7)
        starts, items = arrays(steps)
        stack = LruStack(size, np.zeros(7, np.int32))
        cut = len(steps) // 2  # state goes on from one block to the next
        distance = np.concatenate(
            [
                stack.feed(starts[: cut + 1], items[: starts[cut]]),
                stack.feed(starts[cut:] - starts[cut], items[starts[cut] :]),
            ]
        )
        for budget in range(int(size.sum()) + 1):
            wanted = flat(plain_cache.lru(steps, size, budget))
            found = (distance != replay.FIRST_USE) & (distance <= budget)
            # Distances are judged at the budget of the trace's own steps: a step may overflow it.
            assert (found == wanted).all(), (seed, budget)


@pytest.mark.parametrize(
    ("order", "oracle"), [(Order.LFU, plain_cache.lfu), (Order.CLAIRVOYANT, plain_cache.belady)]
)
def test_keyed_caches_are_their_plain_simulators(way, order, oracle):
    for seed in range(30):
        generator = np.random.default_rng(seed)
        steps = steps_of(generator, 30, 6)
        size = np.ones(6, int) if order == Order.CLAIRVOYANT else generator.integers(1, 4, 6)
        starts, items = arrays(steps)
        for budget in (0, 2, 3, 5, 9):
            cache = KeyedCache(order, size, budget)
            found = cache.feed(starts, items, next_uses(starts, items, 6))
            wanted = flat(oracle(steps, size, budget))
            if order == Order.CLAIRVOYANT:
                assert found.sum() == wanted.sum(), (seed, budget)
            else:
                assert (found == wanted).all(), (seed, budget)


def test_next_uses_are_the_next_sets(way):
    starts, items = arrays([[0, 1], [2], [], [1, 0]])
    assert next_uses(starts, items, 3).tolist() == [3, 3, replay.NEVER, replay.NEVER, replay.NEVER]


def test_no_policy_finds_more_than_the_clairvoyant_one(way):
    """The optimum over all policies, on 300 random traces of at most 8 requests."""
    for seed in range(300):
        generator = np.random.default_rng(seed)
        steps, requests = [], 0
        while requests < 8:
            step = generator.choice(4, generator.integers(1, 3), replace=False).tolist()
            step = step[: 8 - requests]
            steps.append(step)
            requests += len(step)
        starts, items = arrays(steps)
        following = next_uses(starts, items, 4)
        for budget in (2, 3):
            for order in (Order.CLAIRVOYANT, Order.BOUND):
                cache = KeyedCache(order, np.ones(4, int), budget)
                found = cache.feed(starts, items, following)
                most = plain_cache.best(steps, [1] * 4, budget, order == Order.BOUND)
                assert found.sum() == most, (seed, budget, order)


def test_ranks_decide_what_stays_and_can_change(way):
    cache = KeyedCache(Order.RANKED, np.ones(3, int), 1)
    cache.rank(np.array([0, 1, 2]))
    items = np.array([2, 0, 2, 1, 2], np.int32)
    assert not cache.feed(np.arange(6), items).any()  # a step's own expert is kept after it
    wide = KeyedCache(Order.RANKED, np.ones(3, int), 2)
    wide.rank(np.array([0, 1, 2]))
    starts = np.arange(6)
    assert wide.feed(starts, np.array([2, 0, 1, 2, 0], np.int32)).tolist() == [0, 0, 0, 1, 0]
    wide.rank(np.array([2, 1, 0]))
    assert wide.feed(np.arange(3), np.array([1, 0], np.int32)).tolist() == [0, 1]
