// The softmax of attention over tiles of keys, for two rows of a lane in the accumulators of an mma or wgmma.
#pragma once
#include "../ptx/math.h"

// Of a warp's 16 queries a lane holds rows lane/4 and lane/4 + 8, and of those the keys 8j + 2·(lane%4) and the next.
struct RunningSoftmax {
    float maximum[2] = {-1e30f, -1e30f}, total[2] = {0.f, 0.f};  // in base two; a lane's own share of the total

    // Turns the products of a tile of KEYS keys into weights, and returns by what each row's sums of before are to be multiplied.
    // weight(j, i): accumulator i of the eight columns j. score(half, key, product) · factor: in base two, −∞ if unseen.
    template <int KEYS, class Weight, class Score>
    __device__ __forceinline__ float2 step(const Weight& weight, const Score& score, float factor) {
        float rescale[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float greatest = -INFINITY;
#pragma unroll
            for (int j = 0; j < KEYS / 8; j++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    float& z = weight(j, 2 * half + e);
                    z = score(half, j * 8 + static_cast<int>(threadIdx.x) % 4 * 2 + e, z);
                    greatest = fmaxf(greatest, z);
                }
            // The row's other keys are in the three neighbouring lanes.
            greatest = fmaxf(greatest, __shfl_xor_sync(0xffffffffu, greatest, 1));
            greatest = fmaxf(greatest, __shfl_xor_sync(0xffffffffu, greatest, 2));
            greatest = fmaxf(maximum[half], greatest * factor);
            rescale[half] = exp2_fast(maximum[half] - greatest);
            maximum[half] = greatest;
            total[half] *= rescale[half];
#pragma unroll
            for (int j = 0; j < KEYS / 8; j++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    float& p = weight(j, 2 * half + e);
                    p = exp2_fast(fmaf(p, factor, -greatest));
                    total[half] += p;
                }
        }
        return make_float2(rescale[0], rescale[1]);
    }

    // sum(j, i): accumulator i of the eight columns j of D.
    template <int D, class Sum>
    static __device__ __forceinline__ void rescale(const Sum& sum, float2 factors) {
#pragma unroll
        for (int j = 0; j < D / 8; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) sum(j, i) *= i < 2 ? factors.x : factors.y;
    }

    // Behind the last tile: the totals of the whole rows.
    __device__ __forceinline__ void finish() {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            total[half] += __shfl_xor_sync(0xffffffffu, total[half], 1);
            total[half] += __shfl_xor_sync(0xffffffffu, total[half], 2);
        }
    }
    // log Σ exp of a row.
    __device__ __forceinline__ float log_sum(int half) const { return maximum[half] * ln_of_2 + logf(total[half]); }
};
