// Dense attention on a CPU in bfloat16: the flash recurrence over wide tiles of keys, with float32 sums.
//
// Keys and values are first laid out as the instructions for bfloat16 take them, in pairs of rows, so that each product
// is one call of oneDNN's small matrix kernel ("brgemm"); queries are read where they lie. The softmax is a plain loop
// that the compiler vectorises.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <vector>

namespace {

using at::BFloat16;
using at::native::cpublas::brgemm;

constexpr float LOWEST = -1e30f;  // finite, as the loops are compiled without infinities
constexpr int64_t QUERIES = 64, KEYS = 512;

// exp(x) for x <= 0 within 2 units in the last place: 2^n times a polynomial of the rest (Cephes).
inline float exp_of(float x) {
  x = std::max(x, -87.0f);
  const int32_t exponent = static_cast<int32_t>(x * 1.44269504f - 0.5f);
  const float n = static_cast<float>(exponent);
  x -= n * 0.693359375f;
  x -= n * -2.12194440e-4f;
  float y = 1.9875691500e-4f;
  y = y * x + 1.3981999507e-3f;
  y = y * x + 8.3334519073e-3f;
  y = y * x + 4.1665795894e-2f;
  y = y * x + 1.6666665459e-1f;
  y = y * x + 5.0000001201e-1f;
  y = y * x * x + x + 1.0f;
  return y * std::bit_cast<float>((exponent + 127) << 23);
}

// The bits of the nearest bfloat16 of a finite number, ties to even.
inline uint16_t rounded(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

// One head's tokens, `stride` numbers apart.
struct Rows {
  const BFloat16* first;
  int64_t stride;
  const BFloat16* at(int64_t token) const { return first + token * stride; }
};

Rows rows_of(const at::Tensor& x, int64_t head) {
  const int64_t heads = x.size(1);
  return {x.const_data_ptr<BFloat16>() + head / heads * x.stride(0) + head % heads * x.stride(1), x.stride(2)};
}

// Keys [n, d] as [d / 2, n, 2].
void lay_out_keys(Rows keys, int64_t first, int64_t n, int64_t d, BFloat16* to) {
  for (int64_t key = 0; key < n; ++key) {
    const BFloat16* from = keys.at(first + key);
    for (int64_t c = 0; c < d; ++c) to[(c / 2 * n + key) * 2 + c % 2] = from[c];
  }
}

// Values [n, d] as [(n + 1) / 2, d, 2], with zeros behind an odd number.
void lay_out_values(Rows values, int64_t first, int64_t n, int64_t d, BFloat16* to) {
  for (int64_t key = 0; key < n + n % 2; ++key) {
    const BFloat16* from = key < n ? values.at(first + key) : nullptr;
    for (int64_t c = 0; c < d; ++c) to[(key / 2 * d + c) * 2 + key % 2] = from ? from[c] : BFloat16(0.0f);
  }
}

// What a thread works in.
struct Scratch {
  explicit Scratch(int64_t d)
      : scores(QUERIES * KEYS), weights(QUERIES * KEYS), acc(QUERIES * d), sum(QUERIES), top(QUERIES) {}
  std::vector<float> scores;
  std::vector<BFloat16> weights;
  std::vector<float> acc, sum, top;
};

// Exponentiates a row of scores against its highest one so far, and scales what was summed before to that.
void soften(Scratch& s, int64_t row, int64_t n, int64_t d, float scale) {
  const float* scores = s.scores.data() + row * KEYS;
  uint16_t* weights = reinterpret_cast<uint16_t*>(s.weights.data() + row * KEYS);
  float highest = LOWEST;
  for (int64_t c = 0; c < n; ++c) highest = std::max(highest, scores[c]);
  const float now = std::max(s.top[row], highest * scale);
  const float factor = exp_of(s.top[row] - now);
  float total = 0.0f;
  for (int64_t c = 0; c < n; ++c) {
    const float e = exp_of(scores[c] * scale - now);
    weights[c] = rounded(e);
    total += e;
  }
  if (n % 2) weights[n] = 0;
  s.sum[row] = s.sum[row] * factor + total;
  s.top[row] = now;
  float* acc = s.acc.data() + row * d;
  for (int64_t c = 0; c < d; ++c) acc[c] *= factor;
}

// q [B, H, L, D], k and v [B, H, S, D] in bfloat16, D even and next to each other; returns [B, H, L, D], which lies in
// memory as [B, L, H, D].
at::Tensor dense_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, double scale) {
  const int64_t heads = q.size(0) * q.size(1), length = q.size(2), count = k.size(2), d = q.size(3);
  const int64_t tiles = (count + KEYS - 1) / KEYS, parts = (length + QUERIES - 1) / QUERIES;
  const int64_t room = (count + 1) * d;  // of a head
  at::Tensor out = at::empty({q.size(0), length, q.size(1), d}, q.options()).transpose(1, 2);
  at::Tensor laid_out = at::empty({2, heads * room}, q.options());
  BFloat16* keys = laid_out.mutable_data_ptr<BFloat16>();
  BFloat16* values = keys + heads * room;
  at::parallel_for(0, heads * tiles, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t head = task / tiles, first = task % tiles * KEYS, n = std::min(KEYS, count - first);
      lay_out_keys(rows_of(k, head), first, n, d, keys + head * room + first * d);
      lay_out_values(rows_of(v, head), first, n, d, values + head * room + first * d);
    }
  });
  at::parallel_for(0, heads * parts, 1, [&](int64_t begin, int64_t end) {
    Scratch s(d);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t head = task / parts, start = task % parts * QUERIES, m = std::min(QUERIES, length - start);
      const Rows queries = rows_of(q, head), outputs = rows_of(out, head);
      std::fill(s.acc.begin(), s.acc.end(), 0.0f);
      std::fill(s.sum.begin(), s.sum.end(), 0.0f);
      std::fill(s.top.begin(), s.top.end(), LOWEST);
      for (int64_t first = 0; first < count; first += KEYS) {
        const int64_t n = std::min(KEYS, count - first);
        brgemm(m, n, d, queries.stride, n, KEYS, false, queries.at(start), keys + head * room + first * d,
               s.scores.data(), true);
        for (int64_t row = 0; row < m; ++row) soften(s, row, n, d, static_cast<float>(scale));
        brgemm(m, d, n + n % 2, KEYS, d, d, true, s.weights.data(), values + head * room + first * d, s.acc.data(), true);
      }
      for (int64_t row = 0; row < m; ++row) {
        uint16_t* to = reinterpret_cast<uint16_t*>(const_cast<BFloat16*>(outputs.at(start + row)));
        const float share = 1.0f / s.sum[row];
        for (int64_t c = 0; c < d; ++c) to[c] = rounded(s.acc[row * d + c] * share);
      }
    }
    at::native::cpublas::brgemm_release(true);
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(vgen, m) { m.def("dense_attention(Tensor q, Tensor k, Tensor v, float scale) -> Tensor"); }
TORCH_LIBRARY_IMPL(vgen, CPU, m) { m.impl("dense_attention", &dense_attention); }
