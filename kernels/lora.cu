// The adapters' own products, for a group of projections that share their input x.
//
//   dropout     x̃ = mask ∘ x / (1 − p)
//   down        s = x̃ · Aᵀ                                                  forward
//   sum_s       s of shares, where the kernel in front took them
//   gradient    dA = dsᵀ · x̃                                                added to the flat f32 gradients
//   pack        B̂ from the f32 parameters                                   B̂ holds α/r (linear.cu)
//
// x, x̃ [T, I], A [R, I] in T (f16 or bf16); R = Σ r over the group's adapters; s, ds [T, R] and B̂ [O, R] with leading
// dimension R̄, R rounded up to a multiple of 8. slots [adapters][4]: an adapter's output columns begin and end, and its
// columns of s begin and end. Sums in f32 in the order of k; over tokens they are split into gridDim.y stretches, whose
// partial sums are then added in order: the result does not depend on the schedule.
#include "common/matmul_tile.h"
#include "common/philox.h"

constexpr int lora_tile = 64, lora_threads = 128;
template <class T, Major A_MAJOR, Major B_MAJOR>
using LoraTile = MatmulTile<T, A_MAJOR, B_MAJOR, lora_tile, lora_tile, 2, 2>;
constexpr int element_threads = 256;

// Eight neighbouring elements of [rows, width], where the row may end among them.
template <class T>
DEVICE void store_ragged(T* out, long long leading, long long row, int column, int width, const float (&values)[chunk]) {
#pragma unroll
    for (int i = 0; i < chunk; i++)
        if (column + i < width) out[row * leading + column + i] = from_float<T>(values[i]);
}

// s[T][R] = x · Aᵀ. Grid: ceil(T / 64) · ceil(R / 64) blocks, 32 KiB of dynamic shared memory.
template <class T>
DEVICE void lora_down(const T* __restrict__ x, const T* __restrict__ a, T* __restrict__ s, int tokens, int in_features,
                      int rank, int rank_leading) {
    using Tile = LoraTile<T, Major::k, Major::k>;
    DYNAMIC_SHARED(shared, 128);
    const TilePlace tile =
        find_tile(blockIdx.x, (tokens + lora_tile - 1) / lora_tile, (rank + lora_tile - 1) / lora_tile, lora_tile, lora_tile);
    typename Tile::Accumulators sums;
    Tile::clear(sums);
    Tile::accumulate(sums, shared, Operand<T>{x, tokens, in_features}, Operand<T>{a, rank, in_features}, tile.m, tile.n, 0,
                     in_features);
    Tile::store(sums, shared, [&](int row, int column, float (&values)[chunk]) {
        if (tile.m + row < tokens) store_ragged(s, rank_leading, tile.m + row, tile.n + column, rank, values);
    });
}

// partials[stretch][M][N] = leftᵀ · right over the stretch's tokens: left [T, M] and right [T, N] with their leading
// dimensions. Grid: ceil(M / 64) · ceil(N / 64) blocks in x, the stretches in y.
template <class T>
DEVICE void lora_gradient(const T* __restrict__ left, const T* __restrict__ right, float* __restrict__ partials,
                          int tokens, int m, int n, int left_leading, int right_leading) {
    using Tile = LoraTile<T, Major::mn, Major::mn>;
    DYNAMIC_SHARED(shared, 128);
    const TilePlace tile = find_tile(blockIdx.x, (m + lora_tile - 1) / lora_tile, (n + lora_tile - 1) / lora_tile, lora_tile, lora_tile);
    // Whole k tiles, so that every stretch begins aligned.
    const int k_tiles = (tokens + tile_k - 1) / tile_k, per_stretch = (k_tiles + gridDim.y - 1) / gridDim.y * tile_k;
    const int begin = min(tokens, static_cast<int>(blockIdx.y) * per_stretch), end = min(tokens, begin + per_stretch);
    typename Tile::Accumulators sums;
    Tile::clear(sums);
    Tile::accumulate(sums, shared, Operand<T>{left, m, left_leading}, Operand<T>{right, n, right_leading}, tile.m, tile.n,
                     begin, end);
    float* partial = partials + static_cast<long long>(blockIdx.y) * m * n;
    Tile::store(sums, shared, [&](int row, int column, float (&values)[chunk]) {
        if (tile.m + row < m) store_ragged(partial, n, tile.m + row, tile.n + column, n, values);
    });
}

EXPORT_HALF_KERNELS(lora_down, lora_threads,
                    (const T* x, const T* a, T* s, int tokens, int in_features, int rank, int rank_leading),
                    (x, a, s, tokens, in_features, rank, rank_leading))
EXPORT_HALF_KERNELS(lora_gradient, lora_threads,
                    (const T* left, const T* right, float* partials, int tokens, int m, int n, int left_leading,
                     int right_leading),
                    (left, right, partials, tokens, m, n, left_leading, right_leading))

