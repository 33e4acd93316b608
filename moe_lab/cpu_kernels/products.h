// Products of matrices on a CPU, in tiles of the processor's own vectors. Letters: c [m, n] = a [m, depth] b [depth, n], each row-major.
#pragma once
#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <utility>

#include <omp.h>

namespace {

using std::int32_t;
using std::int64_t;

constexpr int64_t kGrain = 8192;  // elements below which a loop is not worth a second thread

// `body(i)` for i < n, on several threads where that pays. Inside a parallel region it is a plain loop.
template <typename Body>
void parallel_for(int64_t threads, int64_t n, int64_t elements_each, const Body& body) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && !omp_in_parallel() && n * elements_each > kGrain)
  for (int64_t i = 0; i < n; ++i) body(i);
}

// The processor's vectors, by the vector extension of GCC and Clang. A tile of the products is kRows x kVectors of them: 12 of 16 registers or 24 of 32.
#if defined(__AVX512F__)
constexpr int kBytes = 64, kRows = 6, kVectors = 4;
#elif defined(__AVX__)
constexpr int kBytes = 32, kRows = 6, kVectors = 2;
#else
constexpr int kBytes = 16, kRows = 6, kVectors = 2;
#endif
constexpr int64_t kGroup = 384;  // rows of one task of a product on several threads
constexpr int64_t kDepth = 256;  // terms of a product that are added in registers: a panel of its second factor stays in the first-level cache

template <typename S>
struct Simd {
  static constexpr int lanes = kBytes / sizeof(S);
  typedef S Vector __attribute__((vector_size(kBytes)));
};
template <typename S>
using Vector = typename Simd<S>::Vector;

template <typename S>
inline Vector<S> load(const S* from) {
  Vector<S> v;
  std::memcpy(&v, from, kBytes);
  return v;
}

// Memory that the next product reads or writes: tiles ask for one line of it with each term, so that it is in cache by then.
struct Ahead {
  const void* begin = nullptr;
  int64_t bytes = 0;
};
constexpr int64_t kLine = 64;

// c[rows, cols] (+)= the sum over k < depth of a[i * row + k * step] b[k * ldb + j]; b has whole vectors, c has ldc columns. Term k asks for the memory at
// ahead + k * stride.
template <typename S, int Rows, int Vectors>
void tile(int64_t depth, const S* a, int64_t row, int64_t step, const S* b, int64_t ldb, const char* ahead, int64_t stride, bool add,
          S* c, int64_t ldc, int64_t cols) {
  constexpr int W = Simd<S>::lanes;
  Vector<S> sum[Rows][Vectors] = {};
  for (int64_t k = 0; k < depth; ++k) {
    __builtin_prefetch(ahead + k * stride);
    Vector<S> v[Vectors];
#pragma GCC unroll 8
    for (int j = 0; j < Vectors; ++j) v[j] = load(b + k * ldb + j * W);
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < Vectors; ++j) sum[i][j] += a[i * row + k * step] * v[j];
  }
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i) {
    S *out = c + i * ldc, part[Vectors * W];
    const bool whole = cols == Vectors * W;
    if (!whole) std::memcpy(part, out, cols * sizeof(S));
    S* to = whole ? out : part;
#pragma GCC unroll 8
    for (int j = 0; j < Vectors; ++j) {
      const Vector<S> value = add ? sum[i][j] + load(to + j * W) : sum[i][j];
      std::memcpy(to + j * W, &value, kBytes);
    }
    if (!whole) std::memcpy(out, part, cols * sizeof(S));
  }
}

template <typename S>
using Tile = void (*)(int64_t, const S*, int64_t, int64_t, const S*, int64_t, const char*, int64_t, bool, S*, int64_t, int64_t);

template <typename S, int... I>
constexpr std::array<Tile<S>, sizeof...(I)> tiles(std::integer_sequence<int, I...>) {
  return {tile<S, I / kVectors + 1, I % kVectors + 1>...};
}
template <typename S>
constexpr auto kTiles = tiles<S>(std::make_integer_sequence<int, kRows * kVectors>{});

// The lanes of a and b in turn, from lane `from` on.
template <typename S, int... I>
inline Vector<S> interleave(Vector<S> a, Vector<S> b, int from, std::integer_sequence<int, I...>) {
  return from ? Vector<S>{(I % 2 ? b : a)[I / 2 + sizeof...(I) / 2]...} : Vector<S>{(I % 2 ? b : a)[I / 2]...};
}

