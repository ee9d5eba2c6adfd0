// The element-wise middle of an MLP on the way back, and in the same pass all that the adapters take from it:
//
//   act = f(g) · u,  du = dact · f(g),  dg = dact · u · f'(g)               du and dg written over u and g (gated.h)
//   gate, up    ds = dg · B̂ and dB = dgᵀ · s, and the same of du            as partial sums, as in lora_back.cu
//   down        dA = dsᵀ · x̃ with x̃ = mask ∘ act / (1 − p)                  as partial sums, as in lora.cu
//
// gate_up [T, 2F]: g in columns 0 … F, u behind it; dact [T, F]; B̂ [2F, R] and s, ds [T, R] with leading dimension R̄, the
// ranks of gate first; down_ds [T, r]. All in T (f16 or bf16), F a multiple of 8; products and sums in f32, of act and x̃ as they
// would be stored: act itself exists in shared memory alone. Any rank may be 0: then nothing of it is read or written.
//
//               64 columns of F at a time ─▶
//             ┌──────┬──────┬──────┐
//   stretch   │ dg   │      │      │ · B̂  added up in registers from left to right: ds of the stretch
//   of tokens │ du   │      │      │
//        │    │ x̃    │      │      │
//        │    └──────┴──────┴──────┘
//        ▼       dgᵀ · s, x̃ᵀ · ds  added up from top to bottom: dB and dA of 64 columns
//
// Four warps take what is of gate, four what is of up, each half the ranks of dA; see MlpCut. dact, g and u are read from memory
// once and dg and du written once: 10 bytes a token and column. The partial sums of dB and dA add 8·Σr over the tokens of a
// stretch to that, written and read: 0.9 bytes for three ranks of 16, 8 for three of 64. They are added in order, as shapes
// alone say.
#include "common/back_tile.h"
#include "common/gated.h"

struct MlpRanks {
    int gate, up, down;
    int gate_up_leading, down_leading;
};

// Partial sums: ds [adapters of gate and up][gridDim.y][T][rank_width], b [gridDim.x][Σ F·r], a [gridDim.x][r][F].
struct MlpPartials {
    float *ds, *b, *a;
    int rank_width;
};

// What gate or up is of all: `ranks` of them from `begin` on, its columns of gate_up, and its parts of the partial sums.
struct MlpSide {
    int begin, ranks, first_rank;  // first_rank: the multiple of 8 at or before `begin`
    int first_out;
    int place;  // among the adapters
    __device__ __forceinline__ MlpSide(const MlpRanks& ranks_of, int is_up, int width)
        : begin(is_up ? ranks_of.gate : 0),
          ranks(is_up ? ranks_of.up : ranks_of.gate),
          first_rank(begin / lanes_wide * lanes_wide),
          first_out(is_up ? width : 0),
          place(is_up && ranks_of.gate > 0) {}
};

// How a block of N ranks is cut: a warp takes at most 32 of them, so that its sums stay in registers; 64 need twice the warps.
template <int N>
struct MlpCut {
    static constexpr int warp_ranks = N < 32 ? N : 32, threads = 256 * (N / warp_ranks);
    static constexpr int token_tiles = warp_ranks == 32 ? 3 : 7;  // of a stretch: as many as spill no registers
};

// Two stages of dact, g and u; the narrow matrices of the step at hand.
template <int N>
struct MlpTiles {
    using Narrow = SwizzledRows<N>;
    static constexpr int stages = 2;
    unsigned char* shared;
    __device__ __forceinline__ unsigned char* wide(int stage, int which) const {
        return shared + (stage * 3 + which) * WideRows::tile_bytes;
    }
    __device__ __forceinline__ unsigned char* dact(int stage) const { return wide(stage, 0); }
    // Of gate (0) or up (1).
    __device__ __forceinline__ unsigned char* half(int stage, int is_up) const { return wide(stage, 1 + is_up); }
    __device__ __forceinline__ unsigned char* narrow(int which) const {
        return shared + stages * 3 * WideRows::tile_bytes + which * Narrow::tile_bytes;
    }
    __device__ __forceinline__ unsigned char* b_hat(int is_up) const { return narrow(is_up); }
    __device__ __forceinline__ unsigned char* s(int is_up) const { return narrow(2 + is_up); }
    __device__ __forceinline__ unsigned char* down_ds() const { return narrow(4); }
};

