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
#include <vector>

#include "products.h"
#include "row_statistics.h"
#include "top_k.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace {

constexpr int64_t kScratch = int64_t(512) << 10;  // bytes of one block of rows between the products: half of a core's second-level cache
constexpr int64_t kWave = int64_t(8) << 20;  // bytes of experts' outputs that wait to be added up by token: they stay in the last-level cache

// One layer's problem. Letters as above; `threads` is torch's number of threads.
template <typename S>
struct Layer {
  int64_t threads, T, K, E, D, F;
  bool on_input;  // the weight multiplies the expert's input, not its output
  double limit, alpha, offset;  // hidden = g sigmoid(alpha g) (u + offset), g = min(gate, limit), u = up within -limit and limit
  const S *x, *weights, *gate_up, *down;
  const int32_t *order, *starts, *place;

  int64_t rows(int64_t e) const { return starts[e + 1] - starts[e]; }

  // The weights of expert e, for products to ask for ahead of their use.
  Ahead into(int64_t e) const { return {gate_up + e * 2 * F * D, int64_t(2 * F * D * sizeof(S))}; }
  Ahead out_of(int64_t e) const { return {down + e * D * F, int64_t(D * F * sizeof(S))}; }

  // Rows of one block, at most: as many as keep its scratch in kScratch.
  int64_t block() const { return std::clamp<int64_t>(kScratch / int64_t((2 * D + 4 * F + 3) * sizeof(S)), 64, 256); }

  // Rows of the block of expert e that begins at row `first`: the rows that are left, in equal parts.
  int64_t next_block(int64_t e, int64_t first) const {
    const int64_t left = starts[e + 1] - first, parts = (left + block() - 1) / block();
    return (left + parts - 1) / parts;
  }
};

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

// Run `work(expert, next, scratch)` for the experts of [begin, end) that have rows. One that has more than a thread's share runs alone, with all threads inside
// its products; the others are dealt out, largest first, and `next` is the one that is probably this thread's next (its own number at the end). Which thread takes an expert changes nothing in its result.
template <typename S, typename Work>
void for_experts(const Layer<S>& z, int64_t begin, int64_t end, int64_t scratch_size, const Work& work) {
  const int64_t used = z.starts[end] - z.starts[begin];
  std::vector<int64_t> shared, alone;
  for (int64_t e = begin; e < end; ++e)
    if (z.rows(e)) (z.threads > 1 && z.rows(e) * z.threads > used + z.block() ? alone : shared).push_back(e);
  std::stable_sort(shared.begin(), shared.end(), [&](int64_t a, int64_t b) { return z.rows(a) > z.rows(b); });
  if (!alone.empty()) {
    std::unique_ptr<S[]> scratch(new S[scratch_size]);
    for (const int64_t e : alone) work(e, e, scratch.get());
  }
  std::atomic<size_t> next{0};
  const int crew = std::min<int64_t>(z.threads, shared.size());
  if (crew == 0) return;
#pragma omp parallel num_threads(crew)
  {
    std::unique_ptr<S[]> scratch(new S[scratch_size]);
    for (size_t turn = next++; turn < shared.size(); turn = next++)
      work(shared[turn], shared[std::min(turn + crew, shared.size() - 1)], scratch.get());
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

// out [T, D] = the sum over experts of what `work(expert, next, scratch, rows)` writes to rows [rows of the expert, D].
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
                   [&](int64_t e, int64_t next, S* scratch) { work(e, next, scratch, rows.get() + (z.starts[e] - first) * z.D); });
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
  sum_over_experts<S>(z, B * (D + F + 2) + (act == nullptr ? B * 2 * F : 0), y, [&](int64_t e, int64_t next, S* scratch, S* rows) {
    S *input = scratch, *hidden = input + B * D, *weight = hidden + B * F, *ones = weight + B, *own = ones + B;
    std::fill(ones, ones + B, S(1));
    for (int64_t first = z.starts[e], n; first < z.starts[e + 1]; first += n) {
      n = z.next_block(e, first);
      const bool last = first + n == z.starts[e + 1];
      const int32_t* order = z.order + first;
      for (int64_t r = 0; r < n; ++r) weight[r] = z.weights[order[r]];
      S* a = act == nullptr ? own : act + first * 2 * F;
      gather<S>(z, z.x, order, n, z.on_input ? weight : nullptr, input);
      product(z.threads, false, true, n, 2 * F, D, input, z.gate_up + e * 2 * F * D, false, a, last ? z.into(next) : Ahead{});
      swiglu<S>(z, a, z.on_input ? ones : weight, n, hidden);
      product(z.threads, false, true, n, D, F, hidden, z.down + e * D * F, false, rows + (first - z.starts[e]) * D,
              last ? z.out_of(next) : Ahead{});
    }
  });
}

// The sum of squares of `n` numbers, in an order that depends on `n` alone.
template <typename S>
double sum_of_squares(const S* values, int64_t n) {
  constexpr int64_t W = Simd<S>::lanes, kPart = 4096;
  double total = 0;
  for (int64_t first = 0; first < n; first += kPart) {
    const int64_t end = std::min(n, first + kPart);
    Vector<S> sums[4] = {};  // as many as hide how long an addition takes
    int64_t i = first;
    for (; i + 4 * W <= end; i += 4 * W)
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) sums[j] += load(values + i + j * W) * load(values + i + j * W);
    const Vector<S> sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    for (int64_t lane = 0; lane < W; ++lane) total += sum[lane];
    for (; i < end; ++i) total += double(values[i]) * values[i];
  }
  return total;
}

