// Linear layers of integers on a CPU: tokens are rounded to int8, and multiplied by weights of int8 or packed int4.
//
// Products are calls of oneDNN's small matrix kernel ("brgemm") with VNNI's instructions, which multiply unsigned by
// signed bytes: tokens are stored with 128 added, which the sums of the weights take off again. Weights are laid out
// for it some channels at a time, and int4 is unpacked on the way, so that in memory they stay as they are stored; sums
// are scaled while they are in the cache.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <optional>
#include <utility>
#include <vector>

namespace {

constexpr int64_t ROWS = 64, COLUMNS = 64;   // of a product
constexpr int64_t MOST_COLUMNS = 256;        // that see a tile of tokens while it is in the cache
constexpr int64_t VALUES_AT_ONCE = 1 << 15;  // fewer are not worth another thread
constexpr float TINY = 1e-30f;               // the smallest maximum that is not taken for zeros
constexpr int32_t OFFSET = 128;
// 1.5 * 2^23: added to a small number it leaves the nearest integer, ties to even, in the low bits of the sum, which
// compilers vectorise, and std::nearbyint they don't.
constexpr float ROUNDING = 12582912.0f;

// Memory of this thread's own for one use, kept from call to call, so that its pages are not made anew each time.
enum class Use { VALUES, CHANNELS, WEIGHTS, SUMS, PRODUCTS };

template <typename T, Use USE>
T* scratch(int64_t count) {
  thread_local std::vector<T> memory;
  if (static_cast<int64_t>(memory.size()) < count) memory.resize(count);
  return memory.data();
}

inline int64_t whole_words(int64_t bytes) { return (bytes + 3) / 4 * 4; }

// One token x [k] to bytes [width], with `values` [k] for what comes in between; returns its scale, which is its largest
// value / 127. The bits of |x| order as the numbers do, with what is not finite on top, so that such a token has a scale
// that is not finite, and products that are not. A function of its own, as bytes may be anything to a compiler, the
// bounds of a loop too, if these are in memory.
template <typename T>
float quantize_row(const T* __restrict x, uint8_t* __restrict bytes, float* __restrict values, int64_t k,
                   int64_t width) {
  uint32_t most = std::bit_cast<uint32_t>(TINY);
  for (int64_t i = 0; i < k; ++i) {
    values[i] = static_cast<float>(x[i]);
    most = std::max(most, std::bit_cast<uint32_t>(values[i]) & 0x7FFFFFFFu);
  }
  const float scale = std::bit_cast<float>(most) / 127.0f, inverse = 1.0f / scale;
  // Apart from the sum, with which it would be one operation that rounds once.
  for (int64_t i = 0; i < k; ++i) values[i] *= inverse;
  for (int64_t i = 0; i < k; ++i)
    bytes[i] = static_cast<uint8_t>(std::bit_cast<uint32_t>(values[i] + ROUNDING) + OFFSET);
  std::fill(bytes + k, bytes + width, static_cast<uint8_t>(OFFSET));
  return scale;
}

template <typename T>
void quantize_rows(const T* x, uint8_t* tokens, float* scales, int64_t rows, int64_t k) {
  const int64_t width = whole_words(k);
  at::parallel_for(0, rows, std::max<int64_t>(1, VALUES_AT_ONCE / k), [=](int64_t begin, int64_t end) {
    float* values = scratch<float, Use::VALUES>(k);
    for (int64_t row = begin; row < end; ++row)
      scales[row] = quantize_row(x + row * k, tokens + row * width, values, k, width);
  });
}

// One channel's weights as int8 [k], from int8 or from int4 with the first half of k in the low bits, times the
// multipliers of its groups, if any.
void decode(const uint8_t* __restrict weight, bool is_packed, const uint8_t* multipliers, int64_t groups, int64_t k,
            int8_t* __restrict to) {
  if (is_packed) {
    const int64_t half = k / 2;
    for (int64_t i = 0; i < half; ++i) {
      to[i] = static_cast<int8_t>((weight[i] & 15) - 8);
      to[half + i] = static_cast<int8_t>((weight[i] >> 4) - 8);
    }
  } else {
    std::memcpy(to, weight, k);
  }
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t i = g * (k / groups); i < (g + 1) * (k / groups); ++i)
      to[i] = static_cast<int8_t>(to[i] * multipliers[g]);
}

