"""Caches written as plainly as possible, and the best that any policy can do: the tests' oracles.

A step is a list of items; sizes by item.
"""

from itertools import combinations


def simulate(steps, size, budget, worst):
    """Hits as [[bool]], with ``worst(cache, number)`` the item that goes next."""
    cache, result = [], []
    for number, step in enumerate(steps):
        result.append([item in cache for item in step])
        if not step:
            continue
        cache = [item for item in cache if item not in step] + list(step)
        while sum(size[item] for item in cache) > budget:
            free = [item for item in cache if item not in step]
            cache.remove(worst(free or cache, number))
    return result


def lru(steps, size, budget):
    return simulate(steps, size, budget, lambda free, number: free[0])


def belady(steps, size, budget):
    def next_use(item, number):
        later = [n for n in range(number + 1, len(steps)) if item in steps[n]]
        return later[0] if later else 10**9

    def worst(free, number):
        return max(free, key=lambda item: (next_use(item, number), -item))

    return simulate(steps, size, budget, worst)


def lfu(steps, size, budget):
    def worst(free, number):
        uses = {item: sum(item in step for step in steps[: number + 1]) for item in free}
        return min(free, key=lambda item: (uses[item], free.index(item)))

    return simulate(steps, size, budget, worst)


def best(steps, size, budget, any_may_go=False):
    """The most hits of any policy that drops after a step only what the step did not use (or,
    ``any_may_go``, anything) until the budget holds.
    """
    states = {frozenset(): 0}
    for step in steps:
        now = frozenset(step)
        following = {}
        for cache, hits in states.items():
            hits += len(cache & now)
            free = sorted(cache | now if any_may_go else cache - now)
            for kept in range(len(free) + 1):
                for chosen in combinations(free, kept):
                    new = frozenset(chosen) if any_may_go else now | frozenset(chosen)
                    if sum(size[item] for item in new) <= budget:
                        following[new] = max(following.get(new, -1), hits)
        states = following
    return max(states.values())
