// A soft cap on scores and logits (Gemma 2): cap · tanh(z / cap); cap 0 is none.
#pragma once
#include "../ptx/target.h"

struct SoftCap {
    float cap;
    __device__ __forceinline__ float value(float z) const { return cap > 0.f ? cap * tanhf(z / cap) : z; }
    // d value / dz, from the value; 0 for a score of −∞, which is hidden.
    __device__ __forceinline__ float slope(float value) const {
        if (cap <= 0.f) return 1.f;
        const float t = value / cap;
        return fmaxf(1.f - t * t, 0.f);
    }
};
