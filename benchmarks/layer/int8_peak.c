/* Measures how many int8 products a core sums per second. The loop has only the processor's best instructions for this,
   on registers, with enough independent sums to hide their latency. Compiled for this processor (-march=native). */
#include <stdint.h>

#define REPEAT(step) step(0) step(1) step(2) step(3) step(4) step(5) step(6) step(7) step(8) step(9) step(10) step(11)
#define STEPS 12

#if defined(__AMX_INT8__)
#include <sys/syscall.h>
#include <unistd.h>
const char *name(void) { return "AMX tdpbssd"; }
/* Six tiles of sums, two of operands, 16 rows of 64 bytes each: 16 * 16 * 64 products an instruction. */
int64_t products(int64_t turns) {
    struct { uint8_t palette, start, reserved[14]; uint16_t bytes[16]; uint8_t rows[16]; } config = {1, 0, {0}, {0}, {0}};
    for (int tile = 0; tile < 8; tile++) config.bytes[tile] = 64, config.rows[tile] = 16;
    if (syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */)) return 0;
    __asm__ volatile("ldtilecfg %0" ::"m"(config));
    for (int64_t turn = 0; turn < turns; turn++)
        __asm__ volatile("tdpbssd %tmm7, %tmm6, %tmm0\n tdpbssd %tmm7, %tmm6, %tmm1\n tdpbssd %tmm7, %tmm6, %tmm2\n"
                         "tdpbssd %tmm7, %tmm6, %tmm3\n tdpbssd %tmm7, %tmm6, %tmm4\n tdpbssd %tmm7, %tmm6, %tmm5");
    __asm__ volatile("tilerelease");
    return turns * 6 * 16 * 16 * 64;
}
#elif defined(__AVX2__)
#include <immintrin.h>
#if defined(__AVX512VNNI__)
const char *name(void) { return "AVX-512 VNNI vpdpbusd"; }
typedef __m512i vector;
#define STEP(i) __asm__ volatile("vpdpbusd %2, %1, %0" : "+v"(sums[i]) : "v"(left), "v"(right));
#elif defined(__AVX512BW__)
const char *name(void) { return "AVX-512 vpmaddubsw, vpmaddwd, vpaddd"; }
typedef __m512i vector;
#else
const char *name(void) { return "AVX2 vpmaddubsw, vpmaddwd, vpaddd"; }
typedef __m256i vector;
#endif
#ifndef STEP
#define STEP(i) { \
    vector pairs; \
    __asm__ volatile("vpmaddubsw %2, %1, %0" : "=v"(pairs) : "v"(left), "v"(right)); \
    __asm__ volatile("vpmaddwd %1, %0, %0" : "+v"(pairs) : "v"(left)); \
    __asm__ volatile("vpaddd %1, %0, %0" : "+v"(sums[i]) : "v"(pairs)); \
}
#endif
int64_t products(int64_t turns) {
    vector sums[STEPS] = {0}, left = {0}, right = {0};
    for (int64_t turn = 0; turn < turns; turn++) { REPEAT(STEP) }
    return turns * STEPS * (int64_t)sizeof(vector);
}
#else
const char *name(void) { return "unknown"; }
int64_t products(int64_t turns) { return 0 * turns; }
#endif
