// Integer codes: with activations as digits all products and sums within a chunk are exact in 32-bit integers, and take a
// quarter of the instructions of float arithmetic.
#pragma once

#include "digits.h"
#include "dot.h"

// Multiply one tile of one chunk with a block of ROWS rows and add to y [ROWS, stride].
template <int BITS, int D, int ROWS>
static void multiply(const Tile& tile, const Layer& layer, int64_t units, const int32_t* quads, const float* steps,
                     int64_t chunks, const int32_t* sums, float* y, int64_t stride) {
    constexpr int accumulators = D * ROWS, most = LANES == 16 ? 12 : 6;
    constexpr int vectors = accumulators * 2 > most ? 1 : accumulators * 4 > most ? 2 : TILE / LANES;
    for (int first = 0; first < TILE; first += vectors * LANES) {
        Dot<BITS> sum[vectors][accumulators];
        for (int v = 0; v < vectors; v++) {
            Words zero = tile.zeros ? spread<BITS>(tile.zeros, layer.groups, first + v * LANES)
                                    : splat((uint32_t)1 << (BITS - 1));
            for (int d = 0; d < D; d++)
                for (int m = 0; m < ROWS; m++)
                    sum[v][d * ROWS + m].total = dot_pairs(Ints{}, (Ints)zero, splat(sums[m * D + d]));
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
