// The gradient of a vector that multiplies every row, of its partial sums over stretches of rows (column_sums.h):
//
//   gradients[c] += Σ_stretch partials[stretch][c] / divisors[c]
//
// All in f32. partials has rows of `leading`; without divisors it is the bare sum; a column whose divisor is 0 gets nothing.
// Eight threads take a column: every eighth stretch each, then their sums in order.
#include "common/column_sums.h"

constexpr int columns_per_block = 32;

// Grid: ceil(columns / 32) blocks.
extern "C" __global__ void __launch_bounds__(column_threads)
    add_column_sums(const float* __restrict__ partials, const float* __restrict__ divisors, float* __restrict__ gradients,
                    int stretches, int columns, int leading) {
    SHARED_ARRAY(float, sums, [column_warps][columns_per_block]);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, column = blockIdx.x * columns_per_block + lane;
    float sum = 0.f;
    if (column < columns)
        for (int stretch = warp; stretch < stretches; stretch += column_warps)
            sum += partials[static_cast<long long>(stretch) * leading + column];
    sums[warp][lane] = sum;
    __syncthreads();
    if (warp != 0 || column >= columns) return;
    for (int of_warp = 1; of_warp < column_warps; of_warp++) sum += sums[of_warp][lane];
    if (divisors) {
        if (!(divisors[column] > 0.f)) return;
        sum /= divisors[column];
    }
    gradients[column] += sum;
}
REGISTER_KERNEL(add_column_sums);
