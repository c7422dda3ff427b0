// Weights whose values are those of states (aptq/formats/trellis.py): the codes of an output and of the outputs before
// it, the latest in the lowest bits, choose a value.
#pragma once

#include "problem.h"
#include "quantiles.h"

constexpr int MOST_STATE_BITS = 12;
constexpr int PAIRS_TILE = 2 * LANES;  // outputs whose codes are a vector, two by two

// What states stand for: values of a table, or quantiles that are computed.
struct States {
    const float* values;      // [2^bits]; null: computed
    const int32_t* computed;  // multiplier of the quantiles, and bits of a state
    int64_t bits;             // of a state, where there is a table
};

// Codes of a unit: of two inputs in the halves of a word, `halfway` apart, and in each half those of two neighbouring
// outputs, the later one low. Those of PAIRS_TILE outputs before the first come first.
template <int TILES>
struct Symbols {
    alignas(64) uint32_t at[UNIT / 2][(TILES + 1) * LANES];
};
// Read words of outputs from `first` on, 0 where there are none.
static inline Words load_inside(const uint32_t* words, int64_t first, int64_t outputs) {
    if (first >= 0 && first + LANES <= outputs) return load<Words>(words + first);
    Words found{};
    if (first >= 0 && first < outputs) std::memcpy(&found, words + first, (outputs - first) * 4);
    return found;
}

template <int BITS, int TILES>
static void read_symbols(const Layer& layer, int64_t unit, int64_t column, Symbols<TILES>& to) {
    const uint32_t* words = layer.qweight + unit * BITS * layer.outputs;
    for (int tile = 0; tile <= TILES; tile++) {
        int64_t first = column + (tile - 1) * PAIRS_TILE;
        Words even[BITS], odd[BITS];
        for (int r = 0; r < BITS; r++) {
            const uint32_t* row = words + r * layer.outputs;
            deinterleave(load_inside(row, first, layer.outputs), load_inside(row, first + LANES, layer.outputs), even[r],
                         odd[r]);
        }
        each<UNIT / 2>([&](auto index) {
            constexpr int k = input_of_step(BITS, index.value);
            store(&to.at[index.value][tile * LANES], two_codes<BITS, k, 0>(odd) | two_codes<BITS, k, BITS>(even));
        });
    }
}

// Runs of codes up to the last outputs of the last tile: of 2 codes, of 4, of 8.
struct Runs {
    Words of[3];
};
// Return the runs of at least a state and a code that end with each symbol, in lanes of uint16_t or uint32_t.
template <int BITS, class Lanes>
static inline Words extended(Runs& before, Words run) {
    each<3>([&](auto step) {
        constexpr int width = (2 * BITS) << step.value;
        if constexpr (width < MOST_STATE_BITS + BITS) {
            Words longer = run | (Words)((Lanes)moved<1 << step.value>(before.of[step.value], run) << width);
            before.of[step.value] = run;
            run = longer;
        }
    });
    return run;
}

// Call `use(constant<tile>, even, odd)` for every PAIRS_TILE outputs of two inputs, whose symbols are given: values of
// outputs 0, 2, 4, ... and 1, 3, 5, ... of either input, in units where they are computed.
template <int BITS, int TILES, bool COMPUTED, class Use>
static inline __attribute__((always_inline)) void each_values(const States& states, const Quantiles& quantiles,
                                                              const uint32_t* symbols, Use&& use) {
    constexpr bool fits = MOST_STATE_BITS + BITS <= 16;
    const uint32_t mask = ((uint32_t)1 << states.bits) - 1;
    Runs before[2] = {};
    each<TILES + 1>([&](auto tile) {
        Words symbol = load<Words>(symbols + tile.value * LANES), first, second;
        if constexpr (fits) {
            first = extended<BITS, Halves>(before[0], symbol);
            second = first >> 16;
        } else {
            first = extended<BITS, Words>(before[0], symbol & 0xFFFFu);
            second = extended<BITS, Words>(before[1], symbol >> 16);
        }
        if constexpr (tile.value > 0) {
            Floats even[2], odd[2];
            if constexpr (COMPUTED) {  // runs of both inputs in one vector: bits above a state's do not matter
                Words late = fits ? first : (first & 0xFFFFu) | (second << 16);
                Words early = fits ? (Words)((Halves)first >> BITS)
                                   : ((first >> BITS) & 0xFFFFu) | (second >> BITS << 16);
                split(quantiles[(Halves)early], even[0], even[1]);
                split(quantiles[(Halves)late], odd[0], odd[1]);
            } else {
                even[0] = gather(states.values, (first >> BITS) & mask), odd[0] = gather(states.values, first & mask);
                even[1] = gather(states.values, (second >> BITS) & mask), odd[1] = gather(states.values, second & mask);
            }
            use(Constant<tile.value - 1>{}, even, odd);
        }
    });
}

