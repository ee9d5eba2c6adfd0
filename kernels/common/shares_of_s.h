// The product s = x · Aᵀ of the adapter that reads x, where x is made: A [r, I] with r at most 64. What makes a stretch of x's
// columns multiplies them while it has them; these shares are added up in order by lora_sum_s (lora.cu).
#pragma once
#include "../ptx/target.h"

constexpr int share_ranks = 64;

// partials [stretches][T][R̄] in f32, or null where no shares are wanted; R̄, the row length of s, is even.
struct SharesOfS {
    float* partials;
    int tokens, leading;
    __device__ __forceinline__ bool are_wanted() const { return partials != nullptr; }

    // Writes a lane's accumulators (wgmma.h) of stretch `stretch`: of row `row` and of the row eight further, if before `end_row`.
    __device__ __forceinline__ void store(const float (&shares)[share_ranks / 2], int stretch, int row, int end_row) const {
        float* partial = partials + static_cast<long long>(stretch) * tokens * leading;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            if (row + half * 8 >= end_row) continue;
#pragma unroll
            for (int j = 0; j < share_ranks / 8; j++) {
                const int rank = j * 8 + threadIdx.x % 4 * 2;
                if (rank < leading)
                    *reinterpret_cast<float2*>(partial + static_cast<long long>(row + half * 8) * leading + rank) =
                        make_float2(shares[j * 4 + half * 2], shares[j * 4 + half * 2 + 1]);
            }
        }
    }
};
