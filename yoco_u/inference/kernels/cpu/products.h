// Products of bfloat16 rows with a piece of weights in the first-level cache, of which all matrix products of the kernels
// consist.
#pragma once

#include <c10/util/BFloat16.h>

#include <cstdint>
#include <cstring>

#include "vectors.h"

constexpr int64_t VECTORS = 4;              // vectors of outputs that are computed together
constexpr int64_t TOKENS = 6;               // tokens that are computed together: 4 x 6 sums fill the registers
constexpr int64_t BLOCK = VECTORS * LANES;  // outputs of a block
constexpr int64_t LINE = 64;                // bytes of a cache line

struct alignas(64) Sums {
  float of[BLOCK];
};

#ifdef __AVX512BF16__
struct Weights {
  __m512bh pairs;
};
typedef __m512bh Inputs;

// The weights of two inputs and 16 outputs.
inline Weights widen(const c10::BFloat16* from) { return {(__m512bh)_mm512_loadu_si512(from)}; }

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

inline Weights widen(const c10::BFloat16* from) {
  typedef uint32_t Bits __attribute__((vector_size(LANES * sizeof(uint32_t)), aligned(2), may_alias));
  const Bits pairs = *reinterpret_cast<const Bits*>(from);
  return {(Vector)(pairs << 16), (Vector)(pairs & 0xffff0000u)};
}

inline Weights widen(const int8_t* from) {
  typedef int16_t Pairs __attribute__((vector_size(LANES * sizeof(int16_t)), aligned(1), may_alias));
  const Whole pairs = __builtin_convertvector(*reinterpret_cast<const Pairs*>(from), Whole);
  return {__builtin_convertvector((pairs << 24) >> 24, Vector), __builtin_convertvector(pairs >> 8, Vector)};
}

inline Inputs two_inputs(const c10::BFloat16* x) { return {static_cast<float>(x[0]), static_cast<float>(x[1])}; }

inline Vector add_products(Vector sum, const Weights& w, const Inputs& x) {
  return sum + w.first * x.first + w.second * x.second;
}
#endif

// Multiplies COUNT tokens by a piece of weights: sums (+)= x (COUNT, pairs * 2), whose rows are `stride` apart. For each pair,
// `lines` cache lines from `ahead` on are prefetched, so that the memory works during the products.
template <int64_t COUNT>
inline void multiply(const Weights* piece, int64_t pairs, const c10::BFloat16* x, int64_t stride, Sums* sums, bool first,
                     const char* ahead, int64_t lines) {
  Vector acc[COUNT][VECTORS];
#pragma GCC unroll 8
  for (int64_t n = 0; n < COUNT; ++n)
#pragma GCC unroll 8
    for (int64_t v = 0; v < VECTORS; ++v) acc[n][v] = first ? Vector{} : load(sums[n].of + v * LANES);
  for (int64_t p = 0; p < pairs; ++p) {
    for (int64_t l = 0; l < lines; ++l, ahead += LINE) __builtin_prefetch(ahead, 0, 3);
#pragma GCC unroll 8
    for (int64_t n = 0; n < COUNT; ++n) {
      const Inputs two = two_inputs(x + n * stride + 2 * p);
#pragma GCC unroll 8
      for (int64_t v = 0; v < VECTORS; ++v) acc[n][v] = add_products(acc[n][v], piece[p * VECTORS + v], two);
    }
  }
#pragma GCC unroll 8
  for (int64_t n = 0; n < COUNT; ++n)
#pragma GCC unroll 8
    for (int64_t v = 0; v < VECTORS; ++v) store(sums[n].of + v * LANES, acc[n][v]);
}

template <int64_t COUNT = TOKENS, typename... Arguments>
inline void multiply_up_to(int64_t count, Arguments... arguments) {
  if (count == COUNT) return multiply<COUNT>(arguments...);
  if constexpr (COUNT > 1) multiply_up_to<COUNT - 1>(count, arguments...);
}
