// Linear layers with int8 weights for bfloat16 inputs. A decode step reads every weight once, at the memory's rate; a chunk of a
// prompt runs at the bfloat16 rate.
//
// Weights are laid out in blocks of 64 outputs, (blocks, pairs of inputs, 64, 2), so that a thread reads one stream. They are
// widened to bfloat16, which holds every int8 exactly, a piece at a time in the first-level cache, where the piece serves all
// tokens. Products are summed in float32 and scaled at the end, one scale an output.
#include <ATen/core/Tensor.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "kernels.h"
#include "vectors.h"

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

constexpr int64_t VECTORS = 4;                // of outputs, computed together: with 6 tokens they fill the registers
constexpr int64_t TOKENS = 6;
constexpr int64_t BLOCK = VECTORS * LANES;    // outputs
constexpr int64_t PANEL = 64 * TOKENS;        // tokens whose sums are kept at a time
constexpr int64_t FEW = 64;                   // tokens up to which reading weights counts for more than storing sums
constexpr int64_t SHORT = 32, LONG = 128;     // pairs of inputs of a piece, for few and for many tokens
constexpr int64_t AHEAD = 4096;               // bytes that are fetched from memory ahead of their use

struct alignas(64) Sums {
  float of[BLOCK];
};

#ifdef __AVX512BF16__
struct Weights {
  __m512bh pairs;
};
typedef __m512bh Inputs;

// Two inputs of 16 outputs, from 32 bytes.
inline Weights widen(const int8_t* from) {
  const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from) + 1);
  return {_mm512_cvtne2ps_pbh(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(high)), _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(low)))};
}

inline Inputs two_inputs(const c10::BFloat16* x) {
  int32_t both;
  std::memcpy(&both, x, sizeof(both));
  return (Inputs)_mm512_set1_epi32(both);
}

inline Vector add_products(Vector sum, const Weights& w, const Inputs& x) {
  return (Vector)_mm512_dpbf16_ps((__m512)sum, w.pairs, x);
}
#else
struct Weights {
  Vector first, second;
};
struct Inputs {
  float first, second;
};

inline Weights widen(const int8_t* from) {
  typedef int16_t Pairs __attribute__((vector_size(LANES * sizeof(int16_t)), aligned(1)));
  const Whole pairs = __builtin_convertvector(*reinterpret_cast<const Pairs*>(from), Whole);
  return {__builtin_convertvector((pairs << 24) >> 24, Vector), __builtin_convertvector(pairs >> 8, Vector)};
}

inline Inputs two_inputs(const c10::BFloat16* x) { return {static_cast<float>(x[0]), static_cast<float>(x[1])}; }

inline Vector add_products(Vector sum, const Weights& w, const Inputs& x) { return sum + w.first * x.first + w.second * x.second; }
#endif

// A piece of a block, for COUNT tokens: x (COUNT, pairs * 2) of rows `stride` apart.
template <int64_t COUNT>
void multiply(const Weights* piece, int64_t pairs, const c10::BFloat16* x, int64_t stride, Sums* sums, bool first) {
  Vector acc[COUNT][VECTORS];
#pragma GCC unroll 8
  for (int64_t n = 0; n < COUNT; ++n)
#pragma GCC unroll 8
    for (int64_t v = 0; v < VECTORS; ++v) acc[n][v] = first ? Vector{} : load(sums[n].of + v * LANES);
  for (int64_t p = 0; p < pairs; ++p)
#pragma GCC unroll 8
    for (int64_t n = 0; n < COUNT; ++n) {
      const Inputs two = two_inputs(x + n * stride + 2 * p);
#pragma GCC unroll 8
      for (int64_t v = 0; v < VECTORS; ++v) acc[n][v] = add_products(acc[n][v], piece[p * VECTORS + v], two);
    }
#pragma GCC unroll 8
  for (int64_t n = 0; n < COUNT; ++n)
#pragma GCC unroll 8
    for (int64_t v = 0; v < VECTORS; ++v) store(sums[n].of + v * LANES, acc[n][v]);
}

