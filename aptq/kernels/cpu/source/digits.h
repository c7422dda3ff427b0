// Activations as fixed-point numbers of one to three signed bytes.
#pragma once

#include <cmath>
#include <cstdlib>

#include "problem.h"

constexpr int MOST_ROWS = 4;  // of activations that share one reading of the codes

// Activations as digits: x = step * (d[0] + 256 d[1] + 65536 d[2]), |d| < 128, a step for each row and chunk.
// Rows are kept in blocks of 4, 2 or 1 so that a kernel reads digits one after the other:
// block, quad of inputs, digit, row in the block.
struct Digits {
    int32_t* quads;
    float* steps;   // [rows, chunks]
    int32_t* sums;  // [chunks, rows, digits]: their negatives in the lower halves, 15 bits and a sign, to be multiplied by zeros
};
struct Block {
    int64_t first, rows;
};
static inline int64_t blocks_of(int64_t rows) { return rows / MOST_ROWS + (rows % 4 + 1) / 2; }
static inline Block block_at(int64_t rows, int64_t index) {
    int64_t whole = rows / MOST_ROWS, rest = rows % MOST_ROWS;
    if (index < whole) return {index * MOST_ROWS, MOST_ROWS};
    if (rest >= 2 && index == whole) return {whole * MOST_ROWS, 2};
    return {rows - 1, 1};
}

// The 32 bytes of a unit, in the order of its quads (`input_of`) of codes of which a byte of a word holds `per_word`.
static inline __m256i in_quads(__m256i bytes, int per_word) {
    if (per_word == 1) return bytes;
    const __m128i two = _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
    const __m128i four = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m128i eight = _mm_setr_epi8(0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15);
    __m128i order = per_word == 2 ? two : per_word == 4 ? four : eight;
    __m256i turned = _mm256_shuffle_epi8(bytes, _mm256_broadcastsi128_si256(order));
    if (per_word < 8) return turned;
    __m128i low = _mm256_castsi256_si128(turned), high = _mm256_extracti128_si256(turned, 1);
    return _mm256_set_m128i(_mm_unpackhi_epi16(low, high), _mm_unpacklo_epi16(low, high));
}

// Write one row's digits of one chunk, x [32 units]. NaN and infinity make the step, and so the row of the product, NaN.
template <int D>
static void digitize_chunk(int bits, const float* x, int64_t units, int32_t* quads, int64_t rows, float* step,
                           int32_t* sums) {
    constexpr int32_t limit = D == 3 ? 127 * 65793 : D == 2 ? 127 * 257 : 127;
    constexpr int32_t most = 0x7F7FFFFF;  // the bits of the largest number; those of sizes are in the order of sizes
    Ints sizes{};
    for (int64_t k = 0; k < units * UNIT; k += LANES) {
        Ints size = (Ints)(load<Words>(x + k) & 0x7FFFFFFFu);
        sizes = size > sizes ? size : sizes;
    }
    int32_t largest = 0;
    for (int lane = 0; lane < LANES; lane++) largest = sizes[lane] > largest ? sizes[lane] : largest;
    float size;
    std::memcpy(&size, &largest, sizeof size);
    *step = largest <= most ? (float)((double)size / limit) : NAN;
    double scale = largest > 0 && largest <= most ? limit / (double)size : 0.0;
    Ints sum[D] = {};
    for (int64_t unit = 0; unit < units; unit++) {
        alignas(32) int8_t digits[D][UNIT] = {};
        for (int k = 0; scale > 0 && k < UNIT; k += LANES) {
            Ints left = rounded(load<Floats>(x + unit * UNIT + k), scale);
            for (int d = 0; d < D; d++) {
                Ints digit = d == D - 1 ? left : (left << 24) >> 24;
                left = (left - digit) >> 8;
                store_bytes(digits[d] + k, digit);
                sum[d] += digit;
            }
        }
        for (int d = 0; d < D; d++) {
            alignas(32) int32_t turned[QUADS];
            __m256i bytes = _mm256_load_si256((const __m256i*)digits[d]);
            _mm256_store_si256((__m256i*)turned, in_quads(bytes, 8 / primary(bits)));
            for (int j = 0; j < QUADS; j++) quads[((unit * QUADS + j) * D + d) * rows] = turned[j];
        }
    }
    for (int d = 0; d < D; d++) {
        int32_t total = 0;
        for (int lane = 0; lane < LANES; lane++) total += sum[d][lane];
        sums[d] = -total & 0xFFFF;
    }
}

// Digits of chunk `index` of all rows.
template <int D>
static void digitize(const Layer& layer, const void* x, int64_t type, int64_t rows, int64_t index, const Digits& to) {
    Chunk chunk = chunk_at(layer, index);
    int64_t first = chunk.unit * UNIT, count = chunk.units * UNIT, chunks = chunks_of(layer);
    if (first + count > layer.inputs) count = layer.inputs - first;
    int64_t quads = ceil_div(layer.inputs, UNIT) * QUADS;
    float values[CHUNK] = {};
    for (int64_t b = 0; b < blocks_of(rows); b++) {
        Block block = block_at(rows, b);
        for (int64_t m = 0; m < block.rows; m++) {
            int64_t row = block.first + m, at = row * layer.inputs + first, k = 0;
            for (; k + LANES <= count; k += LANES) store(values + k, load_floats(x, type, at + k));
            for (; k < count; k++) values[k] = to_float(x, type, at + k);
            int32_t* place = to.quads + block.first * quads * D + chunk.unit * QUADS * D * block.rows + m;
            digitize_chunk<D>((int)layer.bits, values, chunk.units, place, block.rows, to.steps + row * chunks + index,
                              to.sums + (index * rows + row) * D);
        }
    }
}
