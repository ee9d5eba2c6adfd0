// A gated activation and, in the same pass, the product of down's adapter with it:
//
//   act = f(g) · u                                                                       (gated.h)
//   s = x̃ · Aᵀ with x̃ = mask ∘ act / (1 − p)                           as partial sums over stretches of F (lora_sum_s)
//
// gate_up [T, 2F]: g in columns 0 … F, u behind it; act [T, F], A [r, F], s [T, r] with leading dimension r̄. All in T (f16 or
// bf16), F a multiple of 8; x̃ is rounded as it would be stored but exists in shared memory alone. Sums in f32, in the order of the
// columns, a block's first. g and u are read once and act is written once: 6 bytes a token and column. Of A every block reads
// its columns, from the L2: r/32 bytes a token and column. Beyond 64 ranks that would be most of the traffic: there the
// operations run one by one.
#include "common/back_tile.h"
#include "common/gated.h"

constexpr int gated_down_threads = 256;

// act over g, where this thread copied g and u itself; then x̃ in its place.
template <class T, class F>
DEVICE void go_through_gate(unsigned char* g, const unsigned char* u, T* __restrict__ act, int width, int first_token,
                            int tokens, int first_column, const DropoutMask& mask) {
    WideRows::for_each_chunk<side, gated_down_threads, 1>([&](int row, int chunk) {
        const int offset = WideRows::offset(row, chunk), token = first_token + row, column = first_column + chunk * lanes_wide;
        const bool inside = token < tokens && column < width;
        Vector8<T> gates, ups;
        gates.bits = *reinterpret_cast<const uint4*>(g + offset);
        ups.bits = *reinterpret_cast<const uint4*>(u + offset);
#pragma unroll
        for (int i = 0; i < vector_width; i++)
            gates.values[i] = from_float<T>(to_float(ups.values[i]) * F::at(to_float(gates.values[i])).value);
        if (inside) *reinterpret_cast<uint4*>(act + static_cast<long long>(token) * width + column) = gates.bits;
        if (mask.positions && inside) drop8(gates.values, mask, token, column);
        *reinterpret_cast<uint4*>(g + offset) = gates.bits;
    });
}

// partials [gridDim.y][T][r̄], zero beyond r. Grid: T by 64; F by block_columns, a multiple of 64. Dynamic shared memory: two stages of two tiles
// of 64 × 64 halves and one of N × 64. N is at least r.
template <class T, class F, int N>
DEVICE void gated_down(const T* __restrict__ gate_up, T* __restrict__ act, const T* __restrict__ a,
                       float* __restrict__ partials, int tokens, int width, int block_columns, int rank,
                       int rank_leading, const DropoutMask& mask) {
    constexpr int threads = gated_down_threads, stage_bytes = 2 * WideRows::tile_bytes + N * WideRows::row_bytes;
    DYNAMIC_SHARED(shared, 128);
    const int first_token = blockIdx.x * side, begin = blockIdx.y * block_columns, end = min(width, begin + block_columns);
    const auto load = [&](int column, unsigned char* stage) {
        const long long leading = 2 * static_cast<long long>(width);
        WideRows::load<side, threads>(stage, gate_up, leading, first_token, tokens, column, end);
        WideRows::load<side, threads>(stage + WideRows::tile_bytes, gate_up + width, leading, first_token, tokens, column, end);
        WideRows::load<N, threads>(stage + 2 * WideRows::tile_bytes, a, width, 0, rank, column, end);
    };
    const int warp = threadIdx.x / 32, rows = warp % 4 * 16, first_rank = warp / 4 * (N / 2);
    float sums[1][N / 16][4];
    clear_sums(sums);
    load(begin, shared);
    cp_async_commit();
    int stage = 0;
    for (int column = begin; column < end; column += side, stage ^= 1) {
        unsigned char* tile = shared + stage * stage_bytes;
        __syncthreads();  // everybody is done with the stage that is overwritten
        if (column + side < end) load(column + side, shared + (stage ^ 1) * stage_bytes);
        cp_async_commit();
        cp_async_wait<1>();
        go_through_gate<T, F>(tile, tile + WideRows::tile_bytes, act, width, first_token, tokens, column, mask);
        __syncthreads();  // everybody's x̃ is there, and A
#pragma unroll
        for (int k = 0; k < side; k += 32)
            multiply_transposed<T, WideRows>(sums, tile, rows, k, tile + 2 * WideRows::tile_bytes, first_rank, k);
    }
    cp_async_wait<0>();
    float* partial = partials + static_cast<long long>(blockIdx.y) * tokens * rank_leading;
    for_each_sum(sums, [&](int row, int at, float value) {
        const int token = first_token + rows + row, column = first_rank + at;
        if (token < tokens && column < rank_leading) partial[static_cast<long long>(token) * rank_leading + column] = value;
    });
}

#define GATED_DOWN_PARAMETERS(T)                                                                                         \
    (const T* gate_up, T* act, const T* a, float* partials, int tokens, int width, int block_columns, int rank,          \
     int rank_leading, const unsigned* positions, const unsigned* samples, unsigned seed_low, unsigned seed_high, const unsigned* epoch,   \
     unsigned input, unsigned threshold, float keep_scale)
#define GATED_DOWN_ARGUMENTS                                                                                             \
    (gate_up, act, a, partials, tokens, width, block_columns, rank, rank_leading, positions, samples, seed_low,          \
     seed_high, epoch, input, threshold, keep_scale)
#define EXPORT_GATED_DOWN(name, F, n)                                                                                    \
    template <class T>                                                                                                   \
    DEVICE void name GATED_DOWN_PARAMETERS(T) {                                                                          \
        gated_down<T, F, n>(gate_up, act, a, partials, tokens, width, block_columns, rank, rank_leading,                 \
                            DropoutMask{positions, samples, seed_low, seed_high, epoch, input, threshold, keep_scale});  \
    }                                                                                                                    \
    EXPORT_HALF_KERNELS(name, gated_down_threads, GATED_DOWN_PARAMETERS(T), GATED_DOWN_ARGUMENTS)
EXPORT_GATED_DOWN(gated_down_silu_16, Silu, 16)
EXPORT_GATED_DOWN(gated_down_silu_32, Silu, 32)
EXPORT_GATED_DOWN(gated_down_silu_64, Silu, 64)
EXPORT_GATED_DOWN(gated_down_gelu_16, GeluTanh, 16)
EXPORT_GATED_DOWN(gated_down_gelu_32, GeluTanh, 32)
EXPORT_GATED_DOWN(gated_down_gelu_64, GeluTanh, 64)
