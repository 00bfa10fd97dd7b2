// A tile of attention over keys and values in int8: what every level computes, step by step, so that all give the same
// bits.
//
// A cache has one record a position: the D codes of a key or of a value, int8, then their scale and their middle, both
// bfloat16. A stored value is code * scale + middle. Positions are taken in blocks of kBlockKeys, the first of which
// begins at position 0. For each row (a query vector) and each block that has positions the row attends to:
//
//   score(k) = (s * scale of key k + total of the query * middle of key k) * a.scale
//              where s = fma(code(d), query(d), s) for all channels d in order
//   largest  = the larger of the largest score so far and that of the block; kept = e^(largest so far - largest)
//   p(k)     = e^(score(k) - largest), 0 where the row does not attend to k
//   sum      = fma(sum, kept, sum of p), that sum as `sum_of_block` orders it
//   shift    = fma(shift, kept, sum of p * middle of the values)
//   out(d)   = out(d) * kept; then out(d) = fma(p(k) * scale of value k, code(d), out(d)) for all k in order
//
// and at the end out(d) = (out(d) + shift) * (1 / sum). A row with a sink begins with it as the largest score and 1 as
// the sum. A key or value that is not finite has the scale NaN.
#pragma once

#include <cstdint>
#include <cstring>

#include "elementwise.h"

namespace moeship {

constexpr int kBlockKeys = 64;      // positions of a block
constexpr int kAttendingRows = 64;  // largest number of rows of a tile
constexpr int kLargestHead = 256;   // channels
constexpr int kGridBytes = 4;       // scale and middle of a record

// Rows of one sequence that attend to one key/value head. Row r has the query `queries[r]` [size] and attends to the
// positions from first[r] to end[r] - 1, of which there is at least one.
struct Attending {
  int rows, size;
  const float* queries[kAttendingRows];
  float totals[kAttendingRows];  // sums of the queries' channels
  float* out[kAttendingRows];
  int64_t first[kAttendingRows], end[kAttendingRows];
  float largest[kAttendingRows], sum[kAttendingRows];  // at the beginning: the sink and 1, or -infinity and 0
  float shift[kAttendingRows];
  const int8_t *keys, *values;                         // records of position 0
  float scale;

  int64_t record_bytes() const { return size + kGridBytes; }
};

namespace {

constexpr float kMinusInfinity = -__builtin_inff();

inline float from_bfloat16(const int8_t* place) {
  uint16_t bits;
  std::memcpy(&bits, place, sizeof bits);
  return as_float(static_cast<uint32_t>(bits) << 16);
}

// Scales and middles of the keys and values of a block, 0 beyond its keys.
struct Grids {
  alignas(64) float key_scales[kBlockKeys], key_middles[kBlockKeys], value_scales[kBlockKeys],
      value_middles[kBlockKeys];
};

inline void read_grids(const Attending& a, int64_t start, int keys, Grids& grids) {
  const int64_t bytes = a.record_bytes();
  const int8_t *key = a.keys + start * bytes + a.size, *value = a.values + start * bytes + a.size;
  for (int k = 0; k < kBlockKeys; ++k) {
    const bool there = k < keys;
    grids.key_scales[k] = there ? from_bfloat16(key + k * bytes) : 0.0f;
    grids.key_middles[k] = there ? from_bfloat16(key + k * bytes + 2) : 0.0f;
    grids.value_scales[k] = there ? from_bfloat16(value + k * bytes) : 0.0f;
    grids.value_middles[k] = there ? from_bfloat16(value + k * bytes + 2) : 0.0f;
  }
}

// The part of a block that a row attends to, as numbers within the block.
inline void part_of_block(const Attending& a, int row, int64_t start, int keys, int* low, int* high) {
  const int64_t first = a.first[row] - start, end = a.end[row] - start;
  *low = static_cast<int>(first < 0 ? 0 : first > keys ? keys : first);
  *high = static_cast<int>(end < *low ? *low : end > keys ? keys : end);
}

inline float sum_of_block(const float* p) {
  float sums[16];
  for (int i = 0; i < 16; ++i) sums[i] = ((p[i] + p[16 + i]) + p[32 + i]) + p[48 + i];
  for (int i = 0; i < 8; ++i) sums[i] += sums[8 + i];
  for (int i = 0; i < 4; ++i) sums[i] += sums[4 + i];
  return (sums[0] + sums[2]) + (sums[1] + sums[3]);
}

// The positions that any row of a tile attends to begin in the block at `*start`, and end before `*end`.
inline void span_of_rows(const Attending& a, int64_t* start, int64_t* end) {
  *start = a.first[0];
  *end = a.end[0];
  for (int r = 1; r < a.rows; ++r) {
    *start = a.first[r] < *start ? a.first[r] : *start;
    *end = a.end[r] > *end ? a.end[r] : *end;
  }
  *start -= *start % kBlockKeys;
}

// From the sums of products of a block, `scores` [kBlockKeys], to the weights of its values' codes, in place. Returns
// what is kept of the row's output.
inline float weigh_block(Attending& a, int row, int low, int high, const Grids& grids, float* scores) {
  if (low == high) {
    for (int k = 0; k < kBlockKeys; ++k) scores[k] = 0.0f;
    return 1.0f;
  }
  const float total = a.totals[row], scale = a.scale;
  float maxima[16];
  for (int i = 0; i < 16; ++i) maxima[i] = a.largest[row];
  for (int part = 0; part < kBlockKeys; part += 16)
    for (int i = 0; i < 16; ++i) {
      const int k = part + i;
      const float score = fused(total, grids.key_middles[k], scores[k] * grids.key_scales[k]) * scale;
      scores[k] = low <= k && k < high ? score : kMinusInfinity;
      maxima[i] = maxima[i] < scores[k] ? scores[k] : maxima[i];
    }
  float largest = maxima[0];
  for (int i = 1; i < 16; ++i) largest = largest < maxima[i] ? maxima[i] : largest;
  const float kept = exponential(a.largest[row] - largest);
  a.largest[row] = largest;
  alignas(64) float shifts[kBlockKeys];
  for (int k = 0; k < kBlockKeys; ++k) {
    const float p = exponential(scores[k] - largest), shift = p * grids.value_middles[k];
    scores[k] = low <= k && k < high ? p : 0.0f;
    shifts[k] = low <= k && k < high ? shift : 0.0f;
  }
  a.sum[row] = fused(a.sum[row], kept, sum_of_block(scores));
  a.shift[row] = fused(a.shift[row], kept, sum_of_block(shifts));
  for (int k = 0; k < kBlockKeys; ++k) {
    const float weight = scores[k] * grids.value_scales[k];
    scores[k] = low <= k && k < high ? weight : 0.0f;
  }
  return kept;
}

inline void finish_rows(const Attending& a) {
  for (int r = 0; r < a.rows; ++r) {
    const float factor = 1.0f / a.sum[r], shift = a.shift[r];
    float* const out = a.out[r];
    for (int d = 0; d < a.size; ++d) out[d] = (out[d] + shift) * factor;
  }
}

}  // namespace
}  // namespace moeship
