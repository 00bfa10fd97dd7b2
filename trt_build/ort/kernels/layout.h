// What the operators and the instruction sets share: a weight matrix as it is stored, rows of activations, a level.
//
// Layout 1 of a matrix [N, K] in blocks of B input features at b bits (export/quantize/layout.py writes it). Sixteen
// output rows lie side by side, the rows of a group; N is padded to groups, K to blocks. A group has its blocks in
// turn, a block has B * b / 32 lines of 64 bytes. Byte j of line t belongs to the group's row j / 4; counted from the
// lowest, its p-th b bits are the code of input feature 4 * (t * 8 / b + p) + j % 4 of the block.
// Scales [groups, blocks, 16] and zero points [groups, blocks, 16] lie apart, in the same order.
#pragma once

#include <cstddef>
#include <cstdint>

namespace moeship {

constexpr int64_t kLayout = 1;
constexpr int64_t kInterface = 2;  // counted up with kLayout, and where an operator or a function of the library changes
constexpr int kGroupRows = 16;
constexpr int kLineBytes = 64;
constexpr int kUnit = 32;      // input features that every block size is a multiple of; they have `bits` lines
constexpr int kTileRows = 16;  // the most rows of activations that are multiplied together
constexpr int kFewRows = 8;    // what registers have room for
constexpr int kMostGroups = 32;  // groups of one task

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

// Up to kTileRows rows of activations, side by side so that one pointer walks through all of them. Int8 codes
// [features / 4][rows][4] (level_amx.cpp has an order of its own) with a scale and what a block's zero point adds, both [blocks][rows]; or float values
// [features][rows].
struct Tile {
  int rows;
  int8_t* codes;
  float* scales;
  int32_t* offsets;  // the codes' sum times -2^(bits - 1), or times -1 where the weights have zero points
  float* values;
};

enum class Activation { kGelu, kSilu, kSwiglu };

struct Nonlinearity {
  Activation kind;
  float alpha, beta, limit;  // of kSwiglu
};

// The functions of one instruction set. Sums of integers are exact, and the order of every other sum is fixed, with
// fused multiplications in the same places: all levels give the same bits.
struct Level {
  const char* name;
  int tile_rows;  // the most rows of a tile that its int8 products take; float32 activations: kFewRows
  // y[row][count * 16] = the tile's rows times the groups [first, first + count), bias added.
  void (*product)(const Matrix& w, int64_t first, int64_t count, const Tile& x, float* y);
  // Round x[count] to int8 into row `row` of a tile from block `first_block` on, zeros up to the end of a block. `zero`
  // is the zero point of all weights, or 1.
  void (*quantize)(const float* x, int64_t count, int block, int zero, int64_t first_block, int row, const Tile& tile);
  // y[count] in place; with kSwiglu gate and up lie in turn and count / 2 values are left.
  void (*activate)(const Nonlinearity& f, float* y, int64_t count);
  // out[count] = factor * y[count] + out[count], fused.
  void (*accumulate)(const float* y, float factor, float* out, int64_t count);
};

extern const Level kPlain;
#if defined(__x86_64__)
extern const Level kAvx2, kAvx512bw, kAvx512vnni, kAmx;
#endif

}  // namespace moeship