DEVICE float sum_of_partials(const float* partials, int stretches, long long elements, long long element) {
    float sum = 0.f;
    for (int stretch = 0; stretch < stretches; stretch++) sum += partials[stretch * elements + element];
    return sum;
}

// dA [R, I] lies in the gradients as it is. Grid: ceil(elements / 256) blocks.
extern "C" __global__ void __launch_bounds__(element_threads)
    lora_add_a_gradient(const float* __restrict__ partials, float* __restrict__ gradients, int stretches,
                        long long elements) {
    const long long i = static_cast<long long>(blockIdx.x) * element_threads + threadIdx.x;
    if (i < elements) gradients[i] += sum_of_partials(partials, stretches, elements, i);
}
REGISTER_KERNEL(lora_add_a_gradient);

// s [T, R̄] of its shares (common/shares_of_s.h, gated_down.cu), four elements a thread. Grid: ceil(elements / 4 / 256) blocks.
template <class T>
DEVICE void lora_sum_s(const float* __restrict__ partials, T* __restrict__ s, int tiles, long long elements) {
    const long long i = (static_cast<long long>(blockIdx.x) * element_threads + threadIdx.x) * 4;
    if (i >= elements) return;
    float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
    for (int tile = 0; tile < tiles; tile++) {
        const float4 share = *reinterpret_cast<const float4*>(partials + tile * elements + i);
        sum.x += share.x;
        sum.y += share.y;
        sum.z += share.z;
        sum.w += share.w;
    }
    store2(s + i, sum.x, sum.y);
    store2(s + i + 2, sum.z, sum.w);
}
EXPORT_HALF_KERNELS(lora_sum_s, element_threads, (const float* partials, T* s, int tiles, long long elements),
                    (partials, s, tiles, elements))

// B̂ [O, R̄], zeros included. Grid: ceil(O · R̄ / 256) blocks.
template <class T>
DEVICE void lora_pack(const float* __restrict__ parameters, const int* __restrict__ slots,
                      const long long* __restrict__ b_offsets, const float* __restrict__ scales, T* __restrict__ b_hat,
                      int adapters, int out_features, int rank_leading) {
    const long long i = static_cast<long long>(blockIdx.x) * element_threads + threadIdx.x;
    if (i >= static_cast<long long>(out_features) * rank_leading) return;
    const int out = static_cast<int>(i / rank_leading), column = static_cast<int>(i % rank_leading);
    float value = 0.f;
    for (int adapter = 0; adapter < adapters; adapter++) {
        const int* slot = slots + adapter * 4;
        if (out < slot[0] || out >= slot[1] || column < slot[2] || column >= slot[3]) continue;
        const long long at = b_offsets[adapter] + static_cast<long long>(out - slot[0]) * (slot[3] - slot[2]) + column - slot[2];
        value = scales[adapter] * parameters[at];
    }
    b_hat[i] = from_float<T>(value);
}
EXPORT_HALF_KERNELS(lora_pack, element_threads,
                    (const float* parameters, const int* slots, const long long* b_offsets, const float* scales, T* b_hat,
                     int adapters, int out_features, int rank_leading),
                    (parameters, slots, b_offsets, scales, b_hat, adapters, out_features, rank_leading))

// A thread takes four features: the words of one Philox call. I is a multiple of 8. Grid: ceil(T · I / 4 / 256) blocks.
template <class T>
DEVICE void lora_dropout(const T* __restrict__ x, T* __restrict__ dropped, int tokens, int in_features,
                         const DropoutMask& mask) {
    const long long linear = static_cast<long long>(blockIdx.x) * element_threads + threadIdx.x;
    const int groups = in_features / 4;
    const int token = static_cast<int>(linear / groups), group = static_cast<int>(linear % groups);
    if (token >= tokens) return;
    const PhiloxWords words = mask.words(token, group);
    const long long at = static_cast<long long>(token) * in_features + group * 4;
#pragma unroll
    for (int pair = 0; pair < 4; pair += 2) {
        float values[2];
        load2(values, x + at + pair);
        store2(dropped + at + pair, values[0] * mask.factor(words.words[pair]),
               values[1] * mask.factor(words.words[pair + 1]));
    }
}
EXPORT_HALF_KERNELS(lora_dropout, element_threads,
                    (const T* x, T* dropped, int tokens, int in_features, const unsigned* positions,
                     const unsigned* samples, unsigned seed_low, unsigned seed_high, const unsigned* epoch, unsigned input,
                     unsigned threshold, float keep_scale),
                    (x, dropped, tokens, in_features,
                     DropoutMask{positions, samples, seed_low, seed_high, epoch, input, threshold, keep_scale}))
