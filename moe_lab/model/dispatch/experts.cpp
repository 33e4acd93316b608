// The routed experts of one MoE layer on a CPU, forward and backward: y_t = sum_k w_tk W_down_e (silu(W_gate_e x_t) * (W_up_e x_t)), e = i_tk.
//
// Each expert's rows go from gather to output in blocks that stay in cache; nothing of size [slots, D] is copied on the way in. Blocks of
// an expert are taken by one thread and summed in order, and tokens add up their slots in order, so the result does not depend on timing.
//
// Letters: T tokens, K slots, N = T * K, E experts, D d_model, F d_expert. Slots are in expert order: row r of expert e is the slot
// order[r], starts[e] <= r < starts[e + 1]; place[slot] is r, or -1 for a slot that runs no real expert.
#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <numeric>
#include <utility>
#include <vector>

#include <omp.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace {

using std::int32_t;
using std::int64_t;

constexpr int64_t kScratch = int64_t(512) << 10;  // bytes of one block of rows between the products: half of a core's second-level cache
constexpr int64_t kWave = int64_t(8) << 20;  // bytes of experts' outputs that wait to be added up by token: they stay in the last-level cache
constexpr int64_t kGrain = 8192;  // elements below which a loop is not worth a second thread

// One layer's problem. Letters as above; `threads` is torch's number of threads.
template <typename S>
struct Layer {
  int64_t threads, T, K, E, D, F;
  bool on_input;  // the weight multiplies the expert's input, not its output
  double limit, alpha, offset;  // hidden = g sigmoid(alpha g) (u + offset), g = min(gate, limit), u = up within -limit and limit
  const S *x, *weights, *gate_up, *down;
  const int32_t *order, *starts, *place;

  int64_t rows(int64_t e) const { return starts[e + 1] - starts[e]; }

  // Rows of one block, at most: as many as keep its scratch in kScratch.
  int64_t block() const { return std::clamp<int64_t>(kScratch / int64_t((2 * D + 4 * F + 3) * sizeof(S)), 64, 256); }

  // Rows of the block of expert e that begins at row `first`: the rows that are left, in equal parts.
  int64_t next_block(int64_t e, int64_t first) const {
    const int64_t left = starts[e + 1] - first, parts = (left + block() - 1) / block();
    return (left + parts - 1) / parts;
  }
};

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

