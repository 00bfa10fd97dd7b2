/* Makes llama.cpp work when GCC 11 or 12 compiles it on a processor with AMX. The amxtileintrin.h of these compilers
   declares that ldtilecfg reads 8 of its 64 bytes. The compiler then leaves the rest of llama.cpp's tile configuration
   unwritten, and every prompt ends in a segmentation fault (ggml-org/llama.cpp#20824).

       CXXFLAGS="-include $PWD/benchmarks/decode/gcc_amx_tiles.h" pip install -e '.[bench]' */
#if defined(__AMX_TILE__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 13
#include <immintrin.h>
#define _tile_loadconfig(config) __asm__ volatile("ldtilecfg %0" ::"m"(*(const char(*)[64])(config)))
#endif
