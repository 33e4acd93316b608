// The places of the largest numbers of each row, on a CPU.
#pragma once
#include <algorithm>
#include <bit>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

#include "products.h"

namespace {

// Integers in the order of floats: NaN is the largest, both zeros are equal.
template <typename S>
using Key = std::conditional_t<sizeof(S) == 4, int32_t, int64_t>;

template <typename S>
inline Key<S> key_of(S value) {
  const Key<S> bits = std::bit_cast<Key<S>>(value + S(0)), most = std::numeric_limits<Key<S>>::max();
  return value != value ? most : bits < 0 ? bits ^ most : bits;
}

// ids [rows, K]: the places of the K largest of each row [E], the largest first, the lower place first where two are equal.
template <typename S>
void top_k(int64_t threads, int64_t rows, int64_t E, int64_t K, const S* values, int64_t* ids) {
  using Lanes = Vector<Key<S>>;
  constexpr Key<S> gone = std::numeric_limits<Key<S>>::min();
  constexpr int64_t W = Simd<S>::lanes, kTask = 64;
  const int64_t vectors = (E + W - 1) / W;
  parallel_for(threads, (rows + kTask - 1) / kTask, kTask * E, [&](int64_t task) {
    std::vector<Key<S>> keys(vectors * W, gone);
    for (int64_t row = task * kTask; row < std::min(rows, (task + 1) * kTask); ++row) {
      Key<S>* key = keys.data();
#pragma omp simd
      for (int64_t e = 0; e < E; ++e) key[e] = key_of(values[row * E + e]);
      for (int64_t k = 0; k < K; ++k) {
        Lanes best = load(key);  // of each lane
        for (int64_t v = 1; v < vectors; ++v) {
          const Lanes other = load(key + v * W);
          best = other > best ? other : best;
        }
        Key<S> largest = best[0];
#pragma GCC unroll 16
        for (int64_t lane = 1; lane < W; ++lane) largest = std::max<Key<S>>(largest, best[lane]);
        int64_t place = 0;
        while (key[place] != largest) ++place;
        key[place] = gone;
        ids[row * K + k] = place;
      }
    }
  });
}

}  // namespace
