// Adapters with magnitudes (DoRA, Liu et al. 2024): row by row W' = g · V with V = W + B̂·A and g = m / ‖V‖. As in the paper
// (§4.3) and in PEFT the norm is a constant of the backward.
//
//   squares     ‖V‖² of each row, as partial sums over stretches of columns
//   gains       ‖V‖ and g of these; g is 1 where an output has no magnitude, or V is 0
//   forward     y = residual + bias + g∘v                     v = x̃ · Vᵀ, by linear.cu
//   backward    gained = g∘dy, and dm = Σ_rows dy · v / ‖V‖ as partial sums (column_sums.h)
//   change      out = (g − 1)∘dy
//   rest        x̃ = x − x̃
//   through     dx += mask ∘ dx̃
//
// With dropout x̃ is x with features dropped: y = x·Wᵀ + (g∘v − x̃·Wᵀ), of which linear.cu computes (x − x̃)·Wᵀ; and
// dx = dy·W + mask ∘ dx̃, dx̃ = (g∘dy − dy)·W + ds·A.
//
// v, y, dy, gained, residual [T, O], bias [O], x, x̃ [T, I], W [O, I] in T (f16 or bf16), I and O multiples of 8; A, B̂, R̄ and
// slots as in lora.cu; m in the flat f32 parameters; g and ‖V‖ [O] in f32. V is summed in f32 from what the products read, and
// never rounded. Sums in an order that shapes alone say.
#include "common/column_sums.h"
#include "common/matmul_tile.h"
#include "common/philox.h"
#include "common/rank_range.h"

constexpr int norm_tile = 64, norm_threads = 128, norm_columns = 512, element_threads = 256;

// partials [ceil(I / norm_columns)][O], where there are adapters. Grid: ceil(O / 64) blocks in x, the stretches in y; 32 KiB of
// dynamic shared memory.
template <class T>
DEVICE void magnitude_squares(const T* __restrict__ w, const T* __restrict__ b_hat, const T* __restrict__ a,
                              const int* __restrict__ slots, float* __restrict__ partials, int out_features,
                              int in_features, int adapters, int rank_leading) {
    using Tile = MatmulTile<T, Major::k, Major::mn, norm_tile, norm_tile, 2, 2>;
    constexpr int eights = norm_tile / chunk;
    DYNAMIC_SHARED(shared, 128);
    // Tile::store hands the same eights of a tile to the same thread every time: nobody else writes its sums.
    SHARED_ARRAY(float, squares, [norm_tile][eights]);
    const int first_out = blockIdx.x * norm_tile;
    const int2 ranks = rank_range(slots, adapters, first_out, first_out + norm_tile);
    if (ranks.x >= ranks.y) return;
    for (int i = threadIdx.x; i < norm_tile * eights; i += norm_threads) squares[i / eights][i % eights] = 0.f;

    const int begin = blockIdx.y * norm_columns, end = min(in_features, begin + norm_columns);
    for (int first = begin; first < end; first += norm_tile) {
        typename Tile::Accumulators sums;
        Tile::clear(sums);
        Tile::accumulate(sums, shared, Operand<T>{b_hat, out_features, rank_leading}, Operand<T>{a, in_features, in_features},
                         first_out, first, ranks.x, ranks.y);
        Tile::store(sums, shared, [&](int row, int column, float (&values)[chunk]) {
            const int out = first_out + row;
            if (out >= out_features || first + column >= in_features) return;
            float frozen[chunk], square = 0.f;
            load8(frozen, w + static_cast<long long>(out) * in_features + first + column);
#pragma unroll
            for (int i = 0; i < chunk; i++) square += (frozen[i] + values[i]) * (frozen[i] + values[i]);
            squares[row][column / chunk] += square;
        });
    }
    // Tile::store ends with a barrier.
    const int out = first_out + threadIdx.x;
    if (threadIdx.x >= norm_tile || out >= out_features) return;
    float square = 0.f;
#pragma unroll
    for (int i = 0; i < eights; i++) square += squares[threadIdx.x][i];
    partials[static_cast<long long>(blockIdx.y) * out_features + out] = square;
}
EXPORT_HALF_KERNELS(magnitude_squares, norm_threads,
                    (const T* w, const T* b_hat, const T* a, const int* slots, float* partials, int out_features,
                     int in_features, int adapters, int rank_leading),
                    (w, b_hat, a, slots, partials, out_features, in_features, adapters, rank_leading))

