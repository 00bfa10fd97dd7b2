// AVX-512 with byte and word instructions, without VNNI: byte products in pairs of 16 bits.
#include "avx512.h"

namespace moeship {
namespace {

struct Avx512bw : Avx512 {
  static constexpr int kRows = 4;  // each row keeps two or three sums in registers
  static I add_products(I codes, I a, I pairs) {
    pairs = _mm512_add_epi16(pairs, _mm512_maddubs_epi16(codes, a));
    asm("" : "+v"(pairs));  // as in level_avx2.cpp
    return pairs;
  }
  static I add_pairs(I pairs, int16_t factor, I sum) {
    return _mm512_add_epi32(sum, _mm512_madd_epi16(pairs, _mm512_set1_epi16(factor)));
  }
  template <int kBits>
  using Sum = PairSum<Avx512bw, kBits>;
};

}  // namespace

const Level kAvx512bw = {"avx512bw", kFewRows, product<Avx512bw>, quantize, activate, accumulate, attend<Avx512>};

}  // namespace moeship
