// Attention on a CPU: block-sparse and dense, by the flash recurrence over tiles of keys; and the second pass of AdaSpa's
// search, which sums the softmax over blocks.
//
// Keys come transposed and values as they are, so that each product is one call of oneDNN's small matrix kernel
// ("brgemm"), in float32 or in bfloat16 with float32 sums; bfloat16 comes in pairs of rows, as its instructions take it.
// The softmax is a plain loop that the compiler vectorises.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <type_traits>
#include <vector>

namespace {

using at::native::cpublas::brgemm;

constexpr float LOWEST = -1e30f;  // finite, as the loops are compiled without infinities
constexpr int64_t QUERIES_AT_ONCE = 64, KEYS_AT_ONCE = 512;

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

inline void put(float& place, float x) { place = x; }

// Round a finite number to the nearest bfloat16, ties to even; at::BFloat16's own rounding also asks for NaN, and no
// compiler vectorises that.
inline void put(at::BFloat16& place, float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  place.x = static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

// Exponentiates a row of n scores against its highest one so far, and scales what was summed before, acc [d], to that.
// Weights w in float32 may take the place of the scores s.
template <typename T>
inline void soften(const float* s, T* w, int64_t n, float scale, float& top, float& sum, float* acc, int64_t d) {
  float highest = LOWEST;
  for (int64_t c = 0; c < n; ++c) highest = std::max(highest, s[c]);
  const float now = std::max(top, highest * scale);
  const float factor = exp_of(top - now);
  float total = 0.0f;
  for (int64_t c = 0; c < n; ++c) {
    const float e = exp_of(s[c] * scale - now);
    put(w[c], e);
    total += e;
  }
  sum = sum * factor + total;
  top = now;
  for (int64_t c = 0; c < d; ++c) acc[c] *= factor;
}

template <typename T>
void attend(const T* q, const T* kt, const T* v, const int32_t* starts, const int32_t* keys, const int32_t* sizes,
            T* out, int64_t heads, int64_t queries, int64_t blocks, int64_t b, int64_t d, float scale) {
  constexpr bool is_vnni = !std::is_same_v<T, float>;
  const int64_t at_once = std::max<int64_t>(1, KEYS_AT_ONCE / b);
  const int64_t width = at_once * b;
  at::parallel_for(0, heads * queries, 1, [=](int64_t begin, int64_t end) {
    std::vector<float> scores(b * width), sum(b), top(b), acc(b * d);
    std::vector<T> rounded(is_vnni ? b * width : 0);
    T* weights;
    if constexpr (is_vnni)
      weights = rounded.data();
    else
      weights = scores.data();
    for (int64_t row = begin; row < end; ++row) {
      const int64_t base = row / queries * blocks;
      const T* q_row = q + row * b * d;
      std::fill(acc.begin(), acc.end(), 0.0f);
      std::fill(sum.begin(), sum.end(), 0.0f);
      std::fill(top.begin(), top.end(), LOWEST);
      for (int64_t first = starts[row]; first < starts[row + 1]; first += at_once) {
        const int64_t count = std::min<int64_t>(at_once, starts[row + 1] - first);
        for (int64_t j = 0; j < count; ++j) {
          const int64_t key = keys[first + j];
          float* tile = scores.data() + j * b;
          brgemm(b, b, d, d, b, width, false, q_row, kt + (base + key) * b * d, tile, is_vnni);
          for (int64_t i = 0; i < b && sizes[key] < b; ++i)
            std::fill(tile + i * width + sizes[key], tile + i * width + b, LOWEST);
        }
        for (int64_t i = 0; i < b; ++i)
          soften(scores.data() + i * width, weights + i * width, count * b, scale, top[i], sum[i],
                 acc.data() + i * d, d);
        for (int64_t j = 0; j < count; ++j) {
          const T* value = v + (base + keys[first + j]) * b * d;
          brgemm(b, d, b, width, d, d, true, weights + j * b, value, acc.data(), is_vnni);
        }
      }
      for (int64_t i = 0; i < b; ++i)
        for (int64_t c = 0; c < d; ++c) out[(row * b + i) * d + c] = static_cast<T>(acc[i * d + c] / sum[i]);
    }
    at::native::cpublas::brgemm_release(is_vnni);
  });
}

// The mass of each block: the sums of exp(q k * scale - lse) over its pairs, a tile of scores at a time. A score may be
// above its row's lse, which can be of an earlier step: up to HEADROOM, which is taken off before and put back after.
template <typename T>
void mass(const T* q, const T* kt, const float* lse, const int32_t* sizes, float* out, int64_t heads, int64_t blocks,
          int64_t b, int64_t d, float scale) {
  constexpr bool is_vnni = !std::is_same_v<T, float>;
  constexpr float HEADROOM = 20.0f;
  at::parallel_for(0, heads * blocks, 1, [=](int64_t begin, int64_t end) {
    std::vector<float> scores(b * b);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t base = row / blocks * blocks;
      for (int64_t key = 0; key < blocks; ++key) {
        brgemm(b, b, d, d, b, b, false, q + row * b * d, kt + (base + key) * b * d, scores.data(), is_vnni);
        float total = 0.0f;
        for (int64_t i = 0; i < sizes[row - base]; ++i) {
          const float* s = scores.data() + i * b;
          const float rest = lse[row * b + i] + HEADROOM;
          for (int64_t c = 0; c < sizes[key]; ++c) total += exp_of(std::min(s[c] * scale - rest, 0.0f));
        }
        out[row * blocks + key] = total * std::exp(HEADROOM);
      }
    }
    at::native::cpublas::brgemm_release(is_vnni);
  });
}

// q [heads, blocks, b, d]; kt [heads, blocks, d, b], in pairs of rows where it is bfloat16; lse [heads, blocks, b] and
// out [heads, blocks, blocks] in float32. All contiguous.
void block_mass(const at::Tensor& q, const at::Tensor& kt, const at::Tensor& lse, const at::Tensor& sizes,
                at::Tensor out, double scale) {
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    mass<T>(q.const_data_ptr<T>(), kt.const_data_ptr<T>(), lse.const_data_ptr<float>(), sizes.const_data_ptr<int32_t>(),
            out.mutable_data_ptr<float>(), q.size(0), q.size(1), q.size(2), q.size(3), static_cast<float>(scale));
  };
  if (q.scalar_type() == at::kBFloat16)
    run(at::BFloat16());
  else
    run(float());
}

