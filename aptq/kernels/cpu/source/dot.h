// Sums of products of unsigned codes and signed bytes, exact.
#pragma once

#include "planar.h"

#ifdef APTQ_BYTE_DOT
template <int BITS>
struct Dot {
    Ints total;
    // Add the products of quad J of a unit. Quads of a unit come in their order.
    template <int J>
    void add(Words codes, Ints x) {
        total = dot_bytes(total, codes, x);
    }
};
#else
// No instruction adds products of bytes to 32 bits. One adds them in pairs to 16, where those of several quads have room:
// they go on to 32 together. Codes of 8 bits are taken in halves, as two of their products may not fit into 16 bits.
template <int BITS>
struct Dot {
    static constexpr int WIDTH = BITS == 8 ? 4 : BITS, ROOM = 32767 / (2 * 128 * ((1 << WIDTH) - 1));
    Ints total;
    Halves low, high;

    template <int J>
    void add(Words codes, Ints x) {
        constexpr bool first = J % ROOM == 0, last = J % ROOM == ROOM - 1 || J == QUADS - 1;
        if constexpr (BITS < 8) {
            gather<first>(low, byte_pairs(codes, x));
        } else {
            gather<first>(low, byte_pairs(codes & bytes(15), x));
            gather<first>(high, byte_pairs((codes >> 4) & bytes(15), x));
        }
        if constexpr (last) {
            total = dot_pairs(total, (Ints)low, splat(0x00010001));
            if constexpr (BITS == 8) total = dot_pairs(total, (Ints)high, splat(0x00100010));
        }
    }

   private:
    template <bool FIRST>
    static void gather(Halves& sums, Halves pairs) {
        sums = FIRST ? pairs : sums + pairs;
        asm("" : "+v"(sums));  // now: compilers put additions off, and then have no registers for what is to be added
    }
};
#endif
