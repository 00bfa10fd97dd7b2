// AMX: asks whether this process may use tiles, and wraps the tile instructions, which Intel's manual (SDM volume 2)
// defines.
//
// The instructions are inline assembly, because the compilers' intrinsics do not declare all the memory that they read:
// in GCC 11 and 12 _tile_loadconfig declares 8 of 64 bytes, and _tile_loadd none (ggml-org/llama.cpp#20824). Assembly
// also needs no compiler flag, except for clang's pragma in level_amx.cpp.
//
// With MOESHIP_EMULATED_CPU the instructions are emulated for tests on CPUs without AMX; what would fault on a CPU ends
// the process.
#pragma once

#include <array>
#include <cstdint>

#if defined(MOESHIP_EMULATED_CPU)
#include <cstdio>
#include <cstdlib>
#include <cstring>
#else
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace moeship {
namespace {

// The memory operand of LDTILECFG. A tile that is not used has 0 rows and 0 bytes.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64);

#if defined(MOESHIP_EMULATED_CPU)

inline bool tiles_usable() { return true; }

struct EmulatedTiles {
  bool configured = false;
  TileConfig config;
  uint8_t data[8][16][64];
};
thread_local EmulatedTiles emulated;

inline void expect(bool right, const char* what) {
  if (right) return;
  std::fprintf(stderr, "emulated AMX tiles: %s\n", what);
  std::abort();
}

inline void expect_tile(int tile) {
  expect(emulated.configured && tile >= 0 && tile < 8 && emulated.config.rows[tile], "a tile that is not configured");
}

inline void configure_tiles(const TileConfig& config) {
  expect(config.palette == 1 && config.start_row < 16, "palette or start row");
  for (uint8_t byte : config.reserved) expect(byte == 0, "a reserved byte");
  for (int i = 0; i < 16; ++i) {
    expect(config.rows[i] <= 16 && config.row_bytes[i] <= 64, "more rows or bytes than a tile has");
    expect(!config.rows[i] == !config.row_bytes[i], "rows without bytes, or bytes without rows");
    expect(i < 8 || !config.rows[i], "more tiles than there are");
  }
  emulated.configured = true;
  emulated.config = config;
  std::memset(emulated.data, 0, sizeof emulated.data);
}

inline void release_tiles() { emulated = {}; }

template <int kTile>
inline void zero_tile() {
  expect_tile(kTile);
  std::memset(emulated.data[kTile], 0, sizeof emulated.data[kTile]);
}

template <int kTile>
inline void load_tile(const void* from, int64_t stride) {
  zero_tile<kTile>();
  for (int r = emulated.config.start_row; r < emulated.config.rows[kTile]; ++r)
    std::memcpy(emulated.data[kTile][r], static_cast<const uint8_t*>(from) + r * stride,
                emulated.config.row_bytes[kTile]);
  emulated.config.start_row = 0;
}

template <int kTile>
inline void store_tile(void* to, int64_t stride) {
  expect_tile(kTile);
  for (int r = emulated.config.start_row; r < emulated.config.rows[kTile]; ++r)
    std::memcpy(static_cast<uint8_t*>(to) + r * stride, emulated.data[kTile][r], emulated.config.row_bytes[kTile]);
  emulated.config.start_row = 0;
}

template <int kSum, int kSigned, int kUnsigned>
inline void multiply_tiles() {
  static_assert(kSum != kSigned && kSum != kUnsigned && kSigned != kUnsigned, "#UD");
  for (const int tile : std::array{kSum, kSigned, kUnsigned}) {
    expect_tile(tile);
    expect(emulated.config.row_bytes[tile] % 4 == 0, "a row that is not whole int32");
  }
  const TileConfig& config = emulated.config;
  expect(config.rows[kSum] == config.rows[kSigned] && config.row_bytes[kSigned] / 4 == config.rows[kUnsigned] &&
             config.row_bytes[kSum] == config.row_bytes[kUnsigned] && config.start_row == 0,
         "tiles that do not fit each other");
  for (int m = 0; m < config.rows[kSum]; ++m)
    for (int n = 0; n < config.row_bytes[kSum] / 4; ++n) {
      uint32_t sum;
      std::memcpy(&sum, emulated.data[kSum][m] + 4 * n, 4);
      for (int k = 0; k < config.row_bytes[kSigned]; ++k)
        sum += static_cast<uint32_t>(static_cast<int8_t>(emulated.data[kSigned][m][k]) *
                                     int32_t{emulated.data[kUnsigned][k / 4][4 * n + k % 4]});
      std::memcpy(emulated.data[kSum][m] + 4 * n, &sum, 4);
    }
}

#else

// Whether this process may use int8 tiles: the CPU has them, the system saves their state, and Linux permits them. A
// process asks Linux for permission once, for all its threads.
inline bool tiles_usable() {
#if defined(__linux__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  constexpr unsigned kXsaveEnabled = 1u << 27, kTilesAndInt8 = 3u << 24, kTileStates = 3u << 17;
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !(ecx & kXsaveEnabled)) return false;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || (edx & kTilesAndInt8) != kTilesAndInt8) return false;
  __asm__ volatile("xgetbv" : "=a"(eax), "=d"(edx) : "c"(0));
  return (eax & kTileStates) == kTileStates && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

inline void configure_tiles(const TileConfig& config) { __asm__ volatile("ldtilecfg %0" ::"m"(config)); }

inline void release_tiles() { __asm__ volatile("tilerelease" ::: "memory"); }

template <int kTile>
inline void zero_tile() {
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(kTile));
}

template <int kTile>
inline void load_tile(const void* from, int64_t stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(kTile) : "memory");
}

template <int kTile>
inline void store_tile(void* to, int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(kTile) : "memory");
}

// sum[m][n] += the sum over k of signed[m][k] * unsigned[k / 4][4 * n + k % 4]
template <int kSum, int kSigned, int kUnsigned>
inline void multiply_tiles() {
  __asm__ volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kSigned), "i"(kUnsigned));
}

#endif

}  // namespace
}  // namespace moeship
