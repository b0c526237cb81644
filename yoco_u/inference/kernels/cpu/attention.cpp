// Attention of single queries over paged caches: a decode step calls it once per slot, for all of its sequences.
//
// A cache is head-major, (kv_heads, blocks * block_size, head_dim). The keys of a sequence are the first `length` rows of the
// blocks in its block table. There is one pass over keys and values with a running maximum (arXiv 2205.14135), in float32. The
// rows of a long sequence are divided among threads, and the parts are joined by their maxima and sums of exponentials.
#include <ATen/core/Tensor.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <type_traits>
#include <vector>

#include "kernels.h"
#include "vectors.h"

namespace {

constexpr int64_t TILE = LANES;  // rows at a time: their products with one query fill a vector
#ifdef __AVX512F__
constexpr int64_t WIDTH = 4;  // vectors of each of four queries' sums, which the registers hold
#else
constexpr int64_t WIDTH = 2;
#endif
constexpr int64_t RUN = 64;      // most rows between two updates of the running maximum
constexpr int64_t AHEAD = 32;    // how many rows ahead of their use rows are prefetched
constexpr int64_t SPLIT = 1024;  // fewest rows for which another task pays off
constexpr float LOWEST = -std::numeric_limits<float>::infinity();

// The keys or the values of one kv head. DIM is the head_dim if it is known at compile time, else 0.
template <typename T, int64_t DIM>
struct Rows {
  const T* data;
  const float* scales;  // of an int8 cache, one per row; else null
  int64_t head_dim;

  int64_t dim() const { return DIM ? DIM : head_dim; }
  int64_t padded() const { return (dim() + LANES - 1) / LANES * LANES; }

  const T* at(int64_t row) const { return data + row * dim(); }

  // Prefetches part `part` of `parts` of the tile that lies AHEAD rows after this one, as if blocks followed each other, which
  // most do. The requests are spread over the queries of a tile, because only a few can be under way at a time.
  void fetch(int64_t row, int64_t part, int64_t parts) const {
    const int64_t bytes = TILE * dim() * static_cast<int64_t>(sizeof(T));
    const char* ahead = reinterpret_cast<const char*>(at(row + AHEAD));
    for (int64_t byte = bytes * part / parts / 64 * 64; byte < bytes * (part + 1) / parts; byte += 64)
      __builtin_prefetch(ahead + byte, 0, 3);
  }

  // Prefetches the row that lies AHEAD rows after this one.
  void fetch_row(int64_t row) const {
    const char* ahead = reinterpret_cast<const char*>(at(row + AHEAD));
    for (int64_t byte = 0; byte < dim() * static_cast<int64_t>(sizeof(T)); byte += 64) __builtin_prefetch(ahead + byte, 0, 3);
  }

