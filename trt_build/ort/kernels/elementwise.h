// Elementwise functions, as plain loops that the file of each level compiles for its instruction set. Nothing here sums
// floats, so every vector width gives the same bits.
#pragma once

#include <cstdint>
#include <cstring>

#include "layout.h"

namespace moeship {
namespace {

inline float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float from_half(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, rest = half & 0x7FFF;
  if (rest >= 0x7C00) return as_float(sign | 0x7F800000u | (rest & 0x3FF) << 13 | (rest > 0x7C00 ? 0x400000u : 0u));
  if (rest >= 0x400) return as_float(sign | ((rest << 13) + 0x38000000u));
  return as_float(sign | as_bits(static_cast<float>(rest) * 5.9604644775390625e-8f));  // rest * 2^-24
}

// The builtin instead of std::fma: if std::fma is not inlined, the linker keeps one copy of it for all files, which may
// be compiled for an instruction set that the CPU does not have.
inline float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

constexpr float kRoundingMagic = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits

// e^x to about one unit in the last place, saturating near the ends of float32; NaN stays NaN.
// Polynomial: Cephes' expf.
inline float exponential(float x) {
  x = 88.3762626f < x ? 88.3762626f : x;
  x = -87.3365448f > x ? -87.3365448f : x;
  const float shifted = fused(x, 1.44269504f, kRoundingMagic);
  const float n = shifted - kRoundingMagic;
  float r = fused(n, -0.693359375f, x);
  r = fused(n, 2.12194440e-4f, r);
  float p = 1.9875691500e-4f;
  p = fused(p, r, 1.3981999507e-3f);
  p = fused(p, r, 8.3334519073e-3f);
  p = fused(p, r, 4.1665795894e-2f);
  p = fused(p, r, 1.6666665459e-1f);
  p = fused(p, r, 5.0000001201e-1f);
  p = fused(p, r * r, r) + 1.0f;
  return p * as_float((as_bits(shifted) << 23) + 0x3F800000u);
}

inline float gelu(float x) {  // 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), as x times a sigmoid
  const float inner = fused(0.044715f * (x * x), x, x);
  return x / (1.0f + exponential(-1.59576912f * inner));
}

inline float silu(float x, float alpha) { return x / (1.0f + exponential(-alpha * x)); }

inline void activate(const Nonlinearity& f, float* y, int64_t count) {
  switch (f.kind) {
    case Activation::kGelu:
      for (int64_t i = 0; i < count; ++i) y[i] = gelu(y[i]);
      return;
    case Activation::kSilu:
      for (int64_t i = 0; i < count; ++i) y[i] = silu(y[i], 1.0f);
      return;
    case Activation::kSwiglu:
      for (int64_t i = 0; i < count / 2; ++i) {
        float gate = y[2 * i], up = y[2 * i + 1];
        gate = f.limit < gate ? f.limit : gate;
        up = f.limit < up ? f.limit : up;
        up = -f.limit > up ? -f.limit : up;
        y[i] = silu(gate, f.alpha) * (up + f.beta);
      }
  }
}

// Quantise a row of activations to int8. The scale of a block is its largest magnitude / 127; the codes are the nearest
// integers to x / scale. A block that holds an infinity or NaN gets the scale NaN, so that its products are NaN.
//
// In each block of the tile, the codes of row r begin at byte r * row_bytes; groups of four codes are quad_bytes apart.
inline void quantize_quads(const float* x, int64_t count, int block, int zero, int64_t first_block, int row,
                           const Tile& tile, int64_t row_bytes, int64_t quad_bytes) {
  for (int64_t b = 0; b * block < count; ++b) {
    const int64_t left = count - b * block;
    const int here = left < block ? static_cast<int>(left) : block;
    const float* v = x + b * block;
    int32_t largest = 0;  // bits of the largest magnitude: bits compare as magnitudes do, infinity and NaN above all
    for (int i = 0; i < here; ++i) {
      const int32_t bits = static_cast<int32_t>(as_bits(v[i]) & 0x7FFFFFFFu);
      largest = largest < bits ? bits : largest;
    }
    float scale = as_float(static_cast<uint32_t>(largest)) / 127.0f;
    int8_t codes[128] = {};
    int32_t sum = 0;
    if (largest >= 0x7F800000) {
      scale = as_float(0x7FC00000u);
    } else if (largest > 0) {
      scale = scale < 1.40129846e-45f ? 1.40129846e-45f : scale;
      int32_t rounded[128];
      for (int i = 0; i < here; ++i) {
        float q = v[i] / scale;
        q = q > 127.0f ? 127.0f : q;
        q = q < -127.0f ? -127.0f : q;
        rounded[i] = static_cast<int32_t>(as_bits(q + kRoundingMagic) - as_bits(kRoundingMagic));
        sum += rounded[i];
      }
      for (int i = 0; i < here; ++i) codes[i] = static_cast<int8_t>(rounded[i]);
    }
    const int64_t place = (first_block + b) * tile.rows + row;
    tile.scales[place] = scale;
    tile.offsets[place] = -zero * sum;
    int8_t* to = tile.codes + (first_block + b) * block * tile.rows + row * row_bytes;
    for (int quad = 0; quad < block / 4; ++quad) std::memcpy(to + quad * quad_bytes, codes + 4 * quad, 4);
  }
}

inline void quantize(const float* x, int64_t count, int block, int zero, int64_t first_block, int row,
                     const Tile& tile) {
  quantize_quads(x, count, block, zero, first_block, row, tile, 4, int64_t{4} * tile.rows);
}

inline void accumulate(const float* y, float factor, float* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = fused(factor, y[i], out[i]);
}

}  // namespace
}  // namespace moeship