// The chunks of a tile that this thread copied itself, so that its own wait is enough: dg and du over g and u, in memory too,
// and x̃ over dact.
template <class T, class F, int THREADS>
DEVICE void go_back_through_gate(unsigned char* dact, unsigned char* g, unsigned char* u, T* gate_up, int width,
                                 int first_token, int tokens, int first_column, bool with_act, const DropoutMask& mask) {
    WideRows::for_each_chunk<side, THREADS, 1>([&](int row, int chunk) {
        const int offset = WideRows::offset(row, chunk), token = first_token + row, column = first_column + chunk * lanes_wide;
        const bool inside = token < tokens && column < width;
        // In place, as halves: the accumulators leave few registers.
        Vector8<T> gates, ups, gradients;
        gates.bits = *reinterpret_cast<const uint4*>(g + offset);
        ups.bits = *reinterpret_cast<const uint4*>(u + offset);
        gradients.bits = *reinterpret_cast<const uint4*>(dact + offset);
#pragma unroll
        for (int i = 0; i < vector_width; i++) {
            float gate = to_float(gates.values[i]), up = to_float(ups.values[i]);
            gradients.values[i] = from_float<T>(gated_gradient<F>(gate, up, to_float(gradients.values[i])));
            gates.values[i] = from_float<T>(gate);
            ups.values[i] = from_float<T>(up);
        }
        *reinterpret_cast<uint4*>(g + offset) = gates.bits;
        *reinterpret_cast<uint4*>(u + offset) = ups.bits;
        if (inside) {
            T* out = gate_up + static_cast<long long>(token) * 2 * width + column;
            *reinterpret_cast<uint4*>(out) = gates.bits;
            *reinterpret_cast<uint4*>(out + width) = ups.bits;
        }
        if (!with_act) return;
        Vector8<T>& act = gradients;
        if (mask.positions && inside) drop8(act.values, mask, token, column);
        *reinterpret_cast<uint4*>(dact + offset) = act.bits;
    });
}

// Grid: stretches of token_tiles · 64 tokens; F by block_columns, a multiple of 64. Dynamic shared memory: six tiles of
// 64 × 64 halves and five of 64 × N. No adapter has more than N ranks, counted from first_rank.
template <class T, class F, int N>
DEVICE void mlp_back(const T* __restrict__ dact, T* gate_up, const T* __restrict__ s, const T* __restrict__ b_hat,
                     const T* __restrict__ down_ds, const MlpPartials& partials, int tokens, int width, int block_columns,
                     const MlpRanks& ranks, const DropoutMask& mask) {
    using Cut = MlpCut<N>;
    using Narrow = SwizzledRows<N>;
    constexpr int W = Cut::warp_ranks, token_tiles = Cut::token_tiles;
    DYNAMIC_SHARED(shared, 128);
    const MlpTiles<N> tiles{shared};
    const int first_token = blockIdx.x * token_tiles * side;
    const int live = min(token_tiles, (tokens - first_token + side - 1) / side);
    const int begin = blockIdx.y * block_columns, end = min(width, begin + block_columns);

    const auto load_wide = [&](int column, int tile, int stage) {
        const int token = first_token + tile * side;
        const long long leading = 2 * static_cast<long long>(width);
        WideRows::load<side, Cut::threads>(tiles.dact(stage), dact, width, token, tokens, column, end);
        WideRows::load<side, Cut::threads>(tiles.half(stage, 0), gate_up, leading, token, tokens, column, end);
        WideRows::load<side, Cut::threads>(tiles.half(stage, 1), gate_up + width, leading, token, tokens, column, end);
    };
    const auto load_narrow = [&](int column, int tile) {
        const int token = first_token + tile * side;
#pragma unroll
        for (int is_up = 0; is_up < 2; is_up++) {
            const MlpSide of(ranks, is_up, width);
            if (of.ranks == 0) continue;
            Narrow::template load<side, Cut::threads>(tiles.s(is_up), s, ranks.gate_up_leading, token, tokens, of.first_rank,
                                                      of.begin + of.ranks);
            if (tile == 0)
                Narrow::template load<side, Cut::threads>(tiles.b_hat(is_up), b_hat, ranks.gate_up_leading,
                                                          of.first_out + column, of.first_out + end, of.first_rank,
                                                          ranks.gate_up_leading);
        }
        if (ranks.down > 0)
            Narrow::template load<side, Cut::threads>(tiles.down_ds(), down_ds, ranks.down_leading, token, tokens, 0,
                                                      ranks.down);
    };

    const int warp = threadIdx.x / 32, is_up = warp / 4 % 2, rows = warp % 4 * 16;
    const int ranks_from = warp / 8 * W, down_from = warp / 4 * (W / 2);
    const MlpSide mine(ranks, is_up, width);
    float ds[token_tiles][1][W / 8][4];
#pragma unroll
    for (int tile = 0; tile < token_tiles; tile++) clear_sums(ds[tile]);

    load_wide(begin, 0, 0);
    cp_async_commit();
    int stage = 0;
    for (int column = begin; column < end; column += side) {
        float b_sums[1][W / 8][4], a_sums[1][W / 16][4];
        clear_sums(b_sums);
        clear_sums(a_sums);
        for (int tile = 0; tile < live; tile++, stage ^= 1) {
            __syncthreads();  // everybody is done with the tiles that are overwritten
            load_narrow(column, tile);
            cp_async_commit();
            const int next_tile = tile + 1 < live ? tile + 1 : 0, next_column = next_tile > 0 ? column : column + side;
            if (next_column < end) load_wide(next_column, next_tile, stage ^ 1);
            cp_async_commit();
            cp_async_wait<2>();
            go_back_through_gate<T, F, Cut::threads>(tiles.dact(stage), tiles.half(stage, 0), tiles.half(stage, 1), gate_up, width,
                                       first_token + tile * side, tokens, column, ranks.down > 0, mask);
            cp_async_wait<1>();
            __syncthreads();  // everybody's gradients are there, and the narrow matrices
            if (mine.ranks > 0) {
                const unsigned char* gradient = tiles.half(stage, is_up);
#pragma unroll
                for (int at = 0; at < token_tiles; at++)
                    if (at == tile) multiply_rows<T, Narrow>(ds[at], gradient, rows, tiles.b_hat(is_up), ranks_from);
                multiply_columns<T, Narrow>(b_sums, gradient, rows, tiles.s(is_up), ranks_from);
            }
            if (ranks.down > 0)
                multiply_columns<T, Narrow>(a_sums, tiles.dact(stage), rows, tiles.down_ds(), down_from);
        }
        if (mine.ranks > 0) {
            float* partial =
                partials.b + static_cast<long long>(blockIdx.x) * (width * (ranks.gate + ranks.up)) + width * mine.begin;
            for_each_sum(b_sums, [&](int row, int at, float value) {
                const int out = column + rows + row, rank = mine.first_rank + ranks_from + at - mine.begin;
                if (out < end && rank >= 0 && rank < mine.ranks) partial[out * mine.ranks + rank] = value;
            });
        }
        float* partial = partials.a + static_cast<long long>(blockIdx.x) * (width * ranks.down);
        for_each_sum(a_sums, [&](int row, int at, float value) {
            const int out = column + rows + row, rank = down_from + at;
            if (out < end && rank < ranks.down) partial[rank * width + out] = value;
        });
    }
    cp_async_wait<0>();
    if (mine.ranks == 0) return;
    float* partial = partials.ds + static_cast<long long>(mine.place * gridDim.y + blockIdx.y) * tokens * partials.rank_width;
#pragma unroll
    for (int tile = 0; tile < token_tiles; tile++)
        for_each_sum(ds[tile], [&](int row, int at, float value) {
            const int token = first_token + tile * side + rows + row, rank = mine.first_rank + ranks_from + at - mine.begin;
            if (token < tokens && rank >= 0 && rank < mine.ranks)
                partial[static_cast<long long>(token) * partials.rank_width + rank] = value;
        });
}

