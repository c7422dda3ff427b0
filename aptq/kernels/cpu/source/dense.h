// Dense weights of a few outputs, for products with many rows.
#pragma once

#include "levels.h"

enum Kind { INTEGERS, LEVELS, TWO_SIDED };

constexpr uint32_t LARGE = 0x4B000000;  // with a small integer in its low bits: 2^23 and that as a float, exactly

// What a code of a unit says in its low four bits; above them may be others, which tables do not look at.
template <int BITS, int K>
static inline Words index_of(const Words* words) {
    if constexpr (planes(BITS) > 1) return code<BITS, K>(words);
    constexpr Place at = place(BITS, 0, K);
    return shifted<at.shift>(words[at.word]);
}

constexpr int64_t AHEAD = 4;  // units that are fetched before: words are too far apart for the CPU to see what is next

// Call `use(unit, step, column, first, second)` for all weights of the units and the outputs: those of LANES outputs
// from `column`, of both inputs of a step.
template <int BITS, Kind KIND, class Use>
static void each_weights(const Layer& layer, Range units, Range outputs, const Use& use) {
    Room room;
    alignas(64) float tables[32] = {};
    if constexpr (KIND != INTEGERS) make_tables<BITS>(layer, tables);
    const Table above(tables), below(tables + 16);
    for (int64_t unit = units.begin; unit < units.end;) {
        Chunk chunk = chunk_from(layer, unit, units.end);
        for (int64_t column = outputs.begin; column < outputs.end; column += TILE) {
            Tile tile = tile_at(layer, chunk, column, room);
            for (int lane = 0; lane < TILE; lane += LANES) {
                Words zeros = tile.zeros ? spread<BITS>(tile.zeros, layer.groups, lane)
                                         : splat((uint32_t)1 << (BITS - 1));
                Floats zero = (Floats)(zeros | LARGE);
                Floats scale = load_floats(tile.scales, layer.scale_type, lane), scale_below = scale;
                if constexpr (KIND == TWO_SIDED) scale_below = load_floats(tile.below, layer.scale_type, lane);
                for (int64_t at = 0; at < chunk.units; at++) {
                    Words held[BITS];
                    const uint32_t* words = tile.words + at * BITS * tile.stride + lane;
                    const uint32_t* next = layer.qweight + (unit + at + AHEAD) * BITS * layer.outputs + column + lane;
                    for (int r = 0; r < BITS; r++) held[r] = load<Words>(words + r * tile.stride);
                    for (int r = 0; r < BITS; r++) prefetch<2>(next + r * layer.outputs);
                    auto weight = [&](auto k) {
                        if constexpr (KIND == INTEGERS)
                            return ((Floats)(code<BITS, k.value>(held) | LARGE) - zero) * scale;
                        Words index = index_of<BITS, k.value>(held);
                        if constexpr (KIND == LEVELS) return above[index] * scale;
                        return above[index] * scale + below[index] * scale_below;
                    };
                    each<UNIT / 2>([&](auto step) {
                        constexpr int k = input_of_step(BITS, step.value);
                        use(unit + at, step.value, column + lane, weight(Constant<k>{}),
                            weight(Constant<k + halfway(BITS)>{}));
                    });
                }
            }
        }
        unit += chunk.units;
    }
}
template <int BITS, class Use>
static void each_weights(const Layer& layer, Range units, Range outputs, const Use& use) {
    if (!layer.levels) return each_weights<BITS, INTEGERS>(layer, units, outputs, use);
    if constexpr (BITS >= 2 && BITS <= 4) {
        if (!layer.below) each_weights<BITS, LEVELS>(layer, units, outputs, use);
        else each_weights<BITS, TWO_SIDED>(layer, units, outputs, use);
    }
}
