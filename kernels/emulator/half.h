// __half and __nv_bfloat16 for g++. Conversions are explicit, as kernels must write them (rule 3): implicit ones are
// ambiguous under nvcc. Arithmetic rounds to nearest even once per operation, like the hardware.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

struct __half {
    uint16_t bits;
    __half() = default;
    explicit __half(float value) : bits(static_cast<uint16_t>(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT))) {}
    explicit operator float() const { return _cvtsh_ss(bits); }
};

struct __nv_bfloat16 {
    uint16_t bits;
    __nv_bfloat16() = default;
    explicit __nv_bfloat16(float value) {
        uint32_t word;
        memcpy(&word, &value, 4);
        const bool is_nan = (word & 0x7fffffffu) > 0x7f800000u;
        bits = is_nan ? 0x7fff : static_cast<uint16_t>((word + 0x7fffu + ((word >> 16) & 1u)) >> 16);
    }
    explicit operator float() const {
        const uint32_t word = static_cast<uint32_t>(bits) << 16;
        float value;
        memcpy(&value, &word, 4);
        return value;
    }
};

struct alignas(4) __half2 {
    __half x, y;
};
struct alignas(4) __nv_bfloat162 {
    __nv_bfloat16 x, y;
};

static inline __half __float2half_rn(float value) { return __half(value); }
static inline float __half2float(__half value) { return static_cast<float>(value); }
static inline __nv_bfloat16 __float2bfloat16_rn(float value) { return __nv_bfloat16(value); }
static inline float __bfloat162float(__nv_bfloat16 value) { return static_cast<float>(value); }
static inline __half2 __floats2half2_rn(float x, float y) { return {__half(x), __half(y)}; }
static inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__nv_bfloat16(x), __nv_bfloat16(y)}; }
