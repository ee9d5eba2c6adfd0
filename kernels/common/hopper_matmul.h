// A block's part of C[m][n] = Σ_k A[m][k] · B[k][n] for sm_90a: one warpgroup's first thread feeds a ring of shared-memory
// stages through the TMA, two warpgroups multiply 64 rows each by wgmma, and a finished tile leaves through shared memory while
// the ring fills for the next one. Blocks are persistent: a cluster takes every so many-th tile.
//
// A cluster is one block or two, which compute row tiles below each other. Each of two loads its A and half of B, which the TMA
// writes into both: of the 48 KiB that a stage of 128×256 takes, a block fetches 32. (Two column tiles that share A would fetch
// 40.) A stage is empty when the consumers of both blocks have read it.
//
//   producer    wait empty ─▶ TMA loads ─▶ full                       a stage: A 128×64, B 64×TILE_N
//   consumers   wait full ─▶ wgmma ×4, one group in flight ─▶ empty
//
// A has k innermost; B has k innermost ([n][k]), or n (B_IS_MN: [k][n]), so that forward and input gradient read the same
// weights. m, n and k are arbitrary: the TMA reads zeros outside. Row lengths are multiples of 8. Boxes: A's have 128 rows, B's
// TILE_N / 2, or 64 with B_IS_MN.
#pragma once
#include "../ptx/barrier.h"
#include "../ptx/cluster.h"
#include "../ptx/wgmma.h"
#include "halves.h"
#include "tile_order.h"

// First row of a tile, and where the two halves of its columns begin: side by side, or apart.
struct HopperTile {
    int m, low, high;
};

template <class Element, bool B_IS_MN, int TILE_N>
struct HopperMatmul {
    using T = Element;
    static constexpr int tile_m = 128, tile_n = TILE_N, tile_k = box_columns;
    static constexpr int warpgroup = 128, consumers = 2, threads = warpgroup * (1 + consumers);
    static constexpr int rows_of_consumer = tile_m / consumers;

    // Shared memory: the ring, the tile on its way out in boxes of 64 columns, the barriers.
    static constexpr int a_bytes = tile_m * box_row_bytes, b_bytes = TILE_N * box_row_bytes;
    static constexpr int stage_bytes = a_bytes + b_bytes;
    static constexpr int boxes_of_tile = TILE_N / box_columns, out_box_bytes = tile_m * box_row_bytes;
    static constexpr int out_bytes = boxes_of_tile * out_box_bytes;
    static constexpr int barrier_bytes = 1024, largest_shared = 227 * 1024;
    static constexpr int stages = (largest_shared - out_bytes - barrier_bytes) / stage_bytes;
    static_assert(stages >= 3, "loads run ahead of two groups of wgmma");

    // With B_IS_MN a stage's B is boxes of 64 of n, each with its 64 rows of k.
    static constexpr int mn_box_bytes = tile_k * box_row_bytes;

    struct Barriers {
        Mbarrier full[stages], empty[stages], residual[consumers];
    };
    static_assert(sizeof(Barriers) <= barrier_bytes, "the barriers have their place");

    static __device__ __forceinline__ unsigned char* stage(unsigned char* shared, int index) {
        return shared + index * stage_bytes;
    }
    static __device__ __forceinline__ unsigned char* out(unsigned char* shared) { return shared + stages * stage_bytes; }
    static __device__ __forceinline__ Barriers& barriers(unsigned char* shared) {
        return *reinterpret_cast<Barriers*>(out(shared) + out_bytes);
    }

    // Meets the other block, which reaches into this one's shared memory.
    static __device__ __forceinline__ void meet_cluster() {
        if (cluster_block_count() > 1) cluster_barrier_sync();
    }

    // By the whole block, before anything else.
    static __device__ __forceinline__ void begin(unsigned char* shared) {
        if (threadIdx.x == 0) {
            Barriers& all = barriers(shared);
            for (int i = 0; i < stages; i++) {
                mbarrier_init(&all.full[i], 1);
                mbarrier_init(&all.empty[i], cluster_block_count() * consumers * warpgroup / 32);
            }
            for (int i = 0; i < consumers; i++) mbarrier_init(&all.residual[i], 1);
            fence_mbarrier_init();
        }
        __syncthreads();
        meet_cluster();
    }

