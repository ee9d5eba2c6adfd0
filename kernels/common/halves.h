// f16 and bf16 as the kernels use them: read wide, computed in f32, rounded once to nearest even when written.
#pragma once
#include "../ptx/target.h"

DEVICE float to_float(f16 value) { return __half2float(value); }
DEVICE float to_float(bf16 value) { return __bfloat162float(value); }
DEVICE float to_float(float value) { return value; }

template <class T>
DEVICE T from_float(float value);
template <>
__device__ __forceinline__ f16 from_float<f16>(float value) { return __float2half_rn(value); }
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float value) { return __float2bfloat16_rn(value); }
template <>
__device__ __forceinline__ float from_float<float>(float value) { return value; }

// What `value` becomes when it is stored as T.
template <class T>
DEVICE float rounded(float value) { return to_float(from_float<T>(value)); }

// Two halves in one register, the first in the low bits, as mma wants them.
template <class T>
union Pair {
    T values[2];
    uint32_t bits;
    __device__ Pair() {}
};
template <class T>
DEVICE uint32_t pack2(float first, float second) {
    Pair<T> pair;
    pair.values[0] = from_float<T>(first);
    pair.values[1] = from_float<T>(second);
    return pair.bits;
}
// One 4-byte access; addresses must be 4-byte aligned.
template <class T>
DEVICE void load2(float (&values)[2], const T* address) {
    Pair<T> pair;
    pair.bits = *reinterpret_cast<const uint32_t*>(address);
    values[0] = to_float(pair.values[0]);
    values[1] = to_float(pair.values[1]);
}
template <class T>
DEVICE void store2(T* address, float first, float second) {
    *reinterpret_cast<uint32_t*>(address) = pack2<T>(first, second);
}

// Eight halves: one 16-byte access. Addresses must be 16-byte aligned.
constexpr int vector_width = 8;
template <class T>
union Vector8 {
    uint4 bits;
    T values[vector_width];
    __device__ Vector8() {}
};

template <class T>
DEVICE void load8(float (&values)[vector_width], const T* address) {
    Vector8<T> vector;
    vector.bits = *reinterpret_cast<const uint4*>(address);
#pragma unroll
    for (int i = 0; i < vector_width; i++) values[i] = to_float(vector.values[i]);
}

template <class T>
DEVICE Vector8<T> rounded8(const float (&values)[vector_width]) {
    Vector8<T> vector;
#pragma unroll
    for (int i = 0; i < vector_width; i++) vector.values[i] = from_float<T>(values[i]);
    return vector;
}

template <class T>
DEVICE void store8(T* address, const float (&values)[vector_width]) {
    *reinterpret_cast<uint4*>(address) = rounded8<T>(values).bits;
}
