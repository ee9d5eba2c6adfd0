// Each primitive of ptx/ alone, on small integers whose results are exact whatever the order of rounding: on a GPU these show
// whether the PTX means what the emulator takes it to mean. One warp each; tests/kernels/conformance.rs.
#include "common/halves.h"
#include "ptx/ldmatrix.h"
#include "ptx/math.h"
#include "ptx/mma.h"
#include "ptx/warp.h"

constexpr int one_warp = 32;

// d[32][4] = the accumulators of A·B + C from fragments a[32][4], b[32][2] (two halves each) and c[32][4].
template <class T>
DEVICE void conformance_mma(const uint32_t* a, const uint32_t* b, const float* c, float* d) {
    const int lane = threadIdx.x;
    uint32_t a_fragment[1][4], b_fragment[1][2];
    float sums[1][1][4];
    for (int i = 0; i < 4; i++) a_fragment[0][i] = a[lane * 4 + i];
    for (int i = 0; i < 2; i++) b_fragment[0][i] = b[lane * 2 + i];
    for (int i = 0; i < 4; i++) sums[0][0][i] = c[lane * 4 + i];
    mma_tile<T>(sums, a_fragment, b_fragment);
    for (int i = 0; i < 4; i++) d[lane * 4 + i] = sums[0][0][i];
}
EXPORT_HALF_KERNELS(conformance_mma, one_warp, (const uint32_t* a, const uint32_t* b, const float* c, float* d), (a, b, c, d))

// Four 8×8 matrices of 16-bit elements, in[32 rows][8]; plain[32][4] and transposed[32][4] are the lanes' registers.
extern "C" __global__ void __launch_bounds__(one_warp)
    conformance_ldmatrix(const uint4* in, uint32_t* plain, uint32_t* transposed) {
    SHARED_ARRAY(uint4, rows, [32]);
    const int lane = threadIdx.x;
    rows[lane] = in[lane];
    __syncwarp();
    uint32_t registers[4];
    ldmatrix_x4(registers, &rows[lane]);
    for (int i = 0; i < 4; i++) plain[lane * 4 + i] = registers[i];
    ldmatrix_x4_transposed(registers, &rows[lane]);
    for (int i = 0; i < 4; i++) transposed[lane * 4 + i] = registers[i];
}
REGISTER_KERNEL(conformance_ldmatrix);

// Lane l copies l / 2 bytes, but an even number; the rest of its 16 bytes becomes zero. Two groups, waited for one by one.
extern "C" __global__ void __launch_bounds__(one_warp) conformance_cp_async(const uint4* in, uint4* out) {
    SHARED_ARRAY(uint4, tile, [2][32]);
    const int lane = threadIdx.x, bytes = lane / 4 * 2;
    cp_async16(&tile[0][lane], in + lane, bytes);
    cp_async_commit();
    cp_async16(&tile[1][lane], in + lane, 16);
    cp_async_commit();
    cp_async_wait<1>();
    __syncwarp();
    out[lane] = tile[0][31 - lane];
    cp_async_wait<0>();
    __syncwarp();
    out[32 + lane] = tile[1][31 - lane];
}
REGISTER_KERNEL(conformance_cp_async);

// out[32][3]: the warp's sum and maximum of `in`, and two to the power of the lane's own.
extern "C" __global__ void __launch_bounds__(one_warp) conformance_warp(const float* in, float* out) {
    const float value = in[threadIdx.x];
    out[threadIdx.x * 3] = warp_sum(value);
    out[threadIdx.x * 3 + 1] = warp_maximum(value);
    out[threadIdx.x * 3 + 2] = exp2_fast(value);
}
REGISTER_KERNEL(conformance_warp);
