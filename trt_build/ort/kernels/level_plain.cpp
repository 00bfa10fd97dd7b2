// Plain C++ for any CPU, written to be read. It does not use products.h, so tests can compare the other levels with it.
#include "elementwise.h"

namespace moeship {
namespace {

inline float from_half(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, rest = half & 0x7FFF;
  if (rest >= 0x7C00) return as_float(sign | 0x7F800000u | (rest & 0x3FF) << 13 | (rest > 0x7C00 ? 0x400000u : 0u));
  if (rest >= 0x400) return as_float(sign | ((rest << 13) + 0x38000000u));
  return as_float(sign | as_bits(static_cast<float>(rest) * 5.9604644775390625e-8f));  // rest * 2^-24
}

// Decode the codes of one block of one group, minus their zero points: [block][16].
void decode(const Matrix& w, int64_t group, int64_t block, int32_t (*weights)[kGroupRows]) {
  const int planes = 8 / w.bits, mask = (1 << w.bits) - 1, lines = w.block * w.bits / 32;
  const int64_t place = group * w.blocks + block;
  const uint8_t* line = w.codes + place * lines * kLineBytes;
  for (int t = 0; t < lines; ++t, line += kLineBytes)
    for (int byte = 0; byte < kLineBytes; ++byte)
      for (int p = 0; p < planes; ++p) {
        const int lane = byte / 4, zero = w.zeros ? w.zeros[place * kGroupRows + lane] : 1 << (w.bits - 1);
        weights[4 * (t * planes + p) + byte % 4][lane] = (line[byte] >> (w.bits * p) & mask) - zero;
      }
}

void product(const Matrix& w, int64_t first, int64_t count, const Tile& x, float* y) {
  int32_t weights[128][kGroupRows];
  for (int64_t index = 0; index < count; ++index) {
    const int64_t group = first + index;
    float sums[kTileRows][kGroupRows] = {};
    for (int64_t b = 0; b < w.blocks; ++b) {
      decode(w, group, b, weights);
      float scales[kGroupRows];
      for (int lane = 0; lane < kGroupRows; ++lane) {
        const int64_t place = (group * w.blocks + b) * kGroupRows + lane;
        scales[lane] = w.half_scales ? from_half(static_cast<const uint16_t*>(w.scales)[place])
                                     : static_cast<const float*>(w.scales)[place];
      }
      for (int r = 0; r < x.rows; ++r) {
        float* sum = sums[r];
        if (x.values) {
          float inside[kGroupRows] = {};
          for (int k = 0; k < w.block; ++k) {
            const float value = x.values[(b * w.block + k) * x.rows + r];
            for (int lane = 0; lane < kGroupRows; ++lane)
              inside[lane] = fused(static_cast<float>(weights[k][lane]), value, inside[lane]);
          }
          for (int lane = 0; lane < kGroupRows; ++lane) sum[lane] = fused(inside[lane], scales[lane], sum[lane]);
        } else {
          int32_t inside[kGroupRows] = {};
          for (int k = 0; k < w.block; ++k) {
            const int32_t code = x.codes[((b * w.block + k) / 4 * x.rows + r) * 4 + k % 4];
            for (int lane = 0; lane < kGroupRows; ++lane) inside[lane] += weights[k][lane] * code;
          }
          const float scale = x.scales[b * x.rows + r];
          for (int lane = 0; lane < kGroupRows; ++lane)
            sum[lane] = fused(static_cast<float>(inside[lane]), scales[lane] * scale, sum[lane]);
        }
      }
    }
    for (int r = 0; r < x.rows; ++r)
      for (int lane = 0; lane < kGroupRows; ++lane) {
        const int64_t row = group * kGroupRows + lane;
        y[(r * count + index) * kGroupRows + lane] = sums[r][lane] + (w.bias && row < w.rows ? w.bias[row] : 0.0f);
      }
  }
}

}  // namespace

const Level kPlain = {"plain", kFewRows, product, quantize, activate, accumulate};

}  // namespace moeship
