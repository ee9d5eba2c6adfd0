// What attention's kernels for Hopper share: a block owns 128 rows of one head (64 for each of two consuming warpgroups) and
// meets tiles of the other side, which one warp of a third warpgroup loads through the TMA; scores, masks and the products.
#pragma once
#include "../ptx/barrier.h"
#include "../ptx/wgmma.h"
#include "attention_tile.h"

constexpr int hopper_warpgroup = 128, hopper_consumers = 2, hopper_attention_threads = hopper_warpgroup * (1 + hopper_consumers);
constexpr int hopper_rows = 128, consumer_rows = hopper_rows / hopper_consumers;
constexpr int attention_box_rows = 64;  // of every tensor map

// The number of a consuming warpgroup. All lanes of a warp have the same, which the compiler sees in a shuffle: then the operands
// of wgmma stay in uniform registers.
DEVICE int consumer_index() { return __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / hopper_warpgroup, 0) - 1; }

// Rows that a block owns of its tile.
DEVICE int hopper_tile_rows(const SampleTile& tile) { return min(hopper_rows, tile.end - tile.first); }

template <int D, int ROWS>
constexpr int hopper_tile_bytes = ROWS * D * 2;

// Starts to load D columns of ROWS rows: for each 64 columns a box of ROWS rows.
template <int D, int ROWS>
DEVICE void load_hopper_tile(unsigned char* tile, const TensorMap& map, int row, int column, Mbarrier* full) {
#pragma unroll 1
    for (int box = 0; box < D / box_columns; box++)
        for (int part = 0; part < ROWS; part += attention_box_rows)
            tma_load(tile + (box * ROWS + part) * box_row_bytes, map, row + part, column + box * box_columns, full);
}

// Starts sums[64][N] = own[64][D] · other[N][D]ᵀ, as a group. `own`: the warpgroup's rows in a tile of 128.
template <class T, int D, int N>
DEVICE void start_scores(float (&sums)[N / 2], const unsigned char* own, const unsigned char* other) {
    const uint64_t a = wgmma_operand(own), b = wgmma_operand(other);
    wgmma_fence(sums);
#pragma unroll
    for (int step = 0; step < D / 16; step++) {
        const int row_bytes = step / 4 * box_row_bytes, inside = step % 4 * 32;
        wgmma<T, N, false>(sums, wgmma_operand_after(a, hopper_rows * row_bytes + inside),
                           wgmma_operand_after(b, N * row_bytes + inside), step > 0);
    }
    wgmma_commit();
}

// Starts sums[64][D] += weights[64][K] · other[K][D], as a group.
template <class T, int D, int K>
DEVICE void start_weighted_sum(float (&sums)[D / 2], uint32_t (&weights)[K / 16][4], const unsigned char* other) {
    const uint64_t b = wgmma_operand(other, K * box_row_bytes);
    wgmma_fence(sums, weights);
#pragma unroll
    for (int step = 0; step < K / 16; step++)
        wgmma_registers<T, D, true>(sums, weights[step], wgmma_operand_after(b, step * 16 * box_row_bytes), true);
    wgmma_commit();
}

// Starts products[64][N] = rows[64][D] · other[N][D]ᵀ, as a group.
template <class T, int D, int N>
DEVICE void start_shares(float (&products)[N / 2], uint32_t (&rows)[D / 16][4], const unsigned char* other) {
    const uint64_t b = wgmma_operand(other);
    wgmma_fence(products, rows);
#pragma unroll
    for (int step = 0; step < D / 16; step++)
        wgmma_registers<T, N, false>(products, rows[step], wgmma_operand_after(b, step / 4 * N * box_row_bytes + step % 4 * 32),
                                     step > 0);
    wgmma_commit();
}

// Rounds accumulators: their layout is then that of A's fragments.
template <class T, int N>
DEVICE void round_weights(uint32_t (&rounded)[N / 16][4], const float (&weights)[N / 2]) {
#pragma unroll
    for (int i = 0; i < N / 4; i++) rounded[i / 4][i % 4] = pack2<T>(weights[2 * i], weights[2 * i + 1]);
}

// Accumulator i of a thread stands in row accumulator_row + accumulator_row_of(i) of its warpgroup's 64 rows, column
// accumulator_column_of(i).
DEVICE int accumulator_row() { return threadIdx.x % hopper_warpgroup / 32 * 16 + threadIdx.x % 32 / 4; }
DEVICE int accumulator_row_of(int i) { return i / 2 % 2 * 8; }
DEVICE int accumulator_column_of(int i) { return i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2; }

// Whether every pair, or none, of `queries` and `keys` is visible: then no pair needs a test, or the tile no product.
DEVICE bool is_wholly_visible(int first_query, int queries, int first_key, int keys, int window) {
    return first_key + keys - 1 <= first_query && (window == 0 || first_key > first_query + queries - 1 - window);
}
DEVICE bool is_wholly_hidden(int first_query, int queries, int first_key, int keys, int window) {
    return first_key > first_query + queries - 1 || (window != 0 && first_key + keys - 1 <= first_query - window);
}

// Products become scores, −∞ where hidden: z · log2 e = score · exponent_factor. Both steps are left out for whole tiles
// that do not need them. is_seen(row, column): of an accumulator, its row counted from the thread's first.
template <int COUNT, class IsSeen>
DEVICE void score_tile(float (&tile)[COUNT], const Score& score, bool has_hidden, const IsSeen& is_seen) {
    if (score.cap.cap > 0.f)
#pragma unroll
        for (int i = 0; i < COUNT; i++) tile[i] = score.value(tile[i]);
    if (has_hidden)
#pragma unroll
        for (int i = 0; i < COUNT; i++)
            if (!is_seen(accumulator_row_of(i), accumulator_column_of(i))) tile[i] = -INFINITY;
}
DEVICE float exponent_factor(const Score& score) { return (score.cap.cap > 0.f ? 1.f : score.scale) * log2_of_e; }
