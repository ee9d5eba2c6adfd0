// Rotating a head (rope.cu) while it stands in the accumulators of wgmma.h, before it leaves: a lane holds both columns of a
// pair, which are D / 2 apart. All D columns are rotated.
#pragma once
#include "halves.h"
#include "rope_angles.h"

// Calls visit(j, cosines, sines) with a row's angles (Angles::of) of columns 8j + 2·(lane%4) and the next, for j < D / 16.
template <int D, class Visit>
DEVICE void for_each_angle(const float* row, const Visit& visit) {
    const float* own = row + threadIdx.x % 4 * 2;
#pragma unroll
    for (int j = 0; j < D / 16; j++)
        visit(j, *reinterpret_cast<const float2*>(own + j * 8), *reinterpret_cast<const float2*>(own + D / 2 + j * 8));
}

// Rotates the pairs that begin at low[0] and low[1], neighbouring accumulators of a row. They are rounded to T before, so that
// the bits are those of a kernel that reads what was stored.
template <class T, int D>
DEVICE void rotate_two_pairs(float* low, float2 cosines, float2 sines) {
    float* high = low + D / 16 * 4;
    for (int e = 0; e < 2; e++) {
        low[e] = rounded<T>(low[e]);
        high[e] = rounded<T>(high[e]);
    }
    rotate_pair(low[0], high[0], cosines.x, sines.x);
    rotate_pair(low[1], high[1], cosines.y, sines.y);
}
