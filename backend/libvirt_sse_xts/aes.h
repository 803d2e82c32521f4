/*
 * AES-XTS kernels for x86-64: AES-NI, VAES with AVX2, VAES with AVX-512.
 */

#include <cpuid.h>
#include <immintrin.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* The round keys of AES in the order of use, 16 bytes each, *step* bytes apart; never copied to the heap. */
struct schedule {
    const uint8_t *first;
    ptrdiff_t step;
    int rounds;
};

typedef void kernel_function(
    bool encrypt, struct schedule data, struct schedule tweak_schedule,
    const uint8_t *tweak, size_t blocks, uint8_t *dst, const uint8_t *src);

static inline __attribute__((always_inline)) __m128i key(struct schedule schedule, int round)
{
    return _mm_loadu_si128((const __m128i *)(schedule.first + schedule.step * round));
}

/* Tweaks of the first group. Multiplies by x once per block. */
#define FIRST_BY_DOUBLING(tweaks, first, polynomial) \
    EACH (int i = 0; i < GROUP; i++) { \
        tweaks[i] = first; \
        __m128i carries = _mm_srai_epi32(_mm_shuffle_epi32(first, 0x13), 31); \
        first = _mm_xor_si128(_mm_add_epi64(first, first), _mm_and_si128(carries, _mm_set_epi32(0, 1, 0, 0x87))); \
    }

/* Likewise. Multiplies by x^n for each lane at once, n below 64: the bits shifted out of the upper half are
 * multiplied by the polynomial. */
#define FIRST_BY_SHIFTS(tweaks, first, polynomial) \
    EACH (int i = 0; i < GROUP; i++) { \
        V all = BROADCAST(first), counts = COUNTS(LANES * i); \
        V carries = SHIFT_QUADS_RIGHT(all, SUBTRACT_QUADS(SET_QUADS(64), counts)); \
        tweaks[i] = XOR(XOR(SHIFT_QUADS_LEFT(all, counts), SHIFT_LEFT(carries, 8)), CLMUL_HIGH(carries, polynomial)); \
    }

#define TARGET __attribute__((target("aes,pclmul,sse4.1")))
#define V __m128i
#define LANES 1
#define NAME(x) aesni_##x
#define LOAD(p) _mm_loadu_si128((const __m128i *)(p))
#define STORE(p, v) _mm_storeu_si128((__m128i *)(p), v)
#define XOR _mm_xor_si128
#define ENC _mm_aesenc_si128
#define ENC_LAST _mm_aesenclast_si128
#define DEC _mm_aesdec_si128
#define DEC_LAST _mm_aesdeclast_si128
#define SHIFT_LEFT _mm_slli_si128
#define SHIFT_RIGHT _mm_srli_si128
#define CLMUL(a, b) _mm_clmulepi64_si128(a, b, 0)
#define BROADCAST(v) (v)
#define FIRST FIRST_BY_DOUBLING
#include "kernel.h"

#define TARGET __attribute__((target("aes,vaes,pclmul,vpclmulqdq,avx2")))
#define V __m256i
#define LANES 2
#define NAME(x) vaes256_##x
#define LOAD(p) _mm256_loadu_si256((const __m256i *)(p))
#define STORE(p, v) _mm256_storeu_si256((__m256i *)(p), v)
#define XOR _mm256_xor_si256
#define ENC _mm256_aesenc_epi128
#define ENC_LAST _mm256_aesenclast_epi128
#define DEC _mm256_aesdec_epi128
#define DEC_LAST _mm256_aesdeclast_epi128
#define SHIFT_LEFT _mm256_bslli_epi128
#define SHIFT_RIGHT _mm256_bsrli_epi128
#define CLMUL(a, b) _mm256_clmulepi64_epi128(a, b, 0)
#define CLMUL_HIGH(a, b) _mm256_clmulepi64_epi128(a, b, 1)
#define BROADCAST _mm256_broadcastsi128_si256
#define COUNTS(n) _mm256_set_epi64x((n) + 1, (n) + 1, n, n)
#define SET_QUADS _mm256_set1_epi64x
#define SUBTRACT_QUADS _mm256_sub_epi64
#define SHIFT_QUADS_LEFT _mm256_sllv_epi64
#define SHIFT_QUADS_RIGHT _mm256_srlv_epi64
#define FIRST FIRST_BY_SHIFTS
#include "kernel.h"
#undef CLMUL_HIGH
#undef COUNTS
#undef SET_QUADS
#undef SUBTRACT_QUADS
#undef SHIFT_QUADS_LEFT
#undef SHIFT_QUADS_RIGHT

#define TARGET __attribute__((target("aes,vaes,pclmul,vpclmulqdq,avx512f,avx512bw,avx512vl")))
#define V __m512i
#define LANES 4
#define NAME(x) vaes512_##x
#define LOAD(p) _mm512_loadu_si512(p)
#define STORE(p, v) _mm512_storeu_si512(p, v)
#define XOR _mm512_xor_si512
#define ENC _mm512_aesenc_epi128
#define ENC_LAST _mm512_aesenclast_epi128
#define DEC _mm512_aesdec_epi128
#define DEC_LAST _mm512_aesdeclast_epi128
#define SHIFT_LEFT _mm512_bslli_epi128
#define SHIFT_RIGHT _mm512_bsrli_epi128
#define CLMUL(a, b) _mm512_clmulepi64_epi128(a, b, 0)
#define CLMUL_HIGH(a, b) _mm512_clmulepi64_epi128(a, b, 1)
#define BROADCAST _mm512_broadcast_i32x4
#define COUNTS(n) _mm512_set_epi64((n) + 3, (n) + 3, (n) + 2, (n) + 2, (n) + 1, (n) + 1, n, n)
#define SET_QUADS _mm512_set1_epi64
#define SUBTRACT_QUADS _mm512_sub_epi64
#define SHIFT_QUADS_LEFT _mm512_sllv_epi64
#define SHIFT_QUADS_RIGHT _mm512_srlv_epi64
#define FIRST FIRST_BY_SHIFTS
#include "kernel.h"

enum { STATE_SSE_AVX = 0x06, STATE_AVX512 = 0xe0 };

/* The register state that the kernel saves for programs (XCR0). */
static uint32_t saved_state(void)
{
    uint32_t a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE))
        return 0;
    __asm__ volatile("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
    return a;
}

static bool has_aesni(void)
{
    uint32_t a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_AES) && (c & bit_PCLMUL) && (c & bit_SSE4_1);
}

static bool has_vaes(uint32_t features, uint32_t state)
{
    uint32_t a, b, c, d;
    return has_aesni() && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b & features) == features
        && (c & bit_VAES) && (c & bit_VPCLMULQDQ) && (saved_state() & state) == state;
}

static bool has_vaes256(void)
{
    return has_vaes(bit_AVX2, STATE_SSE_AVX);
}

static bool has_vaes512(void)
{
    return has_vaes(bit_AVX512F | bit_AVX512BW | bit_AVX512VL, STATE_SSE_AVX | STATE_AVX512);
}
