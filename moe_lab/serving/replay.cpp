// Replays of expert requests (replay.py says what each function does, and has the same in Python).
#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

namespace {

constexpr int64_t NOT_HELD = std::numeric_limits<int64_t>::max();

// The items of one stack by the time of their last use, newest last: for each size of an item, which
// slots hold one of that size (bits of a word), and how many are in the pages after each page. Loops
// have fixed lengths, so that no branch depends on where an item is.
struct Stack {
    static constexpr int64_t WORD = 64, WORDS = 8, PAGE = WORD * WORDS;  // slots; words of a page
    std::vector<int64_t> sizes;                                          // bytes of its items
    std::vector<uint64_t> bits;                                          // [sizes, pages, WORDS]
    std::vector<int32_t> after;                                          // [sizes, pages]
    int32_t top = 0, pages = 0;

    void clear(int64_t slots) {
        pages = (int32_t)((slots + 8 * PAGE - 1) / (8 * PAGE)) * 8;
        bits.assign(pages * WORDS * sizes.size(), 0);
        after.assign(pages * sizes.size(), 0);
        top = 0;
    }
    // Put items of these sizes on top of an empty stack.
    void fill(const std::vector<int32_t> &size_of) {
        for (const int32_t size : size_of) {
            bits[size * pages * WORDS + top / WORD] |= uint64_t(1) << (top % WORD);
            ++top;
        }
        for (size_t size = 0; size < sizes.size(); ++size)
            for (int32_t page = pages - 1, later = 0; page >= 0; --page) {
                after[size * pages + page] = later;
                const uint64_t *bit = &bits[(size * pages + page) * WORDS];
                for (int64_t i = 0; i < WORDS; ++i) later += __builtin_popcountll(bit[i]);
            }
    }
    // Put an item of a size on top, which was in slot ``old`` or, where that is negative, in none.
    int32_t raise(int64_t old, int64_t size) {
        uint64_t *bit = &bits[size * pages * WORDS];
        const int32_t first = old < 0 ? 0 : (int32_t)(old / PAGE), last = top / PAGE, end = pages;
        if (old >= 0) bit[old / WORD] ^= uint64_t(1) << (old % WORD);
        bit[top / WORD] ^= uint64_t(1) << (top % WORD);
        int32_t *count = &after[size * end];
        for (int32_t i = 0; i < end; ++i) count[i] += i >= first && i < last;
        return top++;
    }
    int64_t above(int64_t slot) const {
        int64_t sum = 0;
        const int64_t page = slot / PAGE, word = slot / WORD % WORDS;
        for (size_t size = 0; size < sizes.size(); ++size) {
            const uint64_t *bit = &bits[(size * pages + page) * WORDS];
            int64_t found = after[size * pages + page];
            for (int64_t i = 0; i < WORDS; ++i) {
                const uint64_t later = ~uint64_t(1) << (slot % WORD);
                const uint64_t mask = i > word ? ~uint64_t(0) : i == word ? later : 0;
                found += __builtin_popcountll(bit[i] & mask);
            }
            sum += found * sizes[size];
        }
        return sum;
    }
};

struct Lru {
    std::vector<int32_t> slot, size, group;  // of each item; size: its place in its stack's sizes
    std::vector<Stack> stacks;

    void compact(int32_t number, int64_t room) {
        Stack &stack = stacks[number];
        std::vector<int32_t> owner(stack.top, -1);
        int64_t held = 0;
        for (size_t item = 0; item < slot.size(); ++item) {
            if (group[item] != number) continue;
            ++held;
            if (slot[item] >= 0) owner[slot[item]] = (int32_t)item;
        }
        stack.clear(2 * (held + room));
        std::vector<int32_t> size_of;
        for (int32_t item : owner) {
            if (item < 0) continue;
            slot[item] = (int32_t)size_of.size();
            size_of.push_back(size[item]);
        }
        stack.fill(size_of);
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
    lru->group.assign(group, group + items);
    lru->slot.assign(items, -1);
    lru->stacks.resize(groups);
    for (int64_t i = 0; i < items; ++i) {
        auto &sizes = lru->stacks[group[i]].sizes;
        const auto at = std::find(sizes.begin(), sizes.end(), bytes[i]);
        lru->size.push_back((int32_t)(at - sizes.begin()));
        if (at == sizes.end()) sizes.push_back(bytes[i]);
    }
    for (int64_t i = 0; i < groups; ++i) lru->compact((int32_t)i, 0);
    return lru;
}

void lru_free(void *state) { delete static_cast<Lru *>(state); }

void lru_feed(void *state, int64_t sets, const int64_t *starts, const int32_t *items,
              int64_t *distance) {
    auto &lru = *static_cast<Lru *>(state);
    for (int64_t s = 0; s < sets; ++s) {
        const int64_t from = starts[s], to = starts[s + 1];
        if (from == to) continue;
        const int32_t group = lru.group[items[from]];
        Stack &stack = lru.stacks[group];
        for (int64_t r = from; r < to; ++r) {
            const int64_t slot = lru.slot[items[r]];
            distance[r] = slot < 0 ? -1 : stack.above(slot) + stack.sizes[lru.size[items[r]]];
        }
        if (stack.top + (to - from) > stack.pages * Stack::PAGE) lru.compact(group, to - from);
        for (int64_t r = from; r < to; ++r) {
            int32_t &slot = lru.slot[items[r]];
            slot = stack.raise(slot, lru.size[items[r]]);
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
            for (int64_t i = 0; i < budgets; ++i) b += limit[i] < distance[r];
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
