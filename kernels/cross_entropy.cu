// Output head and cross-entropy over a chunk of labelled rows; the logits of all rows never exist.
//
//   head_logits           z = x · Wᵀ                        x [L, H], W [V, H], z [L, V̄]
//   cross_entropy         c = cap · tanh(z / cap), or z where the cap is 0
//                         loss = log Σ_v exp(c_v) − c_target,   dz = (softmax(c) − onehot(target)) · scale · dc/dz   over z;
//                         for a target that is no_target, loss and dz are 0
//   head_backward_input   dx = dz · W                       dx [L, H]
//   head_weight_gradient  dW += dzᵀ · x                     dW [V, H] in f32, of a head that is trained
//
// T is f16 or bf16; z is rounded to T, as the layer's output would be; H is a multiple of 8, V arbitrary, V̄ = V rounded up to
// a multiple of 8: the padding columns of z are never read as logits. Sums over the vocabulary in f32: each thread a running
// maximum and sum over its own columns, in order, then the block in a fixed order. Offsets are 64-bit.
#include "common/block_sum.h"
#include "common/matmul_tile.h"
#include "common/soft_cap.h"
#include "ptx/math.h"

constexpr int head_tile = 128, head_threads = 256;
template <class T, Major B_MAJOR>
using HeadTile = MatmulTile<T, Major::k, B_MAJOR, head_tile, head_tile, 2, 4>;

constexpr unsigned no_target = 0xffffffffu;  // of a row that only fills up a batch

DEVICE int head_tiles(int extent) { return (extent + head_tile - 1) / head_tile; }

// Grid: ceil(L / 128) · ceil(V / 128) blocks, 64 KiB of dynamic shared memory.
template <class T>
DEVICE void head_logits(const T* __restrict__ x, const T* __restrict__ w, T* __restrict__ z, int rows, int width,
                        int vocabulary, int vocabulary_leading) {
    using Tile = HeadTile<T, Major::k>;
    DYNAMIC_SHARED(shared, 128);
    const TilePlace tile = find_tile(blockIdx.x, head_tiles(rows), head_tiles(vocabulary), head_tile, head_tile);
    typename Tile::Accumulators sums;
    Tile::clear(sums);
    Tile::accumulate(sums, shared, Operand<T>{x, rows, width}, Operand<T>{w, vocabulary, width}, tile.m, tile.n, 0, width);
    Tile::store(sums, shared, [&](int row, int column, float (&values)[chunk]) {
        // Beyond V an eight holds zeros, products of rows that W does not have.
        if (tile.m + row < rows && tile.n + column < vocabulary_leading)
            store8(z + static_cast<long long>(tile.m + row) * vocabulary_leading + tile.n + column, values);
    });
}

// Grid: ceil(L / 128) · ceil(H / 128) blocks, 64 KiB of dynamic shared memory.
template <class T>
DEVICE void head_backward_input(const T* __restrict__ dz, const T* __restrict__ w, T* __restrict__ dx, int rows, int width,
                                int vocabulary, int vocabulary_leading) {
    using Tile = HeadTile<T, Major::mn>;
    DYNAMIC_SHARED(shared, 128);
    const TilePlace tile = find_tile(blockIdx.x, head_tiles(rows), head_tiles(width), head_tile, head_tile);
    typename Tile::Accumulators sums;
    Tile::clear(sums);
    Tile::accumulate(sums, shared, Operand<T>{dz, rows, vocabulary_leading}, Operand<T>{w, width, width}, tile.m, tile.n, 0,
                     vocabulary);
    Tile::store(sums, shared, [&](int row, int column, float (&values)[chunk]) {
        if (tile.m + row < rows && tile.n + column < width)
            store8(dx + static_cast<long long>(tile.m + row) * width + tile.n + column, values);
    });
}

// The sum goes on from what is there, in the order of rows: chunks of whole tile_k rows, however many, leave the same bits.
// Grid: ceil(V / 128) · ceil(H / 128) blocks, 64 KiB of dynamic shared memory.
template <class T>
DEVICE void head_weight_gradient(const T* __restrict__ dz, const T* __restrict__ x, float* __restrict__ dw, int rows,
                                 int width, int vocabulary, int vocabulary_leading) {
    using Tile = MatmulTile<T, Major::mn, Major::mn, head_tile, head_tile, 2, 4>;
    DYNAMIC_SHARED(shared, 128);
    const TilePlace tile = find_tile(blockIdx.x, head_tiles(vocabulary), head_tiles(width), head_tile, head_tile);
    const auto at = [&](int row, int column) { return static_cast<long long>(tile.m + row) * width + tile.n + column; };
    const auto inside = [&](int row, int column) { return tile.m + row < vocabulary && tile.n + column < width; };
    typename Tile::Accumulators sums;
    Tile::for_each(sums, [&](int row, int column, float& value) { value = inside(row, column) ? dw[at(row, column)] : 0.f; });
    Tile::accumulate(sums, shared, Operand<T>{dz, vocabulary, vocabulary_leading}, Operand<T>{x, width, width}, tile.m, tile.n,
                     0, rows);
    Tile::store(sums, shared, [&](int row, int column, float (&values)[chunk]) {
        if (!inside(row, column)) return;
        float4* target = reinterpret_cast<float4*>(dw + at(row, column));
        target[0] = make_float4(values[0], values[1], values[2], values[3]);
        target[1] = make_float4(values[4], values[5], values[6], values[7]);
    });
}

