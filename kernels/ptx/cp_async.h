// cp.async (sm_80): 16 bytes from global to shared memory without registers, past L1.
#pragma once
#include "target.h"

// shared[0..bytes] = global[0..bytes], zeros up to 16; lands at the wait for its group. bytes: 0 … 16; with 0 the source
// is not read, but must still be a valid, aligned address.
DEVICE void cp_async16(void* shared, const void* global, int bytes CALL_SITE) {
#if ON_DEVICE
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
                 : "memory");
#else
    emulator::cp_async16(shared, global, bytes, where);
#endif
}

// Closes the group of the copies issued since the last commit (it may be empty).
DEVICE void cp_async_commit() {
#if ON_DEVICE
    asm volatile("cp.async.commit_group;" ::: "memory");
#else
    emulator::cp_async_commit();
#endif
}

// Waits until at most `groups_in_flight` of this thread's latest groups are pending. Other threads see the data after
// the next barrier.
template <int groups_in_flight>
DEVICE void cp_async_wait() {
#if ON_DEVICE
    asm volatile("cp.async.wait_group %0;" ::"n"(groups_in_flight) : "memory");
#else
    emulator::cp_async_wait(groups_in_flight);
#endif
}