  void load(int64_t row, int64_t count, float* to) const {
    for (int64_t r = row; r < row + count; ++r, to += padded()) to_float(at(r), to, dim(), scales ? scales[r] : 1.0f);
  }
};

// From two vectors of sums of STEP * 2 neighbouring lanes each, those of the first in the lower half of each such group of
// lanes and those of the second in the upper half.
template <size_t STEP, size_t... LANE>
inline Vector joined(Vector a, Vector b, std::index_sequence<LANE...>) {
  return __builtin_shufflevector(a, b, (LANE & STEP ? LANES + (LANE ^ STEP) : LANE)...) +
         __builtin_shufflevector(a, b, (LANE & STEP ? LANES + LANE : LANE ^ STEP)...);
}

// The sums of the lanes of each of LANES vectors, as one vector. Each step halves the number of vectors and keeps all lanes
// busy.
template <size_t STEP = LANES / 2>
inline Vector sums(const Vector* v) {
  Vector half[STEP];
  for (size_t i = 0; i < STEP; ++i) half[i] = joined<STEP>(v[i], v[i + STEP], Lanes());
  if constexpr (STEP > 1) return sums<STEP / 2>(half);
  return half[0];
}

// The dot products of a query with the rows of a tile.
inline Vector dots(const float* query, const float* tile, int64_t padded) {
  Vector parts[TILE] = {};
  for (int64_t d = 0; d < padded; d += LANES) {
    const Vector q = load(query + d);
#pragma GCC unroll 16
    for (int64_t r = 0; r < TILE; ++r) parts[r] += q * load(tile + r * padded + d);
  }
  return sums(parts);
}

#ifdef __AVX512BF16__
// The same for bfloat16 rows directly in the cache, without copying them to a float32 tile; products and sums are float32.
// `dim` is a multiple of 32.
inline Vector dots(const c10::BFloat16* query, const c10::BFloat16* rows, int64_t dim) {
  Vector parts[TILE] = {};
  for (int64_t d = 0; d < dim; d += 2 * LANES) {
    const auto q = (__m512bh)_mm512_loadu_si512(query + d);
#pragma GCC unroll 16
    for (int64_t r = 0; r < TILE; ++r)
      parts[r] = (Vector)_mm512_dpbf16_ps((__m512)parts[r], q, (__m512bh)_mm512_loadu_si512(rows + r * dim + d));
  }
  return sums(parts);
}
#endif

// acc = fade * acc + weights x tile, for one query, in columns d to d + COUNT * LANES. COUNT independent sums hide the latency
// of the additions.
template <int64_t COUNT>
inline void accumulate_columns(float* acc, float fade, const float* weights, const float* tile, int64_t padded, int64_t d) {
  Vector parts[COUNT];
  for (int64_t i = 0; i < COUNT; ++i) parts[i] = fade * load(acc + d + i * LANES);
#pragma GCC unroll 16
  for (int64_t r = 0; r < TILE; ++r)
    for (int64_t i = 0; i < COUNT; ++i) parts[i] += weights[r] * load(tile + r * padded + d + i * LANES);
  for (int64_t i = 0; i < COUNT; ++i) store(acc + d + i * LANES, parts[i]);
}

inline void accumulate(float* acc, float fade, const float* weights, const float* tile, int64_t padded) {
  int64_t d = 0;
  for (; d + 8 * LANES <= padded; d += 8 * LANES) accumulate_columns<8>(acc, fade, weights, tile, padded, d);
  for (; d + 4 * LANES <= padded; d += 4 * LANES) accumulate_columns<4>(acc, fade, weights, tile, padded, d);
  for (; d < padded; d += LANES) accumulate_columns<1>(acc, fade, weights, tile, padded, d);
}

// The same with rows directly from the cache, for GROUPS queries and columns d to d + WIDTH * LANES, so that a row is widened
// once for all queries. The queries' accumulators are DIM apart, their weights RUN.
template <int64_t GROUPS, typename T, int64_t DIM>
inline void accumulate_rows(float* acc, const float* fades, const float* weights, const Rows<T, DIM>& values, int64_t row,
                            int64_t count, int64_t d) {
  Vector parts[GROUPS][WIDTH];
#pragma GCC unroll 4
  for (int64_t g = 0; g < GROUPS; ++g)
#pragma GCC unroll 4
    for (int64_t i = 0; i < WIDTH; ++i) parts[g][i] = fades[g] * load(acc + g * DIM + d + i * LANES);
  for (int64_t r = 0; r < count; ++r) {
    if (d == 0) values.fetch_row(row + r);
    const T* from = values.at(row + r) + d;
    const float scale = values.scales ? values.scales[row + r] : 1.0f;
    Vector wides[WIDTH];
#pragma GCC unroll 4
    for (int64_t i = 0; i < WIDTH; ++i) wides[i] = wide(from + i * LANES, scale);
#pragma GCC unroll 4
    for (int64_t g = 0; g < GROUPS; ++g)
#pragma GCC unroll 4
      for (int64_t i = 0; i < WIDTH; ++i) parts[g][i] += weights[g * RUN + r] * wides[i];
  }
#pragma GCC unroll 4
  for (int64_t g = 0; g < GROUPS; ++g)
#pragma GCC unroll 4
    for (int64_t i = 0; i < WIDTH; ++i) store(acc + g * DIM + d + i * LANES, parts[g][i]);
}

template <typename T, int64_t DIM>
void accumulate_all(float* acc, const float* fades, const float* weights, const Rows<T, DIM>& values, int64_t row,
                    int64_t count, int64_t groups) {
  int64_t g = 0;
  for (; g + 4 <= groups; g += 4)
    for (int64_t d = 0; d < DIM; d += WIDTH * LANES)
      accumulate_rows<4>(acc + g * DIM, fades + g, weights + g * RUN, values, row, count, d);
  for (; g < groups; ++g)
    for (int64_t d = 0; d < DIM; d += WIDTH * LANES)
      accumulate_rows<1>(acc + g * DIM, fades + g, weights + g * RUN, values, row, count, d);
}

// Buffers of one thread.
template <typename T, typename Q>
struct Scratch {
  Floats queries, tile, weights;
  std::vector<float> fades;
  std::vector<T> edge;  // a copy of the last tile, whose rows may be fewer than TILE

