// RMSNorm and, while the normalised rows stand in shared memory, the product of the adapters that read them:
//
//   y = x · rstd · (offset + w),  rstd = 1 / sqrt(mean(x²) + epsilon)                                    (rms_norm.cu)
//   s = ỹ · Aᵀ with ỹ = mask ∘ y / (1 − p)                                                               (lora.cu)
//
// x, y [T, H], w [H], A [R, H], s [T, R] with leading dimension R̄, in T (f16 or bf16); H is a multiple of 8. A block takes ROWS
// rows, and N rows of A at a time:
//
//   x ── cp.async ──▶ ROWS rows, whole ── normalised where they stand ──▶ y
//                         └─▶ ỹ ── ldmatrix ──▶ mma ──▶ s
//   A ── cp.async ──▶ ring ┘        a stage after the other over H, then the next N rows of A
//
// y and s have the bits of rms_norm_forward and of lora_dropout and lora_down behind it: ỹ is rounded as it would be stored, and
// every sum has the same order, a lane's elements and a butterfly or that of k. x is read and y written once: 4 bytes a token
// and column. A is read from the L2 by every block: 2·R / ROWS bytes a token and column.
#include "common/back_tile.h"
#include "common/rms_norm_row.h"

constexpr int norm_down_threads = 256, norm_down_warps = norm_down_threads / 32;
constexpr int ring_bytes = 16 << 10;

// How the N rows of A go through the ring, and who multiplies what.
template <int ROWS, int N>
struct NormDownCut {
    static constexpr int stage_columns = N == 64 ? 32 : 64;
    using Stage = SwizzledRows<stage_columns>;
    static constexpr int stage_bytes = N * Stage::row_bytes, stages = ring_bytes / stage_bytes;
    // A warp has 16 rows and TILES · 8 ranks; where those are too few, warps are idle.
    static constexpr int row_tiles = ROWS / 16, rank_tiles = N / 8 * row_tiles / norm_down_warps;
    static constexpr int TILES = rank_tiles > 0 ? rank_tiles : 1;
};

// One of ROWS rows in shared memory, which stand side by side in tiles of 64 columns.
template <class T, int ROWS>
struct StandingRow {
    static constexpr int tile_bytes = ROWS * WideRows::row_bytes;
    unsigned char* tiles;
    int row;

    // Eight elements from `column` on.
    __device__ __forceinline__ T* at(int column) const {
        return reinterpret_cast<T*>(tiles + column / side * tile_bytes + WideRows::offset(row, column % side / lanes_wide));
    }
    __device__ __forceinline__ void get(float (&values)[vector_width], int, int column) const { load8(values, at(column)); }
};

// y, and ỹ in place of x, by one warp whose lanes copied their elements of x themselves.
template <class T, int ROWS>
DEVICE void normalise(const StandingRow<T, ROWS>& row, const T* __restrict__ w, T* __restrict__ y, int width, float offset,
                      float epsilon, const DropoutMask& mask, int token) {
    const float rstd = reciprocal_rms<0>(row, width, epsilon);
    for_each_vector<0>(width, [&](int, int column) {
        float h[vector_width], total[vector_width] = {};
        row.get(h, 0, column);
        add_normed(total, h, rstd, w + column, offset);
        Vector8<T> normed = rounded8<T>(total);
        *reinterpret_cast<uint4*>(y + column) = normed.bits;
        if (mask.positions) drop8(normed.values, mask, token, column);
        *reinterpret_cast<uint4*>(row.at(column)) = normed.bits;
    });
}

