// Replays of expert requests (replay.py says what each function does, and has the same in Python).
#include <cstdint>
#include <limits>
#include <vector>

namespace {

constexpr int64_t NOT_HELD = std::numeric_limits<int64_t>::max();

// Bytes of the items of one stack by the time of their last use, newest last, with sums of 16 and of
// 256 slots.
struct Stack {
    std::vector<int64_t> slots, sixteens, pages;
    std::vector<int32_t> owner;  // slot -> item whose last use it is, or -1
    int64_t top = 0;

    void resize(int64_t size) {
        size = (size + 255) & ~int64_t(255);
        slots.assign(size, 0);
        sixteens.assign(size >> 4, 0);
        pages.assign(size >> 8, 0);
        owner.assign(size, -1);
    }
    void add(int64_t slot, int64_t bytes) {
        slots[slot] += bytes;
        sixteens[slot >> 4] += bytes;
        pages[slot >> 8] += bytes;
    }
    int64_t above(int64_t slot) const {
        int64_t sum = 0;
        for (int64_t i = slot + 1, end = (slot | 15) + 1; i < end; ++i) sum += slots[i];
        const int64_t sixteen = slot >> 4;
        for (int64_t i = sixteen + 1, end = (sixteen | 15) + 1; i < end; ++i) sum += sixteens[i];
        for (int64_t i = (slot >> 8) + 1, end = (top + 255) >> 8; i < end; ++i) sum += pages[i];
        return sum;
    }
};

struct Lru {
    std::vector<int64_t> bytes, slot;
    std::vector<int32_t> group;
    std::vector<Stack> stacks;

    void compact(Stack &stack, int64_t room) {
        std::vector<int32_t> kept;
        for (int64_t i = 0; i < stack.top; ++i)
            if (stack.owner[i] >= 0) kept.push_back(stack.owner[i]);
        stack.resize(2 * (int64_t)kept.size() + 2 * room + 256);
        stack.top = (int64_t)kept.size();
        for (int64_t i = 0; i < stack.top; ++i) {
            stack.owner[i] = kept[i];
            slot[kept[i]] = i;
            stack.add(i, bytes[kept[i]]);
        }
    }
};

// Items by a key, the smallest found at once (a tournament tree).
struct Cache {
    int policy;
    int64_t budget, total = 0, leaves = 1, time = 0;
    std::vector<int64_t> bytes, least, key, uses;
    std::vector<uint8_t> held;

    void set(int64_t item, int64_t value) {
        int64_t i = leaves + item;
        least[i] = value;
        for (i >>= 1; i; i >>= 1) {
            const int64_t smaller =
                least[2 * i] <= least[2 * i + 1] ? least[2 * i] : least[2 * i + 1];
            if (least[i] == smaller) break;
            least[i] = smaller;
        }
    }
    // Drop the smallest keys until the budget holds or nothing is left that may go.
    void drop() {
        while (total > budget && least[1] != NOT_HELD) {
            int64_t i = 1;
            while (i < leaves) i = least[2 * i] == least[i] ? 2 * i : 2 * i + 1;
            set(i - leaves, NOT_HELD);
            held[i - leaves] = 0;
            total -= bytes[i - leaves];
        }
    }
};

enum Policy { LFU = 0, RANKED = 1, CLAIRVOYANT = 2, BOUND = 3 };

}  // namespace

