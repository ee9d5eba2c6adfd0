// bar.sync with a number: a barrier of some of a block's threads, such as one warpgroup.
#pragma once
#include "target.h"

// Waits for `threads` threads (a multiple of 32) at barrier `id`, 1 … 15; __syncthreads uses 0.
DEVICE void named_barrier_sync(int id, int threads CALL_SITE) {
#if ON_DEVICE
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#else
    emulator::barrier_sync(id, threads, where);
#endif
}
