// Rows times signs and the Kronecker product of a small dense matrix with a Hadamard matrix (aptq/transforms/hadamard.py).
#pragma once

#include "problem.h"

// Signs D [width] and C [parts, parts], symmetric; H, of entries 1 and -1, is as wide as the rest, a power of two.
struct Rotation {
    const float* signs;
    const float* matrix;
    int64_t parts;
};

// Sums of lanes HALF apart in the lower one, differences in the upper one.
template <int HALF>
static inline Floats butterflies(Floats values) {
    Floats sign = splat(1.0f);
    for (int lane = 0; lane < LANES; lane++)
        if (lane & HALF) sign[lane] = -1.0f;
    return exchanged<HALF>(values) + values * sign;
}

// values [size], a power of two, become their products with the Hadamard matrix of entries 1 and -1.
static inline void mix(float* values, int64_t size) {
    if (size < LANES) {
        for (int64_t half = 1; half < size; half *= 2)
            for (int64_t first = 0; first < size; first += 2 * half)
                for (int64_t at = first; at < first + half; at++) {
                    float left = values[at], right = values[at + half];
                    values[at] = left + right;
                    values[at + half] = left - right;
                }
        return;
    }
    for (int64_t at = 0; at < size; at += LANES) {
        Floats lanes = butterflies<4>(butterflies<2>(butterflies<1>(load<Floats>(values + at))));
        if constexpr (LANES == 16) lanes = butterflies<8>(lanes);
        store(values + at, lanes);
    }
    for (int64_t half = LANES; half < size; half *= 2)
        for (int64_t first = 0; first < size; first += 2 * half)
            for (int64_t at = first; at < first + half; at += LANES) {
                Floats left = load<Floats>(values + at), right = load<Floats>(values + at + half);
                store(values + at, left + right);
                store(values + at + half, left - right);
            }
}

// sums [parts, size] = C held [parts, size]; VECTORS at once stay in registers.
template <int VECTORS>
static inline void combine(const Rotation& rotation, int64_t size, int64_t first, const float* held, float* sums) {
    for (int64_t row = 0; row < rotation.parts; row++) {
        Floats sum[VECTORS] = {};
        for (int64_t part = 0; part < rotation.parts; part++) {
            Floats factor = splat(rotation.matrix[row * rotation.parts + part]);
            for (int v = 0; v < VECTORS; v++) sum[v] += factor * load<Floats>(held + part * size + first + v * LANES);
        }
        for (int v = 0; v < VECTORS; v++) store(sums + row * size + first + v * LANES, sum[v]);
    }
}

// y [width] = (x D) (C (x) H). `held` and `sums` have room for `width` floats.
static inline void rotate_row(const Rotation& rotation, const void* x, int64_t type, int64_t at, int64_t width, float* held,
                              float* sums, void* y) {
    int64_t parts = rotation.parts, size = width / parts, k = 0;
    for (; k + LANES <= width; k += LANES)
        store(held + k, load_floats(x, type, at + k) * load<Floats>(rotation.signs + k));
    for (; k < width; k++) held[k] = to_float(x, type, at + k) * rotation.signs[k];
    for (int64_t part = 0; part < parts; part++) mix(held + part * size, size);
    for (k = 0; k + 4 * LANES <= size; k += 4 * LANES) combine<4>(rotation, size, k, held, sums);
    for (; k + LANES <= size; k += LANES) combine<1>(rotation, size, k, held, sums);
    if (k < size)  // narrower than a vector
        for (int64_t index = 0; index < width; index++) {
            float sum = 0;
            for (int64_t part = 0; part < parts; part++)
                sum += rotation.matrix[index / size * parts + part] * held[part * size + index % size];
            sums[index] = sum;
        }
    for (k = 0; k + LANES <= width; k += LANES) store_floats(y, type, at + k, load<Floats>(sums + k));
    for (; k < width; k++) {
        alignas(64) char room[LANES * 4];
        store_floats(room, type, 0, splat(sums[k]));
        std::memcpy((char*)y + (at + k) * size_of(type), room, size_of(type));
    }
}
