// Functions that AVX-512 with and without VNNI share. The lanes of one register are the sixteen rows of a group.
#pragma once

#include <immintrin.h>

#include "attending.h"
#include "products.h"

namespace moeship {
namespace {

struct Avx512 {
  static constexpr int kLanes = 16, kRows = 8;
  static constexpr int kAttending = 8, kSums = 16;  // rows of attention, and registers of their sums
  using I = __m512i;
  using F = __m512;

  static I load_line(const uint8_t* p) {
    I line = _mm512_loadu_si512(p);
    asm("" : "+v"(line));  // keeps GCC from loading it again for each shift: at one row loads are what takes longest
    return line;
  }
  static I load_bytes(const uint8_t* p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static I broadcast(int32_t value) { return _mm512_set1_epi32(value); }
  static I broadcast_quad(const int8_t* p) {
    int32_t quad;
    std::memcpy(&quad, p, 4);
    return _mm512_set1_epi32(quad);
  }
  template <int kBits>
  static I plane(I codes, int plane) {
    if (kBits == 8) return codes;
    return _mm512_and_si512(_mm512_srli_epi16(codes, kBits * plane), _mm512_set1_epi8((1 << kBits) - 1));
  }
  template <int kLow, int kHigh>
  static I join(I low, int low_place, I high, int high_place) {
    const int up = kLow - kHigh * high_place;
    low = _mm512_srli_epi16(low, kLow * low_place);
    high = up < 0 ? _mm512_srli_epi16(high, -up) : _mm512_slli_epi16(high, up);
    high = _mm512_and_si512(high, _mm512_set1_epi8(((1 << kHigh) - 1) << kLow));
    return _mm512_ternarylogic_epi32(low, _mm512_set1_epi8((1 << kLow) - 1), high, 0xEA);  // low & mask | high
  }
  static I byte(I q, int j) { return _mm512_and_si512(_mm512_srli_epi32(q, 8 * j), _mm512_set1_epi32(255)); }
  static I multiply(I a, I b) { return _mm512_mullo_epi32(a, b); }
  static I subtract(I a, I b) { return _mm512_sub_epi32(a, b); }
  static F to_float(I a) { return _mm512_cvtepi32_ps(a); }
  static F zero() { return _mm512_setzero_ps(); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static F load_half(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static F broadcast(float value) { return _mm512_set1_ps(value); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F multiply(F a, F b) { return _mm512_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static void store(float* p, F a) { _mm512_storeu_ps(p, a); }
  static void store_codes(float* p, __m128i codes) { store(p, to_float(_mm512_cvtepi8_epi32(codes))); }
};

}  // namespace
}  // namespace moeship
