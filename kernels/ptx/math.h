// Fast elementary functions of the special-function unit.
#pragma once
#include "target.h"

// 2^x, within 2 ulp on the device; 0 for -infinity.
DEVICE float exp2_fast(float x) {
#if ON_DEVICE
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return exp2f(x);
#endif
}

constexpr float log2_of_e = 1.44269504088896340736f, ln_of_2 = 0.69314718055994530942f;

DEVICE float exp_fast(float x) { return exp2_fast(x * log2_of_e); }

// 1 / x, within 1 ulp on the device; 0 for infinity and for what is no normal number.
DEVICE float reciprocal_fast(float x) {
#if ON_DEVICE
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return 1.f / x;
#endif
}
