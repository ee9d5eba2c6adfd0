// RMSNorm (Zhang & Sennrich 2019), forward and backward, one warp a row; and the gradient of a weight that is trained.
//
//   forward    rstd = 1 / sqrt(mean(x²) + epsilon)
//              y = residual + x · rstd · (offset + w)          (the residual may be absent, or y itself)
//   backward   dx = residual_gradient + rstd · ((offset + w)·dy − x · rstd² · mean((offset + w)·dy·x))
//              (rounding counts as the identity; residual_gradient may be absent, or dx itself)
//   weight     dw = Σ_rows dy · x · rstd                       as partial sums in f32 (column_sums.h)
//
// x, y, dy, dx [rows, width], w [width] in T (f16 or bf16); width is a multiple of 8. Where the forward rounds on its way says
// norm_weight.h. Sums in f32: each lane adds its elements in order, then a butterfly over the warp. Nothing is saved for the
// backward, whose first pass finds both sums at once. A row's 16-byte loads are all started before the first is used, and it is
// kept in registers until it is normalised: up to 256 elements for each of a kernel's ROUNDS. Wider rows are read twice
// (ROUNDS 0), the second time from L1.
#include "common/column_sums.h"
#include "common/rms_norm_row.h"

constexpr int rms_norm_threads = 128;

// What a lane reads of a row; it may be absent.
template <class T, int ROUNDS>
struct Row {
    const T* address;
    Vector8<T> held[ROUNDS > 0 ? ROUNDS : 1];

    __device__ __forceinline__ Row(const T* address, int width) : address(address) {
        if (ROUNDS == 0 || !address) return;
        for_each_vector<ROUNDS>(width, [&](int round, int column) {
            held[round].bits = *reinterpret_cast<const uint4*>(address + column);
        });
    }
    __device__ __forceinline__ void get(float (&values)[vector_width], int round, int column) const {
        if constexpr (ROUNDS == 0) {
            load8(values, address + column);
        } else {
#pragma unroll
            for (int i = 0; i < vector_width; i++) values[i] = to_float(held[round].values[i]);
        }
    }
};

// The warp's row; false past the end.
DEVICE bool find_row(int rows, int width, long long& begin) {
    const int row = blockIdx.x * (rms_norm_threads / 32) + threadIdx.x / 32;
    begin = static_cast<long long>(row) * width;
    return row < rows;
}

template <class T, int ROUNDS>
DEVICE void rms_norm_forward(const T* __restrict__ x, const T* __restrict__ w, const T* residual, T* y, int rows, int width,
                             float offset, float epsilon) {
    long long begin;
    if (!find_row(rows, width, begin)) return;
    const Row<T, ROUNDS> row(x + begin, width), added(residual ? residual + begin : nullptr, width);
    const float rstd = reciprocal_rms<ROUNDS>(row, width, epsilon);
    for_each_vector<ROUNDS>(width, [&](int round, int column) {
        float h[vector_width], total[vector_width] = {};
        row.get(h, round, column);
        if (residual) added.get(total, round, column);
        add_normed(total, h, rstd, w + column, offset);
        store8(y + begin + column, total);
    });
}