// c[rows, cols] (+)= the sum over k < depth of a[i * row + k * step] b[k * ldb + j]; b has whole vectors, c has ldc columns.
template <typename S, int Rows, int Vectors>
void tile(int64_t depth, const S* a, int64_t row, int64_t step, const S* b, int64_t ldb, bool add, S* c, int64_t ldc, int64_t cols) {
  constexpr int W = Simd<S>::lanes;
  Vector<S> sum[Rows][Vectors] = {};
  for (int64_t k = 0; k < depth; ++k) {
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
using Tile = void (*)(int64_t, const S*, int64_t, int64_t, const S*, int64_t, bool, S*, int64_t, int64_t);

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
void product(int64_t threads, bool ta, bool tb, int64_t m, int64_t n, int64_t depth, const S* a, const S* b, bool add, S* c) {
  constexpr int64_t W = Simd<S>::lanes, width = kVectors * W;
  const int64_t row = ta ? 1 : depth, step = ta ? m : 1, parts = (m + kRows - 1) / kRows;
  parallel_for(threads, (n + width - 1) / width, m * depth * width, [&](int64_t panel) {
    alignas(kBytes) S packed[kDepth * width];
    const int64_t j = panel * width, cols = std::min(width, n - j), vectors = (cols + W - 1) / W;
    for (int64_t k = 0; k < depth; k += kDepth) {
      const int64_t terms = std::min(kDepth, depth - k);
      const S* factor = tb ? b + j * depth + k : b + k * n + j;
      const bool copy = tb || cols % W;
      if (copy) pack(tb, factor, tb ? depth : n, terms, cols, packed, vectors * W);
      for (int64_t i = 0, part = 0; part < parts; ++part) {
        const int64_t rows = (m - i + parts - part - 1) / (parts - part);
        kTiles<S>[(rows - 1) * kVectors + vectors - 1](terms, a + i * row + k * step, row, step, copy ? packed : factor, copy ? vectors * W : n,
                                                       add || k, c + i * n + j, n, cols);
        i += rows;
      }
    }
  });
}

// 1 / (1 + exp(-v)), in float32 by a polynomial that compilers turn into vector instructions: exp(r) on |r| <= ln(2) / 2 (Cephes, expf;
// relative error 2e-7) times a power of two. NaN stays NaN.
inline float sigmoid(float v) {
  const float u = v < -87.0f ? 87.0f : (v > 87.0f ? -87.0f : -v);
  const float n = (u * 1.44269504088896341f + 12582912.0f) - 12582912.0f;
  const float r = (u - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const float power = std::bit_cast<float>((static_cast<int32_t>(n) + 127) << 23);
  return 1.0f / (1.0f + (p * r * r + r + 1.0f) * power);
}

inline double sigmoid(double v) { return 1.0 / (1.0 + std::exp(-v)); }

// NaN stays NaN.
template <typename S>
inline S below(S v, S limit) {
  return v > limit ? limit : v;
}
template <typename S>
inline S within(S v, S limit) {
  return v > limit ? limit : (v < -limit ? -limit : v);
}

// hidden[n, F] = g sigmoid(alpha g) (u + offset) * weight, from act[n, 2F] with the gate first.
template <typename S>
void swiglu(const Layer<S>& z, const S* act, const S* weight, int64_t n, S* hidden) {
  const int64_t F = z.F;
  parallel_for(z.threads, n, F, [&](int64_t r) {
    const S limit = z.limit, alpha = z.alpha, offset = z.offset;  // copies: the compiler gathers captured ones again for every unit
    const S *gate = act + r * 2 * F, *up = gate + F, w = weight[r];
    S* out = hidden + r * F;
#pragma omp simd
    for (int64_t f = 0; f < F; ++f) {
      const S g = below(gate[f], limit);
      out[f] = g * sigmoid(alpha * g) * (within(up[f], limit) + offset) * w;
    }
  });
}

// From act[n, 2F] and the gradient `grad`[n, F] of the unweighted hidden units: hidden * weight, the gradient of act, and <grad, hidden>.
template <typename S>
void swiglu_backward(const Layer<S>& z, const S* act, const S* weight, const S* grad, int64_t n, S* hidden, S* grad_act,
                     S* grad_weight) {
  const int64_t F = z.F;
  parallel_for(z.threads, n, F, [&](int64_t r) {
    const S limit = z.limit, alpha = z.alpha, offset = z.offset;  // copies: the compiler gathers captured ones again for every unit
    const S *gate = act + r * 2 * F, *up = gate + F, *g = grad + r * F, w = weight[r];
    S *h = hidden + r * F, *grad_gate = grad_act + r * 2 * F, *grad_up = grad_gate + F, dot = 0;
#pragma omp simd reduction(+ : dot)
    for (int64_t f = 0; f < F; ++f) {
      const S b = below(gate[f], limit), u = within(up[f], limit) + offset;
      const S s = sigmoid(alpha * b), silu = b * s, product = silu * u, weighted = g[f] * w;
      dot += g[f] * product;
      h[f] = product * w;
      grad_gate[f] = gate[f] > limit ? S(0) : weighted * u * (s + alpha * silu * (S(1) - s));
      grad_up[f] = up[f] > limit || up[f] < -limit ? S(0) : weighted * silu;
    }
    grad_weight[r] = dot;
  });
}

// Ask for large pages of memory that is about to be written for the first time: one page fault instead of 512, where the system has them to give.
template <typename S>
void advise(S* begin, int64_t n) {
#ifdef __linux__
  constexpr std::uintptr_t page = std::uintptr_t(2) << 20;
  const auto first = (reinterpret_cast<std::uintptr_t>(begin) + page - 1) / page * page, last = reinterpret_cast<std::uintptr_t>(begin + n) / page * page;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

// Experts [first, last) whose rows wait together: as many as keep every thread busy, then as many as fit in kWave.
template <typename S>
std::vector<int64_t> waves(const Layer<S>& z) {
  const int64_t most = std::max<int64_t>(1, kWave / int64_t(z.D * sizeof(S)));
  std::vector<int64_t> bounds{0};
  for (int64_t e = 1; e < z.E; ++e)
    if (z.starts[e + 1] - z.starts[bounds.back()] > most && e - bounds.back() >= 4 * z.threads) bounds.push_back(e);
  bounds.push_back(z.E);
  return bounds;
}

// Run `work(expert, scratch)` for the experts of [begin, end) that have rows. One that has more than a thread's share runs alone, with all threads inside
// its products; the others are dealt out, largest first. Which thread takes an expert changes nothing in its result.
template <typename S, typename Work>
void for_experts(const Layer<S>& z, int64_t begin, int64_t end, int64_t scratch_size, const Work& work) {
  const int64_t used = z.starts[end] - z.starts[begin];
  std::vector<int64_t> shared, alone;
  for (int64_t e = begin; e < end; ++e)
    if (z.rows(e)) (z.threads > 1 && z.rows(e) * z.threads > used + z.block() ? alone : shared).push_back(e);
  std::stable_sort(shared.begin(), shared.end(), [&](int64_t a, int64_t b) { return z.rows(a) > z.rows(b); });
  if (!alone.empty()) {
    std::unique_ptr<S[]> scratch(new S[scratch_size]);
    for (const int64_t e : alone) work(e, scratch.get());
  }
  std::atomic<size_t> next{0};
  const int crew = std::min<int64_t>(z.threads, shared.size());
  if (crew == 0) return;
#pragma omp parallel num_threads(crew)
  {
    std::unique_ptr<S[]> scratch(new S[scratch_size]);
    for (size_t turn = next++; turn < shared.size(); turn = next++) work(shared[turn], scratch.get());
  }
}

// out[n, D] = the tokens' rows of `from` for the slots order[0..n), times scale where there is one.
template <typename S>
void gather(const Layer<S>& z, const S* from, const int32_t* order, int64_t n, const S* scale, S* out) {
  for (int64_t r = 0; r < n; ++r) {
    const S* row = from + order[r] / z.K * z.D;
    if (scale == nullptr) {
      std::memcpy(out + r * z.D, row, z.D * sizeof(S));
    } else {
#pragma omp simd
      for (int64_t d = 0; d < z.D; ++d) out[r * z.D + d] = row[d] * scale[r];
    }
  }
}

// out[t] += the rows of the token's slots that lie in [first, last), in the order of the slots; rows[0] is row `first`.
template <typename S>
void combine(const Layer<S>& z, const S* rows, int64_t first, int64_t last, S* out) {
  parallel_for(z.threads, z.T, z.D * z.K, [&](int64_t t) {
    S* y = out + t * z.D;
    for (int64_t k = 0; k < z.K; ++k) {
      const int64_t row = z.place[t * z.K + k];
      if (row < first || row >= last) continue;
      const S* from = rows + (row - first) * z.D;
#pragma omp simd
      for (int64_t d = 0; d < z.D; ++d) y[d] += from[d];
    }
  });
}

// out [T, D] = the sum over experts of what `work(expert, scratch, rows)` writes to rows [rows of the expert, D].
template <typename S, typename Work>
void sum_over_experts(const Layer<S>& z, int64_t scratch_size, S* out, const Work& work) {
  const auto bounds = waves(z);
  int64_t most = 0;
  for (size_t i = 1; i < bounds.size(); ++i) most = std::max<int64_t>(most, z.starts[bounds[i]] - z.starts[bounds[i - 1]]);
  std::unique_ptr<S[]> rows(new S[most * z.D]);
  advise(rows.get(), most * z.D);
  std::fill(out, out + z.T * z.D, S(0));
  for (size_t i = 1; i < bounds.size(); ++i) {
    const int64_t first = z.starts[bounds[i - 1]];
    for_experts<S>(z, bounds[i - 1], bounds[i], scratch_size,
                   [&](int64_t e, S* scratch) { work(e, scratch, rows.get() + (z.starts[e] - first) * z.D); });
    combine<S>(z, rows.get(), first, z.starts[bounds[i]], out);
  }
}

// Where the weight is on the input: out, the gradient of the weighted input, becomes that of the input, and dot that of the weight.
template <typename S>
void input_weights(const Layer<S>& z, const int32_t* order, int64_t n, const S* weight, S* out, S* dot) {
  parallel_for(z.threads, n, z.D, [&](int64_t r) {
    const S* token = z.x + order[r] / z.K * z.D;
    S *row = out + r * z.D, sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t d = 0; d < z.D; ++d) {
      sum += row[d] * token[d];
      row[d] *= weight[r];
    }
    dot[r] = sum;
  });
}

// y [T, D]; act [N, 2F] in expert order is kept for the backward pass unless it is null.
template <typename S>
void forward(const Layer<S>& z, S* act, S* y) {
  const int64_t B = z.block(), D = z.D, F = z.F;
  if (act != nullptr) advise(act, z.starts[z.E] * 2 * F);
  sum_over_experts<S>(z, B * (D + F + 2) + (act == nullptr ? B * 2 * F : 0), y, [&](int64_t e, S* scratch, S* rows) {
    S *input = scratch, *hidden = input + B * D, *weight = hidden + B * F, *ones = weight + B, *own = ones + B;
    std::fill(ones, ones + B, S(1));
    for (int64_t first = z.starts[e], n; first < z.starts[e + 1]; first += n) {
      n = z.next_block(e, first);
      const int32_t* order = z.order + first;
      for (int64_t r = 0; r < n; ++r) weight[r] = z.weights[order[r]];
      S* a = act == nullptr ? own : act + first * 2 * F;
      gather<S>(z, z.x, order, n, z.on_input ? weight : nullptr, input);
      product(z.threads, false, true, n, 2 * F, D, input, z.gate_up + e * 2 * F * D, false, a);
      swiglu<S>(z, a, z.on_input ? ones : weight, n, hidden);
      product(z.threads, false, true, n, D, F, hidden, z.down + e * D * F, false, rows + (first - z.starts[e]) * D);
    }
  });
}

// Gradients of x [T, D], weights [N], gate_up and down from `grad` [T, D] and the `act` of the forward pass.
template <typename S>
void backward(const Layer<S>& z, const S* grad, const S* act, S* grad_x, S* grad_weights, S* grad_gate_up, S* grad_down) {
  const int64_t B = z.block(), D = z.D, F = z.F;
  std::fill(grad_weights, grad_weights + z.T * z.K, S(0));
  advise(grad_gate_up, z.E * 2 * F * D);
  advise(grad_down, z.E * D * F);
  for (int64_t e = 0; e < z.E; ++e) {
    if (z.rows(e)) continue;
    std::fill(grad_gate_up + e * 2 * F * D, grad_gate_up + (e + 1) * 2 * F * D, S(0));
    std::fill(grad_down + e * D * F, grad_down + (e + 1) * D * F, S(0));
  }
  sum_over_experts<S>(z, B * (2 * D + 4 * F + 3), grad_x, [&](int64_t e, S* scratch, S* rows) {
    S *input = scratch, *g = input + B * D, *grad_hidden = g + B * D, *hidden = grad_hidden + B * F, *grad_act = hidden + B * F;
    S *weight = grad_act + B * 2 * F, *ones = weight + B, *dot = ones + B;
    std::fill(ones, ones + B, S(1));
    for (int64_t first = z.starts[e], n; first < z.starts[e + 1]; first += n) {
      n = z.next_block(e, first);
      const bool add = first != z.starts[e];
      const int32_t* order = z.order + first;
      for (int64_t r = 0; r < n; ++r) weight[r] = z.weights[order[r]];
      gather<S>(z, grad, order, n, nullptr, g);
      gather<S>(z, z.x, order, n, z.on_input ? weight : nullptr, input);
      product(z.threads, false, false, n, F, D, g, z.down + e * D * F, false, grad_hidden);
      swiglu_backward<S>(z, act + first * 2 * F, z.on_input ? ones : weight, grad_hidden, n, hidden, grad_act, dot);
      product(z.threads, true, false, D, F, n, g, hidden, add, grad_down + e * D * F);
      product(z.threads, true, false, 2 * F, D, n, grad_act, input, add, grad_gate_up + e * 2 * F * D);
      S* out = rows + (first - z.starts[e]) * D;
      product(z.threads, false, false, n, D, 2 * F, grad_act, z.gate_up + e * 2 * F * D, false, out);
      if (z.on_input) input_weights<S>(z, order, n, weight, out, dot);
      for (int64_t r = 0; r < n; ++r) grad_weights[order[r]] = dot[r];
    }
  });
}

}  // namespace

// The face for ctypes. Every pointer is to a contiguous array; the caller has checked shapes and that N fits in 31 bits.
extern "C" {

// Counting sort of the slots by expert, stable: order [N] (the used slots first), starts [E + 1], place [N].
void moe_plan(const int64_t* ids, int64_t N, int64_t E, int32_t* order, int32_t* starts, int32_t* place) {
  const auto real = [&](int64_t slot) { return ids[slot] >= 0 && ids[slot] < E; };
  std::fill(starts, starts + E + 1, 0);
  for (int64_t slot = 0; slot < N; ++slot)
    if (real(slot)) ++starts[ids[slot] + 1];
  std::partial_sum(starts, starts + E + 1, starts);
  std::vector<int32_t> next(starts, starts + E);
  for (int64_t slot = 0; slot < N; ++slot) {
    place[slot] = real(slot) ? next[ids[slot]]++ : -1;
    if (real(slot)) order[place[slot]] = slot;
  }
}

#define MOE_LAYER(S)                                                                                                                  \
  const Layer<S> z { threads, T, K, E, D, F, on_input, limit, alpha, offset, x, weights, gate_up, down, order, starts, place }
#define MOE_ARGUMENTS(S)                                                                                                              \
  int64_t threads, int64_t T, int64_t K, int64_t E, int64_t D, int64_t F, bool on_input, double limit, double alpha, double offset, const S *x, const S *weights,    \
      const S *gate_up, const S *down, const int32_t *order, const int32_t *starts, const int32_t *place
#define MOE_FACE(S, name)                                                                                                             \
  void moe_forward_##name(MOE_ARGUMENTS(S), S* act, S* y) {                                                                             \
    MOE_LAYER(S);                                                                                                                     \
    forward<S>(z, act, y);                                                                                                            \
  }                                                                                                                                   \
  void moe_backward_##name(MOE_ARGUMENTS(S), const S* grad, const S* act, S* grad_x, S* grad_weights, S* grad_gate_up, S* grad_down) {  \
    MOE_LAYER(S);                                                                                                                     \
    backward<S>(z, grad, act, grad_x, grad_weights, grad_gate_up, grad_down);                                                           \
  }
MOE_FACE(float, f32)
MOE_FACE(double, f64)
}