// One block a row: its loss, whether its target is the first of the highest logits, and, where a scale is given, dz over z.
// The scale is read from memory, so that a graph that was recorded serves every step.
template <class T>
DEVICE void cross_entropy(T* z, const unsigned* __restrict__ targets, float* __restrict__ losses,
                          float* __restrict__ correct, const float* __restrict__ gradient_scale, int vocabulary,
                          int vocabulary_leading, float soft_cap) {
    SHARED_ARRAY(float, partials, [max_warps_per_block]);
    T* row = z + static_cast<long long>(blockIdx.x) * vocabulary_leading;
    const int target = static_cast<int>(targets[blockIdx.x]), stride = head_threads * vector_width;
    if (targets[blockIdx.x] == no_target) {
        if (threadIdx.x == 0) losses[blockIdx.x] = correct[blockIdx.x] = 0.f;
        const float zeros[vector_width] = {};
        if (gradient_scale)
            for (int column = threadIdx.x * vector_width; column < vocabulary; column += stride) store8(row + column, zeros);
        return;
    }
    const SoftCap cap{soft_cap};
    const float at_target = cap.value(to_float(row[target]));

    float greatest = -INFINITY, sum = 0.f, beaten = 0.f;
    for (int column = threadIdx.x * vector_width; column < vocabulary; column += stride) {
        float values[vector_width];
        load8(values, row + column);
        const int count = min(vector_width, vocabulary - column);
        float now = greatest;
#pragma unroll
        for (int i = 0; i < vector_width; i++) {
            if (i >= count) continue;
            values[i] = cap.value(values[i]);
            now = fmaxf(now, values[i]);
            if (values[i] > at_target || (values[i] == at_target && column + i < target)) beaten = 1.f;
        }
        // Before the first finite logit both are −infinity, whose difference would be NaN.
        if (now > greatest) sum *= exp_fast(greatest - now);
        greatest = now;
#pragma unroll
        for (int i = 0; i < vector_width; i++)
            if (i < count && values[i] > -INFINITY) sum += exp_fast(values[i] - greatest);
    }
    const float row_maximum = block_maximum(greatest, partials);
    // A thread without columns holds −infinity and adds nothing.
    const float total = block_sum(greatest > -INFINITY ? sum * exp_fast(greatest - row_maximum) : 0.f, partials);
    const bool is_beaten = block_maximum(beaten, partials) > 0.f;  // also: everybody has read row[target]
    if (threadIdx.x == 0) {
        losses[blockIdx.x] = row_maximum - at_target + logf(total);
        correct[blockIdx.x] = is_beaten ? 0.f : 1.f;
    }
    if (!gradient_scale) return;

    const float scale = *gradient_scale, factor = scale / total;
    for (int column = threadIdx.x * vector_width; column < vocabulary; column += stride) {
        float values[vector_width];
        load8(values, row + column);
#pragma unroll
        for (int i = 0; i < vector_width; i++) {
            const float capped = cap.value(values[i]);
            values[i] = exp_fast(capped - row_maximum) * factor;
            if (column + i == target) values[i] -= scale;
            values[i] *= cap.slope(capped);
        }
        store8(row + column, values);
    }
}

EXPORT_HALF_KERNELS(head_logits, head_threads,
                    (const T* x, const T* w, T* z, int rows, int width, int vocabulary, int vocabulary_leading),
                    (x, w, z, rows, width, vocabulary, vocabulary_leading))
EXPORT_HALF_KERNELS(head_backward_input, head_threads,
                    (const T* dz, const T* w, T* dx, int rows, int width, int vocabulary, int vocabulary_leading),
                    (dz, w, dx, rows, width, vocabulary, vocabulary_leading))
EXPORT_HALF_KERNELS(head_weight_gradient, head_threads,
                    (const T* dz, const T* x, float* dw, int rows, int width, int vocabulary, int vocabulary_leading),
                    (dz, x, dw, rows, width, vocabulary, vocabulary_leading))
// Grid: L blocks.
EXPORT_HALF_KERNELS(cross_entropy, head_threads,
                    (T* z, const unsigned* targets, float* losses, float* correct, const float* gradient_scale,
                     int vocabulary, int vocabulary_leading, float soft_cap),
                    (z, targets, losses, correct, gradient_scale, vocabulary, vocabulary_leading, soft_cap))
