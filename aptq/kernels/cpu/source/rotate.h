// Rows times signs and the Kronecker product of a small dense matrix with a Hadamard matrix (aptq/transforms/hadamard.py).
#pragma once

#include "problem.h"

// values [size], a power of two, become their products with the Hadamard matrix of entries 1 and -1.
static inline void mix(float* values, int64_t size) {
    for (int64_t half = 1; half < size; half *= 2)
        for (int64_t first = 0; first < size; first += 2 * half)
            for (int64_t at = first; at < first + half; at++) {
                float left = values[at], right = values[at + half];
                values[at] = left + right;
                values[at + half] = left - right;
            }
}

// y [width] = (x D) (C (x) H): signs D [width], C [parts, parts] symmetric, H as wide as the rest. `held` and `sums` have
// room for `width` floats.
static inline void rotate_row(const void* x, int64_t type, int64_t at, const float* signs, const float* matrix,
                              int64_t parts, int64_t width, float* held, float* sums, void* y) {
    int64_t size = width / parts;
    for (int64_t k = 0; k < width; k++) held[k] = to_float(x, type, at + k) * signs[k];
    for (int64_t part = 0; part < parts; part++) mix(held + part * size, size);
    std::memset(sums, 0, width * 4);
    for (int64_t row = 0; row < parts; row++)
        for (int64_t part = 0; part < parts; part++) {
            float factor = matrix[row * parts + part];
            for (int64_t k = 0; k < size; k++) sums[row * size + k] += factor * held[part * size + k];
        }
    int64_t k = 0;
    for (; k + LANES <= width; k += LANES) store_floats(y, type, at + k, load<Floats>(sums + k));
    for (; k < width; k++) {
        alignas(64) char room[LANES * 4];
        store_floats(room, type, 0, splat(sums[k]));
        std::memcpy((char*)y + (at + k) * size_of(type), room, size_of(type));
    }
}