// magnitude_offsets [adapters]: where an adapter's m begins in the parameters, or −1. Grid: ceil(O / 256) blocks.
extern "C" __global__ void __launch_bounds__(element_threads)
    magnitude_gains(const float* __restrict__ partials, const float* __restrict__ parameters, const int* __restrict__ slots,
                    const long long* __restrict__ magnitude_offsets, float* __restrict__ norms, float* __restrict__ gains,
                    int out_features, int adapters, int stretches) {
    const int out = blockIdx.x * element_threads + threadIdx.x;
    if (out >= out_features) return;
    float norm = 0.f, gain = 1.f;
    for (int adapter = 0; adapter < adapters; adapter++) {
        const int* slot = slots + adapter * 4;
        if (magnitude_offsets[adapter] < 0 || out < slot[0] || out >= slot[1]) continue;
        float square = 0.f;
        for (int stretch = 0; stretch < stretches; stretch++)
            square += partials[static_cast<long long>(stretch) * out_features + out];
        norm = sqrtf(square);
        if (norm > 0.f) gain = parameters[magnitude_offsets[adapter] + out - slot[0]] / norm;
    }
    norms[out] = norm;
    gains[out] = gain;
}
REGISTER_KERNEL(magnitude_gains);

// Eight neighbouring elements of [rows, width]: a thread's.
struct EightPlace {
    bool inside;
    long long at;
    int column;
};
DEVICE EightPlace find_eight(int rows, int width) {
    const long long at = (static_cast<long long>(blockIdx.x) * element_threads + threadIdx.x) * vector_width;
    return {at < static_cast<long long>(rows) * width, at, static_cast<int>(at % width)};
}
DEVICE void load_gains(float (&values)[vector_width], const float* gains) {
    const float4 low = reinterpret_cast<const float4*>(gains)[0], high = reinterpret_cast<const float4*>(gains)[1];
    const float all[vector_width] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
    for (int i = 0; i < vector_width; i++) values[i] = all[i];
}

// bias and residual may be absent; residual may be y. Grid of this and all that follow but backward: ceil(elements / 8 / 256)
// blocks.
template <class T>
DEVICE void magnitude_forward(const T* __restrict__ v, const float* __restrict__ gains, const T* __restrict__ bias,
                              const T* residual, T* y, int rows, int width) {
    const EightPlace place = find_eight(rows, width);
    if (!place.inside) return;
    float values[vector_width], gain[vector_width], added[vector_width];
    load8(values, v + place.at);
    load_gains(gain, gains + place.column);
#pragma unroll
    for (int i = 0; i < vector_width; i++) values[i] *= gain[i];
    for (const T* source : {bias ? bias + place.column : nullptr, residual ? residual + place.at : nullptr}) {
        if (!source) continue;
        load8(added, source);
#pragma unroll
        for (int i = 0; i < vector_width; i++) values[i] += added[i];
    }
    store8(y + place.at, values);
}
EXPORT_HALF_KERNELS(magnitude_forward, element_threads,
                    (const T* v, const float* gains, const T* bias, const T* residual, T* y, int rows, int width),
                    (v, gains, bias, residual, y, rows, width))

