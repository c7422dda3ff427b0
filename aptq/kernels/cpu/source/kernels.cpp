// Products with packed weights; the C ABI that aptq/kernels/cpu/library.py binds.
#include <algorithm>
#include <memory>
#include <vector>

#include "dense.h"
#include "integer.h"
#include "many.h"
#include "pool.h"
#include "rotate.h"
#include "trellis.h"
#include "trellis_product.h"

// Memory that is given back, aligned for vectors.
template <class Element>
struct Buffer {
    Element* data;
    explicit Buffer(int64_t count) {
        int64_t size = (count * (int64_t)sizeof(Element) + 63) / 64 * 64 + 64;
        data = (Element*)std::aligned_alloc(64, size);
    }
    ~Buffer() { std::free(data); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
};

// Outputs that a thread takes at once. For few rows, reading codes is what takes time, and rows of words are read the
// faster the longer they are; for more, sums have to stay in the cache.
constexpr int64_t FEW_ROWS = 4, STRIP = 2048, STRIP_OF_MANY = 1024, LEAST_STRIP = 96;
constexpr int64_t STRIPS_PER_THREAD = 4;
constexpr int64_t SLAB = 64;  // rows whose digits of a chunk stay in the cache
constexpr int64_t LEAST_SLAB = 128, MOST_SLAB = 1024;  // rows that share unpacked weights
constexpr int64_t MOST_MANY = 4096;  // rows that are copied at once
constexpr int64_t WORTH_SHARING = 1 << 16;  // activations, to make digits of on several threads

// Rough nanoseconds of one thread with AVX2.
static int64_t digits_time(int64_t activations) { return activations * 5; }
static int64_t rotation_time(int64_t activations) { return activations * 12; }
static int64_t integers_time(int64_t products) { return products / 20; }
static int64_t levels_time(int64_t products) { return products / 6; }
static int64_t states_time(int64_t products) { return products / 2; }
static int64_t many_time(int64_t products) { return products / 40; }
static int64_t dense_time(int64_t weights) { return weights; }
static int64_t path_time(int64_t weights, int64_t states) { return weights * states; }

// Into how many parts rows are cut: where outputs alone are too few parts for the threads.
static int64_t many_slabs(int64_t rows, int64_t tiles, int64_t threads) {
    int64_t wanted = ceil_div(STRIPS_PER_THREAD * threads, tiles);
    return std::clamp(wanted, ceil_div(rows, MOST_SLAB), ceil_div(rows, LEAST_SLAB));
}

// Where results go: rows `stride` apart.
struct Output {
    void* rows;
    int64_t type, stride;
    Output from(int64_t row, int64_t column) const {
        return {(char*)rows + (row * stride + column) * size_of(type), type, stride};
    }
};

static void write_output(const float* sums, int64_t width, int64_t rows, int64_t count, const Output& output) {
    int64_t type = output.type;
    void* y = output.rows;
    for (int64_t m = 0; m < rows; m++) {
        const float* from = sums + m * width;
        int64_t to = m * output.stride, at = 0;
        for (; at + LANES <= count; at += LANES) store_floats(y, type, to + at, load<Floats>(from + at));
        for (; at < count; at++) {
            alignas(64) char room[LANES * 4];
            store_floats(room, type, 0, splat(from[at]));
            std::memcpy((char*)y + (to + at) * size_of(type), room, size_of(type));
        }
    }
}

template <int MOST = 8, class Run>
static void by_bits(int64_t bits, Run&& run) {
    each<MOST>([&](auto below) {
        if (bits == below.value + 1) run(Constant<below.value + 1>{});
    });
}

// Layers that read the same rows; their results lie beside each other.
struct Several {
    const Layer* const* layers;
    int64_t count;
};

// Call `work(index, range, sums, stride)` for strips of each layer's outputs, and write what it adds up; `time` is that of so
// many products.
template <class Work>
static void in_strips(const Several& several, int64_t rows, const Output& output, int64_t threads,
                      int64_t time(int64_t products), const Work& work) {
    struct Strips {
        int64_t first, width, column;
    };
    std::vector<Strips> strips(several.count);
    int64_t parts = 0, products = 0, columns = 0;
    for (int64_t index = 0; index < several.count; index++) {
        const Layer& layer = *several.layers[index];
        int64_t tiles = ceil_div(layer.outputs, TILE);
        int64_t most = rows <= FEW_ROWS ? 1 : STRIPS_PER_THREAD;
        int64_t each = std::clamp(tiles * TILE / (LEAST_STRIP * threads), (int64_t)1, most);
        int64_t strip = rows <= FEW_ROWS ? STRIP : STRIP_OF_MANY;
        int64_t wanted = std::max(each * threads, ceil_div(tiles * TILE, strip));  // as many for each thread
        strips[index] = {parts, ceil_div(tiles, wanted) * TILE, columns};
        parts += ceil_div(layer.outputs, strips[index].width);
        columns += layer.outputs;
        products += rows * layer.inputs * layer.outputs;
    }
    in_parallel(parts, threads, time(products), [&](int64_t part) {
        int64_t index = several.count - 1;
        while (part < strips[index].first) index--;
        const Layer& layer = *several.layers[index];
        int64_t width = strips[index].width, begin = (part - strips[index].first) * width;
        Range range{begin, std::min(begin + width, layer.outputs)};
        Buffer<float> sums(rows * width);
        std::memset(sums.data, 0, rows * width * 4);
        work(index, range, sums.data, width);
        write_output(sums.data, width, rows, range.end - begin, output.from(0, strips[index].column + begin));
    });
}

// Call `work(range)` for tiles of outputs from `begin` to `end`.
template <class Work>
static void in_tiles(const Layer& layer, int64_t begin, int64_t end, int64_t threads, const Work& work) {
    in_parallel(ceil_div(end - begin, TILE), threads, dense_time((end - begin) * layer.inputs), [&](int64_t part) {
        work(Range{begin + part * TILE, std::min(begin + (part + 1) * TILE, end)});
    });
}

// Rows of activations as digits.
template <int D>
struct DigitRows {
    Buffer<int32_t> held, sums;
    Buffer<float> steps;
    Digits digits;
    DigitRows(const Layer& layer, const void* x, int64_t rows, int64_t type, int64_t threads)
        : held(rows * ceil_div(layer.inputs, UNIT) * QUADS * D), sums(rows * chunks_of(layer) * D),
          steps(rows * chunks_of(layer)), digits{held.data, steps.data, sums.data} {
        int64_t activations = rows * layer.inputs, shared = activations < WORTH_SHARING ? 1 : threads;
        in_parallel(chunks_of(layer), shared, digits_time(activations),
                    [&](int64_t index) { digitize<D>(layer, x, type, rows, index, digits); });
    }
};

template <int D>
static void integers(const Several& several, const void* x, int64_t rows, const Output& output, int64_t threads) {
    std::vector<std::shared_ptr<DigitRows<D>>> digits;  // their order is that of a layer's codes
    for (int64_t index = 0; index < several.count; index++) {
        const Layer &layer = *several.layers[index], &before = *several.layers[std::max(index - 1, (int64_t)0)];
        bool same = primary(layer.bits) == primary(before.bits) && layer.group == before.group &&
                    chunk_of(layer) == chunk_of(before);
        if (index > 0 && same) digits.push_back(digits.back());
        else digits.emplace_back(new DigitRows<D>(layer, x, rows, output.type, threads));
    }
    in_strips(several, rows, output, threads, integers_time, [&](int64_t index, Range range, float* to, int64_t stride) {
        const Layer& layer = *several.layers[index];
        by_bits(layer.bits, [&](auto bits) {
            multiply_range<bits.value, D>(layer, digits[index]->digits, rows, range, to, stride);
        });
    });
}

// y [rows, width] = x D (C (x) H), both of `type`; see rotate.h.
static void rotate(const Rotation& rotation, const void* x, void* y, int64_t rows, int64_t width, int64_t type,
                   int64_t threads) {
    int64_t slabs = rows * width < WORTH_SHARING ? 1 : ceil_div(rows, SLAB);
    int64_t each = ceil_div(rows, slabs);
    in_parallel(slabs, threads, rotation_time(rows * width), [&](int64_t slab) {
        Buffer<float> held(width), sums(width);
        for (int64_t row = slab * each; row < rows && row < (slab + 1) * each; row++)
            rotate_row(rotation, x, type, row * width, width, held.data, sums.data, y);
    });
}

// What a product reads: x itself, or, where there is a rotation, x rotated and rounded to its type.
struct Inputs {
    Buffer<char> room;
    const void* rows;
    Inputs(const Rotation* rotation, const Layer& layer, const void* x, int64_t count, int64_t type, int64_t threads)
        : room(rotation ? count * layer.inputs * size_of(type) : 0), rows(rotation ? room.data : x) {
        if (rotation) rotate(*rotation, x, room.data, count, layer.inputs, type, threads);
    }
};

// Rows of activations as floats, zeros behind the last input.
struct FloatRows {
    int64_t width;
    Buffer<float> values;
    FloatRows(const Layer& layer, const void* x, int64_t rows, int64_t type)
        : width(ceil_div(layer.inputs, UNIT) * UNIT), values(rows * width) {
        for (int64_t m = 0; m < rows; m++)
            for (int64_t k = 0; k < width; k++)
                values.data[m * width + k] = k < layer.inputs ? to_float(x, type, m * layer.inputs + k) : 0.0f;
    }
};

// Call `use(constant<bits>, weights)`, where `weights(units, outputs, take)` does what `each_weights` does.
template <class Use>
static void with_weights(const Layer& layer, const States* states, const Use& use) {
    if (!states)
        by_bits(layer.bits, [&](auto bits) {
            use(bits, [&](Range units, Range outputs, auto&& take) {
                each_weights<bits.value>(layer, units, outputs, take);
            });
        });
    else
        by_bits<6>(layer.bits, [&](auto bits) {
            use(bits, [&](Range units, Range outputs, auto&& take) {
                if (states->computed) each_weights_of_states<bits.value, true>(layer, *states, units, outputs, take);
                else each_weights_of_states<bits.value, false>(layer, *states, units, outputs, take);
            });
        });
}

// As aptq_many, with rows and weights made of NUMBERS (many.h).
template <class Numbers>
static void many(const Layer& layer, const States* states, const void* x, int64_t rows, const Output& output,
                 int64_t threads) {
    typedef typename Numbers::Element Element;
    constexpr int64_t steps = block_steps<Numbers>();
    int64_t units = units_of(layer).end, blocks = ceil_div(units, BLOCK_UNITS), stride = rows * steps;
    int64_t tiles = ceil_div(layer.outputs, WIDE), slabs = many_slabs(rows, tiles, threads);
    int64_t height = ceil_div(rows, slabs);
    Buffer<Element> inputs(blocks * stride);
    with_weights(layer, states, [&](auto bits, auto&& weights) {
        in_parallel(blocks, threads, rows * layer.inputs, [&](int64_t block) {
            for (int64_t row = 0; row < rows; row++)
                for (int64_t i = 0, unit = block * BLOCK_UNITS; i < BLOCK_UNITS && unit < units; i++, unit++) {
                    int64_t count = std::min(layer.inputs - unit * UNIT, (int64_t)UNIT);
                    Element* to = inputs.data + block * stride + row * steps + i * Numbers::STEPS;
                    Numbers::template read<bits.value>(x, output.type, row * layer.inputs + unit * UNIT, count, to);
                }
        });
        in_parallel(tiles * slabs, threads, many_time(rows * layer.inputs * layer.outputs), [&](int64_t part) {
            Range outputs{part / slabs * WIDE, std::min((part / slabs + 1) * WIDE, layer.outputs)};
            int64_t row = part % slabs * height, count = std::min(height, rows - row);
            if (count <= 0) return;
            Buffer<Element> held(steps * WIDE);
            Buffer<float> sums(count * WIDE);
            auto unpack = [&](Range block, Element* to) {
                weights(block, outputs, [&](int64_t unit, int step, int64_t column, Floats first, Floats second) {
                    Element* place = to + (unit - block.begin) * Numbers::STEPS * WIDE + column - outputs.begin;
                    Numbers::put(bits.value, place, step, first, second);
                });
            };
            multiply_many<Numbers>(layer, inputs.data + row * steps, stride, count, outputs.end - outputs.begin,
                                   held.data, sums.data, unpack);
            write_output(sums.data, WIDE, count, outputs.end - outputs.begin, output.from(row, outputs.begin));
        });
    });
}

static void levels(const Several& several, const void* x, int64_t rows, const Output& output, int64_t threads) {
    FloatRows floats(*several.layers[0], x, rows, output.type);
    in_strips(several, rows, output, threads, levels_time, [&](int64_t index, Range range, float* to, int64_t stride) {
        const Layer& layer = *several.layers[index];
        by_bits<4>(layer.bits, [&](auto bits) {
            if constexpr (bits.value >= 2)
                multiply_levels_range<bits.value>(layer, floats.values.data, floats.width, rows, range, to, stride);
        });
    });
}

extern "C" {

// Whether a product of bytes is one instruction.
int64_t aptq_fast_bytes() {
#ifdef APTQ_BYTE_DOT
    return 1;
#else
    return 0;
#endif
}

// Whether sums of products of pairs of bfloat16 are one instruction.
int64_t aptq_fast_pairs() {
#ifdef APTQ_PAIR_DOT
    return 1;
#else
    return 0;
#endif
}

// Whether products of tiles of bfloat16 are one instruction, which these kernels do not have.
int64_t aptq_tiles() {
#ifdef __AMX_BF16__
    return 1;
#else
    return 0;
#endif
}

// y [rows, width] = x D (C (x) H), both of `type`; see rotate.h.
void aptq_rotate(const Rotation* rotation, const void* x, void* y, int64_t rows, int64_t width, int64_t type,
                 int64_t threads) {
    rotate(*rotation, x, y, rows, width, type, threads);
}

// codes [columns, rows]: of the path of least error for each column of values and scales [columns, rows]; see trellis.h.
void aptq_trellis(const float* values, const float* scales, const float* table, uint8_t* codes, int64_t columns,
                  int64_t rows, int64_t bits, int64_t state_bits, int64_t threads) {
    in_parallel(columns, threads, path_time(columns * rows, (int64_t)1 << state_bits), [&](int64_t column) {
        by_bits(bits, [&](auto width) {
            best_path<width.value>(values + column * rows, scales + column * rows, table, rows, state_bits,
                                   codes + column * rows);
        });
    });
}

// y [rows, stride] = x [rows, inputs] W_i^T beside each other for `count` layers of one kind, all of `type`, with x rotated
// first unless `rotation` is null; digits: bytes that an activation becomes where codes are integers, 1 to 3.
void aptq_multiply(const Layer* const* layers, int64_t count, const Rotation* rotation, void* y, int64_t stride,
                   const void* x, int64_t rows, int64_t type, int64_t digits, int64_t threads) {
    Inputs inputs(rotation, *layers[0], x, rows, type, threads);
    for (int64_t first = 0; first < rows; first += SLAB) {
        Several several{layers, count};
        Output output = Output{y, type, stride}.from(first, 0);
        const void* from = (const char*)inputs.rows + first * layers[0]->inputs * size_of(type);
        int64_t some = std::min(rows - first, SLAB);
        if (layers[0]->levels) levels(several, from, some, output, threads);
        else if (digits == 1) integers<1>(several, from, some, output, threads);
        else if (digits == 2) integers<2>(several, from, some, output, threads);
        else integers<3>(several, from, some, output, threads);
    }
}

// As aptq_multiply, for values of states; codes have up to 6 bits, states up to 12.
void aptq_trellis_multiply(const Layer* const* layers, const States* const* states, int64_t count,
                           const Rotation* rotation, void* y, int64_t stride, const void* x, int64_t rows, int64_t type,
                           int64_t threads) {
    Inputs inputs(rotation, *layers[0], x, rows, type, threads);
    FloatRows floats(*layers[0], inputs.rows, rows, type);
    auto work = [&](int64_t index, Range range, float* to, int64_t width) {
        const Layer& layer = *layers[index];
        const States& mine = *states[index];
        by_bits<6>(layer.bits, [&](auto bits) {
            auto run = mine.computed ? multiply_states_range<bits.value, true> : multiply_states_range<bits.value, false>;
            run(layer, mine, floats.values.data, floats.width, rows, range, to, width);
        });
    };
    in_strips({layers, count}, rows, {y, type, stride}, threads, states_time, work);
}

// As aptq_multiply, of one layer, for codes of any kind; `states` is null where codes stand for something themselves.
void aptq_many(const Layer* layer, const States* states, const Rotation* rotation, void* y, int64_t stride, const void* x,
               int64_t rows, int64_t type, int64_t threads) {
    Inputs inputs(rotation, *layer, x, rows, type, threads);
    for (int64_t first = 0; first < rows; first += MOST_MANY) {
        const char* from = (const char*)inputs.rows + first * layer->inputs * size_of(type);
        Output output = Output{y, type, stride}.from(first, 0);
        int64_t count = std::min(rows - first, MOST_MANY);
#ifdef APTQ_PAIR_DOT
        if (type == BFLOAT16) {
            many<Pair>(*layer, states, from, count, output, threads);
            continue;
        }
#endif
        many<Single>(*layer, states, from, count, output, threads);
    }
}

// to [inputs, stride] of `type`, float32 or bfloat16, = W^T of the outputs from `begin`, a multiple of 32, to `end`. There
// is room for whole tiles: inputs and `stride` are the next multiples of 32. `states` is null where codes stand for
// something themselves.
void aptq_dense(const Layer* layer, const States* states, int64_t begin, int64_t end, void* to, int64_t stride,
                int64_t type, int64_t threads) {
    with_weights(*layer, states, [&](auto bits, auto&& weights) {
        in_tiles(*layer, begin, end, threads, [&](Range outputs) {
            auto take = [&](int64_t unit, int step, int64_t column, Floats first, Floats second) {
                int64_t at = (unit * UNIT + input_of_step(bits.value, step)) * stride + column - begin;
                int64_t next = at + halfway(bits.value) * stride;
                if (type == FLOAT32) store((float*)to + at, first), store((float*)to + next, second);
                else store_bfloats((uint16_t*)to + at, first), store_bfloats((uint16_t*)to + next, second);
            };
            weights(units_of(*layer), outputs, take);
        });
    });
}
}