extern "C" {

void *lru_new(int64_t items, const int64_t *bytes, const int32_t *group, int64_t groups) {
    auto *lru = new Lru;
    lru->bytes.assign(bytes, bytes + items);
    lru->group.assign(group, group + items);
    lru->slot.assign(items, -1);
    lru->stacks.resize(groups);
    for (auto &stack : lru->stacks) lru->compact(stack, 0);
    return lru;
}

void lru_free(void *state) { delete static_cast<Lru *>(state); }

void lru_feed(void *state, int64_t sets, const int64_t *starts, const int32_t *items,
              int64_t *distance) {
    auto &lru = *static_cast<Lru *>(state);
    for (int64_t s = 0; s < sets; ++s) {
        const int64_t from = starts[s], to = starts[s + 1];
        if (from == to) continue;
        Stack &stack = lru.stacks[lru.group[items[from]]];
        for (int64_t r = from; r < to; ++r) {
            const int32_t item = items[r];
            if (lru.slot[item] < 0)
                distance[r] = -1;
            else
                distance[r] = stack.above(lru.slot[item]) + lru.bytes[item];
        }
        if (stack.top + (to - from) > (int64_t)stack.owner.size()) lru.compact(stack, to - from);
        for (int64_t r = from; r < to; ++r) {
            const int32_t item = items[r];
            const int64_t bytes = lru.bytes[item];
            if (lru.slot[item] >= 0) {
                stack.add(lru.slot[item], -bytes);
                stack.owner[lru.slot[item]] = -1;
            }
            lru.slot[item] = stack.top;
            stack.owner[stack.top] = item;
            stack.add(stack.top++, bytes);
        }
    }
}

// Hits of requests by the first of ``budgets`` limits of their place that reaches their distance.
void tally(int64_t sets, int64_t budgets, const int64_t *starts, const int64_t *distance,
           const int32_t *cell, const int32_t *place, const int64_t *limits, int64_t *hits,
           const int64_t *place_bytes, int64_t *bytes) {
    for (int64_t s = 0; s < sets; ++s) {
        const int64_t *limit = limits + place[s] * budgets;
        int64_t *hit = hits + cell[s] * budgets, *found = bytes + cell[s] * budgets;
        for (int64_t r = starts[s]; r < starts[s + 1]; ++r) {
            if (distance[r] < 0) continue;
            int64_t b = 0;
            while (b < budgets && limit[b] < distance[r]) ++b;
            if (b == budgets) continue;
            ++hit[b];
            found[b] += place_bytes[place[s]];
        }
    }
}

void *cache_new(int64_t policy, int64_t items, const int64_t *bytes, int64_t budget) {
    auto *cache = new Cache;
    cache->policy = (int)policy;
    cache->budget = budget;
    while (cache->leaves < items) cache->leaves *= 2;
    cache->least.assign(2 * cache->leaves, NOT_HELD);
    cache->bytes.assign(bytes, bytes + items);
    cache->key.assign(items, 0);
    cache->uses.assign(items, 0);
    cache->held.assign(items, 0);
    return cache;
}

void cache_free(void *state) { delete static_cast<Cache *>(state); }

void cache_rank(void *state, const int64_t *rank) {
    auto &cache = *static_cast<Cache *>(state);
    for (int64_t i = 0; i < (int64_t)cache.key.size(); ++i) {
        cache.key[i] = rank[i];
        if (cache.held[i]) cache.set(i, rank[i]);
    }
}

void cache_feed(void *state, int64_t sets, const int64_t *starts, const int32_t *items,
                const int32_t *next, uint8_t *hit) {
    auto &cache = *static_cast<Cache *>(state);
    for (int64_t s = 0; s < sets; ++s) {
        const int64_t from = starts[s], to = starts[s + 1];
        if (from == to) continue;
        for (int64_t r = from; r < to; ++r) {
            const int32_t item = items[r];
            hit[r] = cache.held[item];
            if (cache.held[item]) {
                cache.set(item, NOT_HELD);  // what the step uses goes last
            } else {
                cache.held[item] = 1;
                cache.total += cache.bytes[item];
            }
        }
        if (cache.policy != BOUND) cache.drop();
        for (int64_t r = from; r < to; ++r) {
            const int32_t item = items[r];
            int64_t key = cache.key[item];
            if (cache.policy == LFU) {
                int64_t uses = ++cache.uses[item];
                if (uses > (1 << 24)) uses = 1 << 24;
                key = (uses << 38) + cache.time++;
            } else if (cache.policy >= CLAIRVOYANT) {
                key = -(int64_t)next[r];
            }
            cache.key[item] = key;
            cache.set(item, key);
        }
        cache.drop();
    }
}

// The set in which each request's item is asked for next, INT32_MAX for never; from the last set.
void next_uses(int64_t sets, int64_t items_in_all, const int64_t *starts, const int32_t *items,
               int32_t *next) {
    std::vector<int32_t> later(items_in_all, std::numeric_limits<int32_t>::max());
    for (int64_t s = sets - 1; s >= 0; --s) {
        for (int64_t r = starts[s]; r < starts[s + 1]; ++r) next[r] = later[items[r]];
        for (int64_t r = starts[s]; r < starts[s + 1]; ++r) later[items[r]] = (int32_t)s;
    }
}
}