#define MLP_BACK_PARAMETERS(T)                                                                                           \
    (const T* dact, T* gate_up, const T* s, const T* b_hat, const T* down_ds, float* ds_partials, float* b_partials,     \
     float* a_partials, int tokens, int width, int block_columns, int gate_rank, int up_rank, int down_rank,             \
     int gate_up_leading, int down_leading, int rank_width, const unsigned* positions, const unsigned* samples,          \
     unsigned seed_low, unsigned seed_high, const unsigned* epoch, unsigned input, unsigned threshold, float keep_scale)
#define MLP_BACK_ARGUMENTS                                                                                               \
    (dact, gate_up, s, b_hat, down_ds, ds_partials, b_partials, a_partials, tokens, width, block_columns, gate_rank,     \
     up_rank, down_rank, gate_up_leading, down_leading, rank_width, positions, samples, seed_low, seed_high, epoch,      \
     input, threshold, keep_scale)
#define EXPORT_MLP_BACK(name, F, n)                                                                                      \
    template <class T>                                                                                                   \
    DEVICE void name MLP_BACK_PARAMETERS(T) {                                                                            \
        mlp_back<T, F, n>(dact, gate_up, s, b_hat, down_ds, MlpPartials{ds_partials, b_partials, a_partials, rank_width}, \
                          tokens, width, block_columns,                                                                  \
                          MlpRanks{gate_rank, up_rank, down_rank, gate_up_leading, down_leading},                        \
                          DropoutMask{positions, samples, seed_low, seed_high, epoch, input, threshold, keep_scale});    \
    }                                                                                                                    \
    EXPORT_HALF_KERNELS_WITHIN(name, (MlpCut<n>::threads, 512 / MlpCut<n>::threads), MLP_BACK_PARAMETERS(T), MLP_BACK_ARGUMENTS)
EXPORT_MLP_BACK(mlp_back_silu_16, Silu, 16)
EXPORT_MLP_BACK(mlp_back_silu_32, Silu, 32)
EXPORT_MLP_BACK(mlp_back_silu_64, Silu, 64)
EXPORT_MLP_BACK(mlp_back_gelu_16, GeluTanh, 16)
EXPORT_MLP_BACK(mlp_back_gelu_32, GeluTanh, 32)
EXPORT_MLP_BACK(mlp_back_gelu_64, GeluTanh, 64)