// Gradients of x [T, D], weights [N], gate_up and down from `grad` [T, D] and the `act` of the forward pass; squares [2]: the sums of squares of the last
// two, added up while an expert's are in cache.
template <typename S>
void backward(const Layer<S>& z, const S* grad, const S* act, S* grad_x, S* grad_weights, S* grad_gate_up, S* grad_down, double* squares) {
  const int64_t B = z.block(), D = z.D, F = z.F;
  std::vector<std::array<double, 2>> squares_of(z.E);
  std::fill(grad_weights, grad_weights + z.T * z.K, S(0));
  advise(grad_gate_up, z.E * 2 * F * D);
  advise(grad_down, z.E * D * F);
  for (int64_t e = 0; e < z.E; ++e) {
    if (z.rows(e)) continue;
    std::fill(grad_gate_up + e * 2 * F * D, grad_gate_up + (e + 1) * 2 * F * D, S(0));
    std::fill(grad_down + e * D * F, grad_down + (e + 1) * D * F, S(0));
  }
  sum_over_experts<S>(z, B * (2 * D + 4 * F + 3), grad_x, [&](int64_t e, int64_t next, S* scratch, S* rows) {
    S *input = scratch, *g = input + B * D, *grad_hidden = g + B * D, *hidden = grad_hidden + B * F, *grad_act = hidden + B * F;
    S *weight = grad_act + B * 2 * F, *ones = weight + B, *dot = ones + B;
    std::fill(ones, ones + B, S(1));
    for (int64_t first = z.starts[e], n; first < z.starts[e + 1]; first += n) {
      n = z.next_block(e, first);
      const bool add = first != z.starts[e], last = first + n == z.starts[e + 1];
      const auto fresh = [&](S* gradient, Ahead like) { return n == z.rows(e) ? Ahead{gradient, like.bytes} : Ahead{}; };
      const int32_t* order = z.order + first;
      for (int64_t r = 0; r < n; ++r) weight[r] = z.weights[order[r]];
      gather<S>(z, grad, order, n, nullptr, g);
      gather<S>(z, z.x, order, n, z.on_input ? weight : nullptr, input);
      product(z.threads, false, false, n, F, D, g, z.down + e * D * F, false, grad_hidden, fresh(grad_down + e * D * F, z.out_of(e)));
      swiglu_backward<S>(z, act + first * 2 * F, z.on_input ? ones : weight, grad_hidden, n, hidden, grad_act, dot);
      product(z.threads, true, false, D, F, n, g, hidden, add, grad_down + e * D * F, fresh(grad_gate_up + e * 2 * F * D, z.into(e)));
      product(z.threads, true, false, 2 * F, D, n, grad_act, input, add, grad_gate_up + e * 2 * F * D, add ? Ahead{} : z.into(e));
      S* out = rows + (first - z.starts[e]) * D;
      product(z.threads, false, false, n, D, 2 * F, grad_act, z.gate_up + e * 2 * F * D, false, out, last ? z.out_of(next) : Ahead{});
      if (z.on_input) input_weights<S>(z, order, n, weight, out, dot);
      for (int64_t r = 0; r < n; ++r) grad_weights[order[r]] = dot[r];
    }
    squares_of[e] = {sum_of_squares(grad_gate_up + e * 2 * F * D, 2 * F * D), sum_of_squares(grad_down + e * D * F, D * F)};
  });
  squares[0] = squares[1] = 0;
  for (const auto& [into, out_of] : squares_of) {
    squares[0] += into;
    squares[1] += out_of;
  }
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

#define MOE_ROUTER(S, name)                                                                                                           \
  void moe_product_##name(int64_t threads, bool ta, bool tb, int64_t m, int64_t n, int64_t depth, const S* a, const S* b, S* c) {       \
    product<S>(threads, ta, tb, m, n, depth, a, b, false, c);                                                                         \
  }                                                                                                                                   \
  void moe_top_k_##name(int64_t threads, int64_t rows, int64_t E, int64_t K, const S* values, int64_t* ids) {                           \
    top_k<S>(threads, rows, E, K, values, ids);                                                                                       \
  }                                                                                                                                   \
  void moe_entropy_and_spread_##name(int64_t threads, int64_t rows, int64_t E, const S* scores, const S* values, S* entropy, S* spread) { \
    entropy_and_spread<S>(threads, rows, E, scores, values, entropy, spread);                                                           \
  }
MOE_ROUTER(float, f32)
MOE_ROUTER(double, f64)

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
  void moe_backward_##name(MOE_ARGUMENTS(S), const S* grad, const S* act, S* grad_x, S* grad_weights, S* grad_gate_up, S* grad_down, double* squares) {  \
    MOE_LAYER(S);                                                                                                                     \
    backward<S>(z, grad, act, grad_x, grad_weights, grad_gate_up, grad_down, squares);                                                  \
  }
MOE_FACE(float, f32)
MOE_FACE(double, f64)
}
