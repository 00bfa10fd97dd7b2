// The matrix products for int8 and float32 activations, for any instruction set V. A register of V has kLanes lanes of
// int32 (I) or float (F). The weights are decoded once for kRows rows of activations. V::Sum<bits> adds products of
// unsigned and signed bytes.
#pragma once

#include <cstring>
#include <type_traits>
#include <utility>

#include "elementwise.h"
#include "layout.h"

namespace moeship {
namespace {

// How far ahead lines are asked for. One row of 5 or 6 bits is read faster by 5 to 10 % with the shorter distance, of
// other bits by up to 5 % with the longer one, on an EPYC with AVX-512 VNNI (benchmarks/kernels.py).
constexpr int prefetch_bytes(int bits) { return bits == 5 || bits == 6 ? 2048 : 4096; }

inline void prefetch(const void* place) { __builtin_prefetch(place); }

// Decodes quad `i` of a unit for the lanes that begin at `unit`: four codes in each lane. `low` and `high` keep the
// lines of the two planes from one quad to the next, in ascending order of `i`.
template <class V, int kBits>
inline typename V::I decode_quad(const uint8_t* unit, int i, typename V::I& low, typename V::I& high) {
  constexpr int kLow = low_bits(kBits), kHigh = kBits - kLow, kInLow = 8 / kLow;
  if (i % kInLow == 0) low = V::load_line(unit + i / kInLow * kLineBytes);
  if constexpr (kHigh == 0) {
    return V::template plane<kLow>(low, i % kInLow);
  } else {
    constexpr int kInHigh = 8 / kHigh;
    if (i % kInHigh == 0) high = V::load_line(unit + (kLow + i / kInHigh) * kLineBytes);
    return V::template join<kLow, kHigh>(low, i % kInLow, high, i % kInHigh);
  }
}

// Byte products without VNNI: V adds pairs of them in 16 bits. The products of `kQuadsTogether` quads fit: of a unit for
// codes up to 15, as 8 * 2 * 15 * 127 < 2^15, of half a unit up to 31, of a quarter up to 63. Codes of 8 bits are split
// into two halves of 4 bits.
template <class V, int kBits>
struct PairSum {
  static constexpr int kQuadsTogether = kBits == 5 ? 4 : kBits == 6 ? 2 : kQuads;
  typename V::I sum, low, high;

