// Causal attention of a chunk of one sequence to itself and its past, with or without a window. Products are those of
// `products.h`, and the softmax is float32; there is one pass over the keys with a running maximum (arXiv 2205.14135).
//
// Keys and values are laid out in tiles of 64 keys. A tile serves a block of queries and all heads that share the keys,
// together about ROWS rows: enough to make up for laying out the tile, few enough to waste little at the edges of a window.
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels.h"
#include "products.h"
#include "vectors.h"

namespace {

constexpr int64_t ROWS = 96;             // rows (query, head) that a tile serves
constexpr int64_t TILE = BLOCK;          // keys of a tile
constexpr int64_t KEY_PAIRS = TILE / 2;  // pairs of keys of a tile
constexpr float HIDDEN = -1e30f;         // score of a key that the query does not see
using Half = c10::BFloat16;

struct Shape {
  int64_t queries, keys, groups, dim, window;

  int64_t past() const { return keys - queries; }
  int64_t tiles() const { return (keys + TILE - 1) / TILE; }
  int64_t pairs() const { return dim / 2; }
  int64_t columns() const { return (dim + BLOCK - 1) / BLOCK; }           // blocks of 64 of the head's dimensions
  int64_t key_size() const { return pairs() * VECTORS; }                  // size of a tile's keys, in `Weights`
  int64_t value_size() const { return columns() * KEY_PAIRS * VECTORS; }  // size of a tile's values, in `Weights`
  int64_t block() const { return std::max<int64_t>(1, ROWS / groups); }   // queries of a block
};

// Two numbers as the halves of one word; a null pointer stands for 0.
inline uint32_t two(const Half* low, const Half* high) {
  uint16_t first = 0, second = 0;
  if (low) std::memcpy(&first, low, sizeof(first));
  if (high) std::memcpy(&second, high, sizeof(second));
  return first | static_cast<uint32_t>(second) << 16;
}

inline Weights weights_of(const uint32_t* pairs) { return widen(reinterpret_cast<const Half*>(pairs)); }

// Lays out the keys of a tile as the weights of a product with `dim` inputs and 64 outputs; zeros after the last key.
void lay_out_keys(const Half* keys, int64_t stride, int64_t count, int64_t dim, Weights* to) {
  for (int64_t d = 0; d < dim; d += 2)
    for (int64_t v = 0; v < VECTORS; ++v) {
      uint32_t pairs[LANES] = {};
      for (int64_t lane = 0; lane < std::min(LANES, count - v * LANES); ++lane)
        std::memcpy(pairs + lane, keys + (v * LANES + lane) * stride + d, sizeof(uint32_t));
      *to++ = weights_of(pairs);
    }
}

// Lays out the values of a tile as the weights of a product with 64 inputs and `dim` outputs; zeros after the last key and the
// last dimension.
void lay_out_values(const Half* values, int64_t stride, int64_t count, int64_t dim, Weights* to) {
  for (int64_t column = 0; column < dim; column += BLOCK)
    for (int64_t key = 0; key < TILE; key += 2) {
      const Half* low = key < count ? values + key * stride : nullptr;
      const Half* high = key + 1 < count ? values + (key + 1) * stride : nullptr;
      for (int64_t d = column; d < column + BLOCK; d += LANES) {
        uint32_t pairs[LANES] = {};
        for (int64_t lane = 0; lane < std::min(LANES, dim - d); ++lane)
          pairs[lane] = two(low ? low + d + lane : nullptr, high ? high + d + lane : nullptr);
        *to++ = weights_of(pairs);
      }
    }
}

// Buffers of one thread for a block of queries. A row is one (query, head); the heads of a query are next to each other.
struct Scratch {
  std::vector<Input> queries, weights;
  std::vector<Sums> scores, out;
  std::vector<float> peak, total;

