// Thread block clusters (sm_90): neighbouring blocks in x that run at the same time, each able to reach the others' shared
// memory. The launch says how many; a launch without clusters has one block in each.
//
// What reaches into a block must be known to be over before that block's threads end, and must not begin before they run: the
// barrier below stands at both ends of a kernel that does so.
#pragma once
#include "target.h"

// This block's number in its cluster, and how many there are. The count is volatile so that it is read where it is needed: kept
// in a register it makes the widest matmul spill.
DEVICE unsigned cluster_block() {
#if ON_DEVICE
    unsigned block;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(block));
    return block;
#else
    return emulator::cluster_block();
#endif
}
DEVICE unsigned cluster_block_count() {
#if ON_DEVICE
    unsigned count;
    asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(count));
    return count;
#else
    return emulator::cluster_block_count();
#endif
}

// A barrier of all threads of the cluster that have not exited. What a thread did before it arrives is visible to all behind
// their wait.
DEVICE void cluster_barrier_arrive(CALL_SITE_ONLY) {
#if ON_DEVICE
    asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#else
    emulator::cluster_barrier_arrive(where);
#endif
}
DEVICE void cluster_barrier_wait(CALL_SITE_ONLY) {
#if ON_DEVICE
    asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#else
    emulator::cluster_barrier_wait(where);
#endif
}
DEVICE void cluster_barrier_sync(CALL_SITE_ONLY) {
#if ON_DEVICE
    cluster_barrier_arrive();
    cluster_barrier_wait();
#else
    emulator::cluster_barrier_arrive(where);
    emulator::cluster_barrier_wait(where);
#endif
}
