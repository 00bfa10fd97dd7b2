// Types that operators and levels share: a stored weight matrix, a tile of activations, the functions of a level.
//
// Layout 1 of a matrix [N, K] in blocks of B input features at b bits (export/quantize/layout.py writes it). Sixteen
// output rows form a group and are stored interleaved; N is padded to whole groups, K to whole blocks. A group stores
// its blocks one after the other, a block its units of 32 input features. A unit has b lines of 64 bytes. Its codes are
// split into planes, the lowest bits first: 3 = 2 + 1, 5 = 4 + 1, 6 = 4 + 2 bits; 2, 4 and 8 bits are one plane. A
// plane of w bits takes w lines. Byte j of its line t belongs to row j / 4 of the group. The byte's p-th w bits,
// counted from the lowest, are those of input feature 4 * (t * 8 / w + p) + j % 4 of the unit. Scales
// [groups, blocks, 16] and zero points [groups, blocks, 16] are separate arrays in the same order.
#pragma once

#include <cstddef>
#include <cstdint>

namespace moeship {

constexpr int64_t kLayout = 1;
constexpr int64_t kInterface = 4;  // incremented whenever kLayout, an operator or a function of the library changes
constexpr int kGroupRows = 16;
constexpr int kLineBytes = 64;
constexpr int kUnit = 32;      // input features; divides every block size, and takes `bits` lines
constexpr int kQuads = 8;      // groups of four neighbouring features of a row, which are stored together, in a unit
constexpr int kTileRows = 16;  // largest number of rows of activations in a tile
constexpr int kFewRows = 8;    // largest number of rows whose sums fit in registers
constexpr int kMostGroups = 32;  // largest number of groups in a task

// Width of the plane that holds the lowest bits of a code; a second plane holds the rest, if there is any.
constexpr int low_bits(int bits) { return bits == 8 ? 8 : bits >= 4 ? 4 : 2; }

struct Matrix {
  const uint8_t* codes;
  const void* scales;    // uint16_t (IEEE half) or float
  const uint8_t* zeros;  // null: every zero point is 2^(bits - 1)
  const float* bias;     // [rows], or null
  bool half_scales;
  int bits;
  int block;
  int64_t rows;
  int64_t groups;
  int64_t blocks;

  int64_t group_bytes() const { return blocks * block * kGroupRows * bits / 8; }
  int64_t features() const { return blocks * block; }  // padded
};

// Up to kTileRows rows of activations, interleaved so that one pointer steps through all of them. Either int8 codes
// [features / 4][rows][4] (level_amx.cpp uses another order), with scales and offsets for zero points, both
// [blocks][rows]; or float values [features][rows].
struct Tile {
  int rows;
  int8_t* codes;
  float* scales;
  int32_t* offsets;  // sum of the block's codes times -2^(bits - 1), or times -1 if the weights have zero points
  float* values;
};

struct Attending;  // attention.h

enum class Activation { kGelu, kSilu, kSwiglu };

struct Nonlinearity {
  Activation kind;
  float alpha, beta, limit;  // parameters of kSwiglu
};

// The functions of one instruction set. All levels give the same bits: integer sums are exact, float sums have a fixed
// order, and the same multiplications are fused.
struct Level {
  const char* name;
  int tile_rows;  // largest number of rows of a tile for int8 products; with float32 activations it is kFewRows
  // y[row][count * 16] = the tile's rows times the groups [first, first + count), bias added.
  void (*product)(const Matrix& w, int64_t first, int64_t count, const Tile& x, float* y);
  // Quantise x[count] to int8 into row `row` of a tile, beginning with block `first_block`; the rest of the last block
  // is zero. `zero` is the zero point of all weights, or 1 if the weights have zero points of their own.
  void (*quantize)(const float* x, int64_t count, int block, int zero, int64_t first_block, int row, const Tile& tile);
  // Apply the activation to y[count] in place. With kSwiglu gate and up values alternate, and count / 2 values result.
  void (*activate)(const Nonlinearity& f, float* y, int64_t count);
  // out[count] = factor * y[count] + out[count], with fused multiplication.
  void (*accumulate)(const float* y, float factor, float* out, int64_t count);
  // Compute the outputs of a tile of attention.
  void (*attend)(Attending& a);
};

extern const Level kPlain;
#if defined(__x86_64__)
extern const Level kAvx2, kAvx512bw, kAvx512vnni, kAmx;
#endif

}  // namespace moeship
