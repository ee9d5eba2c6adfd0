// conformance.cu for what only Hopper has: the TMA's boxes, clusters and wgmma, exact on small integers.
// tests/kernels/conformance.rs.
#include "common/halves.h"
#include "ptx/cluster.h"
#include "ptx/wgmma.h"

constexpr int one_warpgroup = 128;

// By one thread: the barrier of a single load of `bytes`, and the wait for it by all.
DEVICE void begin_load(Mbarrier* barrier, unsigned bytes) {
    if (threadIdx.x == 0) {
        mbarrier_init(barrier, 1);
        fence_mbarrier_init();
        mbarrier_arrive_expecting(barrier, bytes);
    }
}

// A box of 64 rows at (row, column) of `in`: its bytes in shared memory to raw[8192], itself to the same place of `out`.
extern "C" __global__ void __launch_bounds__(one_warpgroup)
    conformance_tma(const __grid_constant__ TensorMap in, const __grid_constant__ TensorMap out, uint4* raw, int row,
                    int column) {
    DYNAMIC_SHARED(shared, 1024);
    constexpr int box_bytes = 64 * box_row_bytes;
    Mbarrier* barrier = reinterpret_cast<Mbarrier*>(shared + box_bytes);
    begin_load(barrier, box_bytes);
    if (threadIdx.x == 0) tma_load(shared, in, row, column, barrier);
    __syncthreads();
    mbarrier_wait(barrier, 0);
    for (int i = threadIdx.x; i < box_bytes / 16; i += one_warpgroup) raw[i] = reinterpret_cast<const uint4*>(shared)[i];
    if (threadIdx.x == 0) {
        tma_store(out, shared, row, column);
        tma_store_commit();
        tma_store_wait_read();
    }
}
REGISTER_KERNEL(conformance_tma);

// In clusters of two, boxes of 32 rows of `in`, two on top of each other in shared memory. Of 64 rows from `row` on each block
// loads half for both; then of those from row + 1 on the other half; then for the other block alone all from row + 2 on, the
// second block from row + 3 on. Each turn waits until both blocks have read the one before. Shared memory of block b and turn t
// goes to raw[b][t][8192], the block's number in its cluster and their count to places[b].
extern "C" __global__ void __launch_bounds__(one_warpgroup)
    conformance_cluster(const __grid_constant__ TensorMap in, uint4* raw, uint2* places, int row, int column) {
    DYNAMIC_SHARED(shared, 1024);
    constexpr int turns = 3, half_rows = 32, half_bytes = half_rows * box_row_bytes, box_bytes = 2 * half_bytes;
    Mbarrier *full = reinterpret_cast<Mbarrier*>(shared + box_bytes), *empty = full + 1;
    const int own = cluster_block();
    if (threadIdx.x == 0) {
        mbarrier_init(full, 1);
        mbarrier_init(empty, 2);
        fence_mbarrier_init();
        places[blockIdx.x] = make_uint2(own, cluster_block_count());
    }
    __syncthreads();
    cluster_barrier_sync();
    for (int turn = 0; turn < turns; turn++) {
        if (threadIdx.x == 0) {
            if (turn > 0) mbarrier_wait(empty, (turn - 1) & 1);
            mbarrier_arrive_expecting(full, box_bytes);
            const auto load = [&](int half, int from, unsigned mask) {
                tma_load_multicast(shared + half * half_bytes, in, from + half * half_rows, column, full, mask);
            };
            if (turn == 0) load(own, row, 3);
            if (turn == 1) load(own ^ 1, row + 1, 3);
            if (turn == 2)
                for (int half = 0; half < 2; half++) load(half, row + 2 + own, 1u << (own ^ 1));
        }
        mbarrier_wait(full, turn & 1);
        for (int i = threadIdx.x; i < box_bytes / 16; i += one_warpgroup)
            raw[(blockIdx.x * turns + turn) * (box_bytes / 16) + i] = reinterpret_cast<const uint4*>(shared)[i];
        __syncthreads();
        if (threadIdx.x == 0) {
            mbarrier_arrive(empty);
            mbarrier_arrive_at(own ^ 1, empty);
        }
    }
    cluster_barrier_sync();
}
REGISTER_KERNEL(conformance_cluster);

