// Plain C++ for any CPU, written to be read. It does not use products.h, so tests can compare the other levels with it.
#include "attention.h"

namespace moeship {
namespace {

// Decode the codes of one block of one group, minus their zero points: [block][16].
void decode(const Matrix& w, int64_t group, int64_t block, int32_t (*weights)[kGroupRows]) {
  const int units = w.block / kUnit, low = low_bits(w.bits);
  const int64_t place = group * w.blocks + block;
  const uint8_t* unit = w.codes + place * units * w.bits * kLineBytes;
  // The bits that a plane of `width` bits, beginning with a line, has of one feature of the unit.
  auto of_plane = [](const uint8_t* line, int width, int feature, int lane) {
    const int quad = feature / 4, in_byte = 8 / width;
    const uint8_t byte = line[quad / in_byte * kLineBytes + 4 * lane + feature % 4];
    return byte >> (quad % in_byte * width) & ((1 << width) - 1);
  };
  for (int u = 0; u < units; ++u, unit += w.bits * kLineBytes)
    for (int feature = 0; feature < kUnit; ++feature)
      for (int lane = 0; lane < kGroupRows; ++lane) {
        int code = of_plane(unit, low, feature, lane);
        if (low < w.bits) code |= of_plane(unit + low * kLineBytes, w.bits - low, feature, lane) << low;
        const int zero = w.zeros ? w.zeros[place * kGroupRows + lane] : 1 << (w.bits - 1);
        weights[u * kUnit + feature][lane] = code - zero;
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

void attend(Attending& a) {
  const int64_t bytes = a.record_bytes();
  int64_t start, end;
  span_of_rows(a, &start, &end);
  for (int r = 0; r < a.rows; ++r)
    for (int d = 0; d < a.size; ++d) a.out[r][d] = 0.0f;
  for (; start < end; start += kBlockKeys) {
    const int keys = static_cast<int>(end - start < kBlockKeys ? end - start : kBlockKeys);
    const int8_t *key = a.keys + start * bytes, *value = a.values + start * bytes;
    Grids grids;
    read_grids(a, start, keys, grids);
    for (int r = 0; r < a.rows; ++r) {
      float scores[kBlockKeys] = {};
      for (int k = 0; k < keys; ++k)
        for (int d = 0; d < a.size; ++d)
          scores[k] = fused(static_cast<float>(key[k * bytes + d]), a.queries[r][d], scores[k]);
      int low, high;
      part_of_block(a, r, start, keys, &low, &high);
      const float kept = weigh_block(a, r, low, high, grids, scores);
      for (int d = 0; d < a.size; ++d) {
        float out = a.out[r][d] * kept;
        for (int k = 0; k < keys; ++k) out = fused(scores[k], static_cast<float>(value[k * bytes + d]), out);
        a.out[r][d] = out;
      }
    }
  }
  finish_rows(a);
}

}  // namespace

const Level kPlain = {"plain", kFewRows, product, quantize, activate, accumulate, attend};

}  // namespace moeship
