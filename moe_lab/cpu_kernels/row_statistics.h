// Numbers that describe a router's scores, row by row, on a CPU.
#pragma once
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include "products.h"

namespace {

// ln(v) of a positive normal number, in float32 by a polynomial that compilers turn into vector instructions (Cephes, logf; error 1e-7).
inline float natural_log(float v) {
  const int32_t bits = std::bit_cast<int32_t>(v), power = (bits - 0x3f3504f3) >> 23;
  const float f = std::bit_cast<float>(bits - (power << 23)) - 1.0f, n = static_cast<float>(power), square = f * f;
  float p = 7.0376836292e-2f;
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  return f + (p * f * square - 2.12194440e-4f * n - 0.5f * square) + 0.693359375f * n;
}

inline double natural_log(double v) { return std::log(v); }

// Of each row: the entropy in nats of scores [rows, E] over their sum, and the largest less the smallest of values [rows, E]. NaN stays NaN.
template <typename S>
void entropy_and_spread(int64_t threads, int64_t rows, int64_t E, const S* scores, const S* values, S* entropy, S* spread) {
  constexpr S tiny = std::numeric_limits<S>::min();
  parallel_for(threads, rows, 8 * E, [&](int64_t r) {
    const S *score = scores + r * E, *value = values + r * E;
    S total = 0, high = value[0], low = value[0], sum = 0, missing = 0;
#pragma omp simd reduction(+ : total, missing) reduction(max : high) reduction(min : low)
    for (int64_t e = 0; e < E; ++e) {
      total += score[e];
      missing += value[e] != value[e] ? S(1) : S(0);
      high = value[e] > high ? value[e] : high;
      low = value[e] < low ? value[e] : low;
    }
    const S scale = S(1) / (total < tiny ? tiny : total);
#pragma omp simd reduction(+ : sum)
    for (int64_t e = 0; e < E; ++e) {
      const S share = score[e] * scale;
      sum += share * natural_log(share < tiny ? tiny : share);
    }
    entropy[r] = S(0) - sum;
    spread[r] = missing ? std::numeric_limits<S>::quiet_NaN() : high - low;
  });
}

}  // namespace
