// What the passes share that take a product for the adapters from rows on their way: tiles of halves in shared memory, and a
// warp's products of them with the narrow matrices of the adapters.
#pragma once
#include "../ptx/cp_async.h"
#include "../ptx/ldmatrix.h"
#include "../ptx/mma.h"
#include "halves.h"
#include "philox.h"

constexpr int side = 64;
constexpr int lanes_wide = 8;  // halves in 16 bytes: the unit of copies and of the swizzle

// Rows of WIDTH halves, swizzled by 16-byte chunks so that eight rows' chunks of one column fall into different banks.
template <int WIDTH>
struct SwizzledRows {
    static constexpr int chunks = WIDTH / lanes_wide;
    static constexpr int shift = chunks == 8 ? 0 : chunks == 4 ? 1 : 2;
    static constexpr int row_bytes = WIDTH * 2, tile_bytes = side * row_bytes;

    static __device__ __forceinline__ int offset(int row, int chunk) {
        return row * row_bytes + ((chunk ^ (row >> shift & (chunks - 1))) << 4);
    }

    // The chunks of ROWS rows that this thread of THREADS copies.
    template <int ROWS, int THREADS, int UNROLL, class Visit>
    static __device__ __forceinline__ void for_each_chunk(const Visit& visit) {
#pragma unroll UNROLL
        for (int turn = 0; turn < (ROWS * chunks + THREADS - 1) / THREADS; turn++) {
            const int linear = threadIdx.x + turn * THREADS;
            if (ROWS * chunks % THREADS == 0 || linear < ROWS * chunks) visit(linear / chunks, linear % chunks);
        }
    }

    // Starts the copies of ROWS rows from (first_row, first_column) on; outside [0, end_row) × [0, end_column) it is zero.
    template <int ROWS, int THREADS, class T>
    static __device__ __forceinline__ void load(unsigned char* tile, const T* source, long long leading, int first_row,
                                                int end_row, int first_column, int end_column) {
        for_each_chunk<ROWS, THREADS, 4>([&](int row, int chunk) {
            const int column = first_column + chunk * lanes_wide;
            const bool inside = first_row + row < end_row && column < end_column;
            cp_async16(tile + offset(row, chunk), inside ? source + (first_row + row) * leading + column : source,
                       inside ? min(lanes_wide, end_column - column) * 2 : 0);
        });
    }
};

using WideRows = SwizzledRows<side>;

// The fragment of rows first … first + 15 of a tile at columns k … k + 15.
DEVICE void load_rows(uint32_t (&fragment)[4], const unsigned char* tile, int first, int k) {
    const int lane = threadIdx.x % 32;
    ldmatrix_x4(fragment, tile + WideRows::offset(first + lane % 16, k / lanes_wide + lane / 16));
}

// The fragment of columns first … first + 15 of a tile, transposed, at rows k … k + 15.
DEVICE void load_columns(uint32_t (&fragment)[4], const unsigned char* tile, int first, int k) {
    const int lane = threadIdx.x % 32;
    ldmatrix_x4_transposed(fragment, tile + WideRows::offset(k + lane / 16 * 8 + lane % 8, first / lanes_wide + lane / 8 % 2));
}

// The two right operands of columns first … first + 15 of a narrow matrix at rows k … k + 15.
template <class Narrow>
DEVICE void load_right(uint32_t (&left)[2], uint32_t (&right)[2], const unsigned char* narrow, int k, int first) {
    const int lane = threadIdx.x % 32;
    uint32_t both[4];
    ldmatrix_x4_transposed(both, narrow + Narrow::offset(k + lane % 16, first / lanes_wide + lane / 16));
    left[0] = both[0];
    left[1] = both[1];
    right[0] = both[2];
    right[1] = both[3];
}

// The right operands of columns first … first + 7 at rows k … k + 31: of two steps of k.
template <class Narrow>
DEVICE void load_right_tall(uint32_t (&upper)[2], uint32_t (&lower)[2], const unsigned char* narrow, int k, int first) {
    uint32_t both[4];
    ldmatrix_x4_transposed(both, narrow + Narrow::offset(k + threadIdx.x % 32, first / lanes_wide));
    upper[0] = both[0];
    upper[1] = both[1];
    lower[0] = both[2];
    lower[1] = both[3];
}