// q and out [heads, queries, b, d]; kt [heads, blocks, d, b] and v [heads, blocks, b, d], in pairs of rows where they are
// bfloat16; the key blocks of row r are keys[starts[r]:starts[r + 1]], of which sizes[key] keys count. All contiguous.
void block_sparse(const at::Tensor& q, const at::Tensor& kt, const at::Tensor& v, const at::Tensor& starts,
                  const at::Tensor& keys, const at::Tensor& sizes, at::Tensor out, double scale) {
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    attend<T>(q.const_data_ptr<T>(), kt.const_data_ptr<T>(), v.const_data_ptr<T>(), starts.const_data_ptr<int32_t>(),
              keys.const_data_ptr<int32_t>(), sizes.const_data_ptr<int32_t>(), out.mutable_data_ptr<T>(), q.size(0),
              q.size(1), sizes.size(0), q.size(2), q.size(3), static_cast<float>(scale));
  };
  if (q.scalar_type() == at::kBFloat16)
    run(at::BFloat16());
  else
    run(float());
}

// One head's tokens, `stride` numbers apart.
struct Rows {
  const at::BFloat16* first;
  int64_t stride;
  const at::BFloat16* at(int64_t token) const { return first + token * stride; }
};

Rows rows_of(const at::Tensor& x, int64_t head) {
  const int64_t heads = x.size(1);
  return {x.const_data_ptr<at::BFloat16>() + head / heads * x.stride(0) + head % heads * x.stride(1), x.stride(2)};
}

// Keys [n, d] as [d / 2, n, 2].
void lay_out_keys(Rows keys, int64_t first, int64_t n, int64_t d, at::BFloat16* to) {
  for (int64_t key = 0; key < n; ++key) {
    const at::BFloat16* from = keys.at(first + key);
    for (int64_t c = 0; c < d; ++c) to[(c / 2 * n + key) * 2 + c % 2] = from[c];
  }
}

// Values [n, d] as [(n + 1) / 2, d, 2], with zeros behind an odd number.
void lay_out_values(Rows values, int64_t first, int64_t n, int64_t d, at::BFloat16* to) {
  for (int64_t key = 0; key < n + n % 2; ++key) {
    const at::BFloat16* from = key < n ? values.at(first + key) : nullptr;
    for (int64_t c = 0; c < d; ++c) to[(key / 2 * d + c) * 2 + key % 2] = from ? from[c] : at::BFloat16(0.0f);
  }
}