    // By all threads that are left, behind everything else.
    static __device__ __forceinline__ void end() { meet_cluster(); }

    // A position in the ring; producer and consumers walk the same way.
    struct Ring {
        int index = 0;
        unsigned parity = 0;
        int unreleased = -1;  // of a consumer: the stage that its group in flight reads
        __device__ __forceinline__ void advance() {
            if (++index == stages) {
                index = 0;
                parity ^= 1;
            }
        }
    };

    // The producer's half: loads the stages of k in [k_begin, k_end) for a tile. Whole stages: beyond k_end what the matrices
    // hold there, beyond their edges zeros.
    static __device__ __forceinline__ void load(unsigned char* shared, Ring& ring, const TensorMap& a, const TensorMap& b,
                                                const HopperTile& tile, int k_begin, int k_end) {
        Barriers& all = barriers(shared);
        const int own = cluster_block(), blocks = cluster_block_count();
        for (int k = k_begin; k < k_end; k += tile_k) {
            Mbarrier* full = &all.full[ring.index];
            mbarrier_wait(&all.empty[ring.index], ring.parity ^ 1);
            // All of B: what the other block sends may land even before this.
            mbarrier_arrive_expecting(full, stage_bytes);
            unsigned char *a_tile = stage(shared, ring.index), *b_tile = a_tile + a_bytes;
            const auto load_for_all = [&](unsigned char* box, int row, int column) {
                if (blocks > 1) tma_load_multicast(box, b, row, column, full, 3);
                else tma_load(box, b, row, column, full);
            };
            tma_load(a_tile, a, tile.m, k, full);
            if constexpr (B_IS_MN) {
                for (int box = own; box < boxes_of_tile; box += blocks)
                    load_for_all(b_tile + box * mn_box_bytes, k, tile.low + box * box_columns);
            } else {
                for (int half = own; half < 2; half += blocks)
                    load_for_all(b_tile + half * (b_bytes / 2), half ? tile.high : tile.low, k);
            }
            ring.advance();
        }
    }

    // Another operand through the ring, as a stage of its own: `boxes` boxes of 64 rows, from row 0 and `column` on, where B
    // stands. Each block loads its own.
    static __device__ __forceinline__ void load_beside(unsigned char* shared, Ring& ring, const TensorMap& map, int column, int boxes) {
        static_assert(2 * box_columns * box_row_bytes <= b_bytes, "two boxes stand where B stands");
        Barriers& all = barriers(shared);
        Mbarrier* full = &all.full[ring.index];
        mbarrier_wait(&all.empty[ring.index], ring.parity ^ 1);
        mbarrier_arrive_expecting(full, boxes * box_columns * box_row_bytes);
        unsigned char* tile = stage(shared, ring.index) + a_bytes;
        for (int box = 0; box < boxes; box++)
            tma_load(tile + box * box_columns * box_row_bytes, map, 0, column + box * box_columns, full);
        ring.advance();
    }
    // Waits for it.
    static __device__ __forceinline__ const unsigned char* take_beside(unsigned char* shared, Ring& ring) {
        mbarrier_wait(&barriers(shared).full[ring.index], ring.parity);
        return stage(shared, ring.index) + a_bytes;
    }
    // Behind the wait for what read it.
    static __device__ __forceinline__ void release_beside(unsigned char* shared, Ring& ring) {
        ring.unreleased = ring.index;
        release(barriers(shared), ring);
        ring.unreleased = -1;
        ring.advance();
    }

