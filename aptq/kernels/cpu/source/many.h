// Products with many rows: the weights of a few outputs and inputs are unpacked to where the cache keeps them, and
// multiplied with all rows there. Sums are float32 over all inputs, in one order.
#pragma once

#include "problem.h"

constexpr int WIDE = 64;         // outputs that are unpacked together
constexpr int BLOCK_UNITS = 16;  // and units of inputs
// Rows, and vectors of outputs, whose sums are in registers.
constexpr int MOST_TOGETHER = 6, MOST_VECTORS = LANES == 16 ? 4 : 2;

// What rows and weights are made of: floats, or pairs of bfloat16 of inputs that are halfway(bits) apart. A block of
// units has rows [rows, block_steps] and weights [steps, WIDE].
struct Single {
    typedef float Element;
    typedef Floats Vector;
    static constexpr int STEPS = UNIT;  // in a unit

    static Floats add(Floats sum, Floats weights, float x) { return sum + weights * x; }

    static void put(int bits, float* weights, int step, Floats first, Floats second) {
        int k = input_of_step(bits, step);
        store(weights + k * WIDE, first);
        store(weights + (k + halfway(bits)) * WIDE, second);
    }

    // Write a unit of a row, zeros behind `count` inputs.
    template <int BITS>
    static void read(const void* x, int64_t type, int64_t at, int64_t count, float* to) {
        if (count == UNIT)
            for (int k = 0; k < UNIT; k += LANES) store(to + k, load_floats(x, type, at + k));
        else
            for (int k = 0; k < UNIT; k++) to[k] = k < count ? to_float(x, type, at + k) : 0.0f;
    }
};

#ifdef APTQ_PAIR_DOT
struct Pair {
    typedef uint32_t Element;
    typedef Words Vector;
    static constexpr int STEPS = UNIT / 2;

    static Floats add(Floats sum, Words weights, uint32_t x) { return dot_bfloats(sum, weights, splat(x)); }

    static void put(int, uint32_t* weights, int step, Floats first, Floats second) {
        store(weights + step * WIDE, bfloat_pairs(first, second));
    }

    template <int BITS>
    static void read(const void* x, int64_t, int64_t at, int64_t count, uint32_t* to) {
        static constexpr Order order = [] {
            Order made{};
            for (int step = 0; step < STEPS; step++) {
                made.from[2 * step] = input_of_step(BITS, step);
                made.from[2 * step + 1] = input_of_step(BITS, step) + halfway(BITS);
            }
            return made;
        }();
        alignas(64) uint16_t room[UNIT] = {};
        const uint16_t* values = (const uint16_t*)x + at;
        if (count < UNIT) values = (const uint16_t*)std::memcpy(room, values, count * 2);
        store(to, ordered(order, values));
    }
};
#endif

template <class Numbers>
constexpr int64_t block_steps() { return BLOCK_UNITS * Numbers::STEPS; }

// Add the products of ROWS rows of a block with VECTORS vectors of outputs to sums [ROWS, WIDE].
template <class Numbers, int ROWS, int VECTORS>
static void multiply_block(const typename Numbers::Element* x, const typename Numbers::Element* weights, int64_t steps,
                           float* sums) {
    constexpr int line = 64 / sizeof *x;  // of the cache
    Floats sum[ROWS][VECTORS];
    for (int m = 0; m < ROWS; m++)
        for (int v = 0; v < VECTORS; v++) sum[m][v] = load<Floats>(sums + m * WIDE + v * LANES);
    for (int64_t step = 0; step < steps; step++) {
        typename Numbers::Vector held[VECTORS];
        for (int v = 0; v < VECTORS; v++) held[v] = load<typename Numbers::Vector>(weights + step * WIDE + v * LANES);
        if (step % line == 0)  // of the next rows
            for (int m = 0; m < ROWS; m++) prefetch<1>(x + (ROWS + m) * block_steps<Numbers>() + step);
        for (int m = 0; m < ROWS; m++)
            for (int v = 0; v < VECTORS; v++)
                sum[m][v] = Numbers::add(sum[m][v], held[v], x[m * block_steps<Numbers>() + step]);
    }
    for (int m = 0; m < ROWS; m++)
        for (int v = 0; v < VECTORS; v++) store(sums + m * WIDE + v * LANES, sum[m][v]);
}

template <class Numbers, int VECTORS>
static void multiply_rows(const typename Numbers::Element* x, const typename Numbers::Element* weights, int64_t steps,
                          int64_t rows, float* sums) {
    int64_t blocks = ceil_div(rows, MOST_TOGETHER);
    for (int64_t block = 0, row = 0; block < blocks; block++) {
        int64_t together = rows * (block + 1) / blocks - row;
        each<MOST_TOGETHER>([&](auto below) {
            if (together == below.value + 1)
                multiply_block<Numbers, below.value + 1, VECTORS>(x + row * block_steps<Numbers>(), weights, steps,
                                                                  sums + row * WIDE);
        });
        row += together;
    }
}

// Make sums [rows, WIDE] those of the products of rows, whose blocks are `stride` apart, with at most WIDE outputs. Their
// weights are what `unpack(units, weights)` writes to `weights`, which has room for a block.
template <class Numbers, class Unpack>
static void multiply_many(const Layer& layer, const typename Numbers::Element* x, int64_t stride, int64_t rows,
                          int64_t outputs, typename Numbers::Element* weights, float* sums, const Unpack& unpack) {
    std::memset(sums, 0, rows * WIDE * sizeof(float));
    int64_t units = units_of(layer).end;
    for (int64_t unit = 0; unit < units; unit += BLOCK_UNITS, x += stride) {
        Range block{unit, unit + BLOCK_UNITS < units ? unit + BLOCK_UNITS : units};
        unpack(block, weights);
        int64_t steps = (block.end - block.begin) * Numbers::STEPS;
        for (int first = 0; first < outputs; first += MOST_VECTORS * LANES) {
            bool half = outputs - first <= MOST_VECTORS / 2 * LANES;
            auto run = half ? multiply_rows<Numbers, MOST_VECTORS / 2> : multiply_rows<Numbers, MOST_VECTORS>;
            run(x, weights + first, steps, rows, sums + first);
        }
    }
}
