// Sums over rows, column by column, for the gradients of vectors that multiply every row: a block sums a stretch of rows, and
// column_sums.cu adds up the stretches. Both in an order that shapes alone say.
#pragma once
#include "halves.h"

constexpr int column_threads = 256, column_warps = column_threads / 32;
// Rows of a stretch, and columns that a block sums at a time: eight a lane.
constexpr int stretch_rows = 64, stretch_columns = 32 * vector_width;
static_assert(stretch_columns == column_threads, "a thread finishes one column");

// partial[column] = Σ of terms over rows [first_row, end_row), for the stretch_columns columns from first_column on, as far as
// `width`. term(values, row, column) gives eight neighbouring terms. A warp takes every eighth row; the warps' sums are added
// in order. All threads of the block must call it; `sums` may be used again at once.
using StagedColumns = float4[column_warps][stretch_columns / 4];
template <class Term>
DEVICE void sum_columns(StagedColumns& sums, float* partial, int first_row, int end_row,
                        int first_column, int width, const Term& term) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, column = first_column + lane * vector_width;
    float sum[vector_width] = {};
    if (column < width)
        for (int row = first_row + warp; row < end_row; row += column_warps) {
            float values[vector_width];
            term(values, row, column);
#pragma unroll
            for (int i = 0; i < vector_width; i++) sum[i] += values[i];
        }
    sums[warp][2 * lane] = make_float4(sum[0], sum[1], sum[2], sum[3]);
    sums[warp][2 * lane + 1] = make_float4(sum[4], sum[5], sum[6], sum[7]);
    __syncthreads();
    float total = 0.f;
    for (int of_warp = 0; of_warp < column_warps; of_warp++) total += reinterpret_cast<const float*>(sums[of_warp])[threadIdx.x];
    const int own = first_column + static_cast<int>(threadIdx.x);
    if (own < width) partial[own] = total;
    __syncthreads();  // the next call writes `sums` again
}
