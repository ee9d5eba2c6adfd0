// Sums over a whole block, in an order that depends on the block's size alone.
#pragma once
#include "../ptx/warp.h"

// One partial a warp; of a block of at most 1024 threads.
constexpr int max_warps_per_block = 32;

// Every thread gets the sum. All threads of the block must call it; `partials` holds max_warps_per_block floats and may be
// used again at once.
DEVICE float block_sum(float value, float* partials) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    value = warp_sum(value);
    if (lane == 0) partials[warp] = value;
    __syncthreads();
    const float total = warp_sum(lane < warps ? partials[lane] : 0.f);
    __syncthreads();  // the next call writes `partials` again
    return total;
}

DEVICE float block_maximum(float value, float* partials) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    value = warp_maximum(value);
    if (lane == 0) partials[warp] = value;
    __syncthreads();
    const float total = warp_maximum(lane < warps ? partials[lane] : partials[0]);
    __syncthreads();
    return total;
}
