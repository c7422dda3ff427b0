// Quantiles of the normal distribution by operations on 16-bit integers (aptq/kernels/quantiles.py).
#pragma once

#include "vectors.h"

// The low and the high halves of all lanes, which are signed, as floats.
static inline void split(Halves halves, Floats& low, Floats& high) {
    low = to_floats((Ints)((Words)halves << 16) >> 16);
    high = to_floats((Ints)halves >> 16);
}

struct Quantiles {
    static constexpr float UNIT_OF_VALUES = 1.0f / 512;
    Halves multiplier, offset;

    // `computed`: multiplier and bits of a state; null: never asked.
    explicit Quantiles(const int32_t* computed) : multiplier{}, offset{} {
        if (!computed) return;
        multiplier += (uint16_t)(computed[0] << (16 - computed[1]));
        offset += (uint16_t)((1 << (15 - computed[1])) - (1 << 15));
    }

    // Values, in units, of states, above whose bits may be others.
    Halves operator[](Halves states) const {
        Halves t = states * multiplier + offset, second = product(t, t), fourth = product(second, second), power = fourth;
        for (int i = 0; i < 4; i++) power = product(power, power);  // the 64th
        return product(t, (fourth >> 7) + (power >> 6) + 512);
    }
};
