// The paged caches: rows written, and attention of single queries over them, which a decode step runs once for all sequences.
//
// A cache is head-major, (kv_heads, blocks * block_size, head_dim). The keys of a sequence are the first `length` rows of the
// blocks in its table. One pass over keys and values with a running maximum (arXiv 2205.14135), float32 throughout; long
// sequences are split over the threads and the parts joined by their log-sum-exps.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <omp.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include "vectors.h"

namespace {

constexpr int64_t TILE = 16;     // rows converted to float32 at a time
constexpr int64_t AHEAD = 32;    // rows fetched from memory ahead of their use
constexpr int64_t SPLIT = 1024;  // fewest rows that are worth a task of their own
constexpr float LOWEST = -std::numeric_limits<float>::infinity();

// Rows of one kv head. DIM is the head_dim where the compiler is to know it, else 0.
template <typename T, int64_t DIM>
struct Rows {
  const T* data;
  const float* scales;  // one a row, of an int8 cache
  int64_t head_dim;

  int64_t dim() const { return DIM ? DIM : head_dim; }
  int64_t padded() const { return (dim() + LANES - 1) / LANES * LANES; }

  void load(int64_t row, int64_t count, float* to) const {
    for (int64_t r = row; r < row + count; ++r, to += padded()) {
      const char* ahead = reinterpret_cast<const char*>(data + (r + AHEAD) * dim());  // most blocks follow each other
      for (int64_t byte = 0; byte < dim() * static_cast<int64_t>(sizeof(T)); byte += 64) __builtin_prefetch(ahead + byte, 0, 0);
      to_float(data + r * dim(), to, dim(), scales ? scales[r] : 1.0f);
    }
  }
};

// Sums of the lanes of 16 vectors, as one vector: a tree of additions that halves the vectors and keeps the lanes full.
inline Vector sums(const Vector* v) {
  Vector a[8], b[4], c[2];
  for (int i = 0; i < 8; ++i)
    a[i] = __builtin_shufflevector(v[i], v[i + 8], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
           __builtin_shufflevector(v[i], v[i + 8], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  for (int i = 0; i < 4; ++i)
    b[i] = __builtin_shufflevector(a[i], a[i + 4], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
           __builtin_shufflevector(a[i], a[i + 4], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
  for (int i = 0; i < 2; ++i)
    c[i] = __builtin_shufflevector(b[i], b[i + 2], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
           __builtin_shufflevector(b[i], b[i + 2], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  return __builtin_shufflevector(c[0], c[1], 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
         __builtin_shufflevector(c[0], c[1], 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
}

// Products of a query with the 16 rows of a tile.
inline Vector dots(const float* query, const float* tile, int64_t padded) {
  Vector parts[TILE] = {};
  for (int64_t d = 0; d < padded; d += LANES) {
    const Vector q = load(query + d);
#pragma GCC unroll 16
    for (int64_t r = 0; r < TILE; ++r) parts[r] += q * load(tile + r * padded + d);
  }
  return sums(parts);
}

// acc = fade * acc + weights x tile, for one query.
inline void accumulate(float* acc, float fade, const float* weights, const float* tile, int64_t padded) {
  int64_t d = 0;
  for (; d + 4 * LANES <= padded; d += 4 * LANES) {
    Vector a = fade * load(acc + d), b = fade * load(acc + d + LANES), c = fade * load(acc + d + 2 * LANES),
           e = fade * load(acc + d + 3 * LANES);
#pragma GCC unroll 16
    for (int64_t r = 0; r < TILE; ++r) {
      const float* row = tile + r * padded + d;
      a += weights[r] * load(row), b += weights[r] * load(row + LANES);
      c += weights[r] * load(row + 2 * LANES), e += weights[r] * load(row + 3 * LANES);
    }
    store(acc + d, a), store(acc + d + LANES, b), store(acc + d + 2 * LANES, c), store(acc + d + 3 * LANES, e);
  }
  for (; d < padded; d += LANES) {
    Vector a = fade * load(acc + d);
    for (int64_t r = 0; r < TILE; ++r) a += weights[r] * load(tile + r * padded + d);
    store(acc + d, a);
  }
}

// Queries (groups, padded) of one kv head against rows [first, last) of one sequence, whose blocks are in `table`.
// Into acc (groups, padded), peak and sum (groups). `tile` has room for (TILE, padded) and (groups, TILE).
template <typename T, int64_t DIM>
void attend(const float* q, const Rows<T, DIM>& keys, const Rows<T, DIM>& values, const int32_t* table, int64_t block_size, int64_t first,
            int64_t last, int64_t groups, float* tile, float* acc, float* peak, float* sum) {
  const int64_t padded = keys.padded();
  std::fill(peak, peak + groups, LOWEST);
  std::fill(tile, tile + TILE * padded, 0.0f);  // rows of another sequence, even at weight 0, could be NaN
  float* weights = tile + TILE * padded;
  const Vector nothing = Vector{} + LOWEST;
  float fades[groups];
  for (int64_t at = first; at < last;) {
    const int64_t within = at % block_size;
    const int64_t count = std::min({TILE, last - at, block_size - within});
    const int64_t row = table[at / block_size] * block_size + within;
    const auto exists = ORDER < Whole{} + static_cast<int32_t>(count);
    keys.load(row, count, tile);
    for (int64_t g = 0; g < groups; ++g) {
      const Vector score = exists ? dots(q + g * padded, tile, padded) : nothing;
      const float best = std::max(peak[g], largest(score));
      const Vector weight = exponential(score - best);
      store(weights + g * TILE, exists ? weight : Vector{});
      fades[g] = exponential(Vector{} + (peak[g] - best))[0];
      sum[g] = sum[g] * fades[g] + sum_of(exists ? weight : Vector{});
      peak[g] = best;
    }
    values.load(row, count, tile);
    for (int64_t g = 0; g < groups; ++g) accumulate(acc + g * padded, fades[g], weights + g * TILE, tile, padded);
    at += count;
  }
}

template <typename T, typename Q, int64_t DIM>
void attend_sequences(const at::Tensor& q, const at::Tensor& cache, const float* scales, const at::Tensor& table, int64_t block_size,
                const at::Tensor& lengths, at::Tensor& out) {
  const int64_t batch = q.size(0), heads = q.size(1), dim = q.size(2), kv_heads = cache.size(1), rows = cache.size(2);
  const int64_t groups = heads / kv_heads, padded = (dim + LANES - 1) / LANES * LANES;
  const float scale = 1.0f / std::sqrt(static_cast<float>(dim));
  const int32_t* blocks = table.const_data_ptr<int32_t>();
  const int64_t* length = lengths.const_data_ptr<int64_t>();
  const T* data = cache.const_data_ptr<T>();
  const Q* query = q.const_data_ptr<Q>();
  Q* result = out.data_ptr<Q>();

  int64_t total = 0;
  for (int64_t b = 0; b < batch; ++b) total += length[b] * kv_heads;
  const int64_t threads = omp_get_max_threads();
  const int64_t share = std::max(SPLIT, (total + 4 * threads - 1) / (4 * threads));

  struct Task {
    int64_t b, head, first, last;
  };
  std::vector<Task> tasks;
  std::vector<int64_t> begins;  // of the tasks of each (sequence, kv head)
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t h = 0; h < kv_heads; ++h) {
      begins.push_back(tasks.size());
      const int64_t parts = std::max<int64_t>(1, (length[b] + share - 1) / share);
      for (int64_t p = 0; p < parts; ++p) tasks.push_back({b, h, length[b] * p / parts, length[b] * (p + 1) / parts});
    }
  begins.push_back(tasks.size());
  std::vector<float> acc(tasks.size() * groups * padded), peak(tasks.size() * groups), sum(tasks.size() * groups);

#pragma omp parallel num_threads(std::min<int64_t>(threads, tasks.size()))
  {
    std::vector<float> tile(TILE * padded + groups * TILE), queries(groups * padded);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < static_cast<int64_t>(tasks.size()); ++i) {
      const Task& t = tasks[i];
      for (int64_t g = 0; g < groups; ++g) {
        float* to = queries.data() + g * padded;
        to_float(query + (t.b * heads + t.head * groups + g) * dim, to, dim, 1.0f);
        for (int64_t d = 0; d < dim; ++d) to[d] *= scale;
      }
      const int64_t k = t.head * rows, v = (kv_heads + t.head) * rows;
      const Rows<T, DIM> keys{data + k * dim, scales ? scales + k : nullptr, dim};
      const Rows<T, DIM> values{data + v * dim, scales ? scales + v : nullptr, dim};
      attend(queries.data(), keys, values, blocks + t.b * table.size(1), block_size, t.first, t.last, groups, tile.data(),
             acc.data() + i * groups * padded, peak.data() + i * groups, sum.data() + i * groups);
    }
  }

  std::vector<float> joined(padded);
  for (int64_t unit = 0; unit < batch * kv_heads; ++unit)
    for (int64_t g = 0; g < groups; ++g) {
      float best = LOWEST, whole = 0.0f;
      for (int64_t i = begins[unit]; i < begins[unit + 1]; ++i) best = std::max(best, peak[i * groups + g]);
      std::fill(joined.begin(), joined.end(), 0.0f);
      for (int64_t i = begins[unit]; i < begins[unit + 1]; ++i) {
        const float fade = std::exp(peak[i * groups + g] - best);
        whole += fade * sum[i * groups + g];
        const float* part = acc.data() + (i * groups + g) * padded;
        for (int64_t d = 0; d < padded; d += LANES) store(joined.data() + d, load(joined.data() + d) + fade * load(part + d));
      }
      for (int64_t d = 0; d < padded; ++d) joined[d] /= whole;
      from_float(joined.data(), result + (unit * groups + g) * dim, dim);
    }
}

template <typename T, typename Q, typename... Arguments>
void attend_all(const at::Tensor& q, Arguments&&... arguments) {
  switch (q.size(2)) {
    case 64: return attend_sequences<T, Q, 64>(q, arguments...);
    case 128: return attend_sequences<T, Q, 128>(q, arguments...);
    default: return attend_sequences<T, Q, 0>(q, arguments...);
  }
}

// q (sequences, heads, head_dim) of float32 or bfloat16; cache (2, kv_heads, rows, head_dim) of float32, bfloat16 or int8;
// scales (2, kv_heads, rows) float32 for int8; table (sequences, blocks) int32; lengths (sequences) int64, at least 1.
at::Tensor decode_attention(const at::Tensor& queries, const at::Tensor& cache, const std::optional<at::Tensor>& scales,
                            const at::Tensor& table, int64_t block_size, const at::Tensor& lengths) {
  const at::Tensor q = queries.contiguous();
  TORCH_CHECK(cache.is_contiguous() && table.is_contiguous() && lengths.is_contiguous());
  TORCH_CHECK(cache.scalar_type() != at::kChar || scales, "an int8 cache needs scales");
  at::Tensor out = at::empty_like(q);
  const float* factors = scales ? scales->const_data_ptr<float>() : nullptr;
  with_type(q, [&](auto query) {
    using Q = decltype(query);
    switch (cache.scalar_type()) {
      case at::kFloat: return attend_all<float, Q>(q, cache, nullptr, table, block_size, lengths, out);
      case at::kBFloat16: return attend_all<c10::BFloat16, Q>(q, cache, nullptr, table, block_size, lengths, out);
      case at::kChar: return attend_all<int8_t, Q>(q, cache, factors, table, block_size, lengths, out);
      default: TORCH_CHECK(false, "a cache is float32, bfloat16 or int8");
    }
  });
  return out;
}

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
void write_all(const at::Tensor& k, const at::Tensor& v, const at::Tensor& places, at::Tensor& cache, float* scales) {
  const int64_t tokens = k.size(0), heads = k.size(1), dim = k.size(2), rows = cache.size(2);
  const int64_t* row = places.const_data_ptr<int64_t>();
  T* data = cache.data_ptr<T>();
#pragma omp parallel if (tokens > 16)
  {
    std::vector<float> wide(dim);
#pragma omp for collapse(2)
    for (int64_t which = 0; which < 2; ++which)
      for (int64_t i = 0; i < tokens; ++i) {
        const at::Tensor& from = which ? v : k;
        const Q* source = from.const_data_ptr<Q>() + i * from.stride(0);
        for (int64_t h = 0; h < heads; ++h) {
          const int64_t place = (which * heads + h) * rows + row[i];
          to_float(source + h * from.stride(1), wide.data(), dim, 1.0f);
          write_row(wide.data(), data + place * dim, scales ? scales + place : nullptr, dim);
        }
      }
  }
}

// k, v (tokens, kv_heads, head_dim) of float32 or bfloat16, rows of the heads contiguous; places (tokens) int64.
void store_rows(const at::Tensor& k, const at::Tensor& v, const at::Tensor& places, at::Tensor& cache,
                const std::optional<at::Tensor>& scales) {
  TORCH_CHECK(k.stride(2) == 1 && v.stride(2) == 1 && places.is_contiguous() && cache.is_contiguous());
  float* factors = scales ? scales->data_ptr<float>() : nullptr;
  with_type(k, [&](auto key) {
    using Q = decltype(key);
    switch (cache.scalar_type()) {
      case at::kFloat: return write_all<float, Q>(k, v, places, cache, nullptr);
      case at::kBFloat16: return write_all<c10::BFloat16, Q>(k, v, places, cache, nullptr);
      default: return write_all<int8_t, Q>(k, v, places, cache, factors);
    }
  });
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(yoco_u, m) {
  m.def("decode_attention(Tensor q, Tensor cache, Tensor? scales, Tensor table, int block_size, Tensor lengths) -> Tensor");
  m.def("store_rows(Tensor k, Tensor v, Tensor places, Tensor(a!) cache, Tensor(b!)? scales) -> ()");
}

TORCH_LIBRARY_IMPL(yoco_u, CPU, m) {
  m.impl("decode_attention", &decode_attention);
  m.impl("store_rows", &store_rows);
}
