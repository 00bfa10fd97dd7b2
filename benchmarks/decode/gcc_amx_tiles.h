/* For compiling llama.cpp with GCC 11 and 12 on a processor with AMX: their amxtileintrin.h tells the compiler that
   ldtilecfg reads 8 bytes of its 64, so that the rest of llama.cpp's tile configuration is left unwritten and every
   prompt ends in a segmentation fault (ggml-org/llama.cpp#20824).

       CXXFLAGS="-include $PWD/benchmarks/decode/gcc_amx_tiles.h" pip install -e '.[bench]' */
#if defined(__AMX_TILE__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 13
#include <immintrin.h>
#define _tile_loadconfig(config) __asm__ volatile("ldtilecfg %0" ::"m"(*(const char(*)[64])(config)))
#endif
