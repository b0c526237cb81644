// The operations between the matrix products of a block, each in one pass over memory: RMSNorm, RoPE, SwiGLU. They compute in
// float32.
#include <ATen/core/Tensor.h>

#include <cmath>
#include <vector>

#include "kernels.h"
#include "vectors.h"

static constexpr int64_t PARALLEL = 1 << 15;  // the fewest elements for which several threads pay off

// x (..., size), weight (size) -> as x.
at::Tensor rms_norm(const at::Tensor& input, const at::Tensor& weight, double eps) {
  const at::Tensor x = input.contiguous();
  at::Tensor out = x.new_empty(x.sizes());
  const int64_t size = x.size(-1), rows = size ? x.numel() / size : 0;
  TORCH_CHECK(weight.numel() == size);
  with_type(x, [&](auto element) {
    using T = decltype(element);
    const T *from = x.const_data_ptr<T>(), *scale = weight.const_data_ptr<T>();
    T* to = out.data_ptr<T>();
    std::vector<float> weights(size);
    to_float(scale, weights.data(), size, 1.0f);
#pragma omp parallel if (x.numel() >= PARALLEL)
    {
      std::vector<float> wide(size);
#pragma omp for
      for (int64_t r = 0; r < rows; ++r) {
        to_float(from + r * size, wide.data(), size, 1.0f);
        Vector squares{};
        float rest = 0.0f;
        int64_t i = 0;
        for (; i + LANES <= size; i += LANES) squares += load(wide.data() + i) * load(wide.data() + i);
        for (; i < size; ++i) rest += wide[i] * wide[i];
        const float factor = 1.0f / std::sqrt((sum_of(squares) + rest) / size + static_cast<float>(eps));
        for (i = 0; i + LANES <= size; i += LANES)
          store(wide.data() + i, load(wide.data() + i) * factor * load(weights.data() + i));
        for (; i < size; ++i) wide[i] *= factor * weights[i];
        from_float(wide.data(), to + r * size, size);
      }
    }
  });
  return out;
}

// RoPE: x (1, tokens, heads, head_dim), each head contiguous; cos, sin (1, tokens, 1, head_dim) float32 -> as x, contiguous.
at::Tensor rotate(const at::Tensor& x, const at::Tensor& cosines, const at::Tensor& sines) {
  const int64_t tokens = x.size(1), heads = x.size(2), dim = x.size(3), half = dim / 2;
  TORCH_CHECK(x.size(0) == 1 && x.stride(3) == 1 && cosines.is_contiguous() && sines.is_contiguous());
  TORCH_CHECK(cosines.numel() == tokens * dim && sines.numel() == tokens * dim && dim % 2 == 0);
  at::Tensor out = x.new_empty({1, tokens, heads, dim});
  with_type(x, [&](auto element) {
    using T = decltype(element);
    const T* from = x.const_data_ptr<T>();
    T* to = out.data_ptr<T>();
    const float *cos = cosines.const_data_ptr<float>(), *sin = sines.const_data_ptr<float>();
    const int64_t token_stride = x.stride(1), head_stride = x.stride(2);
#pragma omp parallel if (x.numel() >= PARALLEL)
    {
      std::vector<float> wide(dim), turned(dim);
#pragma omp for
      for (int64_t t = 0; t < tokens; ++t)
        for (int64_t h = 0; h < heads; ++h) {
          to_float(from + t * token_stride + h * head_stride, wide.data(), dim, 1.0f);
          const float *c = cos + t * dim, *s = sin + t * dim;
          for (int64_t d = 0; d < half; ++d) {
            turned[d] = wide[d] * c[d] - wide[d + half] * s[d];
            turned[d + half] = wide[d + half] * c[d + half] + wide[d] * s[d + half];
          }
          from_float(turned.data(), to + (t * heads + h) * dim, dim);
        }
    }
  });
  return out;
}

// x (..., 2 * size), gate and up side by side, contiguous -> silu(gate) * up, (..., size).
at::Tensor swiglu(const at::Tensor& x) {
  TORCH_CHECK(x.is_contiguous());
  const int64_t size = x.size(-1) / 2, rows = size ? x.numel() / (2 * size) : 0;
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = size;
  at::Tensor out = x.new_empty(shape);
  constexpr int64_t PART = 256;
  const int64_t parts = (size + PART - 1) / PART;
  with_type(x, [&](auto element) {
    using T = decltype(element);
    const T* from = x.const_data_ptr<T>();
    T* to = out.data_ptr<T>();
#pragma omp parallel for collapse(2) if (out.numel() >= PARALLEL)
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t p = 0; p < parts; ++p) {
        alignas(64) float gate[PART] = {}, up[PART] = {};
        const int64_t at = p * PART, count = std::min(PART, size - at);
        to_float(from + r * 2 * size + at, gate, count, 1.0f);
        to_float(from + r * 2 * size + size + at, up, count, 1.0f);
        for (int64_t i = 0; i < count; i += LANES) {
          const Vector g = load(gate + i);
          const Vector e = exponential(g < 0.0f ? g : -g);  // of -|g|
          store(up + i, load(up + i) * g * (g < 0.0f ? e : Vector{} + 1.0f) / (1.0f + e));
        }
        from_float(up, to + r * size + at, count);
      }
  });
  return out;
}
