// Attention over keys and values in int8 (attention.h), for any instruction set V. Keys are transposed once a block, so
// that the lanes of a register are keys in the first product and channels in the second.
#pragma once

#include <immintrin.h>

#include "attention.h"

namespace moeship {
namespace {

constexpr int kGroupKeys = 16;  // keys that are transposed together
constexpr int kKeyGroups = kBlockKeys / kGroupKeys;

// Codes [16 records][16 channels] to floats [16 channels][16 keys].
template <class V>
inline void transpose(const int8_t* const* records, int channel, float* to) {
  __m128i a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) a[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(records[i] + channel));
  // Interleaving the halves four times moves byte j of line i to byte i of line j.
  auto interleave = [](const __m128i* from, __m128i* into) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      into[2 * i] = _mm_unpacklo_epi8(from[i], from[8 + i]);
      into[2 * i + 1] = _mm_unpackhi_epi8(from[i], from[8 + i]);
    }
  };
  interleave(a, b);
  interleave(b, a);
  interleave(a, b);
  interleave(b, a);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) V::store_codes(to + i * kGroupKeys, a[i]);
}

// scores[r][first + keys of `kVectors` registers] = the sums over channels. `keys` are [groups][size][16].
template <class V, int kRows, int kVectors>
inline void score(const Attending& a, int row, const float* keys, int first, float (*scores)[kBlockKeys]) {
  using F = typename V::F;
  constexpr int kOfGroup = kGroupKeys / V::kLanes;
  F sums[kRows][kVectors];
  const float* q[kRows];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    q[r] = a.queries[row + r];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) sums[r][v] = V::zero();
  }
  for (int d = 0; d < a.size; ++d) {
    F k[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v)
      k[v] = V::load(keys + first * a.size + (v / kOfGroup * a.size + d) * kGroupKeys + v % kOfGroup * V::kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const F value = V::broadcast(q[r][d]);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sums[r][v] = V::fma(k[v], value, sums[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) V::store(scores[row + r] + first + v * V::kLanes, sums[r][v]);
}

// out[r][channels of `kVectors` registers] = out * kept[r] + the sum over keys of weights[r][k] * values[k].
template <class V, int kRows, int kVectors>
inline void add_values(const Attending& a, int row, int channel, const float* values, int keys,
                       const float (*weights)[kBlockKeys], const float* kept) {
  using F = typename V::F;
  F sums[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    const F factor = V::broadcast(kept[row + r]);
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v)
      sums[r][v] = V::multiply(V::load(a.out[row + r] + channel + v * V::kLanes), factor);
  }
  for (int k = 0; k < keys; ++k) {
    F value[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) value[v] = V::load(values + k * a.size + channel + v * V::kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const F weight = V::broadcast(weights[row + r][k]);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sums[r][v] = V::fma(weight, value[v], sums[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) V::store(a.out[row + r] + channel + v * V::kLanes, sums[r][v]);
}

// As many registers beside each other as there are for the sums of kRows rows; the rest in ever fewer.
template <class V, int kRows, int kVectors>
inline void add_all_values(const Attending& a, int row, int channel, const float* values, int keys,
                           const float (*weights)[kBlockKeys], const float* kept) {
  for (; channel + kVectors * V::kLanes <= a.size; channel += kVectors * V::kLanes)
    add_values<V, kRows, kVectors>(a, row, channel, values, keys, weights, kept);
  if constexpr (kVectors > 1) add_all_values<V, kRows, kVectors / 2>(a, row, channel, values, keys, weights, kept);
}

template <int kRows, int kSums>
constexpr int vectors_for() {
  return kRows * 8 <= kSums ? 8 : kRows * 4 <= kSums ? 4 : kRows * 2 <= kSums ? 2 : 1;
}

struct Block {
  alignas(64) float keys[kBlockKeys * kLargestHead];    // [groups][size][16]
  alignas(64) float values[kBlockKeys * kLargestHead];  // [keys][size]
  Grids grids;
  alignas(64) float scores[kAttendingRows][kBlockKeys];
  float kept[kAttendingRows];
};

template <class V>
inline void read_block(const Attending& a, int64_t start, int keys, Block& block) {
  static constexpr int8_t kNothing[kLargestHead] = {};
  const int64_t bytes = a.record_bytes();
  const int8_t *key = a.keys + start * bytes, *value = a.values + start * bytes;
  for (int group = 0; group < kKeyGroups; ++group) {
    const int8_t* records[kGroupKeys];
    for (int i = 0; i < kGroupKeys; ++i) {
      const int k = group * kGroupKeys + i;
      records[i] = k < keys ? key + k * bytes : kNothing;
    }
    for (int d = 0; d < a.size; d += 16)
      transpose<V>(records, d, block.keys + (group * a.size + d) * kGroupKeys);
  }
  read_grids(a, start, keys, block.grids);
  for (int k = 0; k < keys; ++k)
    for (int d = 0; d < a.size; d += 16)
      V::store_codes(block.values + k * a.size + d,
                     _mm_loadu_si128(reinterpret_cast<const __m128i*>(value + k * bytes + d)));
}

template <class V, int kRows>
inline void attend_rows(Attending& a, int row, int64_t start, int keys, Block& block) {
  constexpr int kVectors = vectors_for<kRows, V::kSums>();
  constexpr int kTogether = kVectors * V::kLanes < kGroupKeys  ? kGroupKeys
                            : kVectors * V::kLanes > kBlockKeys ? kBlockKeys
                                                                : kVectors * V::kLanes;
  for (int k = 0; k < kBlockKeys; k += kTogether) {
    if (k < keys) {
      score<V, kRows, kTogether / V::kLanes>(a, row, block.keys, k, block.scores);
    } else {
      for (int r = 0; r < kRows; ++r)
        for (int i = 0; i < kTogether; ++i) block.scores[row + r][k + i] = 0.0f;
    }
  }
  for (int r = row; r < row + kRows; ++r) {
    int low, high;
    part_of_block(a, r, start, keys, &low, &high);
    block.kept[r] = weigh_block(a, r, low, high, block.grids, block.scores[r]);
  }
  add_all_values<V, kRows, kVectors>(a, row, 0, block.values, keys, block.scores, block.kept);
}

template <class V>
void attend(Attending& a) {
  Block block;
  int64_t start, end;
  span_of_rows(a, &start, &end);
  for (int r = 0; r < a.rows; ++r)
    for (int d = 0; d < a.size; ++d) a.out[r][d] = 0.0f;
  for (; start < end; start += kBlockKeys) {
    const int keys = static_cast<int>(end - start < kBlockKeys ? end - start : kBlockKeys);
    read_block<V>(a, start, keys, block);
    int row = 0;
    for (; row + V::kAttending <= a.rows; row += V::kAttending)
      attend_rows<V, V::kAttending>(a, row, start, keys, block);
    if constexpr (V::kAttending > 4)
      for (; row + 4 <= a.rows; row += 4) attend_rows<V, 4>(a, row, start, keys, block);
    for (; row + 2 <= a.rows; row += 2) attend_rows<V, 2>(a, row, start, keys, block);
    for (; row < a.rows; ++row) attend_rows<V, 1>(a, row, start, keys, block);
  }
  finish_rows(a);
}

}  // namespace
}  // namespace moeship