template <class T, int ROUNDS>
DEVICE void rms_norm_backward(const T* __restrict__ x, const T* __restrict__ w, const T* __restrict__ dy,
                              const T* residual_gradient, T* dx, int rows, int width, float offset, float epsilon) {
    long long begin;
    if (!find_row(rows, width, begin)) return;
    // A third row of 16 rounds would not fit the registers.
    constexpr int added_rounds = ROUNDS <= 8 ? ROUNDS : 0;
    const Row<T, ROUNDS> row(x + begin, width), gradient_row(dy + begin, width);
    const Row<T, added_rounds> added(residual_gradient ? residual_gradient + begin : nullptr, width);
    float squares = 0.f, products = 0.f;
    for_each_vector<ROUNDS>(width, [&](int round, int column) {
        float h[vector_width], weight[vector_width], gradient[vector_width];
        row.get(h, round, column);
        load8(weight, w + column);
        gradient_row.get(gradient, round, column);
#pragma unroll
        for (int i = 0; i < vector_width; i++) {
            squares += h[i] * h[i];
            products += (offset + weight[i]) * gradient[i] * h[i];
        }
    });
    const float rstd = rsqrtf(warp_sum(squares) / width + epsilon);
    const float along_h = rstd * rstd * (warp_sum(products) / width);

    for_each_vector<ROUNDS>(width, [&](int round, int column) {
        float h[vector_width], weight[vector_width], gradient[vector_width], total[vector_width] = {};
        row.get(h, round, column);
        load8(weight, w + column);
        gradient_row.get(gradient, round, column);
        if (residual_gradient) added.get(total, round, column);
#pragma unroll
        for (int i = 0; i < vector_width; i++) total[i] += rstd * ((offset + weight[i]) * gradient[i] - h[i] * along_h);
        store8(dx + begin + column, total);
    });
}

// partials [ceil(rows / stretch_rows)][width]. The rows are read a second time from a cache. Grid: a block for each stretch.
template <class T>
DEVICE void rms_norm_weight_gradient(const T* __restrict__ x, const T* __restrict__ dy, float* __restrict__ partials,
                                     int rows, int width, float epsilon) {
    SHARED_ARRAY(float4, sums, [column_warps][stretch_columns / 4]);
    SHARED_ARRAY(float, rstds, [stretch_rows]);
    const int first = blockIdx.x * stretch_rows, end = min(rows, first + stretch_rows);
    for (int row = first + threadIdx.x / 32; row < end; row += column_warps) {
        const float rstd = reciprocal_rms<0>(Row<T, 0>(x + static_cast<long long>(row) * width, width), width, epsilon);
        if (threadIdx.x % 32 == 0) rstds[row - first] = rstd;
    }
    __syncthreads();
    for (int column = 0; column < width; column += stretch_columns)
        sum_columns(sums, partials + static_cast<long long>(blockIdx.x) * width, first, end, column, width,
                    [&](float (&values)[vector_width], int row, int own) {
                        const long long at = static_cast<long long>(row) * width + own;
                        float gradient[vector_width];
                        load8(values, x + at);
                        load8(gradient, dy + at);
#pragma unroll
                        for (int i = 0; i < vector_width; i++) values[i] *= rstds[row - first] * gradient[i];
                    });
}
EXPORT_HALF_KERNELS(rms_norm_weight_gradient, column_threads,
                    (const T* x, const T* dy, float* partials, int rows, int width, float epsilon),
                    (x, dy, partials, rows, width, epsilon))

// Grid: ceil(rows / 4) blocks.
#define EXPORT_RMS_NORM(ROUNDS, type) \
    EXPORT_KERNEL_AS(rms_norm_forward_##ROUNDS##_##type, type, (rms_norm_threads), \
                     (const T* x, const T* w, const T* residual, T* y, int rows, int width, float offset, float epsilon), \
                     (rms_norm_forward<T, ROUNDS>(x, w, residual, y, rows, width, offset, epsilon))) \
    EXPORT_KERNEL_AS(rms_norm_backward_##ROUNDS##_##type, type, (rms_norm_threads), \
                     (const T* x, const T* w, const T* dy, const T* residual_gradient, T* dx, int rows, int width, \
                      float offset, float epsilon), \
                     (rms_norm_backward<T, ROUNDS>(x, w, dy, residual_gradient, dx, rows, width, offset, epsilon)))
#define EXPORT_FOR(type) \
    EXPORT_RMS_NORM(0, type) \
    EXPORT_RMS_NORM(2, type) \
    EXPORT_RMS_NORM(4, type) \
    EXPORT_RMS_NORM(8, type) \
    EXPORT_RMS_NORM(16, type)
EXPORT_FOR(f16)
EXPORT_FOR(bf16)
