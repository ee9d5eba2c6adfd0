// planted_faults.cu for Hopper: a warp-specialised matmul over TMA, mbarriers and wgmma, C[rows][128] = A[rows][depth] ·
// B[128][depth]ᵀ in f16: common/hopper_matmul.h in small, with one mistake at a time. In clusters of two each block loads half
// of B for both.
#include "../common/halves.h"
#include "../ptx/barrier.h"
#include "../ptx/cluster.h"
#include "../ptx/wgmma.h"

enum class HopperFault {
    none,
    producer_does_not_wait,   // loads into stages that are being read
    waits_for_wrong_parity,   // the producer waits for the phase after the one it needs
    expects_too_few_bytes,    // B's are forgotten
    consumer_does_not_wait,   // multiplies what may not have landed
    releases_before_wait,     // gives a stage back while wgmma reads it
    keeps_group_in_flight,    // waits for the group before, and gives back the stage of the one in flight
    no_barrier_after_init,    // others may use the mbarriers before they exist
    no_init_fence,            // the TMA may not see them
    no_wgmma_fence,           // the tensor cores may not see the accumulators' start
    advances_by_elements,     // 16 of k are 32 bytes, not 16
    reads_before_last_wait,   // accumulators that are still in flight
    no_proxy_fence,           // the TMA may not see what the threads wrote
    no_barrier_before_store,  // nor what all of them wrote
    leaves_before_store,      // shared memory ends while the TMA reads it
    // In clusters alone:
    no_cluster_barrier,        // the other block's mbarriers may not exist yet
    multicasts_to_itself,      // the other block waits for its bytes
    expects_half_of_b,         // that of the other block may not have landed
    releases_own_block_alone,  // the other block loads into a stage that is being read
    leaves_before_cluster,     // the other block arrives at mbarriers that are no more
};

