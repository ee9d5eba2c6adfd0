// RMSNorm (Zhang & Sennrich 2019), forward and backward, one warp a row.
//
//   forward    rstd = 1 / sqrt(mean(x²) + epsilon)
//              y = residual + x · rstd · (offset + w)          (the residual may be absent, or y itself)
//   backward   dx = residual_gradient + rstd · ((offset + w)·dy − x · rstd² · mean((offset + w)·dy·x))
//              (w is frozen; rounding counts as the identity; residual_gradient may be absent, or dx itself)
//
// x, y, dy, dx [rows, width], w [width] in T (f16 or bf16); width is a multiple of 8. Where the forward rounds on its way says
// norm_weight.h. Sums in f32: each lane adds its elements in order, then a butterfly over the warp. A row is read twice, the
// second time from L1; nothing is saved for the backward, whose first pass finds both sums at once.
#include "common/norm_weight.h"
#include "ptx/warp.h"

constexpr int rms_norm_threads = 256;

template <class T>
DEVICE void rms_norm_forward(const T* __restrict__ x, const T* __restrict__ w, const T* residual, T* y, int rows, int width,
                             float offset, float epsilon) {
    const int lane = threadIdx.x % 32;
    const int row = blockIdx.x * (rms_norm_threads / 32) + threadIdx.x / 32;
    if (row >= rows) return;
    const long long begin = static_cast<long long>(row) * width;

    float squares = 0.f;
    for (int column = lane * vector_width; column < width; column += 32 * vector_width) {
        float h[vector_width];
        load8(h, x + begin + column);
#pragma unroll
        for (int i = 0; i < vector_width; i++) squares += h[i] * h[i];
    }
    const float rstd = rsqrtf(warp_sum(squares) / width + epsilon);

    for (int column = lane * vector_width; column < width; column += 32 * vector_width) {
        float h[vector_width], weight[vector_width], total[vector_width] = {};
        load8(h, x + begin + column);
        load8(weight, w + column);
        if (residual) load8(total, residual + begin + column);
#pragma unroll
        for (int i = 0; i < vector_width; i++) total[i] += weighted<T>(h[i] * rstd, weight[i], offset);
        store8(y + begin + column, total);
    }
}

template <class T>
DEVICE void rms_norm_backward(const T* __restrict__ x, const T* __restrict__ w, const T* __restrict__ dy,
                              const T* residual_gradient, T* dx, int rows, int width, float offset, float epsilon) {
    const int lane = threadIdx.x % 32;
    const int row = blockIdx.x * (rms_norm_threads / 32) + threadIdx.x / 32;
    if (row >= rows) return;
    const long long begin = static_cast<long long>(row) * width;

    float squares = 0.f, products = 0.f;
    for (int column = lane * vector_width; column < width; column += 32 * vector_width) {
        float h[vector_width], weight[vector_width], gradient[vector_width];
        load8(h, x + begin + column);
        load8(weight, w + column);
        load8(gradient, dy + begin + column);
#pragma unroll
        for (int i = 0; i < vector_width; i++) {
            squares += h[i] * h[i];
            products += (offset + weight[i]) * gradient[i] * h[i];
        }
    }
    const float rstd = rsqrtf(warp_sum(squares) / width + epsilon);
    const float along_h = rstd * rstd * (warp_sum(products) / width);

    for (int column = lane * vector_width; column < width; column += 32 * vector_width) {
        float h[vector_width], weight[vector_width], gradient[vector_width], total[vector_width] = {};
        load8(h, x + begin + column);
        load8(weight, w + column);
        load8(gradient, dy + begin + column);
        if (residual_gradient) load8(total, residual_gradient + begin + column);
#pragma unroll
        for (int i = 0; i < vector_width; i++) total[i] += rstd * ((offset + weight[i]) * gradient[i] - h[i] * along_h);
        store8(dx + begin + column, total);
    }
}

// Grid: ceil(rows / 8) blocks.
EXPORT_HALF_KERNELS(rms_norm_forward, rms_norm_threads,
                    (const T* x, const T* w, const T* residual, T* y, int rows, int width, float offset, float epsilon),
                    (x, w, residual, y, rows, width, offset, epsilon))
EXPORT_HALF_KERNELS(rms_norm_backward, rms_norm_threads,
                    (const T* x, const T* w, const T* dy, const T* residual_gradient, T* dx, int rows, int width,
                     float offset, float epsilon),
                    (x, w, dy, residual_gradient, dx, rows, width, offset, epsilon))
