// Block-sparse attention on a CPU: the flash recurrence over the key blocks that a query block sees; and the second pass
// of AdaSpa's search, which sums the softmax over blocks.
//
// Keys come transposed and values as they are, a block at a time, so that each product is one call of oneDNN's small
// matrix kernel ("brgemm"), in float32 or in bfloat16 with float32 sums; bfloat16 comes in pairs of rows, as its
// instructions take it. The softmax is a plain loop that the compiler vectorises.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/native/CPUBlas.h>
#include <torch/library.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <type_traits>
#include <vector>

namespace {

constexpr float LOWEST = -1e30f;  // finite, as the loops are compiled without infinities
constexpr int64_t KEYS_AT_ONCE = 512;

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

template <typename T>
void attend(const T* q, const T* kt, const T* v, const int32_t* starts, const int32_t* keys, const int32_t* sizes,
            T* out, int64_t heads, int64_t queries, int64_t blocks, int64_t b, int64_t d, float scale) {
  constexpr bool is_vnni = !std::is_same_v<T, float>;
  const int64_t at_once = std::max<int64_t>(1, KEYS_AT_ONCE / b);
  const int64_t width = at_once * b;
  at::parallel_for(0, heads * queries, 1, [=](int64_t begin, int64_t end) {
    std::vector<float> scores(b * width), sum(b), top(b), acc(b * d);
    std::vector<T> weights(is_vnni ? b * width : 0);
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
          at::native::cpublas::brgemm(b, b, d, d, b, width, false, q_row, kt + (base + key) * b * d, tile, is_vnni);
          for (int64_t i = 0; i < b && sizes[key] < b; ++i)
            std::fill(tile + i * width + sizes[key], tile + i * width + b, LOWEST);
        }
        const int64_t columns = count * b;
        for (int64_t i = 0; i < b; ++i) {
          float* s = scores.data() + i * width;
          float highest = LOWEST;
          for (int64_t c = 0; c < columns; ++c) highest = std::max(highest, s[c]);
          const float now = std::max(top[i], highest * scale);
          const float factor = exp_of(top[i] - now);
          float total = 0.0f;
          T* w;
          if constexpr (is_vnni)
            w = weights.data() + i * width;
          else
            w = s;
          for (int64_t c = 0; c < columns; ++c) {
            const float e = exp_of(s[c] * scale - now);
            put(w[c], e);
            total += e;
          }
          sum[i] = sum[i] * factor + total;
          top[i] = now;
          float* a = acc.data() + i * d;
          for (int64_t c = 0; c < d; ++c) a[c] *= factor;
        }
        for (int64_t j = 0; j < count; ++j) {
          const T* value = v + (base + keys[first + j]) * b * d;
          if constexpr (is_vnni)
            at::native::cpublas::brgemm(b, d, b, width, d, d, true, weights.data() + j * b, value, acc.data(), true);
          else
            at::native::cpublas::brgemm(b, d, b, width, d, d, true, scores.data() + j * b, value, acc.data(), false);
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
        at::native::cpublas::brgemm(b, b, d, d, b, b, false, q + row * b * d, kt + (base + key) * b * d,
                                    scores.data(), is_vnni);
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

}  // namespace

TORCH_LIBRARY_FRAGMENT(vgen, m) {
  m.def("block_sparse(Tensor q, Tensor kt, Tensor v, Tensor starts, Tensor keys, Tensor sizes, Tensor(a!) out, "
        "float scale) -> ()");
  m.def("block_mass(Tensor q, Tensor kt, Tensor lse, Tensor sizes, Tensor(a!) out, float scale) -> ()");
}
TORCH_LIBRARY_IMPL(vgen, CPU, m) {
  m.impl("block_sparse", &block_sparse);
  m.impl("block_mass", &block_mass);
}
