// Attention of single queries over rows of a paged cache: what a decode step runs, once for all of its sequences.
//
// A cache is head-major, (kv_heads, blocks * block_size, head_dim). The keys of a sequence are the first `length` rows of the
// blocks in its table. One pass over keys and values with a running maximum (arXiv 2205.14135), float32 throughout; long
// sequences are split over the threads and the parts joined by their log-sum-exps.
#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/util/BFloat16.h>
#include <omp.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <vector>

namespace {

constexpr int64_t LANES = 16;
constexpr int64_t TILE = 16;     // rows converted to float32 at a time
constexpr int64_t SPLIT = 1024;  // fewest rows that are worth a task of their own
constexpr float LOWEST = -std::numeric_limits<float>::infinity();

typedef float Vector __attribute__((vector_size(LANES * sizeof(float)), aligned(4)));

inline Vector load(const float* from) { return *reinterpret_cast<const Vector*>(from); }
inline void store(float* to, Vector x) { *reinterpret_cast<Vector*>(to) = x; }

inline void to_float(const float* from, float* to, int64_t n, float) { std::memcpy(to, from, n * sizeof(float)); }

inline void to_float(const c10::BFloat16* from, float* to, int64_t n, float) {
  const uint16_t* bits = reinterpret_cast<const uint16_t*>(from);
  uint32_t* wide = reinterpret_cast<uint32_t*>(to);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) wide[i] = static_cast<uint32_t>(bits[i]) << 16;
}

inline void to_float(const int8_t* from, float* to, int64_t n, float scale) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) to[i] = scale * static_cast<float>(from[i]);
}

template <typename T>
struct Rows {  // of one kv head
  const T* data;
  const float* scales;  // one a row, of an int8 cache
  int64_t dim, padded;

