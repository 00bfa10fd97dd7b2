// AVX2 with FMA and F16C: eight lanes, byte products in pairs of 16 bits.
#include <immintrin.h>

#include "attending.h"
#include "products.h"

namespace moeship {
namespace {

struct Avx2 {
  static constexpr int kLanes = 8, kRows = 4;
  static constexpr int kAttending = 4, kSums = 8;  // rows of attention, and registers of their sums
  using I = __m256i;
  using F = __m256;

  static I load_line(const uint8_t* p) {
    I line = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    asm("" : "+x"(line));  // as in avx512.h
    return line;
  }
  static I load_bytes(const uint8_t* p) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  }
  static I broadcast(int32_t value) { return _mm256_set1_epi32(value); }
  static I broadcast_quad(const int8_t* p) {
    int32_t quad;
    std::memcpy(&quad, p, 4);
    return _mm256_set1_epi32(quad);
  }
  template <int kBits>
  static I plane(I codes, int plane) {
    if (kBits == 8) return codes;
    return _mm256_and_si256(_mm256_srli_epi16(codes, kBits * plane), _mm256_set1_epi8((1 << kBits) - 1));
  }
  template <int kLow, int kHigh>
  static I join(I low, int low_place, I high, int high_place) {
    const int up = kLow - kHigh * high_place;
    high = up < 0 ? _mm256_srli_epi16(high, -up) : _mm256_slli_epi16(high, up);
    high = _mm256_and_si256(high, _mm256_set1_epi8(((1 << kHigh) - 1) << kLow));
    return _mm256_or_si256(plane<kLow>(low, low_place), high);
  }
  static I byte(I q, int j) { return _mm256_and_si256(_mm256_srli_epi32(q, 8 * j), _mm256_set1_epi32(255)); }
  static I multiply(I a, I b) { return _mm256_mullo_epi32(a, b); }
  static I subtract(I a, I b) { return _mm256_sub_epi32(a, b); }
  static F to_float(I a) { return _mm256_cvtepi32_ps(a); }
  static F zero() { return _mm256_setzero_ps(); }
  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static F load_half(const uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static F broadcast(float value) { return _mm256_set1_ps(value); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F multiply(F a, F b) { return _mm256_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static void store(float* p, F a) { _mm256_storeu_ps(p, a); }
  static void store_codes(float* p, __m128i codes) {
    store(p, to_float(_mm256_cvtepi8_epi32(codes)));
    store(p + 8, to_float(_mm256_cvtepi8_epi32(_mm_unpackhi_epi64(codes, codes))));
  }

  static I add_products(I codes, I a, I pairs) {
    pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(codes, a));
    asm("" : "+x"(pairs));  // keeps GCC from summing a unit's products as a tree, which spills registers
    return pairs;
  }
  static I add_pairs(I pairs, int16_t factor, I sum) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(factor)));
  }
  template <int kBits>
  using Sum = PairSum<Avx2, kBits>;
};

}  // namespace

const Level kAvx2 = {"avx2", kFewRows, product<Avx2>, quantize, activate, accumulate, attend<Avx2>};

}  // namespace moeship
