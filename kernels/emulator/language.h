// The part of CUDA C++ that our kernels use, for g++: included by ptx/target.h when nvcc is not the compiler.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "half.h"
#include "runtime.h"

// ---- keywords
#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)
#define __forceinline__ inline __attribute__((always_inline))
#define __restrict__ __restrict
// A bare __shared__ would quietly become a local of each thread: make it a compile error instead (rule 2).
#define __shared__ ERROR_use_SHARED_ARRAY_or_DYNAMIC_SHARED

#define threadIdx (emulator::current->thread_index)
#define blockIdx (emulator::current->block_index)
#define blockDim (emulator::current->block_dim)
#define gridDim (emulator::current->grid_dim)

// ---- vector types
#define EMULATOR_VECTOR2(name, T, bytes) \
    struct alignas(bytes) name { T x, y; }; \
    static inline name make_##name(T x, T y) { return {x, y}; }
#define EMULATOR_VECTOR4(name, T) \
    struct alignas(16) name { T x, y, z, w; }; \
    static inline name make_##name(T x, T y, T z, T w) { return {x, y, z, w}; }
EMULATOR_VECTOR2(float2, float, 8)
EMULATOR_VECTOR2(int2, int, 8)
EMULATOR_VECTOR2(uint2, unsigned, 8)
EMULATOR_VECTOR4(float4, float)
EMULATOR_VECTOR4(int4, int)
EMULATOR_VECTOR4(uint4, unsigned)

// ---- arithmetic. glibc declares some of CUDA's names itself, so those are macros.
static inline float emulator_rsqrtf(float value) { return 1.0f / sqrtf(value); }
#define rsqrtf emulator_rsqrtf
#define EMULATOR_MIN_MAX(T) \
    static inline T min(T a, T b) { return b < a ? b : a; } \
    static inline T max(T a, T b) { return a < b ? b : a; }
EMULATOR_MIN_MAX(int)
EMULATOR_MIN_MAX(unsigned)
EMULATOR_MIN_MAX(long long)
static inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>((uint64_t{a} * b) >> 32); }
static inline unsigned __float_as_uint(float value) { unsigned bits; memcpy(&bits, &value, 4); return bits; }
static inline float __uint_as_float(unsigned bits) { float value; memcpy(&value, &bits, 4); return value; }
static inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

// ---- synchronisation
#define EMULATOR_HERE emulator::Location where = emulator::Location::here()
static inline void __syncthreads(EMULATOR_HERE) { emulator::barrier_sync(0, 0, where); }
static inline void __syncwarp(unsigned mask = 0xffffffffu, EMULATOR_HERE) {
    emulator::collective(emulator::Collective::syncwarp, mask, nullptr, nullptr, where);
}
#define EMULATOR_SHUFFLE(name, mode, Operand) \
    template <class T> \
    static inline T name(unsigned mask, T value, Operand operand, int width = 32, EMULATOR_HERE) { \
        return emulator::shuffle(mask, value, emulator::ShuffleMode::mode, static_cast<int>(operand), width, where); \
    }
EMULATOR_SHUFFLE(__shfl_sync, indexed, int)
EMULATOR_SHUFFLE(__shfl_up_sync, up, unsigned)
EMULATOR_SHUFFLE(__shfl_down_sync, down, unsigned)
EMULATOR_SHUFFLE(__shfl_xor_sync, exclusive_or, int)
static inline unsigned __ballot_sync(unsigned mask, int predicate, EMULATOR_HERE) {
    return emulator::ballot(mask, predicate != 0, where);
}
static inline int __any_sync(unsigned mask, int predicate, EMULATOR_HERE) {
    return emulator::ballot(mask, predicate != 0, where) != 0;
}
static inline float atomicAdd(float* p, float value, EMULATOR_HERE) { return emulator::atomic_add(p, value, where); }
static inline unsigned atomicAdd(unsigned* p, unsigned value, EMULATOR_HERE) { return emulator::atomic_add(p, value, where); }
static inline unsigned atomicMax(unsigned* p, unsigned value, EMULATOR_HERE) { return emulator::atomic_max(p, value, where); }
static inline unsigned atomicOr(unsigned* p, unsigned value, EMULATOR_HERE) { return emulator::atomic_or(p, value, where); }

// ---- shared memory and export macros, the emulator's side (ptx/target.h has the device's)
// SHARED_ARRAY(float, partial_sums, [32]);  DYNAMIC_SHARED(tiles, 128);
#define SHARED_ARRAY(T, name, dimensions) \
    auto& name = *reinterpret_cast<T(*) dimensions>(emulator::static_shared( \
        []() -> const void* { static const char key = 0; return &key; }(), sizeof(T dimensions), \
        alignof(T) < 16 ? 16 : alignof(T)))
#define DYNAMIC_SHARED(name, alignment) unsigned char* const name = emulator::dynamic_shared(alignment)
#define REGISTER_KERNEL(name) static emulator::Registration registration_of_##name(#name, emulator::Trampoline<&name>{})
