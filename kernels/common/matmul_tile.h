// One block's tile of C[m][n] = Σ_k A[m][k] · B[k][n] for sm_80 and newer: cp.async fills a ring of shared-memory stages,
// ldmatrix reads fragments, mma.sync multiplies f16 or bf16 into f32 accumulators in registers.
//
//   global ── cp.async ──▶ stage 0 │ stage 1 │ stage 2 │ stage 3 ── ldmatrix ──▶ fragments ── mma ──▶ accumulators
//
// Either operand may be stored with k innermost (Major::k: A as [m][k], B as [n][k]) or with m or n innermost (Major::mn:
// A as [k][m], B as [k][n]): forward, input gradient and weight gradient need no transposed copies. m, n and k are
// arbitrary: what lies outside reads as zero. Base addresses are 16-byte aligned and leading dimensions multiples of 8.
#pragma once
#include "../ptx/cp_async.h"
#include "../ptx/ldmatrix.h"
#include "../ptx/mma.h"
#include "halves.h"
#include "tile_order.h"

enum class Major { k, mn };

// One operand's matrix in global memory: `extent` is m or n, `leading` the stored row length in elements.
template <class T>
struct Operand {
    const T* base;
    int extent;
    long long leading;
};

constexpr int tile_k = 32;                // two k16 steps of mma a stage
constexpr int chunk = 8;                  // halves in 16 bytes: the unit of copies and of the swizzle
constexpr int stage_count = 4;            // three tiles in flight while one is read
constexpr int chunks_of_k = tile_k / chunk;

// A WIDTH × tile_k tile of one operand in shared memory. Rows are XOR-swizzled by 16-byte chunks so that the eight rows of
// an ldmatrix, and the eight lanes of a copy, fall into different banks.
template <class T, Major major, int WIDTH, int THREADS>
struct OperandTile {
    static constexpr int bytes = WIDTH * tile_k * 2;

    // Offset of chunk `c` of stored row `r`.
    static __device__ __forceinline__ int offset(int r, int c) {
        if constexpr (major == Major::k) return r * tile_k * 2 + ((c ^ (r >> 1 & 3)) << 4);  // 64-byte rows
        else return r * WIDTH * 2 + ((c ^ (r & 7)) << 4);
    }

    // Starts the copies of the tile at (first, k); beyond `extent` and k_end it is zero.
    static __device__ __forceinline__ void load(unsigned char* tile, const Operand<T>& operand, int first, int k,
                                                int k_end) {
        constexpr int chunks_per_row = major == Major::k ? chunks_of_k : WIDTH / chunk;
#pragma unroll
        for (int i = 0; i < WIDTH * chunks_of_k / THREADS; i++) {
            const int linear = threadIdx.x + i * THREADS;
            const int r = linear / chunks_per_row, c = linear % chunks_per_row;
            // Where the chunk stands along m or n, and along k; it runs along the stored row.
            const int at = major == Major::k ? first + r : first + c * chunk;
            const int at_k = major == Major::k ? k + c * chunk : k + r;
            const int left = major == Major::k ? k_end - at_k : operand.extent - at;
            const bool inside = at < operand.extent && at_k < k_end;
            const T* source = operand.base;
            if (inside) source += major == Major::k ? at * operand.leading + at_k : at_k * operand.leading + at;
            cp_async16(tile + offset(r, c), source, inside ? min(left, chunk) * 2 : 0);
        }
    }

    // The fragment of A for rows first … first + 15 and k step `step` (16 wide).
    static __device__ __forceinline__ void load_a(uint32_t (&fragment)[4], const unsigned char* tile, int first,
                                                  int step) {
        const int lane = threadIdx.x % 32;
        if constexpr (major == Major::k) {
            ldmatrix_x4(fragment, tile + offset(first + lane % 16, step * 2 + lane / 16));
        } else {
            const int r = step * 16 + lane / 16 * 8 + lane % 8;
            ldmatrix_x4_transposed(fragment, tile + offset(r, first / chunk + lane / 8 % 2));
        }
    }

    // The fragments of B for columns first … first + 15: two mma tiles.
    static __device__ __forceinline__ void load_b(uint32_t (&left)[2], uint32_t (&right)[2], const unsigned char* tile,
                                                  int first, int step) {
        const int lane = threadIdx.x % 32;
        uint32_t both[4];
        if constexpr (major == Major::k) {
            ldmatrix_x4(both, tile + offset(first + lane / 16 * 8 + lane % 8, step * 2 + lane / 8 % 2));
        } else {
            ldmatrix_x4_transposed(both, tile + offset(step * 16 + lane % 16, first / chunk + lane / 16));
        }
        left[0] = both[0];
        left[1] = both[1];
        right[0] = both[2];
        right[1] = both[3];
    }
};

// A TILE_M × TILE_N tile of C by WARPS_M × WARPS_N warps.
template <class T, Major A_MAJOR, Major B_MAJOR, int TILE_M, int TILE_N, int WARPS_M, int WARPS_N>
struct MatmulTile {
    static constexpr int tile_m = TILE_M, tile_n = TILE_N, threads = 32 * WARPS_M * WARPS_N;
    static constexpr int warp_m = TILE_M / WARPS_M, warp_n = TILE_N / WARPS_N;
    static constexpr int MT = warp_m / 16, NT = warp_n / 8;
    using ATile = OperandTile<T, A_MAJOR, TILE_M, threads>;
    using BTile = OperandTile<T, B_MAJOR, TILE_N, threads>;
    static constexpr int stage_bytes = ATile::bytes + BTile::bytes;
    // Rows of C staged in shared memory at the end: padded by 16 bytes against bank conflicts.
    static constexpr int staged_width = TILE_N + 4;
    static constexpr int shared_bytes = stage_count * stage_bytes;
    static_assert(warp_m * staged_width * 4 <= shared_bytes, "a warp row of C fits the stages");