  void load(int64_t row, int64_t count, float* to) const {
    for (int64_t r = row; r < row + count; ++r, to += padded) to_float(data + r * dim, to, dim, scales ? scales[r] : 1.0f);
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

// e^x for x <= 0, to about 1e-7 relative: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2].
inline Vector exponential(Vector x) {
  typedef int32_t Whole __attribute__((vector_size(LANES * sizeof(int32_t))));
  const Vector lowest = Vector{} - 87.0f;
  x = x > lowest ? x : lowest;
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
// Into acc (groups, padded), peak and sum (groups). `tile` has room for (TILE, padded) and (groups, TILE), and is all zeros.
template <typename T>
void attend(const float* q, const Rows<T>& keys, const Rows<T>& values, const int32_t* table, int64_t block_size, int64_t first,
            int64_t last, int64_t groups, float* tile, float* acc, float* peak, float* sum) {
  const int64_t padded = keys.padded;
  std::fill(peak, peak + groups, LOWEST);
  float* weights = tile + TILE * padded;
  float fades[groups];
  for (int64_t at = first; at < last;) {
    const int64_t within = at % block_size;
    const int64_t count = std::min({TILE, last - at, block_size - within});
    const int64_t row = table[at / block_size] * block_size + within;
    keys.load(row, count, tile);
    for (int64_t g = 0; g < groups; ++g) {
      float score[TILE];
      store(score, dots(q + g * padded, tile, padded));
      float best = peak[g];
      for (int64_t r = 0; r < count; ++r) best = std::max(best, score[r]);
      float* weight = weights + g * TILE;
      store(weight, exponential(load(score) - best));
      for (int64_t r = count; r < TILE; ++r) weight[r] = 0.0f;
      float total = 0.0f;
      for (int64_t r = 0; r < TILE; ++r) total += weight[r];
      fades[g] = std::exp(peak[g] - best);
      sum[g] = sum[g] * fades[g] + total;
      peak[g] = best;
    }
    values.load(row, count, tile);
    for (int64_t g = 0; g < groups; ++g) accumulate(acc + g * padded, fades[g], weights + g * TILE, tile, padded);
    at += count;
  }
}

template <typename T>
void attend_all(const at::Tensor& q, const at::Tensor& cache, const float* scales, const at::Tensor& table, int64_t block_size,
                const at::Tensor& lengths, at::Tensor& out) {
  const int64_t batch = q.size(0), heads = q.size(1), dim = q.size(2), kv_heads = cache.size(1), rows = cache.size(2);
  const int64_t groups = heads / kv_heads;
  const int32_t* blocks = table.const_data_ptr<int32_t>();
  const int64_t* length = lengths.const_data_ptr<int64_t>();
  const T* data = cache.const_data_ptr<T>();
  const float* query = q.const_data_ptr<float>();
  float* result = out.data_ptr<float>();

  const int64_t threads = omp_get_max_threads();
  int64_t total = 0;
  for (int64_t b = 0; b < batch; ++b) total += length[b] * kv_heads;
  const int64_t share = std::max(SPLIT, (total + 4 * threads - 1) / (4 * threads));

  struct Task { int64_t b, head, first, last; };
  std::vector<Task> tasks;
  std::vector<int64_t> begins;  // of the tasks of each (sequence, kv head)
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t h = 0; h < kv_heads; ++h) {
      begins.push_back(tasks.size());
      const int64_t parts = std::max<int64_t>(1, (length[b] + share - 1) / share);
      for (int64_t p = 0; p < parts; ++p) tasks.push_back({b, h, length[b] * p / parts, length[b] * (p + 1) / parts});
    }
  begins.push_back(tasks.size());
  const int64_t padded = (dim + LANES - 1) / LANES * LANES;
  std::vector<float> acc(tasks.size() * groups * padded), peak(tasks.size() * groups), sum(tasks.size() * groups);

#pragma omp parallel
  {
    std::vector<float> tile(TILE * padded + groups * TILE), queries(groups * padded);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < static_cast<int64_t>(tasks.size()); ++i) {
      const Task& t = tasks[i];
      for (int64_t g = 0; g < groups; ++g)
        std::copy_n(query + (t.b * heads + t.head * groups + g) * dim, dim, queries.data() + g * padded);
      const int64_t k = t.head * rows, v = (kv_heads + t.head) * rows;
      const Rows<T> keys{data + k * dim, scales ? scales + k : nullptr, dim, padded};
      const Rows<T> values{data + v * dim, scales ? scales + v : nullptr, dim, padded};
      attend(queries.data(), keys, values, blocks + t.b * table.size(1), block_size, t.first, t.last, groups, tile.data(),
             acc.data() + i * groups * padded, peak.data() + i * groups, sum.data() + i * groups);
    }
  }

  for (int64_t unit = 0; unit < batch * kv_heads; ++unit)
    for (int64_t g = 0; g < groups; ++g) {
      float best = LOWEST, whole = 0.0f;
      for (int64_t i = begins[unit]; i < begins[unit + 1]; ++i) best = std::max(best, peak[i * groups + g]);
      float* to = result + (unit * groups + g) * dim;
      std::fill(to, to + dim, 0.0f);
      for (int64_t i = begins[unit]; i < begins[unit + 1]; ++i) {
        const float fade = std::exp(peak[i * groups + g] - best);
        whole += fade * sum[i * groups + g];
        for (int64_t d = 0; d < dim; ++d) to[d] += fade * acc[(i * groups + g) * padded + d];
      }
      for (int64_t d = 0; d < dim; ++d) to[d] /= whole;
    }
}

// q (sequences, heads, head_dim) float32, already scaled; cache (2, kv_heads, rows, head_dim) of float32, bfloat16 or int8;
// scales (2, kv_heads, rows) float32 for int8; table (sequences, blocks) int32; lengths (sequences) int64, at least 1.
at::Tensor decode_attention(const at::Tensor& q, const at::Tensor& cache, const std::optional<at::Tensor>& scales,
                            const at::Tensor& table, int64_t block_size, const at::Tensor& lengths) {
  TORCH_CHECK(q.is_contiguous() && cache.is_contiguous() && table.is_contiguous() && lengths.is_contiguous());
  at::Tensor out = at::empty_like(q);
  const float* factors = scales ? scales->const_data_ptr<float>() : nullptr;
  if (cache.scalar_type() == at::kFloat) attend_all<float>(q, cache, nullptr, table, block_size, lengths, out);
  else if (cache.scalar_type() == at::kBFloat16) attend_all<c10::BFloat16>(q, cache, nullptr, table, block_size, lengths, out);
  else {
    TORCH_CHECK(cache.scalar_type() == at::kChar && factors != nullptr, "an int8 cache needs scales");
    attend_all<int8_t>(q, cache, factors, table, block_size, lengths, out);
  }
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(yoco_u, m) {
  m.def("decode_attention(Tensor q, Tensor cache, Tensor? scales, Tensor table, int block_size, Tensor lengths) -> Tensor");
}

TORCH_LIBRARY_IMPL(yoco_u, CPU, m) { m.impl("decode_attention", &decode_attention); }
