// Vectors of floats, as many as a register of the CPU holds, by the vector extensions of GCC and clang.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/BFloat16.h>

#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

// The compiler takes apart vectors that are longer than a register, which costs ten times what they are for.
#if defined(__AVX512F__)
constexpr int64_t LANES = 16;
#elif defined(__AVX__)
constexpr int64_t LANES = 8;
#else
constexpr int64_t LANES = 4;
#endif

typedef float Vector __attribute__((vector_size(LANES * sizeof(float)), aligned(4)));
typedef int32_t Whole __attribute__((vector_size(LANES * sizeof(int32_t))));

typedef std::make_index_sequence<LANES> Lanes;

template <size_t... LANE>
constexpr Whole numbered(std::index_sequence<LANE...>) {
  return Whole{static_cast<int32_t>(LANE)...};
}

constexpr Whole ORDER = numbered(Lanes());  // 0, 1, 2 ...

inline Vector load(const float* from) { return *reinterpret_cast<const Vector*>(from); }
inline void store(float* to, Vector x) { *reinterpret_cast<Vector*>(to) = x; }

// An array of floats that begins at a cache line, so that no vector lies across two lines, which would cost two loads.
class Floats {
 public:
  explicit Floats(int64_t count) : lines_((count + LANES - 1) / LANES) {}
  float* data() { return reinterpret_cast<float*>(lines_.data()); }

 private:
  struct alignas(LANES * sizeof(float)) Line {
    float values[LANES] = {};
  };
  std::vector<Line> lines_;
};

inline void to_float(const float* from, float* to, int64_t n, float) { std::memcpy(to, from, n * sizeof(float)); }

// LANES elements as floats; int8 times its scale.
inline Vector wide(const float* from, float) { return load(from); }

inline Vector wide(const c10::BFloat16* from, float) {
  typedef uint16_t Bits __attribute__((vector_size(LANES * sizeof(uint16_t)), aligned(2), may_alias));
  typedef uint32_t Wide __attribute__((vector_size(LANES * sizeof(uint32_t))));
#ifdef __AVX512F__  // one instruction, which GCC does not choose by itself
  const Wide bits = (Wide)_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#else
  const Wide bits = __builtin_convertvector(*reinterpret_cast<const Bits*>(from), Wide);
#endif
  return (Vector)(bits << 16);
}

inline Vector wide(const int8_t* from, float scale) {
  typedef int8_t Bytes __attribute__((vector_size(LANES), aligned(1)));
  return scale * __builtin_convertvector(__builtin_convertvector(*reinterpret_cast<const Bytes*>(from), Whole), Vector);
}

inline void to_float(const c10::BFloat16* from, float* to, int64_t n, float) {
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) store(to + i, wide(from + i, 1.0f));
  for (; i < n; ++i) to[i] = static_cast<float>(from[i]);
}

inline void from_float(const float* from, float* to, int64_t n) { std::memcpy(to, from, n * sizeof(float)); }

// Vector types that read memory as the bits of another type are `may_alias`, here and in products.h. Without it, the compiler
// may assume that such a read does not see what was written before as floats, and move it ahead of the write.
inline void from_float(const float* from, c10::BFloat16* to, int64_t n) {
  typedef uint32_t Wide __attribute__((vector_size(LANES * sizeof(uint32_t)), aligned(4), may_alias));
  typedef uint16_t Bits __attribute__((vector_size(LANES * sizeof(uint16_t)), aligned(2), may_alias));
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) {
    const Wide bits = *reinterpret_cast<const Wide*>(from + i);
    const Wide rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
    const Wide nan = (bits & 0x7fffffff) > 0x7f800000 ? Wide{} + 0x7fc0 : rounded;
    *reinterpret_cast<Bits*>(to + i) = __builtin_convertvector(nan, Bits);
  }
  for (; i < n; ++i) to[i] = static_cast<c10::BFloat16>(from[i]);
}

inline void to_float(const int8_t* from, float* to, int64_t n, float scale) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) to[i] = scale * static_cast<float>(from[i]);
}

// The lanes whose numbers differ by STEP change places.
template <size_t STEP, size_t... LANE>
inline Vector swapped(Vector x, std::index_sequence<LANE...>) {
  return __builtin_shufflevector(x, x, (LANE ^ STEP)...);
}

template <size_t STEP = LANES / 2, typename Join>
inline float fold(Vector x, Join join) {
  x = join(x, swapped<STEP>(x, Lanes()));
  if constexpr (STEP > 1) return fold<STEP / 2>(x, join);
  return x[0];
}

inline Vector larger(Vector a, Vector b) { return a > b ? a : b; }

inline float largest(Vector x) { return fold(x, larger); }

inline float sum_of(Vector x) {
  return fold(x, [](Vector a, Vector b) { return a + b; });
}

// e^x for x <= 0, to about 1e-7 relative: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2]. NaN stays NaN.
inline Vector exponential(Vector x) {
  const Vector lowest = Vector{} - 87.0f;
  x = x < lowest ? lowest : x;
  const Whole n = __builtin_convertvector(x * 1.44269504f - 0.5f, Whole);  // rounds to nearest: x is not positive
  const Vector steps = __builtin_convertvector(n, Vector);
  const Vector r = (x - steps * 0.693359375f) + steps * 2.12194440e-4f;
  Vector p = r * 1.38888889e-3f + 8.33333333e-3f;
  p = p * r + 4.16666667e-2f;
  p = p * r + 1.66666667e-1f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return p * (Vector)((n + 127) << 23);
}

// Calls `call` with a zero of the tensor's element type, float or bfloat16, so that it can be a template.
template <typename Call>
inline void with_type(const at::Tensor& x, Call call) {
  if (x.scalar_type() == at::kFloat) return call(0.0f);
  TORCH_CHECK(x.scalar_type() == at::kBFloat16, "activations are float32 or bfloat16, got ", x.scalar_type());
  call(c10::BFloat16());
}
