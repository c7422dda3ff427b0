// Products with packed weights; the C ABI that aptq/kernels/cpu/library.py binds.
#include <algorithm>
#include <memory>
#include <vector>

#include "dense.h"
#include "integer.h"
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

constexpr int64_t STRIP = 1024, LEAST_STRIP = 96;  // outputs that a thread takes at once
constexpr int64_t STRIPS_PER_THREAD = 4;
constexpr int64_t SLAB = 64;  // rows whose digits of a chunk stay in the cache
constexpr int64_t WORTH_SHARING = 1 << 16;  // activations, to make digits of on several threads

// Rough nanoseconds of one thread with AVX2.
static int64_t digits_time(int64_t activations) { return activations * 5; }
static int64_t rotation_time(int64_t activations) { return activations * 12; }
static int64_t integers_time(int64_t products) { return products / 20; }
static int64_t levels_time(int64_t products) { return products / 6; }
static int64_t states_time(int64_t products) { return products / 2; }
static int64_t dense_time(int64_t weights) { return weights; }
static int64_t path_time(int64_t weights, int64_t states) { return weights * states; }

static void write_output(const float* sums, int64_t stride, int64_t rows, Range range, void* y, int64_t type, int64_t n) {
    int64_t count = range.end - range.begin;
    for (int64_t m = 0; m < rows; m++) {
        const float* from = sums + m * stride;
        int64_t to = m * n + range.begin, at = 0;
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

// Products that read the same rows: layers of equal inputs, and where the results go.
struct Several {
    const Layer* const* layers;
    void* const* results;
    int64_t count;
};

// Call `work(index, range, sums, stride)` for strips of each layer's outputs, and write what it adds up; `time` is that of so
// many products.
template <class Work>
static void in_strips(const Several& several, int64_t rows, int64_t type, int64_t threads,
                      int64_t time(int64_t products), const Work& work) {
    struct Strips {
        int64_t first, width;
    };
    std::vector<Strips> strips(several.count);
    int64_t parts = 0, products = 0;
    for (int64_t index = 0; index < several.count; index++) {
        const Layer& layer = *several.layers[index];
        int64_t tiles = ceil_div(layer.outputs, TILE);
        int64_t each = std::clamp(tiles * TILE / (LEAST_STRIP * threads), (int64_t)1, STRIPS_PER_THREAD);
        int64_t wanted = std::max(each * threads, ceil_div(tiles * TILE, STRIP));  // as many for each thread
        strips[index] = {parts, ceil_div(tiles, wanted) * TILE};
        parts += ceil_div(layer.outputs, strips[index].width);
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
        write_output(sums.data, width, rows, range, several.results[index], type, layer.outputs);
    });
}

// Call `work(range, place)` for tiles of outputs from `begin` to `end`, whose dense weights go to `place` in `to`.
template <class Work>
static void in_tiles(const Layer& layer, int64_t begin, int64_t end, void* to, int64_t type, int64_t threads,
                     const Work& work) {
    in_parallel(ceil_div(end - begin, TILE), threads, dense_time((end - begin) * layer.inputs), [&](int64_t part) {
        Range range{begin + part * TILE, begin + (part + 1) * TILE};
        if (range.end > end) range.end = end;
        work(range, (char*)to + part * TILE * size_of(type));
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
static void integers(const Several& several, const void* x, int64_t rows, int64_t type, int64_t threads) {
    std::vector<std::unique_ptr<DigitRows<D>>> digits;  // their order is that of a layer's codes
    for (int64_t index = 0; index < several.count; index++)
        digits.emplace_back(new DigitRows<D>(*several.layers[index], x, rows, type, threads));
    in_strips(several, rows, type, threads, integers_time, [&](int64_t index, Range range, float* to, int64_t stride) {
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

static void levels(const Several& several, const void* x, int64_t rows, int64_t type, int64_t threads) {
    const Layer& layer = *several.layers[0];
    FloatRows floats(layer, x, rows, type);
    in_strips(several, rows, type, threads, levels_time, [&](int64_t, Range range, float* to, int64_t stride) {
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

// As aptq_multiply, of one layer, for values of states; codes have up to 6 bits, states up to 12.
void aptq_trellis_multiply(const Layer* layer, const States* states, const Rotation* rotation, void* const* results,
                           const void* x, int64_t rows, int64_t type, int64_t threads) {
    Inputs inputs(rotation, *layer, x, rows, type, threads);
    FloatRows floats(*layer, inputs.rows, rows, type);
    in_strips({&layer, results, 1}, rows, type, threads, states_time, [&](int64_t, Range range, float* to, int64_t stride) {
        by_bits<6>(layer->bits, [&](auto bits) {
            auto run = states->computed ? multiply_states_range<bits.value, true> : multiply_states_range<bits.value, false>;
            run(*layer, *states, floats.values.data, floats.width, rows, range, to, stride);
        });
    });
}

// As aptq_dense, for values of states.
void aptq_trellis_dense(const Layer* layer, const States* states, int64_t begin, int64_t end, void* to, int64_t stride,
                        int64_t type, int64_t threads) {
    in_tiles(*layer, begin, end, to, type, threads, [&](Range range, char* place) {
        by_bits<6>(layer->bits, [&](auto bits) {
            constexpr int B = bits.value;
            auto run = states->computed ? (type == FLOAT32 ? write_states<B, FLOAT32, true> : write_states<B, BFLOAT16, true>)
                                     : (type == FLOAT32 ? write_states<B, FLOAT32, false> : write_states<B, BFLOAT16, false>);
            run(*layer, *states, range, place, stride);
        });
    });
}

// results[i] [rows, outputs of i] = x [rows, inputs] W_i^T, all of `type`, with x rotated first unless `rotation` is null;
// digits: bytes that an activation becomes, 1 to 3. Layers of levels come alone.
void aptq_multiply(const Layer* const* layers, int64_t count, const Rotation* rotation, void* const* results, const void* x,
                   int64_t rows, int64_t type, int64_t digits, int64_t threads) {
    Inputs inputs(rotation, *layers[0], x, rows, type, threads);
    for (int64_t first = 0; first < rows; first += SLAB) {
        std::vector<void*> to;
        for (int64_t index = 0; index < count; index++)
            to.push_back((char*)results[index] + first * layers[index]->outputs * size_of(type));
        Several several{layers, to.data(), count};
        const void* from = (const char*)inputs.rows + first * layers[0]->inputs * size_of(type);
        int64_t some = std::min(rows - first, SLAB);
        if (layers[0]->levels) levels(several, from, some, type, threads);
        else if (digits == 1) integers<1>(several, from, some, type, threads);
        else if (digits == 2) integers<2>(several, from, some, type, threads);
        else integers<3>(several, from, some, type, threads);
    }
}

// to [inputs, stride] of `type`, float32 or bfloat16, = W^T of the outputs from `begin`, a multiple of 32, to `end`. There
// is room for whole tiles: inputs and `stride` are the next multiples of 32.
void aptq_dense(const Layer* layer, int64_t begin, int64_t end, void* to, int64_t stride, int64_t type,
                int64_t threads) {
    in_tiles(*layer, begin, end, to, type, threads, [&](Range range, char* place) {
        by_bits(layer->bits, [&](auto bits) {
            if (type == FLOAT32) write_dense<bits.value, FLOAT32>(*layer, range, place, stride);
            else write_dense<bits.value, BFLOAT16>(*layer, range, place, stride);
        });
    });
}
}
