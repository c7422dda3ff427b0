// The dense weight of a few outputs, for products with many rows.
#pragma once

#include "levels.h"

enum Kind { INTEGERS, LEVELS, TWO_SIDED };

// Write W^T [inputs to the next multiple of 32, outputs of the range] of TYPE, a tile of a chunk at a time.
template <int BITS, int TYPE, Kind KIND>
static void write_dense(const Layer& layer, Range range, void* to, int64_t stride) {
    Room room;
    alignas(64) float tables[32] = {};
    if constexpr (KIND != INTEGERS) make_tables<BITS>(layer, tables);
    const Table above(tables), below(tables + 16);
    for (int64_t index = 0; index < chunks_of(layer); index++) {
        Chunk chunk = chunk_at(layer, index);
        for (int64_t column = range.begin; column < range.end; column += TILE) {
            Tile tile = tile_at(layer, chunk, column, room);
            for (int lane = 0; lane < TILE; lane += LANES) {
                Words zero = tile.zeros ? spread<BITS>(tile.zeros, groups_of(layer), lane)
                                        : splat((uint32_t)1 << (BITS - 1));
                Floats scale = load_floats(tile.scales, layer.scale_type, lane), scale_below = scale;
                if constexpr (KIND == TWO_SIDED) scale_below = load_floats(tile.below, layer.scale_type, lane);
                for (int64_t unit = 0; unit < chunk.units; unit++) {
                    Words held[BITS];
                    const uint32_t* words = tile.words + unit * BITS * tile.stride + lane;
                    for (int r = 0; r < BITS; r++) held[r] = load<Words>(words + r * tile.stride);
                    int64_t at = (chunk.unit + unit) * UNIT * stride + column - range.begin + lane;
                    each<UNIT>([&](auto k) {
                        Words codes = code<BITS, k.value>(held);
                        Floats values;
                        if constexpr (KIND == INTEGERS) values = to_floats((Ints)codes - (Ints)zero) * scale;
                        else values = above[codes] * scale;
                        if constexpr (KIND == TWO_SIDED) values += below[codes] * scale_below;
                        store_floats(to, TYPE, at + k.value * stride, values);
                    });
                }
            }
        }
    }
}
template <int BITS, int TYPE>
static void write_dense(const Layer& layer, Range range, void* to, int64_t stride) {
    if (!layer.levels) return write_dense<BITS, TYPE, INTEGERS>(layer, range, to, stride);
    if constexpr (BITS >= 2 && BITS <= 4) {
        if (!layer.below) write_dense<BITS, TYPE, LEVELS>(layer, range, to, stride);
        else write_dense<BITS, TYPE, TWO_SIDED>(layer, range, to, stride);
    }
}
