// The kernels. Each is described where it is defined.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps);
at::Tensor rotate(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin);
at::Tensor swiglu(const at::Tensor& x);
at::Tensor prepacked_linear(const at::Tensor& x, const at::Tensor& weights, const std::optional<at::Tensor>& scales,
                            int64_t outputs);
void store_rows(const at::Tensor& k, const at::Tensor& v, const at::Tensor& slot_mapping, at::Tensor& cache,
                const std::optional<at::Tensor>& scales);
at::Tensor decode_attention(const at::Tensor& q, const at::Tensor& cache, const std::optional<at::Tensor>& scales,
                            const at::Tensor& table, int64_t block_size, const at::Tensor& lengths);
at::Tensor chunk_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, int64_t window);
