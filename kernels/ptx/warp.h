// Reductions over a warp.
#pragma once
#include "target.h"

constexpr unsigned whole_warp = 0xffffffffu;

// Every lane gets the warp's sum: a butterfly, so each lane adds in the same order and the bits agree.
DEVICE float warp_sum(float value CALL_SITE) {
#if ON_DEVICE
#pragma unroll
    for (int offset = 16; offset; offset /= 2) value += __shfl_xor_sync(whole_warp, value, offset);
    return value;
#else
    return emulator::warp_reduce(value, false, where);
#endif
}

DEVICE float warp_maximum(float value CALL_SITE) {
#if ON_DEVICE
#pragma unroll
    for (int offset = 16; offset; offset /= 2) value = fmaxf(value, __shfl_xor_sync(whole_warp, value, offset));
    return value;
#else
    return emulator::warp_reduce(value, true, where);
#endif
}
