// Chooses the compiler's world: nvcc with the hardware, or g++ with the emulator. Every kernel includes this first,
// through one of the headers beside it. This folder is the only place with inline PTX; each primitive here shows the
// instruction and, beside it, what it means in plain C++ (for whole-warp instructions: emulator/warp_operations.cpp).
#pragma once

#if defined(__CUDACC__)

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#define ON_DEVICE 1
// Shared memory goes through these two, so that the emulator can place it: SHARED_ARRAY(float, sums, [32]);
#define SHARED_ARRAY(T, name, dimensions) __shared__ T name dimensions
#define DYNAMIC_SHARED(name, alignment) extern __shared__ __align__(alignment) unsigned char name[]
#define REGISTER_KERNEL(name)
// The emulator passes each primitive's call site along, for its messages; the device has no use for it.
#define CALL_SITE
#define CALL_SITE_ONLY

#else

#include "../emulator/language.h"

#define ON_DEVICE 0
#define CALL_SITE_ONLY emulator::Location where = emulator::Location::here()
#define CALL_SITE , CALL_SITE_ONLY

#endif

#define DEVICE static __device__ __forceinline__

// A shared-memory pointer as the 32-bit address that PTX wants.
#if ON_DEVICE
DEVICE uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}
#endif

typedef __half f16;
typedef __nv_bfloat16 bf16;

// Two kernels from one template `body<T>(…)`: name_f16 and name_bf16, with C linkage and plain parameters (rule 8).
// PARAMETERS and ARGUMENTS are parenthesised lists; PARAMETERS may use T. BOUNDS: threads and least blocks a multiprocessor.
#define EXPORT_HALF_KERNELS(name, threads, PARAMETERS, ARGUMENTS) \
    EXPORT_HALF_KERNELS_WITHIN(name, (threads), PARAMETERS, ARGUMENTS)
#define EXPORT_HALF_KERNELS_WITHIN(name, BOUNDS, PARAMETERS, ARGUMENTS) \
    EXPORT_KERNEL_FOR(name, f16, BOUNDS, PARAMETERS, ARGUMENTS) \
    EXPORT_KERNEL_FOR(name, bf16, BOUNDS, PARAMETERS, ARGUMENTS)
#define EXPORT_KERNEL_FOR(name, type, BOUNDS, PARAMETERS, ARGUMENTS) \
    EXPORT_KERNEL_AS(name##_##type, type, BOUNDS, PARAMETERS, (name<T> ARGUMENTS))
// One kernel of any name that makes the parenthesised call.
#define EXPORT_KERNEL_AS(name, type, BOUNDS, PARAMETERS, CALL) \
    namespace of_##name { \
    using T = type; \
    extern "C" __global__ void __launch_bounds__ BOUNDS name PARAMETERS { CALL; } \
    REGISTER_KERNEL(name); \
    }