    struct Accumulators {
        float values[MT][NT][4];
    };

    static __device__ __forceinline__ void clear(Accumulators& sums) {
#pragma unroll
        for (int i = 0; i < MT; i++)
#pragma unroll
            for (int j = 0; j < NT; j++)
#pragma unroll
                for (int q = 0; q < 4; q++) sums.values[i][j][q] = 0.f;
    }

    static __device__ __forceinline__ int warp_row() { return threadIdx.x / 32 / WARPS_N * warp_m; }
    static __device__ __forceinline__ int warp_column() { return threadIdx.x / 32 % WARPS_N * warp_n; }

    // sums += A[m][k] · B[k][n] over k in [k_begin, k_end), for the tile at (m, n). k_begin is a multiple of 8. May be
    // called again for another pair of operands: the accumulators stay in registers.
    static __device__ __forceinline__ void accumulate(Accumulators& sums, unsigned char* shared, const Operand<T>& a,
                                                      const Operand<T>& b, int m, int n, int k_begin, int k_end) {
        const int steps = (k_end - k_begin + tile_k - 1) / tile_k;
        const auto load = [&](int step) {
            unsigned char* stage = shared + step % stage_count * stage_bytes;
            const int k = k_begin + step * tile_k;
            ATile::load(stage, a, m, k, k_end);
            BTile::load(stage + ATile::bytes, b, n, k, k_end);
        };
#pragma unroll
        for (int step = 0; step < stage_count - 1; step++) {
            if (step < steps) load(step);
            cp_async_commit();
        }
        for (int step = 0; step < steps; step++) {
            cp_async_wait<stage_count - 2>();
            // The tile of `step` has landed for every thread, and everybody has finished reading the stage that the
            // next load overwrites.
            __syncthreads();
            if (step + stage_count - 1 < steps) load(step + stage_count - 1);
            cp_async_commit();  // also when empty: the wait above counts groups
            multiply(sums, shared + step % stage_count * stage_bytes);
        }
        cp_async_wait<0>();
        __syncthreads();  // the stages may be used for something else
    }

    static __device__ __forceinline__ void multiply(Accumulators& sums, const unsigned char* stage) {
#pragma unroll
        for (int step = 0; step < tile_k / 16; step++) {
            uint32_t a[MT][4], b[NT][2];
#pragma unroll
            for (int i = 0; i < MT; i++) ATile::load_a(a[i], stage, warp_row() + i * 16, step);
#pragma unroll
            for (int j = 0; j < NT; j += 2)
                BTile::load_b(b[j], b[j + 1], stage + ATile::bytes, warp_column() + j * 8, step);
            mma_tile<T>(sums.values, a, b);
        }
    }

    // Calls visit(row, column, value) for every accumulator of the thread; coordinates inside the tile.
    template <class Visit>
    static __device__ __forceinline__ void for_each(Accumulators& sums, const Visit& visit) {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int i = 0; i < MT; i++)
#pragma unroll
            for (int j = 0; j < NT; j++)
#pragma unroll
                for (int q = 0; q < 4; q++)
                    visit(warp_row() + i * 16 + lane / 4 + q / 2 * 8, warp_column() + j * 8 + lane % 4 * 2 + q % 2,
                          sums.values[i][j][q]);
    }

    // Calls store(row, column, values) for every eight neighbouring columns of the tile, so that global memory is read and
    // written 16 bytes a thread and in whole lines. The accumulators pass through shared memory in f32, one row of warps at
    // a time.
    template <class Store>
    static __device__ __forceinline__ void store(Accumulators& sums, unsigned char* shared, const Store& store_eight) {
        float* staged = reinterpret_cast<float*>(shared);
        const int lane = threadIdx.x % 32;
        for (int turn = 0; turn < WARPS_M; turn++) {
            if (static_cast<int>(threadIdx.x) / 32 / WARPS_N == turn) {
#pragma unroll
                for (int i = 0; i < MT; i++)
#pragma unroll
                    for (int j = 0; j < NT; j++)
#pragma unroll
                        for (int half = 0; half < 2; half++) {
                            const int row = i * 16 + lane / 4 + half * 8, column = warp_column() + j * 8 + lane % 4 * 2;
                            *reinterpret_cast<float2*>(staged + row * staged_width + column) =
                                make_float2(sums.values[i][j][2 * half], sums.values[i][j][2 * half + 1]);
                        }
            }
            __syncthreads();
            for (int linear = threadIdx.x; linear < warp_m * TILE_N / chunk; linear += threads) {
                const int row = linear / (TILE_N / chunk), column = linear % (TILE_N / chunk) * chunk;
                const float4* source = reinterpret_cast<const float4*>(staged + row * staged_width + column);
                const float4 low = source[0], high = source[1];
                float values[chunk] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
                store_eight(turn * warp_m + row, column, values);
            }
            __syncthreads();  // the next turn overwrites `staged`
        }
    }
};