// q [B, H, L, D], k and v [B, H, S, D] in bfloat16, D even and next to each other; returns [B, H, L, D], which lies in
// memory as [B, L, H, D].
at::Tensor dense_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, double scale) {
  const int64_t heads = q.size(0) * q.size(1), length = q.size(2), count = k.size(2), d = q.size(3);
  const int64_t tiles = (count + KEYS_AT_ONCE - 1) / KEYS_AT_ONCE;
  const int64_t parts = (length + QUERIES_AT_ONCE - 1) / QUERIES_AT_ONCE;
  const int64_t room = (count + 1) * d;  // of a head
  const float factor = static_cast<float>(scale);
  at::Tensor out = at::empty({q.size(0), length, q.size(1), d}, q.options()).transpose(1, 2);
  at::Tensor laid_out = at::empty({2, heads * room}, q.options());
  at::BFloat16* result = out.mutable_data_ptr<at::BFloat16>();
  at::BFloat16* keys = laid_out.mutable_data_ptr<at::BFloat16>();
  at::BFloat16* values = keys + heads * room;
  at::parallel_for(0, heads * tiles, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t head = task / tiles, first = task % tiles * KEYS_AT_ONCE, n = std::min(KEYS_AT_ONCE, count - first);
      lay_out_keys(rows_of(k, head), first, n, d, keys + head * room + first * d);
      lay_out_values(rows_of(v, head), first, n, d, values + head * room + first * d);
    }
  });
  at::parallel_for(0, heads * parts, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> scores(QUERIES_AT_ONCE * KEYS_AT_ONCE), acc(QUERIES_AT_ONCE * d);
    std::vector<float> sum(QUERIES_AT_ONCE), top(QUERIES_AT_ONCE);
    std::vector<at::BFloat16> weights(QUERIES_AT_ONCE * KEYS_AT_ONCE);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t head = task / parts, start = task % parts * QUERIES_AT_ONCE;
      const int64_t m = std::min(QUERIES_AT_ONCE, length - start);
      const Rows queries = rows_of(q, head);
      std::fill(acc.begin(), acc.end(), 0.0f);
      std::fill(sum.begin(), sum.end(), 0.0f);
      std::fill(top.begin(), top.end(), LOWEST);
      for (int64_t first = 0; first < count; first += KEYS_AT_ONCE) {
        const int64_t n = std::min(KEYS_AT_ONCE, count - first), even = n + n % 2, at = head * room + first * d;
        brgemm(m, n, d, queries.stride, n, KEYS_AT_ONCE, false, queries.at(start), keys + at, scores.data(), true);
        for (int64_t i = 0; i < m; ++i) {
          at::BFloat16* w = weights.data() + i * KEYS_AT_ONCE;
          soften(scores.data() + i * KEYS_AT_ONCE, w, n, factor, top[i], sum[i], acc.data() + i * d, d);
          if (n < even) w[n] = at::BFloat16(0.0f);
        }
        brgemm(m, d, even, KEYS_AT_ONCE, d, d, true, weights.data(), values + at, acc.data(), true);
      }
      for (int64_t i = 0; i < m; ++i) {
        at::BFloat16* to = result + ((head / q.size(1) * length + start + i) * q.size(1) + head % q.size(1)) * d;
        for (int64_t c = 0; c < d; ++c) put(to[c], acc[i * d + c] / sum[i]);
      }
    }
    at::native::cpublas::brgemm_release(true);
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(vgen, m) {
  m.def("block_sparse(Tensor q, Tensor kt, Tensor v, Tensor starts, Tensor keys, Tensor sizes, Tensor(a!) out, "
        "float scale) -> ()");
  m.def("block_mass(Tensor q, Tensor kt, Tensor lse, Tensor sizes, Tensor(a!) out, float scale) -> ()");
  m.def("dense_attention(Tensor q, Tensor k, Tensor v, float scale) -> Tensor");
}
TORCH_LIBRARY_IMPL(vgen, CPU, m) {
  m.impl("block_sparse", &block_sparse);
  m.impl("block_mass", &block_mass);
  m.impl("dense_attention", &dense_attention);
}
