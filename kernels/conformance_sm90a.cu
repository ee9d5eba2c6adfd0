// conformance.cu for what only Hopper has: the TMA's boxes and wgmma, exact on small integers. tests/kernels/conformance.rs.
#include "common/halves.h"
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

// d[2][64][N]: A · Bᵀ with B [N][64], and A · B with B [64][N]; A [64][64]. Boxes of 64 rows, of N for the first B. The
// accumulators start as ones, so that adding and replacing both show.
template <class T, int N>
DEVICE void conformance_wgmma(const TensorMap& a, const TensorMap& b_by_k, const TensorMap& b_by_n, float* d) {
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
    for (int turn = 0; turn < 2; turn++) {
        float sums[N / 2];
        for (int i = 0; i < N / 2; i++) sums[i] = 1.f;
        wgmma_fence(sums);
#pragma unroll
        for (int k = 0; k < 4; k++) {
            const uint64_t a_operand = wgmma_operand(tiles + k * 32);
            const bool accumulate = turn == 0 || k > 0;
            if (turn == 0) wgmma<T, N, false>(sums, a_operand, wgmma_operand(first_b + k * 32), accumulate);
            else wgmma<T, N, true>(sums, a_operand, wgmma_operand(second_b + k * 16 * box_row_bytes, box_bytes), accumulate);
        }
        wgmma_commit();
        wgmma_wait<0>(sums);
        const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4;
        for (int j = 0; j < N / 8; j++)
            for (int q = 0; q < 4; q++)
                d[(turn * 64 + row + q / 2 * 8) * N + j * 8 + lane % 4 * 2 + q % 2] = sums[j * 4 + q];
    }
}
#define EXPORT_CONFORMANCE_WGMMA(N, type) \
    EXPORT_KERNEL_AS(conformance_wgmma_n##N##_##type, type, (one_warpgroup), \
                     (const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b_by_k, \
                      const __grid_constant__ TensorMap b_by_n, float* d), \
                     (conformance_wgmma<T, N>(a, b_by_k, b_by_n, d)))
EXPORT_CONFORMANCE_WGMMA(128, f16)
EXPORT_CONFORMANCE_WGMMA(192, f16)
EXPORT_CONFORMANCE_WGMMA(256, f16)
EXPORT_CONFORMANCE_WGMMA(128, bf16)
EXPORT_CONFORMANCE_WGMMA(192, bf16)
EXPORT_CONFORMANCE_WGMMA(256, bf16)
