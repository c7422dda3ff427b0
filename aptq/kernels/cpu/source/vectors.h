// Vectors of 32-bit lanes: 16 with AVX-512, 8 with AVX2. Arithmetic is the compiler's own on vector types; only what it
// has no operator for is spelled in intrinsics here.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define APTQ_AVX512 1
constexpr int LANES = 16;
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
constexpr int LANES = 8;
#else
#error "aptq's kernels need AVX2 with FMA and F16C, or AVX-512 (F, BW, DQ, VL)"
#endif

typedef uint32_t Words __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));
typedef uint16_t Halves __attribute__((vector_size(LANES * 4)));
typedef float Floats __attribute__((vector_size(LANES * 4)));

template <class Vector, class Element>
static inline Vector load(const Element* from) {
    Vector vector;
    std::memcpy(&vector, from, sizeof vector);  // any alignment
    return vector;
}

template <class Vector, class Element>
static inline void store(Element* to, Vector vector) {
    std::memcpy(to, &vector, sizeof vector);
}

// Fetch what will be read, if there is anything, to the first or the second cache.
template <int LEVEL>
static inline void prefetch(const void* from) {
    _mm_prefetch((const char*)from, LEVEL == 1 ? _MM_HINT_T0 : _MM_HINT_T1);
}

static inline Ints splat(int32_t value) { return Ints{} + value; }
static inline Words splat(uint32_t value) { return Words{} + value; }
static inline Floats splat(float value) { return value - Floats{}; }
static inline Floats to_floats(Ints ints) { return __builtin_convertvector(ints, Floats); }

// Repeat a byte in all bytes of a word.
constexpr uint32_t bytes(uint32_t byte) { return byte * 0x01010101u; }

// Call `step(constant<0>)`, ..., `step(constant<Count - 1>)`.
template <int Value>
struct Constant {
    static constexpr int value = Value;
};
template <class Step, int... Values>
static inline __attribute__((always_inline)) void each(Step&& step, std::integer_sequence<int, Values...>) {
    (step(Constant<Values>{}), ...);
}
template <int Count, class Step>
static inline __attribute__((always_inline)) void each(Step&& step) {
    each(static_cast<Step&&>(step), std::make_integer_sequence<int, Count>{});
}

