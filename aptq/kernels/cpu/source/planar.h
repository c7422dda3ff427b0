// The packed layout "planar32", as aptq/packing.py states it: units of 32 inputs, BITS words of each output.
#pragma once

#include "vectors.h"

constexpr int UNIT = 32;
constexpr int QUADS = 8;  // of four codes in a unit

// Width of the primary plane, and of the two that may lie above it (0: none).
constexpr int primary(int bits) { return bits == 8 ? 8 : bits >= 4 ? 4 : bits >= 2 ? 2 : 1; }
constexpr int second(int bits) { return bits == 3 || bits == 5 ? 1 : bits == 6 || bits == 7 ? 2 : 0; }
constexpr int third(int bits) { return bits == 7 ? 1 : 0; }

// Input of the unit that byte `i` of quad `j` holds.
constexpr int input_of(int bits, int j, int i) {
    int per_word = 8 / primary(bits);
    return 4 * per_word * (j / per_word) + j % per_word + per_word * i;
}

template <int RIGHT>
static inline Words shifted(Words words) {
    if constexpr (RIGHT > 0) return words >> RIGHT;
    if constexpr (RIGHT < 0) return words << -RIGHT;
    return words;
}

// A unit's words of some outputs, loaded as they are needed: registers are few.
struct Unit {
    const uint32_t* words;
    int64_t stride;
    Words operator[](int index) const { return load<Words>(words + index * stride); }
};

// Bring a secondary plane's bits of quad J to bit LOW of each byte.
template <int PRIMARY, int WIDTH, int LOW, int FIRST, int J>
static inline Words secondary(const Unit& words) {
    constexpr int per_word = 8 / PRIMARY, r = J / per_word, s = J % per_word;
    constexpr int slots = 2 * PRIMARY / WIDTH, c = 2 * r + s % 2;
    constexpr int right = 2 * PRIMARY * (s / 2) + WIDTH * (c % slots);
    return shifted<right - LOW>(words[FIRST + c / slots]) & bytes(((1u << WIDTH) - 1) << LOW);
}

// Return quad J of a unit: four codes in the bytes of each lane, whose inputs `input_of` tells.
template <int BITS, int J>
static inline Words quad(const Unit& words) {
    constexpr int P = primary(BITS), S = second(BITS), per_word = 8 / P;
    Words codes = shifted<P * (J % per_word)>(words[J / per_word]);
    if constexpr (P < 8) codes = codes & bytes((1u << P) - 1);
    if constexpr (S > 0) codes |= secondary<P, S, P, P, J>(words);
    if constexpr (third(BITS) > 0) codes |= secondary<P, third(BITS), P + S, P + S, J>(words);
    return codes;
}

// Where code `k` of a unit lies in a plane.
struct Place {
    int word, shift;
};
constexpr Place place(int bits, int plane, int k) {
    int P = primary(bits), slot = k % (32 / P), r = k / (32 / P);
    if (plane == 0) return {r, P * slot};
    int width = plane == 1 ? second(bits) : third(bits), first = plane == 1 ? P : P + second(bits);
    int slots = 2 * P / width, c = 2 * r + slot % 2;
    return {first + c / slots, 2 * P * (slot / 2) + width * (c % slots)};
}
constexpr int planes(int bits) { return 1 + (second(bits) > 0) + (third(bits) > 0); }
constexpr int width_of(int bits, int plane) {
    return plane == 0 ? primary(bits) : plane == 1 ? second(bits) : third(bits);
}
constexpr int low_of(int bits, int plane) {
    return plane == 0 ? 0 : plane == 1 ? primary(bits) : primary(bits) + second(bits);
}

// Return code K of a unit for every lane.
template <int BITS, int K>
static inline Words code(const Words* words) {
    Words codes{};
    each<planes(BITS)>([&](auto plane) {
        constexpr Place at = place(BITS, plane.value, K);
        constexpr int low = low_of(BITS, plane.value);
        codes |= shifted<at.shift - low>(words[at.word]) & (((1u << width_of(BITS, plane.value)) - 1) << low);
    });
    return codes;
}

// In all planes, the code that lies 16 bits above the one of an input is that of the input so many behind it.
constexpr int halfway(int bits) { return 16 / primary(bits); }
// The first input of step `step` of a unit, which has both of them.
constexpr int input_of_step(int bits, int step) {
    return step / halfway(bits) * 2 * halfway(bits) + step % halfway(bits);
}

// Return codes K and K + halfway(BITS) of a unit in the halves of every lane, UP bits above their lowest.
template <int BITS, int K, int UP>
static inline Words two_codes(const Words* words) {
    Words codes{};
    each<planes(BITS)>([&](auto plane) {
        constexpr Place at = place(BITS, plane.value, K), next = place(BITS, plane.value, K + halfway(BITS));
        static_assert(at.word == next.word && at.shift + 16 == next.shift);
        constexpr int low = low_of(BITS, plane.value) + UP;
        codes |= shifted<at.shift - low>(words[at.word]) & (((1u << width_of(BITS, plane.value)) - 1) * 0x10001u << low);
    });
    return codes;
}

// Words and shifts of LANES consecutive codes of one unit, for each plane.
template <int BITS>
struct Spread {
    uint32_t shift[planes(BITS)][LANES];
    uint32_t mask[planes(BITS)][BITS][LANES];  // all ones where the lane's code lies in that word
    bool used[planes(BITS)][BITS];
    constexpr explicit Spread(int first) : shift{}, mask{}, used{} {
        for (int plane = 0; plane < planes(BITS); plane++)
            for (int lane = 0; lane < LANES; lane++) {
                Place at = place(BITS, plane, first + lane);
                shift[plane][lane] = at.shift;
                mask[plane][at.word][lane] = ~0u;
                used[plane][at.word] = true;
            }
    }
};

// Return codes FIRST, ..., FIRST + LANES - 1 of one unit, one in each lane; its words are `stride` apart.
template <int BITS, int FIRST>
static inline Words spread(const uint32_t* words, long stride) {
    static constexpr Spread<BITS> where(FIRST);
    Words codes{};
    each<planes(BITS)>([&](auto plane) {
        Words found{};
        each<BITS>([&](auto word) {
            if constexpr (where.used[plane.value][word.value])
                found |= splat(words[word.value * stride]) & load<Words>(where.mask[plane.value][word.value]);
        });
        constexpr uint32_t ones = (1u << width_of(BITS, plane.value)) - 1;
        codes |= ((found >> load<Words>(where.shift[plane.value])) & ones) << low_of(BITS, plane.value);
    });
    return codes;
}
template <int BITS>
static inline Words spread(const uint32_t* words, long stride, int first) {
    Words codes{};
    each<UNIT / LANES>([&](auto part) {
        if (first == part.value * LANES) codes = spread<BITS, part.value * LANES>(words, stride);
    });
    return codes;
}