template <HopperFault fault>
DEVICE void hopper_pipeline(const TensorMap& a, const TensorMap& b, const TensorMap& c, int depth) {
    constexpr int stages = 3, rows = 64, columns = 128, tile_k = box_columns, warpgroup = 128;
    constexpr int a_bytes = rows * box_row_bytes, b_bytes = columns * box_row_bytes, stage_bytes = a_bytes + b_bytes;
    DYNAMIC_SHARED(shared, 1024);
    unsigned char* out = shared + stages * stage_bytes;  // two boxes of 64 columns
    Mbarrier* full = reinterpret_cast<Mbarrier*>(out + 2 * a_bytes);
    Mbarrier* empty = full + stages;
    const int first_row = blockIdx.x * rows, steps = depth / tile_k;
    const int own = cluster_block(), blocks = cluster_block_count(), b_rows = columns / blocks, own_b_bytes = b_bytes / blocks;
    constexpr bool releases_both = fault != HopperFault::releases_own_block_alone;
    const auto meet_cluster = [&] {
        if (blocks > 1) cluster_barrier_sync();
    };
    if (threadIdx.x == 0) {
        for (int i = 0; i < stages; i++) {
            mbarrier_init(&full[i], 1);
            mbarrier_init(&empty[i], warpgroup / 32 * (releases_both ? blocks : 1));
        }
        if (fault != HopperFault::no_init_fence) fence_mbarrier_init();
    }
    if (fault != HopperFault::no_barrier_after_init) __syncthreads();
    if (fault != HopperFault::no_cluster_barrier) meet_cluster();

    if (threadIdx.x < warpgroup) {
        if (threadIdx.x > 0) return;
        for (int step = 0; step < steps; step++) {
            const int stage = step % stages, round = step / stages;
            const unsigned parity = fault == HopperFault::waits_for_wrong_parity ? round & 1 : (round & 1) ^ 1;
            if (fault != HopperFault::producer_does_not_wait) mbarrier_wait(&empty[stage], parity);
            mbarrier_arrive_expecting(&full[stage], fault == HopperFault::expects_too_few_bytes ? a_bytes
                                                    : fault == HopperFault::expects_half_of_b   ? a_bytes + own_b_bytes
                                                                                                : stage_bytes);
            unsigned char *a_tile = shared + stage * stage_bytes, *b_tile = a_tile + a_bytes + own * own_b_bytes;
            tma_load(a_tile, a, first_row, step * tile_k, &full[stage]);
            const unsigned mask = fault == HopperFault::multicasts_to_itself ? 1u << own : (1u << blocks) - 1;
            if (blocks > 1) tma_load_multicast(b_tile, b, own * b_rows, step * tile_k, &full[stage], mask);
            else tma_load(b_tile, b, 0, step * tile_k, &full[stage]);
        }
        if (fault != HopperFault::leaves_before_cluster) meet_cluster();
        return;
    }

    float sums[columns / 2];
    const int lane = threadIdx.x % 32, warp = threadIdx.x % warpgroup / 32;
    const auto release = [&](int step) {
        if (lane) return;
        mbarrier_arrive(&empty[step % stages]);
        if (blocks > 1 && releases_both) mbarrier_arrive_at(own ^ 1, &empty[step % stages]);
    };
    for (int step = 0; step < steps; step++) {
        const unsigned char* stage = shared + step % stages * stage_bytes;
        if (fault != HopperFault::consumer_does_not_wait) mbarrier_wait(&full[step % stages], step / stages & 1);
        if (fault != HopperFault::no_wgmma_fence) wgmma_fence(sums);
        for (int k = 0; k < tile_k / 16; k++) {
            const int advance = k * (fault == HopperFault::advances_by_elements ? 16 : 32);
            wgmma<f16, columns, false>(sums, wgmma_operand(stage + advance), wgmma_operand(stage + a_bytes + advance),
                                       step > 0 || k > 0);
        }
        wgmma_commit();
        if (fault == HopperFault::releases_before_wait) release(step);
        wgmma_wait<1>(sums);
        if (fault == HopperFault::keeps_group_in_flight) release(step);
        else if (fault != HopperFault::releases_before_wait && step > 0) release(step - 1);
    }
    if (fault != HopperFault::reads_before_last_wait) wgmma_wait<0>(sums);

    for (int j = 0; j < columns / 8; j++)
        for (int half = 0; half < 2; half++) {
            const int row = warp * 16 + lane / 4 + half * 8;
            unsigned char* chunk = out + j / 8 * a_bytes + box_offset(row, j % 8);
            store2(reinterpret_cast<f16*>(chunk) + lane % 4 * 2, sums[j * 4 + half * 2], sums[j * 4 + half * 2 + 1]);
        }
    if (fault == HopperFault::reads_before_last_wait) wgmma_wait<0>(sums);
    if (fault != HopperFault::no_proxy_fence) fence_async_proxy();
    if (fault != HopperFault::no_barrier_before_store) named_barrier_sync(1, warpgroup);
    if (threadIdx.x == warpgroup) {
        for (int box = 0; box < 2; box++) tma_store(c, out + box * a_bytes, first_row, box * box_columns);
        tma_store_commit();
        if (fault != HopperFault::leaves_before_store) tma_store_wait_read();
    }
    if (fault != HopperFault::leaves_before_cluster) meet_cluster();
}

#define PLANTED_HOPPER(fault) \
    EXPORT_KERNEL_AS(planted_hopper_##fault, f16, (256), \
                     (const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b, \
                      const __grid_constant__ TensorMap c, int depth), \
                     (hopper_pipeline<HopperFault::fault>(a, b, c, depth)))
PLANTED_HOPPER(none)
PLANTED_HOPPER(producer_does_not_wait)
PLANTED_HOPPER(waits_for_wrong_parity)
PLANTED_HOPPER(expects_too_few_bytes)
PLANTED_HOPPER(consumer_does_not_wait)
PLANTED_HOPPER(releases_before_wait)
PLANTED_HOPPER(keeps_group_in_flight)
PLANTED_HOPPER(no_barrier_after_init)
PLANTED_HOPPER(no_init_fence)
PLANTED_HOPPER(no_wgmma_fence)
PLANTED_HOPPER(advances_by_elements)
PLANTED_HOPPER(reads_before_last_wait)
PLANTED_HOPPER(no_proxy_fence)
PLANTED_HOPPER(no_barrier_before_store)
PLANTED_HOPPER(leaves_before_store)
PLANTED_HOPPER(no_cluster_barrier)
PLANTED_HOPPER(multicasts_to_itself)
PLANTED_HOPPER(expects_half_of_b)
PLANTED_HOPPER(releases_own_block_alone)
PLANTED_HOPPER(leaves_before_cluster)
