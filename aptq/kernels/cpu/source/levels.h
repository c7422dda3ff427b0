// Codes that stand for any levels, of up to 4 bits: a table in a register, float arithmetic.
#pragma once

#include "problem.h"

// Words whose low four bits, after a shift by 4 i, tell the level; and the input of the unit that is then at i.
template <int BITS>
constexpr int level_words() { return BITS > 2 ? 4 : BITS; }
template <int BITS>
constexpr int per_word() { return BITS > 2 ? 8 : 32 / BITS; }
template <int BITS>
constexpr int input_at(int word, int i) {
    if (BITS == 3) return 16 * (word / 2) + 2 * i + word % 2;
    return per_word<BITS>() * word + i;
}
template <int BITS, int WORD>
static inline Words level_word(const Words* words) {
    if constexpr (BITS != 3) return words[WORD];
    // The 1-bit plane goes above whole words of the 2-bit one (aptq/packing.py).
    else return (shifted<2 * (WORD % 2)>(words[WORD / 2]) & 0x33333333u) | (shifted<WORD - 2>(words[2]) & 0x44444444u);
}

// Multiply one tile of one chunk with ROWS rows of float activations [ROWS, width] and add to y [ROWS, stride].
// `above` and `below` are the levels of either side, repeated to 16 entries; SIDES: 2 where each has its own scale.
template <int BITS, int ROWS, int SIDES>
static void multiply_levels(const Tile& tile, const Layer& layer, int64_t units, const float* tables, const float* x,
                            int64_t width, float* y, int64_t stride) {
    const Table above(tables), below(tables + 16 * (SIDES - 1));
    for (int column = 0; column < TILE; column += LANES) {
        Floats sum[SIDES][ROWS] = {};
        const uint32_t* words = tile.words + column;
        const float* from = x;
        for (int64_t unit = 0; unit < units; unit++) {
            Words held[BITS];
            for (int r = 0; r < BITS; r++) held[r] = load<Words>(words + r * tile.stride);
            words += BITS * tile.stride;
            each<level_words<BITS>()>([&](auto word) {
                Words codes = level_word<BITS, word.value>(held);
                each<per_word<BITS>()>([&](auto i) {
                    constexpr int k = input_at<BITS>(word.value, i.value);
                    Words index = shifted<32 / per_word<BITS>() * i.value>(codes);
                    for (int m = 0; m < ROWS; m++) sum[0][m] += above[index] * from[m * width + k];
                    if constexpr (SIDES == 2)
                        for (int m = 0; m < ROWS; m++) sum[1][m] += below[index] * from[m * width + k];
                });
            });
            from += UNIT;
        }
        Floats scale = load_floats(tile.scales, layer.scale_type, column);
        Floats scale_below = SIDES == 2 ? load_floats(tile.below, layer.scale_type, column) : scale;
        for (int m = 0; m < ROWS; m++) {
            Floats total = sum[0][m] * scale;
            if constexpr (SIDES == 2) total += sum[1][m] * scale_below;
            float* place = y + m * stride + column;
            store(place, load<Floats>(place) + total);
        }
    }
}

// Levels repeated to 16 entries; with two scales those of one side, and zeros in place of the other's.
template <int BITS>
static void make_tables(const Layer& layer, float* tables) {
    for (int i = 0; i < 16; i++) {
        float level = layer.levels[i % (1 << (BITS < 4 ? BITS : 4))];
        tables[i] = layer.below && level < 0 ? 0.0f : level;
        tables[16 + i] = level < 0 ? level : 0.0f;
    }
}

// One worker's outputs: y [rows, stride], zero at first; x [rows, width], zeros behind the last input.
template <int BITS>
static void multiply_levels_range(const Layer& layer, const float* x, int64_t width, int64_t rows, Range range, float* y,
                                  int64_t stride) {
    alignas(64) float tables[32];
    make_tables<BITS>(layer, tables);
    Room room;
    for (int64_t index = 0; index < chunks_of(layer); index++) {
        Chunk chunk = chunk_at(layer, index);
        for (int64_t column = range.begin; column < range.end; column += TILE) {
            Tile tile = tile_at(layer, chunk, column, room);
            for (int64_t m = 0; m < rows;) {
                const float* from = x + m * width + chunk.unit * UNIT;
                float* to = y + m * stride + column - range.begin;
                bool four = rows - m >= 4;
                auto run = layer.below ? (four ? multiply_levels<BITS, 4, 2> : multiply_levels<BITS, 1, 2>)
                                       : (four ? multiply_levels<BITS, 4, 1> : multiply_levels<BITS, 1, 1>);
                run(tile, layer, chunk.units, tables, from, width, to, stride);
                m += four ? 4 : 1;
            }
        }
    }
}
