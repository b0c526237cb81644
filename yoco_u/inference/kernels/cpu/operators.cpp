// What Python calls, as `torch.ops.yoco_u` and `torch.classes.yoco_u`: each kernel, and a whole block of the model in one call.
// All of it is registered in this file, since the compiler takes longer to read torch's headers for that than for most kernels.
#include "operators.h"

#include <ATen/core/Tensor.h>
#include <torch/custom_class.h>

#include <utility>
#include <vector>

#include "kernels.h"

namespace {

// A linear layer whose weights `prepacking.py` has laid out.
struct Linear {
  at::Tensor weight;
  std::optional<at::Tensor> scales;
  int64_t outputs;

  at::Tensor operator()(const at::Tensor& x) const { return prepacked_linear(x, weight, scales, outputs); }
};

// A block for a step of decodes: one token of each sequence. Between two kernels that are called from Python, the interpreter
// would find its own data evicted from the caches by the weights, and wait for memory.
class DecodeBlock : public torch::CustomClassHolder {
 public:
  // weights, scales (none, or one each) and outputs belong to four linear layers: queries with keys and values; the attention's
  // output; gate with up; down. norms are those before attention and before the feed-forward, and then those of queries and of
  // keys if the model has them. kv_heads is 0 for a cross block, which writes no keys and values.
  DecodeBlock(std::vector<at::Tensor> norms, double eps, const std::vector<at::Tensor>& weights,
              const std::vector<at::Tensor>& scales, const std::vector<int64_t>& outputs, int64_t heads, int64_t kv_heads,
              int64_t head_dim, bool rotates)
      : norms_(std::move(norms)), eps_(eps), heads_(heads), kv_heads_(kv_heads), head_dim_(head_dim), rotates_(rotates) {
    for (size_t i = 0; i < weights.size(); ++i)
      linears_.push_back({weights[i], scales.empty() ? std::nullopt : std::make_optional(scales[i]), outputs[i]});
  }

  // x (1, sequences, hidden) bfloat16 -> as x. cos and sin are as in `rotate`, slot_mapping as in `store_rows`, and the other
  // arguments as in `decode_attention`.
  at::Tensor run(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin, at::Tensor cache,
                 const std::optional<at::Tensor>& scales, const at::Tensor& table, int64_t block_size,
                 const at::Tensor& lengths, const std::optional<at::Tensor>& slot_mapping) const {
    const at::Tensor projected = linears_[0](rms_norm(x, norms_[0], eps_));
    at::Tensor q = turned(heads_of(projected, 0, heads_), 2, cos, sin);
    if (kv_heads_) {
      const at::Tensor k = turned(heads_of(projected, heads_, kv_heads_), 3, cos, sin);
      store_rows(k[0], heads_of(projected, heads_ + kv_heads_, kv_heads_)[0], *slot_mapping, cache, scales);
    }
    const at::Tensor attended = decode_attention(q[0], cache, scales, table, block_size, lengths);
    const at::Tensor y = linears_[1](attended.view({1, x.size(1), -1})).add_(x);
    return linears_[3](swiglu(linears_[2](rms_norm(y, norms_[1], eps_)))).add_(y);
  }

 private:
  at::Tensor heads_of(const at::Tensor& x, int64_t first, int64_t count) const {
    return x.narrow(-1, first * head_dim_, count * head_dim_).unflatten(-1, {count, head_dim_});
  }

  at::Tensor turned(at::Tensor x, size_t norm, const at::Tensor& cos, const at::Tensor& sin) const {
    if (norms_.size() > norm) x = rms_norm(x, norms_[norm], eps_);
    return rotates_ ? rotate(x, cos, sin) : x;
  }

  std::vector<at::Tensor> norms_;
  double eps_;
  std::vector<Linear> linears_;
  int64_t heads_, kv_heads_, head_dim_;
  bool rotates_;
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(yoco_u, m) {
  m.class_<DecodeBlock>("DecodeBlock")
      .def(torch::init<std::vector<at::Tensor>, double, std::vector<at::Tensor>, std::vector<at::Tensor>, std::vector<int64_t>,
                       int64_t, int64_t, int64_t, bool>())
      .def("run", &DecodeBlock::run);
}
