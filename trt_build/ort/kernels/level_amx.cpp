// AMX: one tile product multiplies sixteen rows of weights by up to sixteen rows of activations. AVX-512 VNNI is used
// for float32 activations, and for fewer than kFewestRows rows, where filling tiles costs more than it saves.
#include "amx_tiles.h"
#include "avx512.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("amx-tile,amx-int8"))), apply_to = function)
#endif

namespace moeship {
namespace {

// With AMX a block of 64 features costs about 40 cycles for any number of rows: 16 lines are decoded, stored, and
// loaded as a tile. With VNNI it costs about 12 cycles to decode and, at two instructions a cycle, 8 cycles a row.
constexpr int kFewestRows = 4;
constexpr int kTileFeatures = 64;
constexpr int kLongestBlock = 128;

// Quantise as elementwise.h does, but in the order that tiles load: [blocks][rows][block], so that the codes of a row
// are contiguous within a block.
void quantize_rows(const float* x, int64_t count, int block, int zero, int64_t first_block, int row, const Tile& tile) {
  if (tile.rows < kFewestRows) return quantize(x, count, block, zero, first_block, row, tile);
  quantize_quads(x, count, block, zero, first_block, row, tile, block, 4);
}

// Decode the codes of one block into tile rows: line q has features 4 * q to 4 * q + 3 of all sixteen rows.
template <int kBits>
inline const uint8_t* decode(const uint8_t* lines, int block, uint8_t* decoded) {
  for (int u = 0; u < block / kUnit; ++u) {
    const uint8_t* const unit = lines + u * kBits * kLineBytes;
#pragma GCC unroll 8
    for (int t = 0; t < kBits; ++t) prefetch(unit + t * kLineBytes + prefetch_bytes(kBits));
    if (kBits == 8) continue;  // codes of 8 bits are stored in this order already
    __m512i low{}, high{};
#pragma GCC unroll 8
    for (int i = 0; i < kQuads; ++i)
      _mm512_store_si512(decoded + (u * kQuads + i) * kLineBytes, decode_quad<Avx512, kBits>(unit, i, low, high));
  }
  return kBits == 8 ? lines : decoded;
}

// Compute the sums of one block's products, [rows][16]. Successive blocks alternate between two sets of tiles.
template <int kSide>
inline void multiply(const int8_t* a, const uint8_t* weights, int block, int32_t* sums) {
  zero_tile<kSide>();
  for (int k = 0; k < block; k += kTileFeatures) {
    load_tile<2 + kSide>(a + k, block);
    load_tile<4 + kSide>(weights + k * kGroupRows, kLineBytes);
    multiply_tiles<kSide, 2 + kSide, 4 + kSide>();
  }
  store_tile<kSide>(sums, kLineBytes);
}

template <int kBits, int kRows>
void product_tiles(const Matrix& w, int64_t first, int64_t count, const Tile& x, float* y) {
  using V = Avx512;
  alignas(64) uint8_t decoded[2][kLongestBlock * kGroupRows];
  alignas(64) int32_t sums[2][kRows * kGroupRows];
  const int features = w.block < kTileFeatures ? w.block : kTileFeatures;
  TileConfig config;
  for (int side = 0; side < 2; ++side) {
    config.rows[side] = config.rows[2 + side] = kRows;
    config.rows[4 + side] = static_cast<uint8_t>(features / 4);
    config.row_bytes[side] = config.row_bytes[4 + side] = kLineBytes;
    config.row_bytes[2 + side] = static_cast<uint16_t>(features);
  }
  configure_tiles(config);
  const int64_t block_bytes = int64_t{w.block} * kBits * 2;
  for (int64_t index = 0; index < count; ++index) {
    const int64_t group = first + index;
    V::F y_sums[1][kRows];
    for (V::F& sum : y_sums[0]) sum = V::zero();
    // The sums of a block are used one iteration later, so that the tile products have finished.
    for (int64_t b = 0; b <= w.blocks; ++b) {
      if (b < w.blocks) {
        const uint8_t* lines = w.codes + (group * w.blocks + b) * block_bytes;
        const int8_t* a = x.codes + b * w.block * kRows;
        const uint8_t* weights = decode<kBits>(lines, w.block, decoded[b % 2]);
        if (b % 2 == 0) multiply<0>(a, weights, w.block, sums[0]);
        if (b % 2 == 1) multiply<1>(a, weights, w.block, sums[1]);
      }
      if (b == 0) continue;
      const int64_t place = (group * w.blocks + b - 1) * kGroupRows;
      prefetch(static_cast<const char*>(w.scales) + (place + 256) * (w.half_scales ? 2 : 4));
      const V::F scale = scales_at<V>(w, place);
      const V::I zeros = w.zeros ? V::load_bytes(w.zeros + place) : V::broadcast(1);
      const int32_t* from = sums[(b - 1) % 2];
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const V::I offset = V::broadcast(x.offsets[(b - 1) * kRows + r]);
        const V::I sum = _mm512_add_epi32(_mm512_load_si512(from + r * kGroupRows),
                                          w.zeros ? V::multiply(zeros, offset) : offset);
        y_sums[0][r] = V::fma(V::to_float(sum), V::multiply(scale, V::broadcast(x.scales[(b - 1) * kRows + r])),
                              y_sums[0][r]);
      }
    }
    store<V, kRows>(w, group, index, count, y_sums, y);
  }
  release_tiles();  // ONNX Runtime's kernels configure tiles too, and tile state in use slows every task switch
}

template <int kBits, int... kRows>
void product_of_rows(const Matrix& w, int64_t first, int64_t count, const Tile& x, float* y,
                     std::integer_sequence<int, kRows...>) {
  static constexpr Product kProducts[] = {product_tiles<kBits, kFewestRows + kRows>...};
  kProducts[x.rows - kFewestRows](w, first, count, x, y);
}

void product_amx(const Matrix& w, int64_t first, int64_t count, const Tile& x, float* y) {
  if (x.values || x.rows < kFewestRows) return kAvx512vnni.product(w, first, count, x, y);
  constexpr auto rows = std::make_integer_sequence<int, kTileRows - kFewestRows + 1>();
  with_bits(w.bits, [&](auto bits) { product_of_rows<bits()>(w, first, count, x, y, rows); });
}

}  // namespace

const Level kAmx = {"amx", kTileRows, product_amx, quantize_rows, activate, accumulate, attend<Avx512>};

}  // namespace moeship

#if defined(__clang__)
#pragma clang attribute pop
#endif
