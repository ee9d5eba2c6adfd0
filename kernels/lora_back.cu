// One pass over dy for what the adapters of a group take from it.
//
//   back     ds = dy · B̂ and dB = dyᵀ · s, both as partial sums                         B̂ holds α/r (linear.cu)
//   sum_ds   ds [T, R] of its partial sums, of these or of those of mlp_back.cu
//   add_b    dB of its partial sums, likewise, times α/r, added to the flat f32 gradients
//
// dy [T, O], B̂ [O, R] and s, ds [T, R] in T (f16 or bf16); R̄, slots and b_offsets as in lora.cu. A block takes one adapter's
// rows of B̂, up to back_outputs of them, over a stretch of tokens, and at most N of its ranks:
//
//               64 outputs at a time ─▶
//             ┌──────┬──────┬──────┐
//   stretch   │ dy   │      │      │ · B̂  added up in registers from left to right: ds of the stretch     (warps 0 … 3)
//   of tokens │ 64²  │      │      │
//        │    └──────┴──────┴──────┘
//        ▼       dyᵀ · s  added up from top to bottom: dB of 64 outputs                                    (warps 4 … 7)
//
// Each tile of dy is read from memory once and used by both products. Partial sums are in f32 and are added in order, as
// shapes alone say: the result depends on no schedule. Up to 64 ranks dy is read once, beyond once for every 64.
#include "common/back_tile.h"

constexpr int back_threads = 256, back_outputs = 1024, back_stages = 4, element_threads = 256;

// The adapter, of its outputs, and of its ranks, that a block takes.
struct BackPlace {
    int out_begin, out_end, rank_begin, rank_end;  // rank_begin: where the adapter's ranks begin among all
    int first_rank;                                // the block's, a multiple of 8 at or before the adapter's own
    int first_out;                                 // where the adapter's outputs begin
    long long b_start;                             // elements of the B matrices before its own
};
DEVICE BackPlace find_back_place(const int* slots, int adapters, int ranks_wide) {
    int chunk = blockIdx.y;
    long long b_start = 0;
    for (int adapter = 0; adapter < adapters; adapter++) {
        const int* slot = slots + adapter * 4;
        const int outputs = slot[1] - slot[0], chunks = (outputs + back_outputs - 1) / back_outputs;
        if (chunk < chunks) {
            const int begin = slot[0] + chunk * back_outputs;
            const int first_rank = slot[2] / lanes_wide * lanes_wide + static_cast<int>(blockIdx.z) * ranks_wide;
            return {begin, min(slot[1], begin + back_outputs), slot[2], slot[3], first_rank, slot[0], b_start};
        }
        chunk -= chunks;
        b_start += static_cast<long long>(outputs) * (slot[3] - slot[2]);
    }
    return {};
}

// Tiles of tokens in a stretch: as many as 64 accumulators a thread allow.
template <int N>
constexpr int token_tiles = 128 / N;

// ds_partials [gridDim.y][T][rank_width], b_partials [stretches][Σ O·r]. Grid: stretches of token_tiles<N> · 64 tokens; for
// every adapter ceil(O / back_outputs); ranks by N. Dynamic shared memory: see lora_back_shared_bytes in linear.rs.
template <class T, int N>
DEVICE void lora_back(const T* __restrict__ dy, const T* __restrict__ b_hat, const T* __restrict__ s,
                      const int* __restrict__ slots, float* __restrict__ ds_partials, float* __restrict__ b_partials,
                      int tokens, int out_features, int adapters, int rank_leading, int rank_width,
                      long long b_elements) {
    using Narrow = SwizzledRows<N>;
    DYNAMIC_SHARED(shared, 128);
    const BackPlace place = find_back_place(slots, adapters, N);
    if (place.first_rank >= place.rank_end) return;
    unsigned char* s_tile = shared + back_stages * WideRows::tile_bytes;
    unsigned char* b_tiles = s_tile + token_tiles<N> * Narrow::tile_bytes;

    const int first_token = blockIdx.x * token_tiles<N> * side;
    const int live = min(token_tiles<N>, (tokens - first_token + side - 1) / side);
    const int out_tiles = (place.out_end - place.out_begin + side - 1) / side, total = out_tiles * live;
    const auto load = [&](int step) {
        const int out = place.out_begin + step / live * side, token = first_token + step % live * side;
        WideRows::load<side, back_threads>(shared + step % back_stages * WideRows::tile_bytes, dy, out_features, token, tokens,
                                           out, place.out_end);
        // At most three tiles of outputs ahead, so that four buffers suffice.
        if (step % live == 0)
            Narrow::template load<side, back_threads>(b_tiles + step / live % back_stages * Narrow::tile_bytes, b_hat,
                                                      rank_leading, out, place.out_end, place.first_rank, rank_leading);
    };
    Narrow::template load<token_tiles<N> * side, back_threads>(s_tile, s, rank_leading, first_token, tokens, place.first_rank,
                                                               place.rank_end);
#pragma unroll
    for (int step = 0; step < back_stages - 1; step++) {
        if (step < total) load(step);
        cp_async_commit();
    }

    const int warp = threadIdx.x / 32;
    // ds of every tile of tokens, or, in the other four warps, dB of the tile of outputs at hand in the first.
    float sums[token_tiles<N>][1][N / 8][4];
#pragma unroll
    for (int tile = 0; tile < token_tiles<N>; tile++) clear_sums(sums[tile]);
    int step = 0;
    for (int out_tile = 0; out_tile < out_tiles; out_tile++) {
        if (warp >= 4) clear_sums(sums[0]);
        const unsigned char* b_tile = b_tiles + out_tile % back_stages * Narrow::tile_bytes;
#pragma unroll
        for (int tile = 0; tile < token_tiles<N>; tile++) {
            if (tile >= live) continue;
            cp_async_wait<back_stages - 2>();
            __syncthreads();  // the tile has landed for everybody, and everybody is done with the one that is overwritten
            if (step + back_stages - 1 < total) load(step + back_stages - 1);
            cp_async_commit();
            const unsigned char* dy_tile = shared + step % back_stages * WideRows::tile_bytes;
            if (warp < 4) multiply_rows<T, Narrow>(sums[tile], dy_tile, warp * 16, b_tile, 0);
            else multiply_columns<T, Narrow>(sums[0], dy_tile, (warp - 4) * 16, s_tile + tile * Narrow::tile_bytes, 0);
            step++;
        }
        if (warp >= 4) {
            float* partial = b_partials + blockIdx.x * b_elements + place.b_start;
            const int first = place.out_begin + out_tile * side + (warp - 4) * 16, ranks = place.rank_end - place.rank_begin;
            for_each_sum(sums[0], [&](int row, int column, float value) {
                const int out = first + row, rank = place.first_rank + column - place.rank_begin;
                if (out < place.out_end && rank >= 0 && rank < ranks)
                    partial[(out - place.first_out) * ranks + rank] = value;
            });
        }
    }
    cp_async_wait<0>();
    if (warp >= 4) return;
    float* partial = ds_partials + static_cast<long long>(blockIdx.y) * tokens * rank_width;
#pragma unroll
    for (int tile = 0; tile < token_tiles<N>; tile++)
        for_each_sum(sums[tile], [&](int row, int column, float value) {
            const int token = first_token + tile * side + warp * 16 + row;
            const int rank = place.first_rank + column - place.rank_begin;
            if (token < tokens && rank >= 0 && rank < place.rank_end - place.rank_begin)
                partial[static_cast<long long>(token) * rank_width + rank] = value;
        });
}

