// What every kernel works on, and how the work is cut.
#pragma once

#include "planar.h"

enum Type : int32_t { FLOAT32 = 0, FLOAT16 = 1, BFLOAT16 = 2 };

constexpr int TILE = 32;    // outputs that are computed together; a unit of packed zeros
constexpr int CHUNK = 128;  // inputs that share a scale of the activations, at most

// A packed layer; shapes as in aptq/packing.py. K is the number of inputs, N of outputs.
struct Layer {
    const uint32_t* qweight;  // [ceil(K / 32), bits, N]
    const void* scales;       // [groups, N]
    const void* below;        // [groups, N]: scales of levels below 0; null: none of their own
    const uint32_t* qzeros;   // [ceil(N / 32), bits, groups]; null: the zero is 2^(bits - 1)
    const float* levels;      // [16]: what codes stand for; null: integers
    int64_t inputs, outputs, group, groups, bits;
    int64_t scale_type;
};

static inline int64_t ceil_div(int64_t left, int64_t right) { return (left + right - 1) / right; }

// A run of inputs in one group: what is accumulated before scales are applied.
struct Chunk {
    int64_t unit, units, group;
};
// Inputs of a chunk where its group has as many. No more than 16 rows of words: in wide layers, whose rows often are a
// multiple of 4096 bytes apart, a cache has few places for what lies in one column.
static inline int64_t chunk_of(const Layer& layer) { return layer.bits > 4 ? CHUNK / 2 : CHUNK; }
// Chunks are counted through all groups, each of which has the same number but for the last.
static inline int64_t chunks_per_group(const Layer& layer) { return ceil_div(layer.group, chunk_of(layer)); }
static inline int64_t chunks_of(const Layer& layer) {
    int64_t whole = layer.inputs / layer.group, rest = layer.inputs % layer.group;
    return whole * chunks_per_group(layer) + ceil_div(rest, chunk_of(layer));
}
static inline Chunk chunk_at(const Layer& layer, int64_t index) {
    int64_t group = index / chunks_per_group(layer), inside = index % chunks_per_group(layer) * chunk_of(layer);
    int64_t first = group * layer.group + inside;
    int64_t end = first + chunk_of(layer);
    if (end > (group + 1) * layer.group) end = (group + 1) * layer.group;
    if (end > layer.inputs) end = layer.inputs;
    return {first / UNIT, ceil_div(end - first, UNIT), group};
}
// The longest chunk that begins with a unit and ends with unit `end`, or before.
static inline Chunk chunk_from(const Layer& layer, int64_t unit, int64_t end) {
    int64_t group = unit * UNIT / layer.group, stop = (group + 1) * layer.group / UNIT;
    if (stop > end) stop = end;
    int64_t most = chunk_of(layer) / UNIT;
    return {unit, stop - unit < most ? stop - unit : most, group};
}

// Outputs, or units, from begin to end.
struct Range {
    int64_t begin, end;
};
static inline Range units_of(const Layer& layer) { return {0, ceil_div(layer.inputs, UNIT)}; }

static inline float to_float(const void* from, int64_t type, int64_t at) {
    if (type == FLOAT32) return ((const float*)from)[at];
    uint16_t half = ((const uint16_t*)from)[at];
    if (type == FLOAT16) return _cvtsh_ss(half);
    uint32_t bits = (uint32_t)half << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
static inline Floats load_floats(const void* from, int64_t type, int64_t at) {
    if (type == FLOAT32) return load<Floats>((const float*)from + at);
    if (type == FLOAT16) return from_halves((const uint16_t*)from + at);
    return from_bfloats((const uint16_t*)from + at);
}
static inline int64_t size_of(int64_t type) { return type == FLOAT32 ? 4 : 2; }

static inline void store_floats(void* to, int64_t type, int64_t at, Floats floats) {
    if (type == FLOAT32) store((float*)to + at, floats);
    else if (type == FLOAT16) store_halves((uint16_t*)to + at, floats);
    else store_bfloats((uint16_t*)to + at, floats);
}

// One tile of one chunk with all of its columns readable: the last tile of a layer is copied to where there is room.
struct Tile {
    const uint32_t* words;  // [units * bits, stride]
    int64_t stride;
    const uint32_t* zeros;  // words of this unit of outputs and this group, `groups` apart; null: none
    const void* scales;     // [TILE]
    const void* below;      // [TILE]
};
struct Room {
    alignas(64) uint32_t words[CHUNK / UNIT * 8 * TILE];
    alignas(64) uint32_t scales[TILE], below[TILE];
};
static inline Tile tile_at(const Layer& layer, const Chunk& chunk, int64_t column, Room& room) {
    int64_t n = layer.outputs, rows = chunk.units * layer.bits, size = size_of(layer.scale_type);
    const uint32_t* words = layer.qweight + chunk.unit * layer.bits * n + column;
    int64_t scale_at = (chunk.group * n + column) * size;
    const char* scales = (const char*)layer.scales + scale_at;
    const char* below = layer.below ? (const char*)layer.below + scale_at : nullptr;
    const uint32_t* zeros =
        layer.qzeros ? layer.qzeros + column / UNIT * layer.bits * layer.groups + chunk.group : nullptr;
    if (column + TILE <= n) return {words, n, zeros, scales, below};
    int64_t rest = n - column;
    std::memset(&room, 0, sizeof room);
    for (int64_t row = 0; row < rows; row++) std::memcpy(room.words + row * TILE, words + row * n, rest * 4);
    std::memcpy(room.scales, scales, rest * size);
    if (below) std::memcpy(room.below, below, rest * size);
    return {room.words, TILE, zeros, room.scales, below ? room.below : nullptr};
}