    // The consumers' half, for accumulators of wgmma.h. `any`: whether the accumulators hold a sum already.
    static __device__ __forceinline__ void accumulate(float (&sums)[TILE_N / 2], unsigned char* shared, Ring& ring,
                                                      int consumer, int k_begin, int k_end, bool& any) {
        Barriers& all = barriers(shared);
        for (int k = k_begin; k < k_end; k += tile_k) {
            mbarrier_wait(&all.full[ring.index], ring.parity);
            const unsigned char* a_tile = stage(shared, ring.index) + consumer * rows_of_consumer * box_row_bytes;
            const unsigned char* b_tile = stage(shared, ring.index) + a_bytes;
            wgmma_fence(sums);
#pragma unroll
            for (int step = 0; step < tile_k / 16; step++) {
                const uint64_t b = B_IS_MN ? wgmma_operand(b_tile + step * 16 * box_row_bytes, mn_box_bytes)
                                           : wgmma_operand(b_tile + step * 32);
                wgmma<T, TILE_N, B_IS_MN>(sums, wgmma_operand(a_tile + step * 32), b, any || step > 0);
            }
            wgmma_commit();
            wgmma_wait<1>(sums);
            release(all, ring);
            ring.unreleased = ring.index;
            ring.advance();
            any = true;
        }
    }

    // Waits for the last group: the accumulators may be touched.
    static __device__ __forceinline__ void finish(float (&sums)[TILE_N / 2], unsigned char* shared, Ring& ring) {
        wgmma_wait<0>(sums);
        release(barriers(shared), ring);
        ring.unreleased = -1;
    }

    static __device__ __forceinline__ void release(Barriers& all, const Ring& ring) {
        if (ring.unreleased < 0 || threadIdx.x % 32) return;
        Mbarrier* empty = &all.empty[ring.unreleased];
        mbarrier_arrive(empty);
        if (cluster_block_count() > 1) mbarrier_arrive_at(cluster_block() ^ 1, empty);
    }

    // The first row that a lane holds, inside the tile; the other is eight further.
    static __device__ __forceinline__ int own_row(int consumer) {
        return consumer * rows_of_consumer + threadIdx.x % warpgroup / 32 * 16 + threadIdx.x % 32 / 4;
    }

    // Calls visit(row, column, first, second) for each two neighbouring accumulators; coordinates inside the tile.
    template <class Visit>
    static __device__ __forceinline__ void for_each_pair(float (&sums)[TILE_N / 2], int consumer, const Visit& visit) {
        const int first_row = own_row(consumer), quad = threadIdx.x % 4;
#pragma unroll
        for (int j = 0; j < TILE_N / 8; j++)
#pragma unroll
            for (int half = 0; half < 2; half++)
                visit(first_row + half * 8, j * 8 + quad * 2, sums[j * 4 + half * 2], sums[j * 4 + half * 2 + 1]);
    }

    // Where two neighbouring elements of the tile stand on their way out.
    static __device__ __forceinline__ T* out_pair(unsigned char* shared, int row, int column) {
        const int inside = column % box_columns;
        return reinterpret_cast<T*>(out(shared) + column / box_columns * out_box_bytes + box_offset(row, inside / 8)) + inside % 8;
    }
};

// One of the warpgroups that multiply, and the tile that it sends out.
template <class Matmul>
struct HopperConsumer {
    unsigned char* shared;
    int index;

    __device__ __forceinline__ int first_row() const { return index * Matmul::rows_of_consumer; }
    // The thread that starts the copies.
    __device__ __forceinline__ bool is_first() const { return threadIdx.x % Matmul::warpgroup == 0; }
    __device__ __forceinline__ void meet() const { named_barrier_sync(1 + index, Matmul::warpgroup); }
    // Its rows of box `box` of the tile on its way out.
    __device__ __forceinline__ unsigned char* out_box(int box) const {
        return Matmul::out(shared) + box * Matmul::out_box_bytes + first_row() * box_row_bytes;
    }
    // Before the tile is written: the one before has left.
    __device__ __forceinline__ void wait_until_free() const {
        if (is_first()) tma_store_wait_read();
        meet();
    }
    // Sends `boxes` boxes from `first_box` on to rows `row` … and columns `column` … of `out`, when all have written them.
    __device__ __forceinline__ void send(const TensorMap& out, int first_box, int boxes, int row, int column) const {
        for (int box = 0; box < boxes; box++)
            tma_store(out, out_box(first_box + box), row + first_row(), column + box * box_columns);
    }
};