// partials [ceil(T / stretch_rows)][O]. Grid: ceil(O / stretch_columns) blocks in x, the stretches in y.
template <class T>
DEVICE void magnitude_backward(const T* __restrict__ dy, const T* __restrict__ v, const float* __restrict__ gains,
                               T* __restrict__ gained, float* __restrict__ partials, int rows, int width) {
    SHARED_ARRAY(float4, sums, [column_warps][stretch_columns / 4]);
    const int first = blockIdx.y * stretch_rows, first_column = blockIdx.x * stretch_columns;
    const int lane_column = first_column + static_cast<int>(threadIdx.x) % 32 * vector_width;
    float gain[vector_width] = {};
    if (lane_column < width) load_gains(gain, gains + lane_column);
    sum_columns(sums, partials + static_cast<long long>(blockIdx.y) * width, first, min(rows, first + stretch_rows), first_column,
                width, [&](float (&values)[vector_width], int row, int column) {
                    const long long at = static_cast<long long>(row) * width + column;
                    float gradient[vector_width];
                    load8(values, v + at);
                    load8(gradient, dy + at);
#pragma unroll
                    for (int i = 0; i < vector_width; i++) {
                        values[i] *= gradient[i];
                        gradient[i] *= gain[i];
                    }
                    store8(gained + at, gradient);
                });
}
EXPORT_HALF_KERNELS(magnitude_backward, column_threads,
                    (const T* dy, const T* v, const float* gains, T* gained, float* partials, int rows, int width),
                    (dy, v, gains, gained, partials, rows, width))

template <class T>
DEVICE void magnitude_change(const T* __restrict__ dy, const float* __restrict__ gains, T* __restrict__ out, int rows,
                             int width) {
    const EightPlace place = find_eight(rows, width);
    if (!place.inside) return;
    float values[vector_width], gain[vector_width];
    load8(values, dy + place.at);
    load_gains(gain, gains + place.column);
#pragma unroll
    for (int i = 0; i < vector_width; i++) values[i] *= gain[i] - 1.f;
    store8(out + place.at, values);
}
EXPORT_HALF_KERNELS(magnitude_change, element_threads, (const T* dy, const float* gains, T* out, int rows, int width),
                    (dy, gains, out, rows, width))

template <class T>
DEVICE void magnitude_rest(const T* __restrict__ x, T* __restrict__ dropped, int rows, int width) {
    const EightPlace place = find_eight(rows, width);
    if (!place.inside) return;
    float values[vector_width], taken[vector_width];
    load8(values, x + place.at);
    load8(taken, dropped + place.at);
#pragma unroll
    for (int i = 0; i < vector_width; i++) values[i] -= taken[i];
    store8(dropped + place.at, values);
}
EXPORT_HALF_KERNELS(magnitude_rest, element_threads, (const T* x, T* dropped, int rows, int width), (x, dropped, rows, width))

template <class T>
DEVICE void magnitude_through(const T* __restrict__ gradient, T* __restrict__ dx, int rows, int width,
                              const DropoutMask& mask) {
    const EightPlace place = find_eight(rows, width);
    if (!place.inside) return;
    float values[vector_width], added[vector_width];
    load8(values, dx + place.at);
    load8(added, gradient + place.at);
    const int token = static_cast<int>(place.at / width);
#pragma unroll
    for (int half = 0; half < vector_width; half += 4) {
        const PhiloxWords words = mask.words(token, (place.column + half) / 4);
#pragma unroll
        for (int i = 0; i < 4; i++) values[half + i] += added[half + i] * mask.factor(words.words[i]);
    }
    store8(dx + place.at, values);
}
EXPORT_HALF_KERNELS(magnitude_through, element_threads,
                    (const T* gradient, T* dx, int rows, int width, const unsigned* positions, const unsigned* samples,
                     unsigned seed_low, unsigned seed_high, const unsigned* epoch, unsigned input, unsigned threshold,
                     float keep_scale),
                    (gradient, dx, rows, width,
                     DropoutMask{positions, samples, seed_low, seed_high, epoch, input, threshold, keep_scale}))
