// Element-wise odds and ends over flat arrays: conversions between f32, f16 and bf16 (rounded to nearest even), a fill, and
// a search for numbers that are not finite.
//
// Grid-stride loops: any grid is right. Counts are 64-bit.
#include "common/halves.h"
#include "ptx/warp.h"

constexpr int convert_threads = 256;

template <class From, class To>
DEVICE void convert(const From* __restrict__ in, To* __restrict__ out, long long count) {
    const long long stride = static_cast<long long>(gridDim.x) * convert_threads;
    for (long long i = static_cast<long long>(blockIdx.x) * convert_threads + threadIdx.x; i < count; i += stride)
        out[i] = from_float<To>(to_float(in[i]));
}

#define EXPORT_CONVERT(name, From, To) \
    extern "C" __global__ void __launch_bounds__(convert_threads) name(const From* in, To* out, long long count) { \
        convert(in, out, count); \
    } \
    REGISTER_KERNEL(name);
EXPORT_CONVERT(convert_f32_to_f16, float, f16)
EXPORT_CONVERT(convert_f32_to_bf16, float, bf16)
EXPORT_CONVERT(convert_f16_to_f32, f16, float)
EXPORT_CONVERT(convert_bf16_to_f32, bf16, float)
EXPORT_CONVERT(convert_f16_to_bf16, f16, bf16)
EXPORT_CONVERT(convert_bf16_to_f16, bf16, f16)

extern "C" __global__ void __launch_bounds__(convert_threads) fill_f32(float* out, float value, long long count) {
    const long long stride = static_cast<long long>(gridDim.x) * convert_threads;
    for (long long i = static_cast<long long>(blockIdx.x) * convert_threads + threadIdx.x; i < count; i += stride)
        out[i] = value;
}
REGISTER_KERNEL(fill_f32);

// *flag |= 1 if any element is infinite or NaN. One atomic a warp at most: the flag is the same whatever their order.
template <class T>
DEVICE void find_non_finite(const T* __restrict__ in, unsigned* flag, long long count) {
    const long long stride = static_cast<long long>(gridDim.x) * convert_threads;
    bool found = false;
    for (long long i = static_cast<long long>(blockIdx.x) * convert_threads + threadIdx.x; i < count; i += stride) {
        const float value = to_float(in[i]);
        found |= !(fabsf(value) <= 3.402823466e+38f);  // false for NaN too
    }
    if (__any_sync(whole_warp, found) && threadIdx.x % 32 == 0) atomicOr(flag, 1u);
}
EXPORT_HALF_KERNELS(find_non_finite, convert_threads, (const T* in, unsigned* flag, long long count), (in, flag, count))
