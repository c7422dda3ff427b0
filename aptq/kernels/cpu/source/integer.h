// Integer codes: activations become fixed-point numbers of one to three signed bytes, so that all products and sums
// within a chunk are exact in 32-bit integers, and take a quarter of the instructions of float arithmetic.
#pragma once

#include <cmath>
#include <cstdlib>

#include "dot.h"
#include "problem.h"

constexpr int MOST_ROWS = 4;  // of activations that share one reading of the codes

// Activations as digits: x = step * (d[0] + 256 d[1] + 65536 d[2]), |d| < 128, a step for each row and chunk.
// Rows are kept in blocks of 4, 2 or 1 so that a kernel reads digits one after the other:
// block, quad of inputs, digit, row in the block.
struct Digits {
    int32_t* quads;
    float* steps;   // [rows, chunks]
    int32_t* sums;  // [chunks, rows, digits]
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

// Write one row's digits of one chunk. NaN and infinity make the step, and so the row of the product, NaN.
template <int D>
static void digitize_chunk(int bits, const float* x, int64_t count, const Chunk& chunk, int32_t* quads, int64_t rows,
                           float* step, int32_t* sums) {
    constexpr int32_t limit = D == 3 ? 127 * 65793 : D == 2 ? 127 * 257 : 127;
    constexpr double round = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds, and leaves the integer in the low bits
    float largest = 0;
    bool finite = true;
    for (int64_t k = 0; k < count; k++) {
        float size = std::fabs(x[k]);
        finite &= size <= 3.4028235e38f;
        largest = size > largest ? size : largest;
    }
    double scale = finite && largest > 0 ? limit / (double)largest : 0.0;
    *step = finite ? (float)((double)largest / limit) : NAN;
    alignas(64) int8_t digits[D][CHUNK];
    std::memset(digits, 0, sizeof digits);
    int32_t sum[D] = {};
    for (int64_t k = 0; finite && k < count; k++) {
        double shifted = x[k] * scale + round;
        int64_t raw;
        std::memcpy(&raw, &shifted, sizeof raw);
        int32_t left = (int32_t)raw;
        for (int d = 0; d < D; d++) {
            int8_t digit = (int8_t)left;
            left = (left - digit) >> 8;
            digits[d][k] = digit;
            sum[d] += digit;
        }
    }
    for (int d = 0; d < D; d++) sums[d] = sum[d];
    for (int64_t unit = 0; unit < chunk.units; unit++)
        for (int j = 0; j < QUADS; j++)
            for (int d = 0; d < D; d++) {
                const int8_t* from = digits[d] + unit * UNIT;
                int8_t quad[4];
                for (int i = 0; i < 4; i++) quad[i] = from[input_of(bits, j, i)];
                std::memcpy(quads + ((unit * QUADS + j) * D + d) * rows, quad, 4);
            }
}

// Digits of chunk `index` of all rows.
template <int D>
static void digitize(const Layer& layer, const void* x, int64_t type, int64_t rows, int64_t index, const Digits& to) {
    Chunk chunk = chunk_at(layer, index);
    int64_t first = chunk.unit * UNIT, count = chunk.units * UNIT, chunks = chunks_of(layer);
    if (first + count > layer.inputs) count = layer.inputs - first;
    int64_t quads = ceil_div(layer.inputs, UNIT) * QUADS;
    float values[CHUNK];
    for (int64_t b = 0; b < blocks_of(rows); b++) {
        Block block = block_at(rows, b);
        for (int64_t m = 0; m < block.rows; m++) {
            int64_t row = block.first + m;
            for (int64_t k = 0; k < count; k++) values[k] = to_float(x, type, row * layer.inputs + first + k);
            int32_t* place = to.quads + block.first * quads * D + chunk.unit * QUADS * D * block.rows + m;
            digitize_chunk<D>((int)layer.bits, values, count, chunk, place, block.rows,
                              to.steps + row * chunks + index, to.sums + (index * rows + row) * D);
        }
    }
}

// Multiply one tile of one chunk with a block of ROWS rows and add to y [ROWS, stride].
template <int BITS, int D, int ROWS>
static void multiply(const Tile& tile, const Layer& layer, int64_t units, const int32_t* quads, const float* steps,
                     int64_t chunks, const int32_t* sums, float* y, int64_t stride) {
    constexpr int accumulators = D * ROWS, most = LANES == 16 ? 12 : 6;
    constexpr int vectors = accumulators * 2 > most ? 1 : accumulators * 4 > most ? 2 : TILE / LANES;
    for (int first = 0; first < TILE; first += vectors * LANES) {
        Dot<BITS> sum[vectors][accumulators];
        for (int v = 0; v < vectors; v++) {
            Words zero = tile.zeros ? spread<BITS>(tile.zeros, groups_of(layer), first + v * LANES)
                                    : splat((uint32_t)1 << (BITS - 1));
            for (int d = 0; d < D; d++)
                for (int m = 0; m < ROWS; m++)  // a sum of digits has 15 bits and a sign
                    sum[v][d * ROWS + m].total = dot_pairs(Ints{}, (Ints)zero, splat(-sums[m * D + d] & 0xFFFF));
        }
        const int32_t* x = quads;
        const uint32_t* words = tile.words + first;
        for (int64_t unit = 0; unit < units; unit++) {
            each<QUADS>([&](auto j) {
                for (int v = 0; v < vectors; v++) {
                    Words codes = quad<BITS, j.value>(Unit{words + v * LANES, tile.stride});
                    for (int a = 0; a < accumulators; a++) sum[v][a].template add<j.value>(codes, splat(x[a]));
                }
                x += accumulators;
            });
            words += BITS * tile.stride;
        }
        for (int v = 0; v < vectors; v++) {
            int column = first + v * LANES;
            Floats scale = load_floats(tile.scales, layer.scale_type, column);
            for (int m = 0; m < ROWS; m++) {
                Floats total = to_floats(sum[v][(D - 1) * ROWS + m].total);
                for (int d = D - 2; d >= 0; d--) total = total * 256.0f + to_floats(sum[v][d * ROWS + m].total);
                float* place = y + m * stride + column;
                store(place, load<Floats>(place) + total * (scale * steps[m * chunks]));
            }
        }
    }
}

// One worker's outputs: y [rows, stride], zero at first.
template <int BITS, int D>
static void multiply_range(const Layer& layer, const Digits& x, int64_t rows, Range range, float* y, int64_t stride) {
    int64_t chunks = chunks_of(layer), quads = ceil_div(layer.inputs, UNIT) * QUADS;
    Room room;
    for (int64_t index = 0; index < chunks; index++) {
        Chunk chunk = chunk_at(layer, index);
        for (int64_t column = range.begin; column < range.end; column += TILE) {
            Tile tile = tile_at(layer, chunk, column, room);
            for (int64_t b = 0; b < blocks_of(rows); b++) {
                Block block = block_at(rows, b);
                const int32_t* from = x.quads + block.first * quads * D + chunk.unit * QUADS * D * block.rows;
                const float* steps = x.steps + block.first * chunks + index;
                const int32_t* sums = x.sums + (index * rows + block.first) * D;
                float* to = y + block.first * stride + column - range.begin;
                auto run = block.rows == 4 ? multiply<BITS, D, 4> : block.rows == 2 ? multiply<BITS, D, 2>
                                                                                    : multiply<BITS, D, 1>;
                run(tile, layer, chunk.units, from, steps, chunks, sums, to, stride);
            }
        }
    }
}