  Scratch(int64_t groups, int64_t padded)
      : queries(groups * padded), tile(TILE * padded), weights(groups * RUN), fades(groups), edge(TILE * padded) {}
};

// Whether dot products read bfloat16 rows directly from the cache.
template <typename T, typename Q, int64_t DIM>
constexpr bool direct() {
#ifdef __AVX512BF16__
  return std::is_same_v<T, c10::BFloat16> && std::is_same_v<Q, c10::BFloat16> && DIM && DIM % (2 * LANES) == 0;
#else
  return false;
#endif
}

// Scores of the queries of one kv head with `count` <= TILE rows from `row` on, into the weights from column `at` on.
template <typename T, typename Q, int64_t DIM>
void score(const Q* q, const Rows<T, DIM>& keys, int64_t row, int64_t count, int64_t groups, int64_t at, float scale,
           Scratch<T, Q>& own) {
  const auto exists = ORDER < Whole{} + static_cast<int32_t>(count);
  const Vector nothing = Vector{} + LOWEST;
  if constexpr (direct<T, Q, DIM>()) {
    const T* rows = keys.at(row);
    if (count < TILE) {
      std::copy(rows, rows + count * DIM, own.edge.begin());
      rows = own.edge.data();
    }
    for (int64_t g = 0; g < groups; ++g) {
      keys.fetch(row, g, groups);
      store(own.weights.data() + g * RUN + at, exists ? scale * dots(q + g * DIM, rows, DIM) : nothing);
    }
  } else {
    const int64_t padded = keys.padded();
    keys.load(row, count, own.tile.data());
    for (int64_t g = 0; g < groups; ++g) {
      keys.fetch(row, g, groups);
      store(own.weights.data() + g * RUN + at,
            exists ? scale * dots(own.queries.data() + g * padded, own.tile.data(), padded) : nothing);
    }
  }
}

// Attention of the queries (groups, dim) of one kv head to rows [first, last) of one sequence, whose blocks are in `table`.
// Writes the weighted values to acc (groups, padded), the maximum score to peak and the sum of exponentials to sum (groups).
template <typename T, typename Q, int64_t DIM>
void attend(const Q* q, const Rows<T, DIM>& keys, const Rows<T, DIM>& values, const int32_t* table, int64_t block_size,
            int64_t first, int64_t last, int64_t groups, float scale, Scratch<T, Q>& own, float* acc, float* peak, float* sum) {
  const int64_t padded = keys.padded(), dim = keys.dim();
  std::fill(peak, peak + groups, LOWEST);
  std::fill_n(own.tile.data(), TILE * padded, 0.0f);  // left-over rows could be NaN, which even weight 0 would not remove
  for (int64_t g = 0; g < groups; ++g) to_float(q + g * dim, own.queries.data() + g * padded, dim, 1.0f);
  for (int64_t at = first; at < last;) {
    const int64_t within = at % block_size;
    const int64_t count = std::min({RUN, last - at, block_size - within});
    const int64_t row = table[at / block_size] * block_size + within;
    for (int64_t t = 0; t < count; t += TILE) score(q, keys, row + t, std::min(TILE, count - t), groups, t, scale, own);
    for (int64_t g = 0; g < groups; ++g) {
      float* weights = own.weights.data() + g * RUN;
      Vector best = Vector{} + peak[g], total = {};
      for (int64_t t = 0; t < count; t += TILE) best = larger(best, load(weights + t));
      const float top = largest(best);
      for (int64_t t = 0; t < count; t += TILE) {
        const Vector weight =
            ORDER < Whole{} + static_cast<int32_t>(count - t) ? exponential(load(weights + t) - top) : Vector{};
        store(weights + t, weight);
        total += weight;
      }
      own.fades[g] = exponential(Vector{} + (peak[g] - top))[0];
      sum[g] = sum[g] * own.fades[g] + sum_of(total);
      peak[g] = top;
    }
    if constexpr (DIM) {
      accumulate_all(acc, own.fades.data(), own.weights.data(), values, row, count, groups);
    } else {
      for (int64_t t = 0; t < count; t += TILE) {
        values.load(row + t, std::min(TILE, count - t), own.tile.data());
        for (int64_t g = 0; g < groups; ++g) {
          values.fetch(row + t, g, groups);
          accumulate(acc + g * padded, t ? 1.0f : own.fades[g], own.weights.data() + g * RUN + t, own.tile.data(), padded);
        }
      }
    }
    at += count;
  }
}

template <typename T, typename Q, int64_t DIM>
void attend_sequences(const at::Tensor& q, const at::Tensor& cache, const float* scales, const at::Tensor& table,
                      int64_t block_size, const at::Tensor& lengths, at::Tensor& out) {
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
  // By the number of cores, not of threads, which follows what other programs leave: the result must not depend on them.
  const int64_t parts_in_all = 4 * omp_get_num_procs();
  const int64_t share = std::max(SPLIT, (total + parts_in_all - 1) / parts_in_all);

  struct Task {
    int64_t b, head, first, last;
  };
  std::vector<Task> tasks;
  std::vector<int64_t> begins;  // index of the first task of each (sequence, kv head)
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t h = 0; h < kv_heads; ++h) {
      begins.push_back(tasks.size());
      const int64_t parts = std::max<int64_t>(1, (length[b] + share - 1) / share);
      for (int64_t p = 0; p < parts; ++p) tasks.push_back({b, h, length[b] * p / parts, length[b] * (p + 1) / parts});
    }
  begins.push_back(tasks.size());
  Floats acc(tasks.size() * groups * padded);
  std::vector<float> peak(tasks.size() * groups), sum(tasks.size() * groups);

#pragma omp parallel num_threads(std::min<int64_t>(omp_get_max_threads(), tasks.size()))
  {
    Scratch<T, Q> own(groups, padded);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < static_cast<int64_t>(tasks.size()); ++i) {
      const Task& t = tasks[i];
      const int64_t k = t.head * rows, v = (kv_heads + t.head) * rows;
      const Rows<T, DIM> keys{data + k * dim, scales ? scales + k : nullptr, dim};
      const Rows<T, DIM> values{data + v * dim, scales ? scales + v : nullptr, dim};
      attend(query + (t.b * heads + t.head * groups) * dim, keys, values, blocks + t.b * table.size(1), block_size, t.first,
             t.last, groups, scale, own, acc.data() + i * groups * padded, peak.data() + i * groups, sum.data() + i * groups);
    }
  }

  std::vector<float> joined(padded);
  for (int64_t unit = 0; unit < batch * kv_heads; ++unit) {
    if (length[unit / kv_heads] == 0) {
      std::fill_n(result + unit * groups * dim, groups * dim, Q(0.0f));
      continue;
    }
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
}

