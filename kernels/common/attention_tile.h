// What the attention kernels share: tiles of rows of one head in shared memory, and the two products on them.
//
// A tile holds rows of D halves, padded by 16 bytes: the row length in 16-byte chunks is then odd, so that the eight rows
// of an ldmatrix fall into different banks for every D.
#pragma once
#include "../ptx/cp_async.h"
#include "../ptx/ldmatrix.h"
#include "../ptx/math.h"
#include "../ptx/mma.h"
#include "halves.h"
#include "soft_cap.h"

constexpr int attention_threads = 128;  // four warps of 16 rows
constexpr int outer_rows = 64;          // rows that a block owns: queries, or keys in the backward of keys

template <int D>
constexpr int pitch = D + 8;

// Rows of the other side that pass by, a tile at a time: fewer for wide heads, which need the registers and the space.
template <int D>
constexpr int inner_rows = D <= 64 ? 64 : D <= 128 ? 32 : 16;

// Starts copying ROWS rows from `source`; rows from `count` on become zero. count is at least 1.
template <class T, int D, int ROWS>
DEVICE void load_rows(T* tile, const T* source, long long leading, int count) {
    constexpr int chunks_per_row = D / 8, chunks = ROWS * chunks_per_row;
#pragma unroll
    for (int i = 0; i < (chunks + attention_threads - 1) / attention_threads; i++) {
        const int linear = threadIdx.x + i * attention_threads;
        if (linear >= chunks) break;
        const int row = linear / chunks_per_row, column = linear % chunks_per_row * 8;
        const bool inside = row < count;
        cp_async16(tile + row * pitch<D> + column, source + (inside ? row * leading + column : 0), inside ? 16 : 0);
    }
}

template <int COLUMNS>
DEVICE void clear(float (&sums)[1][COLUMNS][4]) {
#pragma unroll
    for (int j = 0; j < COLUMNS; j++)
#pragma unroll
        for (int q = 0; q < 4; q++) sums[0][j][q] = 0.f;
}

// sums[16][N] += a[first … first + 15][D] · b[N][D]ᵀ by one warp.
template <class T, int D, int N>
DEVICE void multiply_transposed(float (&sums)[1][N / 8][4], const T* a, int first, const T* b) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int step = 0; step < D / 16; step++) {
        uint32_t a_fragment[1][4], b_fragments[N / 8][2];
        ldmatrix_x4(a_fragment[0], a + (first + lane % 16) * pitch<D> + step * 16 + lane / 16 * 8);
#pragma unroll
        for (int j = 0; j < N / 8; j += 2) {
            uint32_t both[4];
            ldmatrix_x4(both, b + (j * 8 + lane / 16 * 8 + lane % 8) * pitch<D> + step * 16 + lane / 8 % 2 * 8);
            b_fragments[j][0] = both[0];
            b_fragments[j][1] = both[1];
            b_fragments[j + 1][0] = both[2];
            b_fragments[j + 1][1] = both[3];
        }
        mma_tile<T>(sums, a_fragment, b_fragments);
    }
}

// sums[16][W] += weights[16][K] · b[K][first … first + W − 1] by one warp. The weights are accumulators of an earlier
// product: rounded to T, their layout is that of a fragment of A.
template <class T, int D, int K, int W>
DEVICE void multiply(float (&sums)[1][W / 8][4], const float (&weights)[1][K / 8][4], const T* b, int first) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int step = 0; step < K / 16; step++) {
        uint32_t a_fragment[1][4], b_fragments[W / 8][2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float(&four)[4] = weights[0][2 * step + half];
            a_fragment[0][2 * half] = pack2<T>(four[0], four[1]);
            a_fragment[0][2 * half + 1] = pack2<T>(four[2], four[3]);
        }
#pragma unroll
        for (int j = 0; j < W / 8; j += 2) {
            uint32_t both[4];
            ldmatrix_x4_transposed(both, b + (step * 16 + lane % 16) * pitch<D> + first + j * 8 + lane / 16 * 8);
            b_fragments[j][0] = both[0];
            b_fragments[j][1] = both[1];
            b_fragments[j + 1][0] = both[2];
            b_fragments[j + 1][1] = both[3];
        }
        mma_tile<T>(sums, a_fragment, b_fragments);
    }
}

// z = scale · q·k, softly capped where there is a cap.
struct Score {
    float scale;
    SoftCap cap;
    __device__ __forceinline__ float value(float product) const { return cap.value(product * scale); }
    // dz / d(q·k)
    __device__ __forceinline__ float slope(float z) const { return scale * cap.slope(z); }
};

// Which part of a sample a block owns: tiles[blockIdx.x] = (first row of the sample, its end, first row owned). The host
// lists first what has most rows of its sample before it, so that the last blocks to finish are short.
struct SampleTile {
    int begin, end, first;
    __device__ __forceinline__ int rows() const { return min(outer_rows, end - first); }
    // The tile of `height` rows with as many behind it as this one has before it: for owners of keys, who meet the queries behind.
    __device__ __forceinline__ SampleTile mirrored(int height) const {
        const int last = begin + (end - begin - 1) / height * height;
        return {begin, end, begin + last - first};
    }
};
DEVICE SampleTile find_sample_tile(const int* tiles) {
    const int* tile = tiles + blockIdx.x * 3;
    return {tile[0], tile[1], tile[2]};
}

// Causal, and not further back than the window (0: unlimited).
DEVICE bool is_visible(int query, int key, int window) { return key <= query && (window == 0 || key > query - window); }

// A query attends to one key group's heads.
DEVICE int key_head_of(int query_head, int query_heads, int key_value_heads) {
    return query_head / (query_heads / key_value_heads);
}
