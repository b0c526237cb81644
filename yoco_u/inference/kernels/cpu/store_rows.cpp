// Writes the keys and values of new tokens to the rows of a paged cache, which it may quantize to int8.
#include <ATen/core/Tensor.h>

#include <cmath>
#include <optional>
#include <vector>

#include "kernels.h"
#include "vectors.h"

namespace {

template <typename Q>
inline void write_row(const float* from, Q* to, float*, int64_t dim) {
  from_float(from, to, dim);
}

inline void write_row(const float* from, int8_t* to, float* scale, int64_t dim) {
  float largest = 1e-30f;
  for (int64_t d = 0; d < dim; ++d) largest = std::abs(from[d]) <= largest || std::isnan(largest) ? largest : std::abs(from[d]);
  *scale = largest / 127;
  for (int64_t d = 0; d < dim; ++d) to[d] = static_cast<int8_t>(std::nearbyint(from[d] / *scale));
}

template <typename T, typename Q>
void write_all(const at::Tensor& k, const at::Tensor& v, const at::Tensor& slot_mapping, at::Tensor& cache, float* scales) {
  const int64_t tokens = k.size(0), heads = k.size(1), dim = k.size(2), rows = cache.size(2);
  const int64_t* row = slot_mapping.const_data_ptr<int64_t>();
  const Q* sources[] = {k.const_data_ptr<Q>(), v.const_data_ptr<Q>()};
  T* data = cache.data_ptr<T>();
#pragma omp parallel if (tokens > 16)
  {
    std::vector<float> wide(dim);
#pragma omp for collapse(2)
    for (int64_t which = 0; which < 2; ++which)
      for (int64_t i = 0; i < tokens; ++i) {
        if (row[i] < 0) continue;
        const at::Tensor& from = which ? v : k;
        const Q* source = sources[which] + i * from.stride(0);
        for (int64_t h = 0; h < heads; ++h) {
          const int64_t place = (which * heads + h) * rows + row[i];
          to_float(source + h * from.stride(1), wide.data(), dim, 1.0f);
          write_row(wide.data(), data + place * dim, scales ? scales + place : nullptr, dim);
        }
      }
  }
}

}  // namespace

// k, v (tokens, kv_heads, head_dim), float32 or bfloat16, each row of head_dim contiguous; slot_mapping (tokens) int64: the row
// of the cache that each token's keys and values go to, -1 for none; cache and scales as in `decode_attention`.
void store_rows(const at::Tensor& k, const at::Tensor& v, const at::Tensor& slot_mapping, at::Tensor& cache,
                const std::optional<at::Tensor>& scales) {
  TORCH_CHECK(k.stride(2) == 1 && v.stride(2) == 1 && slot_mapping.is_contiguous() && cache.is_contiguous());
  TORCH_CHECK(k.sizes() == v.sizes() && slot_mapping.numel() == k.size(0));
  TORCH_CHECK(cache.size(1) == k.size(1) && cache.size(3) == k.size(2));
  TORCH_CHECK(cache.scalar_type() != at::kChar || scales, "an int8 cache needs scales");
  const int64_t* row = slot_mapping.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < k.size(0); ++i) TORCH_CHECK(row[i] < cache.size(2), "row ", row[i], " of a cache of ", cache.size(2));
  float* factors = scales ? scales->data_ptr<float>() : nullptr;
  with_type(k, [&](auto key) {
    using Q = decltype(key);
    switch (cache.scalar_type()) {
      case at::kFloat: return write_all<float, Q>(k, v, slot_mapping, cache, nullptr);
      case at::kBFloat16: return write_all<c10::BFloat16, Q>(k, v, slot_mapping, cache, nullptr);
      default: return write_all<int8_t, Q>(k, v, slot_mapping, cache, factors);
    }
  });
}