  void start(typename V::I first) { sum = first; }
  void begin() { low = high = V::broadcast(0); }
  void add(typename V::I q, typename V::I a) {
    if (kBits == 8) {
      high = V::add_products(V::template plane<4>(q, 1), a, high);
      q = V::template plane<4>(q, 0);
    }
    low = V::add_products(q, a, low);
  }
  void end() {
    sum = V::add_pairs(low, 1, sum);
    if (kBits == 8) sum = V::add_pairs(high, 16, sum);
  }
};

template <class V>
inline typename V::F scales_at(const Matrix& w, int64_t place) {
  return w.half_scales ? V::load_half(static_cast<const uint16_t*>(w.scales) + place)
                       : V::load(static_cast<const float*>(w.scales) + place);
}

template <class V, int kRows>
inline void store(const Matrix& w, int64_t group, int64_t index, int64_t count, const typename V::F (*sums)[kRows],
                  float* y) {
  float bias[kGroupRows] = {};
  if (w.bias) {
    const int64_t left = w.rows - group * kGroupRows;
    std::memcpy(bias, w.bias + group * kGroupRows, sizeof(float) * (left < kGroupRows ? left : kGroupRows));
  }
  for (int h = 0; h < kGroupRows / V::kLanes; ++h)
    for (int r = 0; r < kRows; ++r)
      V::store(y + (r * count + index) * kGroupRows + h * V::kLanes,
               V::add(sums[h][r], V::load(bias + h * V::kLanes)));
}

// Int8 activations: for each block, in order, y = fma(float(sum of code products), weight scale * activation scale, y).
template <class V, int kBits, int kRows>
void product_int8(const Matrix& w, int64_t first, int64_t count, const Tile& x, float* y) {
  using I = typename V::I;
  using F = typename V::F;
  using Sum = typename V::template Sum<kBits>;
  constexpr int kHalves = kGroupRows / V::kLanes;
  constexpr int kTogether = kRows < V::kRows ? kRows : V::kRows;
  const int units = w.block / kUnit;
  const int64_t block_bytes = int64_t{units} * kBits * kLineBytes;
  for (int64_t index = 0; index < count; ++index) {
    const uint8_t* line = w.codes + (first + index) * w.blocks * block_bytes;
    const int8_t* a = x.codes;
    F sums[kHalves][kRows];
    for (auto& half : sums)
      for (F& sum : half) sum = V::zero();
    for (int64_t b = 0; b < w.blocks; ++b, line += block_bytes, a += w.block * kRows) {
      const int64_t place = ((first + index) * w.blocks + b) * kGroupRows;
      const float* const a_scales = x.scales + b * kRows;
      const int32_t* const a_offsets = x.offsets + b * kRows;
      prefetch(static_cast<const char*>(w.scales) + (place + 256) * (w.half_scales ? 2 : 4));
#pragma GCC unroll 2
      for (int h = 0; h < kHalves; ++h) {
        const F scale = scales_at<V>(w, place + h * V::kLanes);
#pragma GCC unroll 2
        for (int r0 = 0; r0 < kRows; r0 += kTogether) {
          Sum sum[kTogether];
#pragma GCC unroll 8
          for (int r = 0; r < kTogether; ++r)
            if (r0 + r < kRows) sum[r].start(V::broadcast(a_offsets[r0 + r]));
          if (w.zeros) {
            const I zeros = V::load_bytes(w.zeros + place + h * V::kLanes);
#pragma GCC unroll 8
            for (int r = 0; r < kTogether; ++r)
              if (r0 + r < kRows) sum[r].start(V::multiply(zeros, sum[r].sum));
          }
          for (int u = 0; u < units; ++u) {
            const uint8_t* const unit = line + u * kBits * kLineBytes;
            if (h == 0 && r0 == 0) {
#pragma GCC unroll 8
              for (int t = 0; t < kBits; ++t) prefetch(unit + t * kLineBytes + prefetch_bytes(kBits));
            }
            I low{}, high{};
#pragma GCC unroll 8
            for (int i = 0; i < kQuads; ++i) {
              if (i % Sum::kQuadsTogether == 0) {
#pragma GCC unroll 8
                for (int r = 0; r < kTogether; ++r) sum[r].begin();
              }
              const I q = decode_quad<V, kBits>(unit + h * V::kLanes * 4, i, low, high);
              const int8_t* quad = a + (u * kQuads + i) * kRows * 4;
#pragma GCC unroll 8
              for (int r = 0; r < kTogether; ++r)
                if (r0 + r < kRows) sum[r].add(q, V::broadcast_quad(quad + (r0 + r) * 4));
              if ((i + 1) % Sum::kQuadsTogether == 0) {
#pragma GCC unroll 8
                for (int r = 0; r < kTogether; ++r) sum[r].end();
              }
            }
          }
#pragma GCC unroll 8
          for (int r = 0; r < kTogether; ++r)
            if (r0 + r < kRows)
              sums[h][r0 + r] = V::fma(V::to_float(sum[r].sum), V::multiply(scale, V::broadcast(a_scales[r0 + r])),
                                       sums[h][r0 + r]);
        }
      }
    }
    store<V, kRows>(w, first + index, index, count, sums, y);
  }
}

// Float32 activations: for each block s = fma(code - zero, x, s) over its features in order, then y = fma(s, scale, y).
template <class V, int kBits, int kRows>
void product_float(const Matrix& w, int64_t first, int64_t count, const Tile& x, float* y) {
  using I = typename V::I;
  using F = typename V::F;
  constexpr int kHalves = kGroupRows / V::kLanes;
  for (int64_t index = 0; index < count; ++index) {
    const uint8_t* line = w.codes + (first + index) * w.group_bytes();
    const float* a = x.values;
    F sums[kHalves][kRows];
    for (auto& half : sums)
      for (F& sum : half) sum = V::zero();
    for (int64_t b = 0; b < w.blocks; ++b, line += w.block * kBits * 2, a += w.block * kRows) {
      const int64_t place = ((first + index) * w.blocks + b) * kGroupRows;
      for (int h = 0; h < kHalves; ++h) {
        const I zero = w.zeros ? V::load_bytes(w.zeros + place + h * V::kLanes) : V::broadcast(1 << (kBits - 1));
        F inside[kRows];
        for (F& sum : inside) sum = V::zero();
        for (int u = 0; u < w.block / kUnit; ++u) {
          I low{}, high{};
          for (int i = 0; i < kQuads; ++i) {
            const uint8_t* const unit = line + u * kBits * kLineBytes;
            const I q = decode_quad<V, kBits>(unit + h * V::kLanes * 4, i, low, high);
            for (int j = 0; j < 4; ++j) {
              const F weight = V::to_float(V::subtract(V::byte(q, j), zero));
              const float* from = a + ((u * kQuads + i) * 4 + j) * kRows;
#pragma GCC unroll 8
              for (int r = 0; r < kRows; ++r) inside[r] = V::fma(weight, V::broadcast(from[r]), inside[r]);
            }
          }
        }
        const F scale = scales_at<V>(w, place + h * V::kLanes);
        for (int r = 0; r < kRows; ++r) sums[h][r] = V::fma(inside[r], scale, sums[h][r]);
      }
    }
    store<V, kRows>(w, first + index, index, count, sums, y);
  }
}

using Product = void (*)(const Matrix&, int64_t, int64_t, const Tile&, float*);

// Calls f with the number of bits as a type, std::integral_constant<int, bits>.
template <class F>
inline void with_bits(int bits, const F& f) {
  switch (bits) {
    case 2: return f(std::integral_constant<int, 2>());
    case 3: return f(std::integral_constant<int, 3>());
    case 4: return f(std::integral_constant<int, 4>());
    case 5: return f(std::integral_constant<int, 5>());
    case 6: return f(std::integral_constant<int, 6>());
    case 8: return f(std::integral_constant<int, 8>());
  }
}

template <class V, int kBits, int... kRows>
inline void product_of_bits(const Matrix& w, int64_t first, int64_t count, const Tile& x, float* y,
                            std::integer_sequence<int, kRows...>) {
  static constexpr Product kInt8[] = {product_int8<V, kBits, kRows + 1>...};
  static constexpr Product kFloat[] = {product_float<V, kBits, kRows + 1>...};
  (x.values ? kFloat : kInt8)[x.rows - 1](w, first, count, x, y);
}

template <class V>
void product(const Matrix& w, int64_t first, int64_t count, const Tile& x, float* y) {
  constexpr auto rows = std::make_integer_sequence<int, kFewRows>();
  with_bits(w.bits, [&](auto bits) { product_of_bits<V, bits()>(w, first, count, x, y, rows); });
}

}  // namespace
}  // namespace moeship