template <int64_t COUNT = TOKENS, typename... Arguments>
void multiply_up_to(int64_t count, Arguments... arguments) {
  if (count == COUNT) return multiply<COUNT>(arguments...);
  if constexpr (COUNT > 1) multiply_up_to<COUNT - 1>(count, arguments...);
}

// One block for up to PANEL tokens.
void multiply_block(const int8_t* weights, int64_t pairs, const c10::BFloat16* x, int64_t tokens, Weights* piece, Sums* sums) {
  const int64_t length = tokens <= FEW ? SHORT : LONG;
  for (int64_t begin = 0; begin < pairs; begin += length) {
    const int64_t count = std::min(length, pairs - begin);
    const int8_t* from = weights + begin * 2 * BLOCK;
    for (int64_t i = 0; i < count * VECTORS; ++i, from += 2 * LANES) {
      __builtin_prefetch(from + AHEAD, 0, 3);
      piece[i] = widen(from);
    }
    for (int64_t n = 0; n < tokens; n += TOKENS)
      multiply_up_to(std::min(TOKENS, tokens - n), piece, count, x + n * 2 * pairs + 2 * begin, 2 * pairs, sums + n, begin == 0);
  }
}

}  // namespace

// x (..., inputs) bfloat16; weights (blocks, pairs, 64, 2) int8 and scales (blocks * 64) float32, both filled up with zeros
// -> (..., outputs) bfloat16.
at::Tensor int8_linear(const at::Tensor& input, const at::Tensor& weights, const at::Tensor& scales, int64_t outputs) {
  const int64_t blocks = weights.size(0), pairs = weights.size(1), inputs = input.size(-1);
  TORCH_CHECK(input.scalar_type() == at::kBFloat16 && weights.scalar_type() == at::kChar && scales.scalar_type() == at::kFloat);
  TORCH_CHECK(weights.is_contiguous() && weights.size(2) == BLOCK && scales.is_contiguous() && scales.numel() == blocks * BLOCK);
  TORCH_CHECK((inputs + 1) / 2 == pairs && (outputs + BLOCK - 1) / BLOCK == blocks);
  const at::Tensor x = (inputs % 2 ? at::constant_pad_nd(input, {0, 1}) : input).contiguous();
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = outputs;
  at::Tensor out = at::empty(shape, x.options());
  const int64_t tokens = x.numel() / (2 * pairs);
  const c10::BFloat16* from = x.const_data_ptr<c10::BFloat16>();
  const int8_t* weight = weights.const_data_ptr<int8_t>();
  const float* scale = scales.const_data_ptr<float>();
  c10::BFloat16* to = out.data_ptr<c10::BFloat16>();
#pragma omp parallel
  {
    std::vector<Sums> sums(std::min(tokens, PANEL));
    alignas(64) Weights piece[LONG * VECTORS];
#pragma omp for schedule(static)
    for (int64_t b = 0; b < blocks; ++b)
      for (int64_t begin = 0; begin < tokens; begin += PANEL) {
        const int64_t count = std::min(PANEL, tokens - begin);
        multiply_block(weight + b * pairs * 2 * BLOCK, pairs, from + begin * 2 * pairs, count, piece, sums.data());
        for (int64_t n = 0; n < count; ++n) {
          float* sum = sums[n].of;
          for (int64_t v = 0; v < BLOCK; v += LANES) store(sum + v, load(sum + v) * load(scale + b * BLOCK + v));
          from_float(sum, to + (begin + n) * outputs + b * BLOCK, std::min(BLOCK, outputs - b * BLOCK));
        }
      }
  }
  return out;
}

TORCH_LIBRARY_FRAGMENT(yoco_u, m) {
  m.def("int8_linear(Tensor x, Tensor weights, Tensor scales, int outputs) -> Tensor");
}

TORCH_LIBRARY_IMPL(yoco_u, CPU, m) { m.impl("int8_linear", &int8_linear); }
