// The best path through a trellis of shifting bits, for each column of a weight (aptq/formats/trellis_code.py).
#pragma once

#include <cstdint>
#include <vector>

constexpr float UNREACHED = 1e30f;  // beyond any cost; not infinite, so that differences stay numbers

// A state is the last `state_bits` bits of the codes so far; the next one shifts BITS bits in from the right. Viterbi:
// `costs` holds the least cost of a path into each state, `came` which of the 2^BITS states before it had that.
template <int BITS>
static void best_path(const float* values, const float* scales, const float* table, int64_t rows, int64_t state_bits,
                      uint8_t* codes) {
    constexpr int64_t CHOICES = 1 << BITS;
    const int64_t states = (int64_t)1 << state_bits, prefixes = states >> BITS;
    std::vector<float> costs(states, UNREACHED), least(prefixes);
    std::vector<uint8_t> came(rows * prefixes);
    costs[0] = 0.0f;  // as if only codes 0 had come before
    for (int64_t row = 0; row < rows; row++) {
        uint8_t* from = came.data() + row * prefixes;
        for (int64_t prefix = 0; prefix < prefixes; prefix++) least[prefix] = costs[prefix], from[prefix] = 0;
        for (int64_t lost = 1; lost < CHOICES; lost++) {  // the bits that are shifted out
            const float* before = costs.data() + lost * prefixes;
            for (int64_t prefix = 0; prefix < prefixes; prefix++) {
                bool better = before[prefix] < least[prefix];
                least[prefix] = better ? before[prefix] : least[prefix];
                from[prefix] = better ? (uint8_t)lost : from[prefix];
            }
        }
        const float value = values[row], scale = scales[row];
        for (int64_t prefix = 0; prefix < prefixes; prefix++)
            for (int64_t code = 0; code < CHOICES; code++) {
                float error = value - scale * table[prefix * CHOICES + code];
                costs[prefix * CHOICES + code] = least[prefix] + error * error;
            }
    }
    int64_t state = 0;
    for (int64_t other = 1; other < states; other++)
        if (costs[other] < costs[state]) state = other;
    for (int64_t row = rows - 1; row >= 0; row--) {
        codes[row] = (uint8_t)(state & (CHOICES - 1));
        int64_t prefix = state >> BITS;
        state = prefix | (int64_t)came[row * prefixes + prefix] << (state_bits - BITS);
    }
}