// Sixteen words, of a channel or for sixteen channels: one cache line.
constexpr int64_t LINE = 16;
typedef int32_t Line __attribute__((vector_size(4 * LINE)));
constexpr auto WITHIN = std::make_integer_sequence<int, LINE>();

// Exchanges the blocks of STEP words that lie across the diagonal of two rows.
template <int STEP, int... J>
inline void exchange(Line& upper, Line& lower, std::integer_sequence<int, J...>) {
  const Line a = upper, b = lower;
  upper = __builtin_shufflevector(a, b, (J & STEP ? LINE + J - STEP : J)...);
  lower = __builtin_shufflevector(a, b, (J & STEP ? LINE + J : J + STEP)...);
}

template <int STEP>
inline void exchange_all(Line (&rows)[LINE]) {
  for (int i = 0; i < LINE; ++i)
    if (!(i & STEP)) exchange<STEP>(rows[i], rows[i + STEP], WITHIN);
}

// `count` channels as brgemm takes them, [k / 4, COLUMNS, 4], and of each OFFSET times its sum.
void lay_out(const uint8_t* weight, bool is_packed, const uint8_t* multipliers, int64_t groups, int64_t k,
             int64_t count, int32_t* packed, int32_t* sums) {
  const int64_t words = whole_words(k) / 4, bytes = is_packed ? k / 2 : k, lines = (words + LINE - 1) / LINE;
  Line* channels = scratch<Line, Use::CHANNELS>(LINE * lines);
  for (int64_t first = 0; first < COLUMNS; first += LINE) {
    for (int64_t i = 0; i < LINE; ++i) {
      const int64_t channel = first + i;
      const bool is_there = channel < count;
      std::fill(channels + i * lines + (is_there ? lines - 1 : 0), channels + (i + 1) * lines, Line{});
      int32_t sum = 0;
      if (is_there) {
        auto* values = reinterpret_cast<int8_t*>(channels + i * lines);
        decode(weight + channel * bytes, is_packed, multipliers + channel * groups, groups, k, values);
        for (int64_t j = 0; j < k; ++j) sum += values[j];
      }
      sums[channel] = OFFSET * sum;
    }
    for (int64_t line = 0; line < lines; ++line) {
      Line rows[LINE];
      for (int64_t i = 0; i < LINE; ++i) rows[i] = channels[i * lines + line];
      exchange_all<8>(rows);
      exchange_all<4>(rows);
      exchange_all<2>(rows);
      exchange_all<1>(rows);
      for (int64_t j = 0; j < std::min(LINE, words - line * LINE); ++j)
        std::memcpy(packed + (line * LINE + j) * COLUMNS + first, &rows[j], sizeof(Line));
    }
  }
}

