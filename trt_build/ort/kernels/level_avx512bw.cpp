// AVX-512 with byte and word instructions, without VNNI: byte products in pairs of 16 bits.
#include "avx512.h"

namespace moeship {
namespace {

struct Avx512bw : Avx512 {
  static constexpr int kRows = 4;  // a row has two or three sums in work
  // As in level_avx2.cpp: a unit's products of codes up to 15 fit in 16 bits, codes of 8 bits are two halves of 4.
  template <int kBits>
  struct Sum {
    I sum, low, high;
    void start(I first) { sum = first; }
    void begin_unit() { low = high = _mm512_setzero_si512(); }
    void add(I q, I a) {
      if (kBits == 8) {
        const I mask = _mm512_set1_epi8(15);
        const I upper = _mm512_and_si512(_mm512_srli_epi16(q, 4), mask);
        high = _mm512_add_epi16(high, _mm512_maddubs_epi16(upper, a));
        q = _mm512_and_si512(q, mask);
      }
      low = _mm512_add_epi16(low, _mm512_maddubs_epi16(q, a));
    }
    void end_unit() {
      sum = _mm512_add_epi32(sum, _mm512_madd_epi16(low, _mm512_set1_epi16(1)));
      if (kBits == 8) sum = _mm512_add_epi32(sum, _mm512_madd_epi16(high, _mm512_set1_epi16(16)));
    }
  };
};

}  // namespace

const Level kAvx512bw = {"avx512bw", product<Avx512bw>, quantize, activate, accumulate};

}  // namespace moeship
