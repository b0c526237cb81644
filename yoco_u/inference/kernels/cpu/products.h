// Products of rows with a piece of bfloat16 or int8 weights in the first-level cache, of which all matrix products of the
// kernels consist. Rows are bfloat16 where the CPU multiplies that, and floats elsewhere.
#pragma once

#include <c10/util/BFloat16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "vectors.h"

constexpr int64_t BLOCK = 64;               // outputs of a block
constexpr int64_t VECTORS = BLOCK / LANES;  // vectors of outputs of a block
constexpr int64_t LINE = 64;                // bytes of a cache line
constexpr int64_t TOKENS = 6;               // most tokens that are computed together
#ifdef __AVX512F__
constexpr int64_t SUMS = 24;  // vectors of sums that fill 32 registers, with what is added to them
#else
constexpr int64_t SUMS = 12;  // 16 registers
#endif

// How many vectors of outputs are computed together, for so many tokens.
constexpr int64_t abreast(int64_t tokens) {
  int64_t count = VECTORS;
  while (count * tokens > SUMS) count /= 2;
  return count;
}

struct alignas(64) Sums {
  float of[BLOCK];
};

#ifdef __AVX512BF16__
typedef c10::BFloat16 Input;
struct Weights {
  __m512bh pairs;
};
typedef __m512bh Inputs;

inline Weights widen(const Weights* from) { return *from; }

// The weights of two inputs and LANES outputs.
inline Weights widen(const c10::BFloat16* from) { return {(__m512bh)_mm512_loadu_si512(from)}; }

inline Weights widen(const int8_t* from) {
  const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from) + 1);
  return {_mm512_cvtne2ps_pbh(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(high)), _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(low)))};
}

inline void copy_inputs(const c10::BFloat16* from, Input* to, int64_t n) { std::memcpy(to, from, n * sizeof(Input)); }

inline Inputs two_inputs(const Input* x) {
  int32_t both;
  std::memcpy(&both, x, sizeof(both));
  return (Inputs)_mm512_set1_epi32(both);
}

inline Vector add_products(Vector sum, const Weights& w, const Inputs& x) {
  return (Vector)_mm512_dpbf16_ps((__m512)sum, w.pairs, x);
}
#else
typedef float Input;
struct Weights {
  Vector first, second;
};
struct Inputs {
  float first, second;
};

inline Weights widen(const Weights* from) { return *from; }

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

inline void copy_inputs(const c10::BFloat16* from, Input* to, int64_t n) { to_float(from, to, n, 1.0f); }

inline Inputs two_inputs(const Input* x) { return {x[0], x[1]}; }

inline Vector add_products(Vector sum, const Weights& w, const Inputs& x) {
  return sum + w.first * x.first + w.second * x.second;
}
#endif

inline at::Tensor as_inputs(const at::Tensor& x) { return x.to(c10::CppTypeToScalarType<Input>::value); }

// Multiplies COUNT tokens by a piece of weights, which lie there as they are in memory or widened: sums (+)= x (COUNT, pairs *
// 2), whose rows are `stride` apart. For each pair, `lines` cache lines from `ahead` on are prefetched, so that the memory
// works during the products.
template <int64_t COUNT, typename Piece>
inline void multiply(const Piece* piece, int64_t pairs, const Input* x, int64_t stride, Sums* sums, bool first,
                     const char* ahead, int64_t lines) {
  constexpr int64_t ABREAST = abreast(COUNT), STEP = std::is_same_v<Piece, Weights> ? 1 : 2 * LANES;
  for (int64_t part = 0; part < VECTORS; part += ABREAST, lines = 0) {
    Vector acc[COUNT][ABREAST];
#pragma GCC unroll 8
    for (int64_t n = 0; n < COUNT; ++n)
#pragma GCC unroll 8
      for (int64_t v = 0; v < ABREAST; ++v) acc[n][v] = first ? Vector{} : load(sums[n].of + (part + v) * LANES);
    for (int64_t p = 0; p < pairs; ++p) {
      for (int64_t l = 0; l < lines; ++l, ahead += LINE) __builtin_prefetch(ahead, 0, 3);
      const Piece* from = piece + (p * VECTORS + part) * STEP;
      Weights wide[ABREAST];
#pragma GCC unroll 8
      for (int64_t v = 0; v < ABREAST; ++v) wide[v] = widen(from + v * STEP);
#pragma GCC unroll 8
      for (int64_t n = 0; n < COUNT; ++n) {
        const Inputs two = two_inputs(x + n * stride + 2 * p);
#pragma GCC unroll 8
        for (int64_t v = 0; v < ABREAST; ++v) acc[n][v] = add_products(acc[n][v], wide[v], two);
      }
    }
#pragma GCC unroll 8
    for (int64_t n = 0; n < COUNT; ++n)
#pragma GCC unroll 8
      for (int64_t v = 0; v < ABREAST; ++v) store(sums[n].of + (part + v) * LANES, acc[n][v]);
  }
}

template <int64_t COUNT = TOKENS, typename... Arguments>
inline void multiply_up_to(int64_t count, Arguments... arguments) {
  if (count == COUNT) return multiply<COUNT>(arguments...);
  if constexpr (COUNT > 1) multiply_up_to<COUNT - 1>(count, arguments...);
}
