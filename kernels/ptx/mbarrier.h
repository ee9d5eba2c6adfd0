// mbarrier (sm_90): a barrier in shared memory that counts arrivals and, for asynchronous copies, bytes. A phase completes
// when both counts are met; then the next begins. Eight bytes in shared memory, 8-byte aligned.
#pragma once
#include "target.h"

typedef uint64_t Mbarrier;

// By one thread, followed by fence_mbarrier_init and a barrier of the block. `arrivals` complete a phase.
DEVICE void mbarrier_init(Mbarrier* barrier, unsigned arrivals CALL_SITE) {
#if ON_DEVICE
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
#else
    emulator::mbarrier_init(barrier, arrivals, where);
#endif
}

// Makes the thread's initialisations visible to the asynchronous copies.
DEVICE void fence_mbarrier_init() {
#if ON_DEVICE
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#else
    emulator::fence_mbarrier_init();
#endif
}

// One arrival; what the thread did before is visible to whoever waits for the phase.
DEVICE void mbarrier_arrive(Mbarrier* barrier CALL_SITE) {
#if ON_DEVICE
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
#else
    emulator::mbarrier_arrive(barrier, 0, where);
#endif
}

// One arrival at the same barrier of block `block` of the cluster: at the offset that `barrier` has in this block's shared
// memory. It passes a turn and no data: copies that the thread waiting there starts overwrite nothing that this thread, or its
// wgmma, read before; what this thread wrote is not visible there. (`.release.cluster` would make it so, at the price of a
// MEMBAR.GPU in every call.) Only between the cluster's barriers: see cluster.h.
DEVICE void mbarrier_arrive_at(unsigned block, Mbarrier* barrier CALL_SITE) {
#if ON_DEVICE
    asm volatile(
        "{\n"
        ".reg .b32 there;\n"
        "mapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [there];\n"
        "}" ::"r"(shared_address(barrier)),
        "r"(block)
        : "memory");
#else
    emulator::mbarrier_arrive_at(block, barrier, where);
#endif
}

// One arrival, and `bytes` more to be copied before the phase completes.
DEVICE void mbarrier_arrive_expecting(Mbarrier* barrier, unsigned bytes CALL_SITE) {
#if ON_DEVICE
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
#else
    emulator::mbarrier_arrive(barrier, bytes, where);
#endif
}

// Waits until the phase of this parity has completed; the first phase has parity 0. Parity 1 on a fresh barrier does not
// wait: the phase "before the first" counts as complete.
DEVICE void mbarrier_wait(Mbarrier* barrier, unsigned parity CALL_SITE) {
#if ON_DEVICE
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again_%=:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again_%=;\n"
        "}" ::"r"(shared_address(barrier)), "r"(parity)
        : "memory");
#else
    emulator::mbarrier_wait(barrier, parity, where);
#endif
}