// d[turns][64][N]: A · Bᵀ with B [N][64], and A · B with B [64][N]; A [64][64]; then the same with A in registers where there is
// such an instruction. Boxes of 64 rows, of N for the first B. The accumulators start as ones, so that adding and replacing both
// show.
template <class T, int N>
DEVICE void conformance_wgmma(const TensorMap& a, const TensorMap& b_by_k, const TensorMap& b_by_n, float* d) {
    constexpr bool has_registers = N <= 128;
    DYNAMIC_SHARED(tiles, 1024);
    constexpr int box_bytes = 64 * box_row_bytes, b_bytes = N * box_row_bytes;
    unsigned char *first_b = tiles + box_bytes, *second_b = first_b + b_bytes;
    Mbarrier* barrier = reinterpret_cast<Mbarrier*>(second_b + b_bytes);
    begin_load(barrier, box_bytes + 2 * b_bytes);
    if (threadIdx.x == 0) {
        tma_load(tiles, a, 0, 0, barrier);
        tma_load(first_b, b_by_k, 0, 0, barrier);
        for (int box = 0; box < N / box_columns; box++)
            tma_load(second_b + box * box_bytes, b_by_n, 0, box * box_columns, barrier);
    }
    __syncthreads();
    mbarrier_wait(barrier, 0);
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4;
#pragma unroll
    for (int turn = 0; turn < (has_registers ? 4 : 2); turn++) {
        const bool adds = turn % 2 == 0;
        float sums[N / 2];
        uint32_t fragments[4][4];
#pragma unroll
        for (int i = 0; i < N / 2; i++) sums[i] = 1.f;
#pragma unroll
        for (int k = 0; k < 4; k++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                fragments[k][i] = *reinterpret_cast<const uint32_t*>(
                    tiles + box_offset(row + i % 2 * 8, k * 2 + i / 2) + lane % 4 * 4);
        wgmma_fence(sums, fragments);
#pragma unroll
        for (int k = 0; k < 4; k++) {
            const uint64_t a_operand = wgmma_operand(tiles + k * 32), b_operand = wgmma_operand(first_b + k * 32);
            const uint64_t b_operand_by_n = wgmma_operand(second_b + k * 16 * box_row_bytes, box_bytes);
            if constexpr (has_registers)
                if (turn >= 2) {
                    if (adds) wgmma_registers<T, N, false>(sums, fragments[k], b_operand, true);
                    else wgmma_registers<T, N, true>(sums, fragments[k], b_operand_by_n, k > 0);
                    continue;
                }
            if (adds) wgmma<T, N, false>(sums, a_operand, b_operand, true);
            else wgmma<T, N, true>(sums, a_operand, b_operand_by_n, k > 0);
        }
        wgmma_commit();
        wgmma_wait<0>(sums);
#pragma unroll
        for (int j = 0; j < N / 8; j++)
#pragma unroll
            for (int q = 0; q < 4; q++)
                d[(turn * 64 + row + q / 2 * 8) * N + j * 8 + lane % 4 * 2 + q % 2] = sums[j * 4 + q];
    }
}
#define EXPORT_CONFORMANCE_WGMMA(N, type) \
    EXPORT_KERNEL_AS(conformance_wgmma_n##N##_##type, type, (one_warpgroup), \
                     (const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b_by_k, \
                      const __grid_constant__ TensorMap b_by_n, float* d), \
                     (conformance_wgmma<T, N>(a, b_by_k, b_by_n, d)))
EXPORT_CONFORMANCE_WGMMA(64, f16)
EXPORT_CONFORMANCE_WGMMA(128, f16)
EXPORT_CONFORMANCE_WGMMA(192, f16)
EXPORT_CONFORMANCE_WGMMA(256, f16)
EXPORT_CONFORMANCE_WGMMA(64, bf16)
EXPORT_CONFORMANCE_WGMMA(128, bf16)
EXPORT_CONFORMANCE_WGMMA(192, bf16)
EXPORT_CONFORMANCE_WGMMA(256, bf16)
