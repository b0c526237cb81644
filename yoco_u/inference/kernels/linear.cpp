// A linear layer whose bfloat16 weights stay as they are, for an LM head that is the embedding as well: packing it would keep
// it twice. Few tokens read every weight once, at the memory's rate; many are left to torch.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <omp.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "vectors.h"

namespace {

constexpr int64_t MOST = 32;        // tokens that are few
constexpr int64_t ROWS = 4;         // outputs computed together
constexpr int64_t STEP = 2 * LANES;  // inputs of a vector

#ifdef __AVX512BF16__
// Products of M tokens, `inputs` apart, with R rows of weights, into `out` with `outputs` between tokens.
template <int64_t M, int64_t R>
inline void products(const c10::BFloat16* x, const c10::BFloat16* weights, int64_t inputs, float* out, int64_t outputs) {
  __m512 parts[M][R];
#pragma GCC unroll 8
  for (int64_t m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int64_t r = 0; r < R; ++r) parts[m][r] = _mm512_setzero_ps();
  for (int64_t i = 0; i < inputs; i += STEP) {
    __m512bh row[R];
#pragma GCC unroll 4
    for (int64_t r = 0; r < R; ++r) {
      row[r] = (__m512bh)_mm512_loadu_si512(weights + r * inputs + i);
      __builtin_prefetch(weights + (ROWS + r) * inputs + i, 0, 3);
    }
#pragma GCC unroll 8
    for (int64_t m = 0; m < M; ++m) {
      const auto token = (__m512bh)_mm512_loadu_si512(x + m * inputs + i);
#pragma GCC unroll 4
      for (int64_t r = 0; r < R; ++r) parts[m][r] = _mm512_dpbf16_ps(parts[m][r], token, row[r]);
    }
  }
  for (int64_t m = 0; m < M; ++m)
    for (int64_t r = 0; r < R; ++r) out[m * outputs + r] = _mm512_reduce_add_ps(parts[m][r]);
}

// The same for any number of tokens and up to ROWS rows.
void products(const c10::BFloat16* x, int64_t tokens, const c10::BFloat16* weights, int64_t rows, int64_t inputs, float* out) {
  int64_t m = 0;
  for (; m + 8 <= tokens; m += 8)
    for (int64_t r = 0; r < rows; r += 2) {
      const auto from = weights + r * inputs;
      float* to = out + m * ROWS + r;
      r + 2 <= rows ? products<8, 2>(x + m * inputs, from, inputs, to, ROWS) : products<8, 1>(x + m * inputs, from, inputs, to, ROWS);
    }
  for (; m < tokens; ++m) {
    if (rows == ROWS) products<1, ROWS>(x + m * inputs, weights, inputs, out + m * ROWS, ROWS);
    else
      for (int64_t r = 0; r < rows; ++r) products<1, 1>(x + m * inputs, weights + r * inputs, inputs, out + m * ROWS + r, ROWS);
  }
}

at::Tensor few_tokens(const at::Tensor& x, const at::Tensor& weight) {
  const int64_t tokens = x.numel() / x.size(-1), inputs = weight.size(1), outputs = weight.size(0);
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = outputs;
  at::Tensor out = at::empty(shape, x.options());
  const auto from = x.const_data_ptr<c10::BFloat16>(), weights = weight.const_data_ptr<c10::BFloat16>();
  auto to = out.mutable_data_ptr<c10::BFloat16>();
  const int64_t groups = (outputs + ROWS - 1) / ROWS;
#pragma omp parallel
  {
    std::vector<float> sums(tokens * ROWS);
    const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
    for (int64_t group = groups * thread / threads; group < groups * (thread + 1) / threads; ++group) {
      const int64_t first = group * ROWS, rows = std::min(ROWS, outputs - first);
      products(from, tokens, weights + first * inputs, rows, inputs, sums.data());
      for (int64_t m = 0; m < tokens; ++m) from_float(sums.data() + m * ROWS, to + m * outputs + first, rows);
    }
  }
  return out;
}
#endif

// x (..., inputs) and weight (outputs, inputs), bfloat16. Sums in float32.
at::Tensor linear(const at::Tensor& input, const at::Tensor& weight) {
#ifdef __AVX512BF16__
  if (input.numel() <= MOST * input.size(-1) && input.numel() && input.size(-1) % STEP == 0 && weight.is_contiguous())
    return few_tokens(input.contiguous(), weight);
#endif
  return at::linear(input, weight);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(yoco_u, m) { m.def("linear(Tensor x, Tensor weight) -> Tensor"); }

TORCH_LIBRARY_IMPL(yoco_u, CPU, m) { m.impl("linear", &linear); }