// Grid: ceil(T / ROWS) blocks. Dynamic shared memory: ROWS rows of H rounded up to a multiple of 64, and the ring.
template <class T, int ROWS, int N>
DEVICE void rms_norm_down(const T* __restrict__ x, const T* __restrict__ w, const T* __restrict__ a, T* __restrict__ y,
                          T* __restrict__ s, int tokens, int width, float offset, float epsilon, int rank, int rank_leading,
                          const DropoutMask& mask) {
    using Row = StandingRow<T, ROWS>;
    using Cut = NormDownCut<ROWS, N>;
    constexpr int rows_of_warp = ROWS / norm_down_warps;
    DYNAMIC_SHARED(shared, 128);
    const int tiles = (width + side - 1) / side;
    unsigned char* ring = shared + tiles * Row::tile_bytes;
    const int warp = threadIdx.x / 32, first_token = blockIdx.x * ROWS;

    int next_rank = 0, next_column = 0;
    const auto load_next = [&](int stage) {
        if (next_rank < rank)
            Cut::Stage::template load<N, norm_down_threads>(ring + stage * Cut::stage_bytes, a, width, next_rank, rank,
                                                            next_column, width);
        cp_async_commit();  // also when empty: waits count groups
        next_column += Cut::stage_columns;
        if (next_column >= width) {
            next_column = 0;
            next_rank += N;
        }
    };
    for (int stage = 0; stage < Cut::stages - 1; stage++) load_next(stage);

    const auto row_of_turn = [&](int turn) { return Row{shared, warp + turn * norm_down_warps}; };
    for (int turn = 0; turn < rows_of_warp; turn++) {
        const Row row = row_of_turn(turn);
        const int token = first_token + row.row;
        const T* source = x + static_cast<long long>(token) * width;
        // Rows past the end, and columns up to a whole tile, are zero.
        for_each_vector<0>(tiles * side, [&](int, int column) {
            const bool inside = token < tokens && column < width;
            cp_async16(row.at(column), inside ? source + column : x, inside ? 16 : 0);
        });
        cp_async_commit();
    }
    for (int turn = 0; turn < rows_of_warp; turn++) {
        cp_async_commit();  // an empty group for each row that is done, so that the wait may be for the same number
        cp_async_wait<rows_of_warp>();
        const Row row = row_of_turn(turn);
        const int token = first_token + row.row;
        if (token < tokens)
            normalise(row, w, y + static_cast<long long>(token) * width, width, offset, epsilon, mask, token);
    }

    const int first_row = warp % Cut::row_tiles * 16, rank_of_warp = warp / Cut::row_tiles * (Cut::TILES * 8);
    int stage = 0;
    for (int first_rank = 0; first_rank < rank; first_rank += N) {
        const bool is_busy = rank_of_warp < min(N, rank - first_rank);
        float sums[1][Cut::TILES][4];
        clear_sums(sums);
        for (int column = 0; column < width; column += Cut::stage_columns) {
            cp_async_wait<Cut::stages - 2>();
            // The stage has landed for every thread, at first also the rows, and everybody is done with the stage before it,
            // which the next load overwrites.
            __syncthreads();
            load_next((stage + Cut::stages - 1) % Cut::stages);
            if (is_busy) {
                const unsigned char* tile = shared + column / side * Row::tile_bytes;
#pragma unroll
                for (int k = 0; k < Cut::stage_columns; k += 32)
                    multiply_transposed<T, typename Cut::Stage>(sums, tile, first_row, column % side + k,
                                                                ring + stage * Cut::stage_bytes, rank_of_warp, k);
            }
            stage = (stage + 1) % Cut::stages;
        }
        if (!is_busy) continue;
        for_each_sum(sums, [&](int row, int at, float value) {
            const int token = first_token + first_row + row, column = first_rank + rank_of_warp + at;
            if (token < tokens && column < rank) s[static_cast<long long>(token) * rank_leading + column] = from_float<T>(value);
        });
    }
    cp_async_wait<0>();
}

#define EXPORT_NORM_DOWN_AS(rows, n, type)                                                                               \
    EXPORT_KERNEL_AS(rms_norm_down_##rows##_##n##_##type, type, (norm_down_threads, 2),                                  \
                     (const T* x, const T* w, const T* a, T* y, T* s, int tokens, int width, float offset, float epsilon, \
                      int rank, int rank_leading, const unsigned* positions, const unsigned* samples, unsigned seed_low, \
                      unsigned seed_high, const unsigned* epoch, unsigned input, unsigned threshold, float keep_scale),  \
                     (rms_norm_down<T, rows, n>(x, w, a, y, s, tokens, width, offset, epsilon, rank, rank_leading,       \
                                                DropoutMask{positions, samples, seed_low, seed_high, epoch, input,       \
                                                            threshold, keep_scale})))
#define EXPORT_NORM_DOWN(rows, n) \
    EXPORT_NORM_DOWN_AS(rows, n, f16) \
    EXPORT_NORM_DOWN_AS(rows, n, bf16)
EXPORT_NORM_DOWN(16, 16)
EXPORT_NORM_DOWN(16, 32)
EXPORT_NORM_DOWN(16, 64)
EXPORT_NORM_DOWN(32, 16)
EXPORT_NORM_DOWN(32, 32)
EXPORT_NORM_DOWN(32, 64)
EXPORT_NORM_DOWN(64, 16)
EXPORT_NORM_DOWN(64, 32)
EXPORT_NORM_DOWN(64, 64)
