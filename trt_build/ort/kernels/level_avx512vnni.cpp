// AVX-512 with VNNI: four byte products are added to an int32 by one instruction.
#include "avx512.h"

namespace moeship {
namespace {

struct Avx512vnni : Avx512 {
  template <int kBits>
  struct Sum {
    static constexpr int kQuadsTogether = kQuads;
    I sum;
    void start(I first) { sum = first; }
    void begin() {}
    void end() {}
    void add(I q, I a) { sum = _mm512_dpbusd_epi32(sum, q, a); }
  };
};

}  // namespace

const Level kAvx512vnni = {"avx512vnni", kFewRows, product<Avx512vnni>, quantize, activate, accumulate, attend<Avx512>};

}  // namespace moeship