#define LORA_BACK_PARAMETERS(T)                                                                                          \
    (const T* dy, const T* b_hat, const T* s, const int* slots, float* ds_partials, float* b_partials, int tokens,       \
     int out_features, int adapters, int rank_leading, int rank_width, long long b_elements)
#define LORA_BACK_ARGUMENTS                                                                                              \
    (dy, b_hat, s, slots, ds_partials, b_partials, tokens, out_features, adapters, rank_leading, rank_width, b_elements)
#define EXPORT_LORA_BACK(name, n)                                                                                        \
    template <class T>                                                                                                   \
    DEVICE void name LORA_BACK_PARAMETERS(T) {                                                                           \
        lora_back<T, n> LORA_BACK_ARGUMENTS;                                                                             \
    }                                                                                                                    \
    EXPORT_HALF_KERNELS_WITHIN(name, (back_threads, 2), LORA_BACK_PARAMETERS(T), LORA_BACK_ARGUMENTS)
EXPORT_LORA_BACK(lora_back_16, 16)
EXPORT_LORA_BACK(lora_back_32, 32)
EXPORT_LORA_BACK(lora_back_64, 64)

// ds of one token and rank a thread, of partial sums over block_outputs outputs. Grid: ceil(T · R / 256) blocks.
template <class T>
DEVICE void lora_sum_ds(const float* __restrict__ partials, const int* __restrict__ slots, T* __restrict__ ds, int tokens,
                        int adapters, int rank, int rank_leading, int rank_width, int block_outputs) {
    const long long i = static_cast<long long>(blockIdx.x) * element_threads + threadIdx.x;
    if (i >= static_cast<long long>(tokens) * rank) return;
    const long long token = i / rank;
    const int column = static_cast<int>(i % rank);
    int chunk = 0;
    for (int adapter = 0; adapter < adapters; adapter++) {
        const int* slot = slots + adapter * 4;
        const int end = chunk + (slot[1] - slot[0] + block_outputs - 1) / block_outputs;
        if (column >= slot[2] && column < slot[3]) {
            float sum = 0.f;
            for (int at = chunk; at < end; at++) sum += partials[(at * static_cast<long long>(tokens) + token) * rank_width + column - slot[2]];
            ds[token * rank_leading + column] = from_float<T>(sum);
            return;
        }
        chunk = end;
    }
}
EXPORT_HALF_KERNELS(lora_sum_ds, element_threads,
                    (const float* partials, const int* slots, T* ds, int tokens, int adapters, int rank, int rank_leading,
                     int rank_width, int block_outputs),
                    (partials, slots, ds, tokens, adapters, rank, rank_leading, rank_width, block_outputs))

// One element of the B matrices a thread, which stand one after the other in a stretch's partial sums. Grid:
// ceil(elements / 256) blocks.
extern "C" __global__ void __launch_bounds__(element_threads)
    lora_add_b_gradient(const float* __restrict__ partials, const int* __restrict__ slots,
                        const long long* __restrict__ b_offsets, const float* __restrict__ scales,
                        float* __restrict__ gradients, int stretches, int adapters, long long elements) {
    const long long i = static_cast<long long>(blockIdx.x) * element_threads + threadIdx.x;
    if (i >= elements) return;
    long long start = 0;
    for (int adapter = 0; adapter < adapters; adapter++) {
        const int* slot = slots + adapter * 4;
        const long long end = start + static_cast<long long>(slot[1] - slot[0]) * (slot[3] - slot[2]);
        if (i < end) {
            float sum = 0.f;
            for (int stretch = 0; stretch < stretches; stretch++) sum += partials[stretch * elements + i];
            gradients[b_offsets[adapter] + i - start] += scales[adapter] * sum;
            return;
        }
        start = end;
    }
}
REGISTER_KERNEL(lora_add_b_gradient);