// out[k * width + j] = b[j * ld + k], one square of vectors.
template <typename S>
inline void transpose(const S* b, int64_t ld, S* out, int64_t width) {
  constexpr int W = Simd<S>::lanes;
  constexpr auto lanes = std::make_integer_sequence<int, W>{};
  Vector<S> rows[W], mixed[W];
#pragma GCC unroll 16
  for (int j = 0; j < W; ++j) rows[j] = load(b + j * ld);
#pragma GCC unroll 4
  for (int stage = 1; stage < W; stage *= 2) {
#pragma GCC unroll 16
    for (int j = 0; j < W / 2; ++j) {
      mixed[2 * j] = interleave<S>(rows[j], rows[j + W / 2], 0, lanes);
      mixed[2 * j + 1] = interleave<S>(rows[j], rows[j + W / 2], 1, lanes);
    }
#pragma GCC unroll 16
    for (int j = 0; j < W; ++j) rows[j] = mixed[j];
  }
#pragma GCC unroll 16
  for (int j = 0; j < W; ++j) std::memcpy(out + j * width, &rows[j], kBytes);
}

// out[depth, width] = the first `cols` columns of b, the others zero; b is [depth, ld], or [cols, ld] where it is transposed.
template <typename S>
void pack(bool transposed, const S* b, int64_t ld, int64_t depth, int64_t cols, S* out, int64_t width) {
  constexpr int W = Simd<S>::lanes;
  const int64_t whole_rows = transposed ? depth / W * W : 0, whole = cols / W * W;
  for (int64_t j = 0; j < (whole_rows ? whole : 0); j += W)
    for (int64_t k = 0; k < whole_rows; k += W) transpose(b + j * ld + k, ld, out + k * width + j, width);
  if (whole_rows == depth && whole == width) return;
  for (int64_t k = 0; k < depth; ++k)
    for (int64_t j = k < whole_rows ? whole : 0; j < width; ++j) out[k * width + j] = j >= cols ? S(0) : transposed ? b[j * ld + k] : b[k * ld + j];
}

// Row-major c[m, n] (+)= op(a) op(b), on several threads outside of a parallel region. The order of each sum depends on `depth` alone.
template <typename S>
void product(int64_t threads, bool ta, bool tb, int64_t m, int64_t n, int64_t depth, const S* a, const S* b, bool add, S* c, Ahead ahead = {}) {
  constexpr int64_t W = Simd<S>::lanes, width = kVectors * W;
  const int64_t row = ta ? 1 : depth, step = ta ? m : 1, panels = (n + width - 1) / width;
  const int64_t groups = threads > 1 && !omp_in_parallel() ? (m + kGroup - 1) / kGroup : 1;
  const int64_t lines = (ahead.bytes + kLine * panels * groups - 1) / (kLine * panels * groups);
  parallel_for(threads, panels * groups, m * depth * width / groups, [&](int64_t task) {
    alignas(kBytes) S packed[kDepth * width];
    const int64_t j = task / groups * width, cols = std::min(width, n - j), vectors = (cols + W - 1) / W;
    const int64_t first = m * (task % groups) / groups, last = m * (task % groups + 1) / groups, parts = (last - first + kRows - 1) / kRows;
    const char* next = static_cast<const char*>(ahead.begin) + task * lines * kLine;
    const char* const end = next + lines * kLine;
    for (int64_t k = 0; k == 0 || k < depth; k += kDepth) {
      const int64_t terms = std::min(kDepth, depth - k);
      const S* factor = tb ? b + j * depth + k : b + k * n + j;
      const bool copy = tb || cols % W;
      if (copy) pack(tb, factor, tb ? depth : n, terms, cols, packed, vectors * W);
      for (int64_t i = first, part = 0; part < parts; ++part) {
        const int64_t rows = (last - i + parts - part - 1) / (parts - part);
        kTiles<S>[(rows - 1) * kVectors + vectors - 1](terms, a + i * row + k * step, row, step, copy ? packed : factor, copy ? vectors * W : n, next,
                                                       next < end ? kLine : 0, add || k, c + i * n + j, n, cols);
        i += rows;
        next = std::min(next + terms * kLine, end);
      }
    }
  });
}

}  // namespace
