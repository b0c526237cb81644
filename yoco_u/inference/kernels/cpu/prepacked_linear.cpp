// Linear layers with prepacked bfloat16 or int8 weights for bfloat16 inputs. A decode step reads every weight once, at the
// memory's rate; a chunk of a prompt runs at the rate of bfloat16 products, or of float32 products where the CPU has no others.
//
// Weights are laid out in blocks of 64 outputs, (blocks, pairs of inputs, 64, 2), so that a thread reads one stream of memory.
// A piece of a block at a time is brought into the first-level cache, where it serves all tokens. Weights are widened there to
// what is multiplied, which represents all of them exactly. Products are summed in float32; int8 weights have one scale per
// output, which multiplies the sum.
#include <ATen/core/Tensor.h>
#include <omp.h>

#include <algorithm>
#include <vector>

#include "kernels.h"
#include "products.h"
#include "vectors.h"

namespace {

constexpr int64_t PANEL = 64 * TOKENS;  // the most tokens whose sums are kept at a time
constexpr int64_t FEW = 64;             // up to this many tokens, reading weights takes longer than storing sums
constexpr int64_t SHORT = 8192;         // bytes of a piece, for up to FEW tokens
constexpr int64_t LONG = 32768 / (VECTORS * sizeof(Weights));  // pairs of inputs of a piece, for more tokens
constexpr int64_t NEAR = 2048;  // bytes ahead that are prefetched where weights are widened as they are multiplied
#ifdef __AVX512BF16__
constexpr bool AT_ONCE = false;  // whether that is done for few tokens, without bringing a piece into the cache first
#else
constexpr bool AT_ONCE = true;
#endif
constexpr int64_t ALONE = 1 << 17;  // products up to which waking the other threads takes longer than they would save
constexpr int64_t TURNS = 16;       // pieces of work for each thread: one that other programs hold up takes fewer

// Multiplies up to PANEL tokens by one block of weights. The next piece is prefetched meanwhile: during the passes of TOKENS
// tokens over this piece, or, if there is only one pass, while this piece is widened.
template <typename T>
void multiply_block(const T* weights, int64_t pairs, const Input* x, int64_t tokens, Weights* piece, Sums* sums) {
  constexpr int64_t pair = 2 * BLOCK * sizeof(T);  // bytes of the weights of a pair of inputs
  const int64_t length = tokens <= FEW ? std::min(SHORT / pair, LONG) : LONG, passes = (tokens + TOKENS - 1) / TOKENS;
  const int64_t share = (pair / LINE + passes - 1) / passes;
  for (int64_t begin = 0; begin < pairs; begin += length) {
    const int64_t count = std::min(length, pairs - begin);
    const T* from = weights + begin * 2 * BLOCK;
    if (AT_ONCE && passes == 1) {
      multiply_up_to(tokens, from, count, x + 2 * begin, 2 * pairs, sums, begin == 0,
                     reinterpret_cast<const char*>(from) + NEAR, pair / LINE);
      continue;
    }
    for (int64_t i = 0; i < count * VECTORS; ++i, from += 2 * LANES) {
      if (passes == 1) __builtin_prefetch(reinterpret_cast<const char*>(from) + SHORT, 0, 3);
      piece[i] = widen(from);
    }
    const char* ahead = reinterpret_cast<const char*>(from);
    int64_t left = passes == 1 ? 0 : pair / LINE;
    for (int64_t n = 0; n < tokens; n += TOKENS) {
      const int64_t lines = std::min(share, left);
      multiply_up_to(std::min(TOKENS, tokens - n), piece, count, x + n * 2 * pairs + 2 * begin, 2 * pairs, sums + n, begin == 0,
                     ahead, lines);
      ahead += lines * count * LINE, left -= lines;
    }
  }
}

template <typename T>
void multiply_all(const at::Tensor& x, const at::Tensor& weights, const float* scales, int64_t outputs, at::Tensor& out) {
  const int64_t blocks = weights.size(0), pairs = weights.size(1), tokens = x.numel() / (2 * pairs);
  const Input* from = x.const_data_ptr<Input>();
  const T* weight = weights.const_data_ptr<T>();
  c10::BFloat16* to = out.data_ptr<c10::BFloat16>();
  const int64_t turn = std::max<int64_t>(1, blocks / (TURNS * omp_get_max_threads()));
#pragma omp parallel if (tokens * weights.numel() > ALONE)
  {
    std::vector<Sums> sums(std::min(tokens, PANEL));
    alignas(64) Weights piece[LONG * VECTORS];
#pragma omp for schedule(dynamic, turn)
    for (int64_t b = 0; b < blocks; ++b)
      for (int64_t begin = 0; begin < tokens; begin += PANEL) {
        const int64_t count = std::min(PANEL, tokens - begin);
        multiply_block(weight + b * pairs * 2 * BLOCK, pairs, from + begin * 2 * pairs, count, piece, sums.data());
        for (int64_t n = 0; n < count; ++n) {
          float* sum = sums[n].of;
          if (scales)
            for (int64_t v = 0; v < BLOCK; v += LANES) store(sum + v, load(sum + v) * load(scales + b * BLOCK + v));
          from_float(sum, to + (begin + n) * outputs + b * BLOCK, std::min(BLOCK, outputs - b * BLOCK));
        }
      }
  }
}

// With a column of zeros behind the others.
at::Tensor padded(const at::Tensor& x) {
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() += 1;
  at::Tensor out = x.new_zeros(shape);
  out.narrow(-1, 0, x.size(-1)).copy_(x);
  return out;
}

}  // namespace

// x (..., inputs) bfloat16; weights (blocks, pairs, 64, 2) bfloat16, or int8 with scales (blocks * 64) float32, both padded
// with zeros -> (..., outputs) bfloat16.
at::Tensor prepacked_linear(const at::Tensor& input, const at::Tensor& weights, const std::optional<at::Tensor>& scales,
                            int64_t outputs) {
  const int64_t blocks = weights.size(0), pairs = weights.size(1), inputs = input.size(-1);
  TORCH_CHECK(input.scalar_type() == at::kBFloat16 && weights.is_contiguous() && weights.size(2) == BLOCK);
  TORCH_CHECK((inputs + 1) / 2 == pairs && (outputs + BLOCK - 1) / BLOCK == blocks);
  const at::Tensor x = as_inputs(inputs % 2 ? padded(input) : input).contiguous();
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = outputs;
  at::Tensor out = input.new_empty(shape);
  if (weights.scalar_type() == at::kBFloat16) {
    multiply_all<c10::BFloat16>(x, weights, nullptr, outputs, out);
    return out;
  }
  TORCH_CHECK(weights.scalar_type() == at::kChar && scales && scales->scalar_type() == at::kFloat && scales->is_contiguous() &&
              scales->numel() == blocks * BLOCK);
  multiply_all<int8_t>(x, weights, scales->const_data_ptr<float>(), outputs, out);
  return out;
}