template <typename T>
void multiply(const uint8_t* tokens, const float* token_scales, const uint8_t* weight, bool is_packed,
              const uint8_t* multipliers, int64_t groups, const float* scale, const float* bias, T* out, int64_t m,
              int64_t n, int64_t k) {
  const int64_t width = whole_words(k), threads = at::get_num_threads();
  const int64_t tiles = (n + COLUMNS - 1) / COLUMNS;
  const int64_t span = std::clamp<int64_t>(tiles / threads, 1, MOST_COLUMNS / COLUMNS);  // tiles of columns at once
  const int64_t spans = (tiles + span - 1) / span;
  // Where there are fewer spans than threads, tokens are shared out, too, at the cost of laying out weights again.
  const int64_t row_tiles = (m + ROWS - 1) / ROWS;
  const int64_t shares = std::clamp<int64_t>((threads + spans - 1) / spans, 1, row_tiles);
  const int64_t share_rows = (row_tiles + shares - 1) / shares * ROWS;
  at::parallel_for(0, spans * shares, 1, [=](int64_t begin, int64_t end) {
    int32_t* packed = scratch<int32_t, Use::WEIGHTS>(span * width / 4 * COLUMNS);
    int32_t* sums = scratch<int32_t, Use::SUMS>(span * COLUMNS);
    int32_t* products = scratch<int32_t, Use::PRODUCTS>(ROWS * COLUMNS);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task / shares * span, last = std::min(first + span, tiles);
      for (int64_t tile = first; tile < last; ++tile) {
        const int64_t column = tile * COLUMNS, bytes = is_packed ? k / 2 : k;
        lay_out(weight + column * bytes, is_packed, multipliers + column * groups, groups, k,
                std::min(COLUMNS, n - column), packed + (tile - first) * width / 4 * COLUMNS,
                sums + (tile - first) * COLUMNS);
      }
      const int64_t top = task % shares * share_rows, bottom = std::min(top + share_rows, m);
      for (int64_t row = top; row < bottom; row += ROWS)
        for (int64_t tile = first; tile < last; ++tile) {
          const int64_t rows = std::min(ROWS, bottom - row), column = tile * COLUMNS;
          const auto* channels = reinterpret_cast<int8_t*>(packed + (tile - first) * width / 4 * COLUMNS);
          at::native::cpublas::brgemm(rows, COLUMNS, width, width, COLUMNS, COLUMNS, false, tokens + row * width,
                                      channels, products, true);
          const int32_t* sum = sums + (tile - first) * COLUMNS;
          const int64_t count = std::min(COLUMNS, n - column);
          for (int64_t i = 0; i < rows; ++i) {
            const float token_scale = token_scales[row + i];
            T* to = out + (row + i) * n + column;
            for (int64_t j = 0; j < count; ++j) {
              const auto product = static_cast<float>(products[i * COLUMNS + j] - sum[j]);
              to[j] = static_cast<T>(product * token_scale * scale[column + j] + bias[column + j]);
            }
          }
        }
    }
    at::native::cpublas::brgemm_release(true);
  });
}

// The layer: x [..., k], float32 or bfloat16, each token rounded by a scale of its own, times weight int8 [n, k] or packed
// int4 [n, k / 2], times multipliers uint8 [n, groups] of its groups, times scale float32 [n], plus bias [n], as x.
at::Tensor integer_linear(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& multipliers,
                          const at::Tensor& scale, const std::optional<at::Tensor>& bias) {
  const int64_t k = x.size(-1), n = weight.size(0), rows = x.numel() / k;
  const at::Tensor inputs = x.contiguous();
  const at::Tensor tokens = at::empty({rows, whole_words(k)}, x.options().dtype(at::kByte));
  const at::Tensor token_scales = at::empty({rows}, x.options().dtype(at::kFloat));
  const at::Tensor offset = bias ? bias->to(at::kFloat) : at::zeros_like(scale);
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.back() = n;
  at::Tensor out = at::empty(sizes, x.options());
  if (rows == 0) return out;
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    auto* bytes = tokens.mutable_data_ptr<uint8_t>();
    auto* scales = token_scales.mutable_data_ptr<float>();
    quantize_rows<T>(inputs.const_data_ptr<T>(), bytes, scales, rows, k);
    multiply<T>(bytes, scales, static_cast<const uint8_t*>(weight.const_data_ptr()),
                weight.scalar_type() == at::kByte, multipliers ? multipliers->const_data_ptr<uint8_t>() : nullptr,
                multipliers ? multipliers->size(1) : 0, scale.const_data_ptr<float>(), offset.const_data_ptr<float>(),
                out.mutable_data_ptr<T>(), rows, n, k);
  };
  if (x.scalar_type() == at::kBFloat16)
    run(at::BFloat16());
  else
    run(float());
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(vgen, m) {
  m.def("integer_linear(Tensor x, Tensor weight, Tensor? multipliers, Tensor scale, Tensor? bias) -> Tensor");
}
TORCH_LIBRARY_IMPL(vgen, CPU, m) { m.impl("integer_linear", &integer_linear); }