#ifdef APTQ_AVX512
static inline void store_low(uint16_t* to, Words words) {
    _mm256_storeu_si256((__m256i*)to, _mm512_cvtepi32_epi16((__m512i)words));
}
static inline Floats from_halves(const uint16_t* halves) {
    return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)halves));
}
static inline Floats from_bfloats(const uint16_t* halves) {
    return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)halves)), 16);
}
static inline void store_halves(uint16_t* to, Floats floats) {
    _mm256_storeu_si256((__m256i*)to, _mm512_cvtps_ph((__m512)floats, _MM_FROUND_TO_NEAREST_INT));
}
// Entry `index % 16` of a table for every lane.
struct Table {
    __m512 entries;
    explicit Table(const float* from) : entries(_mm512_loadu_ps(from)) {}
    Floats operator[](Words index) const { return (Floats)_mm512_permutexvar_ps((__m512i)index, entries); }
};
// Move lanes up by COUNT, a power of two, the last ones of `before` in front.
template <int COUNT>
static inline Words moved(Words before, Words words) {
    return (Words)_mm512_alignr_epi32((__m512i)words, (__m512i)before, LANES - COUNT);
}
// Every lane in the place of the one COUNT, a power of two, beside it.
template <int COUNT>
static inline Floats exchanged(Floats floats) {
    __m512 from = (__m512)floats;
    if constexpr (COUNT <= 2) return (Floats)_mm512_permute_ps(from, COUNT == 1 ? 0xB1 : 0x4E);
    else return (Floats)_mm512_shuffle_f32x4(from, from, COUNT == 4 ? 0xB1 : 0x4E);
}
// Lanes 0, 2, 4, ... of two vectors, and lanes 1, 3, 5, ...
static inline void deinterleave(Words low, Words high, Words& even, Words& odd) {
    const __m512i from = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    even = (Words)_mm512_permutex2var_epi32((__m512i)low, from, (__m512i)high);
    odd = (Words)_mm512_permutex2var_epi32((__m512i)low, from | _mm512_set1_epi32(1), (__m512i)high);
}
static inline void interleave(Floats even, Floats odd, Floats& low, Floats& high) {
    const __m512i from = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    low = (Floats)_mm512_permutex2var_ps((__m512)even, from, (__m512)odd);
    high = (Floats)_mm512_permutex2var_ps((__m512)even, from + _mm512_set1_epi32(8), (__m512)odd);
}
static inline Floats gather(const float* table, Words index) {
    return (Floats)_mm512_i32gather_ps((__m512i)index, table, 4);
}
// floats * scale, to the nearest integers.
static inline Ints rounded(Floats floats, double scale) {
    __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256((__m512)floats)) * scale;
    __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)floats, 1)) * scale;
    return (Ints)_mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtpd_epi32(low)), _mm512_cvtpd_epi32(high), 1);
}
// The low byte of every lane.
static inline void store_bytes(int8_t* to, Ints ints) {
    _mm_storeu_si128((__m128i*)to, _mm512_cvtepi32_epi8((__m512i)ints));
}
// sums + the products of 16-bit halves, added in pairs.
static inline Ints dot_pairs(Ints sums, Ints left, Ints right) {
#ifdef __AVX512VNNI__
    return (Ints)_mm512_dpwssd_epi32((__m512i)sums, (__m512i)left, (__m512i)right);
#else
    return sums + (Ints)_mm512_madd_epi16((__m512i)left, (__m512i)right);
#endif
}
#ifdef __AVX512VNNI__
#define APTQ_BYTE_DOT 1
static inline Ints dot_bytes(Ints sums, Words codes, Ints x) {
    return (Ints)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)codes, (__m512i)x);
}
#endif
#ifdef __AVX512BF16__
#define APTQ_PAIR_DOT 1
// Halves in another order.
struct Order {
    alignas(64) uint16_t from[2 * LANES];
};
static inline Words ordered(const Order& order, const void* halves) {
    return (Words)_mm512_permutexvar_epi16(_mm512_load_si512(order.from), _mm512_loadu_si512(halves));
}
// bfloat16 of `low` in the lower halves of lanes, of `high` in the upper ones.
static inline Words bfloat_pairs(Floats low, Floats high) {
    static constexpr Order order{{0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                  8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31}};
    __m512bh rounded = _mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
    return ordered(order, &rounded);
}
// sums + the products of bfloat16, added in pairs.
static inline Floats dot_bfloats(Floats sums, Words left, Words right) {
    return (Floats)_mm512_dpbf16_ps((__m512)sums, (__m512bh)left, (__m512bh)right);
}
#endif
static inline Halves byte_pairs(Words codes, Ints x) {
    return (Halves)_mm512_maddubs_epi16((__m512i)codes, (__m512i)x);
}
// Products of signed fixed-point numbers with 15 bits behind the point, rounded.
static inline Halves product(Halves left, Halves right) {
    return (Halves)_mm512_mulhrs_epi16((__m512i)left, (__m512i)right);
}
#else
static inline Floats from_halves(const uint16_t* halves) {
    return (Floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)halves));
}
static inline Floats from_bfloats(const uint16_t* halves) {
    return (Floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)halves)), 16);
}
static inline void store_low(uint16_t* to, Words words) {
    __m256i low = (__m256i)(words & 0xFFFFu);
    _mm_storeu_si128((__m128i*)to, _mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1)));
}
static inline void store_halves(uint16_t* to, Floats floats) {
    _mm_storeu_si128((__m128i*)to, _mm256_cvtps_ph((__m256)floats, _MM_FROUND_TO_NEAREST_INT));
}
struct Table {
    __m256 low, high;
    explicit Table(const float* from) : low(_mm256_loadu_ps(from)), high(_mm256_loadu_ps(from + 8)) {}
    Floats operator[](Words index) const {
        __m256 below = _mm256_permutevar8x32_ps(low, (__m256i)index);
        __m256 above = _mm256_permutevar8x32_ps(high, (__m256i)index);
        return (Floats)_mm256_blendv_ps(below, above, (__m256)(index << 28));  // by bit 3, moved to the sign
    }
};
template <int COUNT>
static inline Words moved(Words before, Words words) {
    __m256i middle = _mm256_permute2x128_si256((__m256i)before, (__m256i)words, 0x21);
    if constexpr (COUNT == 4) return (Words)middle;
    else return (Words)_mm256_alignr_epi8((__m256i)words, middle, 16 - 4 * COUNT);
}
template <int COUNT>
static inline Floats exchanged(Floats floats) {
    __m256 from = (__m256)floats;
    if constexpr (COUNT <= 2) return (Floats)_mm256_permute_ps(from, COUNT == 1 ? 0xB1 : 0x4E);
    else return (Floats)_mm256_permute2f128_ps(from, from, 1);
}
static inline void deinterleave(Words low, Words high, Words& even, Words& odd) {
    __m256 a = _mm256_shuffle_ps((__m256)low, (__m256)high, 0x88), b = _mm256_shuffle_ps((__m256)low, (__m256)high, 0xDD);
    even = (Words)_mm256_permute4x64_epi64((__m256i)a, 0xD8);
    odd = (Words)_mm256_permute4x64_epi64((__m256i)b, 0xD8);
}
static inline void interleave(Floats even, Floats odd, Floats& low, Floats& high) {
    __m256 a = _mm256_unpacklo_ps((__m256)even, (__m256)odd), b = _mm256_unpackhi_ps((__m256)even, (__m256)odd);
    low = (Floats)_mm256_permute2f128_ps(a, b, 0x20);
    high = (Floats)_mm256_permute2f128_ps(a, b, 0x31);
}
static inline Floats gather(const float* table, Words index) {
    return (Floats)_mm256_i32gather_ps(table, (__m256i)index, 4);
}
static inline Ints rounded(Floats floats, double scale) {
    __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128((__m256)floats)) * scale;
    __m256d high = _mm256_cvtps_pd(_mm256_extractf128_ps((__m256)floats, 1)) * scale;
    return (Ints)_mm256_set_m128i(_mm256_cvtpd_epi32(high), _mm256_cvtpd_epi32(low));
}
static inline void store_bytes(int8_t* to, Ints ints) {
    const __m256i lowest = _mm256_set1_epi32(0x0C080400);
    __m256i bytes = _mm256_shuffle_epi8((__m256i)ints, lowest);
    int32_t low = _mm256_extract_epi32(bytes, 0), high = _mm256_extract_epi32(bytes, 4);
    std::memcpy(to, &low, 4);
    std::memcpy(to + 4, &high, 4);
}
static inline Ints dot_pairs(Ints sums, Ints left, Ints right) {
    return sums + (Ints)_mm256_madd_epi16((__m256i)left, (__m256i)right);
}
#ifdef __AVXVNNI__
#define APTQ_BYTE_DOT 1
static inline Ints dot_bytes(Ints sums, Words codes, Ints x) {
    return (Ints)_mm256_dpbusd_avx_epi32((__m256i)sums, (__m256i)codes, (__m256i)x);
}
#endif
static inline Halves byte_pairs(Words codes, Ints x) {
    return (Halves)_mm256_maddubs_epi16((__m256i)codes, (__m256i)x);
}
static inline Halves product(Halves left, Halves right) {
    return (Halves)_mm256_mulhrs_epi16((__m256i)left, (__m256i)right);
}
#endif

// Round to bfloat16, ties to even; NaN stays NaN.
static inline void store_bfloats(uint16_t* to, Floats floats) {
#if defined(APTQ_AVX512) && defined(__AVX512BF16__)
    __m256bh rounded = _mm512_cvtneps_pbh((__m512)floats);
    std::memcpy(to, &rounded, sizeof rounded);
#else
    Words bits = (Words)floats;
    Words rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    store_low(to, floats == floats ? rounded : splat(0x7FC0u));
#endif
}
