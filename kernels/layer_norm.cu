// LayerNorm (Ba et al. 2016), forward and backward, one warp a row.
//
//   forward    h = x + addend                       (addend may be absent: then h is x)
//              mean = Σ h / width,  rstd = 1 / sqrt(Σ (h − mean)² / width + epsilon)
//              y = (h − mean) · rstd · w + b        (b may be absent)
//   backward   dx = residual_gradient + rstd · (w·dy − mean(w·dy) − n · mean(w·dy·n)),  n = (h − mean) · rstd
//              (w and b are frozen; residual_gradient may be absent, or dx itself)
//
// x, h, y, dy, dx [rows, width], w, b [width] in T (f16 or bf16); width is a multiple of 8. Sums in f32: each lane adds its
// elements in order, then a butterfly over the warp. The variance is summed around the mean, in a pass of its own: the row is
// read again from L1. Nothing is saved for the backward, which finds mean and rstd again.
#include "common/halves.h"
#include "ptx/warp.h"

constexpr int layer_norm_threads = 256;

struct Moments {
    float mean, rstd;
};

// Of a row that the lane may read at the columns that are its own.
template <class T>
DEVICE Moments moments_of(const T* row, int width, float epsilon) {
    const int lane = threadIdx.x % 32;
    float sum = 0.f;
    for (int column = lane * vector_width; column < width; column += 32 * vector_width) {
        float h[vector_width];
        load8(h, row + column);
#pragma unroll
        for (int i = 0; i < vector_width; i++) sum += h[i];
    }
    const float mean = warp_sum(sum) / width;
    float squares = 0.f;
    for (int column = lane * vector_width; column < width; column += 32 * vector_width) {
        float h[vector_width];
        load8(h, row + column);
#pragma unroll
        for (int i = 0; i < vector_width; i++) squares += (h[i] - mean) * (h[i] - mean);
    }
    return {mean, rsqrtf(warp_sum(squares) / width + epsilon)};
}

// `sum` must not be x or addend.
template <class T>
DEVICE void layer_norm_forward(const T* __restrict__ x, const T* __restrict__ addend, const T* __restrict__ w,
                               const T* __restrict__ b, T* sum, T* __restrict__ y, int rows, int width, float epsilon) {
    const int lane = threadIdx.x % 32;
    const int row = blockIdx.x * (layer_norm_threads / 32) + threadIdx.x / 32;
    if (row >= rows) return;
    const long long begin = static_cast<long long>(row) * width;
    if (addend)
        for (int column = lane * vector_width; column < width; column += 32 * vector_width) {
            float h[vector_width], added[vector_width];
            load8(h, x + begin + column);
            load8(added, addend + begin + column);
#pragma unroll
            for (int i = 0; i < vector_width; i++) h[i] += added[i];
            store8(sum + begin + column, h);
        }
    // A lane reads back only what it wrote itself.
    const T* h_row = (addend ? sum : x) + begin;
    const Moments moments = moments_of(h_row, width, epsilon);
    for (int column = lane * vector_width; column < width; column += 32 * vector_width) {
        float h[vector_width], weight[vector_width], bias[vector_width] = {};
        load8(h, h_row + column);
        load8(weight, w + column);
        if (b) load8(bias, b + column);
#pragma unroll
        for (int i = 0; i < vector_width; i++) h[i] = (h[i] - moments.mean) * moments.rstd * weight[i] + bias[i];
        store8(y + begin + column, h);
    }
}

template <class T>
DEVICE void layer_norm_backward(const T* __restrict__ x, const T* __restrict__ w, const T* __restrict__ dy,
                                const T* residual_gradient, T* dx, int rows, int width, float epsilon) {
    const int lane = threadIdx.x % 32;
    const int row = blockIdx.x * (layer_norm_threads / 32) + threadIdx.x / 32;
    if (row >= rows) return;
    const long long begin = static_cast<long long>(row) * width;
    const Moments moments = moments_of(x + begin, width, epsilon);
    float sum = 0.f, products = 0.f;
    for (int column = lane * vector_width; column < width; column += 32 * vector_width) {
        float h[vector_width], weight[vector_width], gradient[vector_width];
        load8(h, x + begin + column);
        load8(weight, w + column);
        load8(gradient, dy + begin + column);
#pragma unroll
        for (int i = 0; i < vector_width; i++) {
            const float weighted = weight[i] * gradient[i];
            sum += weighted;
            products += weighted * (h[i] - moments.mean) * moments.rstd;
        }
    }
    const float mean_sum = warp_sum(sum) / width, mean_products = warp_sum(products) / width;
    for (int column = lane * vector_width; column < width; column += 32 * vector_width) {
        float h[vector_width], weight[vector_width], gradient[vector_width], total[vector_width] = {};
        load8(h, x + begin + column);
        load8(weight, w + column);
        load8(gradient, dy + begin + column);
        if (residual_gradient) load8(total, residual_gradient + begin + column);
#pragma unroll
        for (int i = 0; i < vector_width; i++) {
            const float normed = (h[i] - moments.mean) * moments.rstd;
            total[i] += moments.rstd * (weight[i] * gradient[i] - mean_sum - normed * mean_products);
        }
        store8(dx + begin + column, total);
    }
}

// Grid: ceil(rows / 8) blocks.
EXPORT_HALF_KERNELS(layer_norm_forward, layer_norm_threads,
                    (const T* x, const T* addend, const T* w, const T* b, T* sum, T* y, int rows, int width, float epsilon),
                    (x, addend, w, b, sum, y, rows, width, epsilon))
EXPORT_HALF_KERNELS(layer_norm_backward, layer_norm_threads,
                    (const T* x, const T* w, const T* dy, const T* residual_gradient, T* dx, int rows, int width,
                     float epsilon),
                    (x, w, dy, residual_gradient, dx, rows, width, epsilon))