// sums[16][W] += left · columns first … first + W − 1 of a narrow matrix of 64 rows; load_left(fragment, k) gives left's.
template <class T, class Narrow, int TILES, class LoadLeft>
DEVICE void multiply_narrow(float (&sums)[1][TILES][4], const unsigned char* narrow, int first, const LoadLeft& load_left) {
#pragma unroll
    for (int k = 0; k < side; k += 32) {
        if constexpr (TILES % 2 == 0) {
#pragma unroll
            for (int step = 0; step < 32; step += 16) {
                uint32_t a[1][4], b[TILES][2];
                load_left(a[0], k + step);
#pragma unroll
                for (int j = 0; j < TILES; j += 2) load_right<Narrow>(b[j], b[j + 1], narrow, k + step, first + j * 8);
                mma_tile<T>(sums, a, b);
            }
        } else {
            static_assert(TILES == 1, "eight columns, or pairs of eight");
            uint32_t upper[1][4], lower[1][4], b_upper[1][2], b_lower[1][2];
            load_left(upper[0], k);
            load_left(lower[0], k + 16);
            load_right_tall<Narrow>(b_upper[0], b_lower[0], narrow, k, first);
            mma_tile<T>(sums, upper, b_upper);
            mma_tile<T>(sums, lower, b_lower);
        }
    }
}

// sums[16][W] += rows first … first + 15 of a tile · columns first_right … of a narrow matrix.
template <class T, class Narrow, int TILES>
DEVICE void multiply_rows(float (&sums)[1][TILES][4], const unsigned char* tile, int first, const unsigned char* narrow,
                          int first_right) {
    multiply_narrow<T, Narrow>(sums, narrow, first_right,
                               [&](uint32_t (&fragment)[4], int k) { load_rows(fragment, tile, first, k); });
}

// The same with columns first … first + 15 of the tile, transposed.
template <class T, class Narrow, int TILES>
DEVICE void multiply_columns(float (&sums)[1][TILES][4], const unsigned char* tile, int first, const unsigned char* narrow,
                             int first_right) {
    multiply_narrow<T, Narrow>(sums, narrow, first_right,
                               [&](uint32_t (&fragment)[4], int k) { load_columns(fragment, tile, first, k); });
}

// sums[16][W] += rows first … first + 15 of a tile at columns k … k + 31 · the transpose of rows first_right … of another,
// `Right`, at its columns right_k ….
template <class T, class Right, int TILES>
DEVICE void multiply_transposed(float (&sums)[1][TILES][4], const unsigned char* tile, int first, int k,
                                const unsigned char* right, int first_right, int right_k) {
    const int lane = threadIdx.x % 32;
    uint32_t upper[1][4], lower[1][4], b_upper[TILES][2], b_lower[TILES][2];
    load_rows(upper[0], tile, first, k);
    load_rows(lower[0], tile, first, k + 16);
#pragma unroll
    for (int j = 0; j < TILES; j++) {
        uint32_t both[4];
        ldmatrix_x4(both, right + Right::offset(first_right + j * 8 + lane % 8, right_k / lanes_wide + lane / 8));
        b_upper[j][0] = both[0];
        b_upper[j][1] = both[1];
        b_lower[j][0] = both[2];
        b_lower[j][1] = both[3];
    }
    mma_tile<T>(sums, upper, b_upper);
    mma_tile<T>(sums, lower, b_lower);
}

// Calls store(row, column, value) for what a warp holds of 16 rows.
template <int TILES, class Store>
DEVICE void for_each_sum(const float (&sums)[1][TILES][4], const Store& store) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int j = 0; j < TILES; j++)
#pragma unroll
        for (int q = 0; q < 4; q++) store(lane / 4 + q / 2 * 8, j * 8 + lane % 4 * 2 + q % 2, sums[0][j][q]);
}

template <int TILES>
DEVICE void clear_sums(float (&sums)[1][TILES][4]) {
#pragma unroll
    for (int j = 0; j < TILES; j++)
#pragma unroll
        for (int q = 0; q < 4; q++) sums[0][j][q] = 0.f;
}

// Dropout on eight neighbouring features of a token, rounded as they would be stored.
template <class T>
DEVICE void drop8(T (&values)[vector_width], const DropoutMask& mask, int token, int column) {
#pragma unroll
    for (int i = 0; i < vector_width; i += 4) {
        const PhiloxWords words = mask.words(token, (column + i) / 4);
#pragma unroll
        for (int j = 0; j < 4; j++)
            values[i + j] = from_float<T>(to_float(values[i + j]) * mask.factor(words.words[j]));
    }
}