// Scales of PAIRS_TILE TILES outputs from `column` on, 0 behind the last one; those of computed values
// times their unit.
template <int TILES, bool COMPUTED>
static inline void read_scales(const Layer& layer, int64_t group, int64_t column, Floats* to) {
    int64_t size = size_of(layer.scale_type), rest = layer.outputs - column, first = group * layer.outputs + column;
    alignas(64) char room[PAIRS_TILE * TILES * 4] = {};
    const void* from = (const char*)layer.scales + first * size;
    if (rest < PAIRS_TILE * TILES) from = std::memcpy(room, from, rest * size);
    for (int i = 0; i < 2 * TILES; i++) {
        to[i] = load_floats(from, layer.scale_type, i * LANES);
        if (COMPUTED) to[i] *= Quantiles::UNIT_OF_VALUES;
    }
}

// Multiply some outputs of a chunk with ROWS rows [ROWS, width] and add to y [ROWS, stride].
template <int BITS, int ROWS, int TILES, bool COMPUTED>
static void multiply_states(const Layer& layer, const States& states, const Chunk& chunk, int64_t column, const float* x,
                            int64_t width, float* y, int64_t stride) {
    Floats sum[ROWS][2 * TILES] = {}, scale[2 * TILES];
    Symbols<TILES> symbols;
    const Quantiles quantiles(states.computed);
    for (int64_t unit = 0; unit < chunk.units; unit++) {
        read_symbols<BITS>(layer, chunk.unit + unit, column, symbols);
        for (int index = 0; index < UNIT / 2; index++) {  // not unrolled: decoded instructions are to stay where they are kept
            const float* at = x + unit * UNIT + input_of_step(BITS, index);
            each_values<BITS, TILES, COMPUTED>(states, quantiles, symbols.at[index], [&](auto tile, auto& even, auto& odd) {
                for (int m = 0; m < ROWS; m++)
                    for (int input = 0; input < 2; input++) {
                        float by = at[m * width + input * halfway(BITS)];
                        sum[m][2 * tile.value] += even[input] * by;
                        sum[m][2 * tile.value + 1] += odd[input] * by;
                    }
            });
        }
    }
    read_scales<TILES, COMPUTED>(layer, chunk.group, column, scale);
    for (int m = 0; m < ROWS; m++)
        for (int i = 0; i < 2 * TILES; i += 2) {
            Floats low, high;
            interleave(sum[m][i], sum[m][i + 1], low, high);
            float* place = y + m * stride + i * LANES;
            store(place, load<Floats>(place) + low * scale[i]);
            store(place + LANES, load<Floats>(place + LANES) + high * scale[i + 1]);
        }
}

// One worker's outputs: y [rows, stride], zero at first; x [rows, width], zeros behind the last input.
template <int BITS, bool COMPUTED>
static void multiply_states_range(const Layer& layer, const States& states, const float* x, int64_t width, int64_t rows,
                                  Range range, float* y, int64_t stride) {
    constexpr int most = 4, few = LANES == 16 ? 2 : 1;  // as many sums as there are registers for
    for (int64_t index = 0; index < chunks_of(layer); index++) {
        Chunk chunk = chunk_at(layer, index);
        for (int64_t m = 0; m < rows;) {
            bool four = rows - m >= 4;
            int tiles = four ? few : most;
            for (int64_t column = range.begin; column < range.end;) {
                bool whole = range.end - column >= tiles * PAIRS_TILE;
                auto run = four ? (whole ? multiply_states<BITS, 4, few, COMPUTED> : multiply_states<BITS, 4, 1, COMPUTED>)
                                : (whole ? multiply_states<BITS, 1, most, COMPUTED> : multiply_states<BITS, 1, 1, COMPUTED>);
                run(layer, states, chunk, column, x + m * width + chunk.unit * UNIT, width,
                    y + m * stride + column - range.begin, stride);
                column += (whole ? tiles : 1) * PAIRS_TILE;
            }
            m += four ? 4 : 1;
        }
    }
}

// As each_weights of dense.h, for PAIRS_TILE outputs at a time.
template <int BITS, bool COMPUTED, class Use>
static void each_weights_of_states(const Layer& layer, const States& states, Range units, Range outputs,
                                   const Use& use) {
    Symbols<1> symbols;
    Floats scale[2];
    const Quantiles quantiles(states.computed);
    for (int64_t unit = units.begin; unit < units.end; unit++)
        for (int64_t column = outputs.begin; column < outputs.end; column += PAIRS_TILE) {
            read_symbols<BITS>(layer, unit, column, symbols);
            read_scales<1, COMPUTED>(layer, unit * UNIT / layer.group, column, scale);
            for (int step = 0; step < UNIT / 2; step++)
                each_values<BITS, 1, COMPUTED>(states, quantiles, symbols.at[step], [&](auto, auto& even, auto& odd) {
                    Floats low[2], high[2];
                    for (int i = 0; i < 2; i++) interleave(even[i], odd[i], low[i], high[i]);
                    use(unit, step, column, low[0] * scale[0], low[1] * scale[0]);
                    use(unit, step, column + LANES, high[0] * scale[1], high[1] * scale[1]);
                });
        }
}