  Scratch(int64_t rows, const Shape& s)
      : queries(rows * s.dim), weights(rows * TILE), scores(rows), out(rows * s.columns()), peak(rows), total(rows) {}
};

// sums (+)= x (rows, 2 * pairs) times a piece of weights; `first` starts the sums at zero.
void products(int64_t rows, const Weights* piece, int64_t pairs, const Input* x, Sums* sums, bool first) {
  for (int64_t n = 0; n < rows; n += TOKENS)
    multiply_up_to(std::min(TOKENS, rows - n), piece, pairs, x + n * 2 * pairs, 2 * pairs, sums + n, first, nullptr,
                   int64_t{0});
}

// Turns the scores of one row and tile into softmax weights, for the keys [low, high] that the row sees, and scales what the
// row has summed so far to the new maximum.
void soften(int64_t row, int64_t rows, int64_t low, int64_t high, float scale, const Shape& s, Scratch& own, bool first) {
  float* scores = own.scores[row].of;
  const bool all = low <= 0 && high >= TILE - 1;
  Vector best = Vector{} + own.peak[row];
  Whole seen[VECTORS];
  for (int64_t v = 0; v < VECTORS; ++v) {
    Vector score = scale * load(scores + v * LANES);
    if (!all) {
      const Whole key = ORDER + static_cast<int32_t>(v * LANES);
      seen[v] = (key >= static_cast<int32_t>(low)) & (key <= static_cast<int32_t>(high));
      score = seen[v] ? score : Vector{} + HIDDEN;
    }
    store(scores + v * LANES, score);
    best = larger(score, best);
  }
  const float top = largest(best);
  Vector total = {};
  for (int64_t v = 0; v < VECTORS; ++v) {
    Vector weight = exponential(load(scores + v * LANES) - top);
    if (!all) weight = seen[v] ? weight : Vector{};
    store(scores + v * LANES, weight);
    total += weight;
  }
  from_float(scores, own.weights.data() + row * TILE, TILE);
  const float fade = exponential(Vector{} + (own.peak[row] - top))[0];
  own.total[row] = own.total[row] * fade + sum_of(total);
  own.peak[row] = top;
  if (first || fade == 1.0f) return;
  for (int64_t c = 0; c < s.columns(); ++c) {
    float* sums = own.out[c * rows + row].of;
    for (int64_t d = 0; d < BLOCK; d += LANES) store(sums + d, fade * load(sums + d));
  }
}

// Attention of queries [begin, end), for all heads that share the laid-out keys and values.
void attend(int64_t begin, int64_t end, const Weights* keys, const Weights* values, const Shape& s, Scratch& own) {
  const int64_t rows = (end - begin) * s.groups, past = s.past();
  const float scale = 1.0f / std::sqrt(static_cast<float>(s.dim));
  std::fill(own.peak.begin(), own.peak.end(), HIDDEN);
  std::fill(own.total.begin(), own.total.end(), 0.0f);
  const int64_t first = std::max<int64_t>(0, past + begin - s.window + 1) / TILE, last = (past + end - 1) / TILE;
  for (int64_t t = first; t <= last; ++t) {
    products(rows, keys + t * s.key_size(), s.pairs(), own.queries.data(), own.scores.data(), true);
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t high = past + begin + row / s.groups - t * TILE;
      soften(row, rows, high - s.window + 1, high, scale, s, own, t == first);
    }
    for (int64_t c = 0; c < s.columns(); ++c)
      products(rows, values + t * s.value_size() + c * KEY_PAIRS * VECTORS, KEY_PAIRS, own.weights.data(),
               own.out.data() + c * rows, t == first);
  }
}

}  // namespace

// q (1, queries, heads, head_dim), of the last of the tokens that have keys; k, v (1, keys, kv_heads, head_dim); all bfloat16,
// head_dim even. A token sees `window` keys, itself included -> as q.
at::Tensor chunk_attention(const at::Tensor& queries, const at::Tensor& keys, const at::Tensor& values, int64_t window) {
  const at::Tensor q = queries.contiguous(), k = keys.contiguous(), v = values.contiguous();
  TORCH_CHECK(q.scalar_type() == at::kBFloat16 && k.scalar_type() == at::kBFloat16 && v.scalar_type() == at::kBFloat16);
  TORCH_CHECK(q.size(0) == 1 && k.size(1) >= q.size(1) && q.size(3) % 2 == 0 && window >= 1);
  TORCH_CHECK(k.sizes() == v.sizes() && k.size(3) == q.size(3) && q.size(2) % k.size(2) == 0);
  const int64_t heads = q.size(2), kv_heads = k.size(2);
  const Shape s{q.size(1), k.size(1), heads / kv_heads, q.size(3), std::min(window, k.size(1))};
  at::Tensor out = q.new_empty(q.sizes());
  const Half *query = q.const_data_ptr<Half>(), *key = k.const_data_ptr<Half>(), *value = v.const_data_ptr<Half>();
  Half* result = out.data_ptr<Half>();
  const int64_t stride = kv_heads * s.dim, blocks = (s.queries + s.block() - 1) / s.block();
  std::vector<Weights> laid_keys(kv_heads * s.tiles() * s.key_size()), laid_values(kv_heads * s.tiles() * s.value_size());
#pragma omp parallel
  {
    Scratch own(s.block() * s.groups, s);
#pragma omp for collapse(2)
    for (int64_t h = 0; h < kv_heads; ++h)
      for (int64_t t = 0; t < s.tiles(); ++t) {
        const int64_t at = t * TILE * stride + h * s.dim, count = std::min(TILE, s.keys - t * TILE);
        lay_out_keys(key + at, stride, count, s.dim, laid_keys.data() + (h * s.tiles() + t) * s.key_size());
        lay_out_values(value + at, stride, count, s.dim, laid_values.data() + (h * s.tiles() + t) * s.value_size());
      }
#pragma omp for collapse(2) schedule(dynamic, 1)
    for (int64_t h = 0; h < kv_heads; ++h)
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t begin = b * s.block(), end = std::min(begin + s.block(), s.queries), width = s.groups * s.dim;
        for (int64_t i = begin; i < end; ++i)
          copy_inputs(query + (i * heads + h * s.groups) * s.dim, own.queries.data() + (i - begin) * width, width);
        attend(begin, end, laid_keys.data() + h * s.tiles() * s.key_size(), laid_values.data() + h * s.tiles() * s.value_size(),
               s, own);
        const int64_t rows = (end - begin) * s.groups;
        for (int64_t row = 0; row < rows; ++row) {
          Half* to = result + ((begin + row / s.groups) * heads + h * s.groups + row % s.groups) * s.dim;
          for (int64_t c = 0; c < s.columns(); ++c) {
            float* sums = own.out[c * rows + row].of;
            for (int64_t d = 0; d < BLOCK; d += LANES) store(sums + d, load(sums + d) / own.total[row]);
            from_float(sums, to + c * BLOCK, std::min(BLOCK, s.dim - c * BLOCK));
          }
        }
      }
  }
  return out;
}