template <typename T, typename Q, typename... Arguments>
void attend_all(const at::Tensor& q, Arguments&&... arguments) {
  switch (q.size(2)) {
    case 64: return attend_sequences<T, Q, 64>(q, arguments...);
    case 128: return attend_sequences<T, Q, 128>(q, arguments...);
    default: return attend_sequences<T, Q, 0>(q, arguments...);
  }
}

// Whether every sequence's rows are rows of the cache.
bool within(const at::Tensor& cache, const at::Tensor& table, int64_t block_size, const at::Tensor& lengths) {
  const int64_t blocks = cache.size(2) / block_size;
  const int32_t* block = table.const_data_ptr<int32_t>();
  const int64_t* length = lengths.const_data_ptr<int64_t>();
  for (int64_t b = 0; b < table.size(0); ++b, block += table.size(1)) {
    const int64_t used = (length[b] + block_size - 1) / block_size;
    if (length[b] < 0 || used > table.size(1)) return false;
    if (std::any_of(block, block + used, [&](int32_t one) { return one < 0 || one >= blocks; })) return false;
  }
  return true;
}

}  // namespace

// q (sequences, heads, head_dim), float32 or bfloat16; cache (2, kv_heads, rows, head_dim), keys then values, float32, bfloat16
// or int8; scales (2, kv_heads, rows) float32, for int8 alone; table (sequences, blocks) int32; lengths (sequences) int64
// -> as q, zero where the length is 0.
at::Tensor decode_attention(const at::Tensor& queries, const at::Tensor& cache, const std::optional<at::Tensor>& scales,
                            const at::Tensor& table, int64_t block_size, const at::Tensor& lengths) {
  const at::Tensor q = queries.contiguous();
  TORCH_CHECK(cache.is_contiguous() && table.is_contiguous() && lengths.is_contiguous());
  TORCH_CHECK(cache.scalar_type() != at::kChar || scales, "an int8 cache needs scales");
  TORCH_CHECK(table.size(0) == q.size(0) && lengths.numel() == q.size(0));
  TORCH_CHECK(q.size(1) % cache.size(1) == 0 && q.size(2) == cache.size(3));
  TORCH_CHECK(within(cache, table, block_size, lengths), "a sequence goes beyond the cache or its block table");
  at::Tensor out = q.new_empty(q.sizes());
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
