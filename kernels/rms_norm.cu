// RMSNorm (Zhang & Sennrich 2019), forward and backward, one warp a row.
//
//   forward    h = x + addend                       (addend may be absent: then h is x)
//              rstd = 1 / sqrt(mean(h²) + epsilon)
//              y = round(h · rstd) · w              rounded to T before × w, as Hugging Face's LlamaRMSNorm
//   backward   dx = residual_gradient + rstd · (w·dy − h · rstd² · mean(w·dy·h))
//              (w is frozen; the rounding counts as the identity; residual_gradient may be absent, or dx itself)
//
// x, h, y, dy, dx [rows, width], w [width] in T (f16 or bf16); width is a multiple of 8. Sums in f32: each lane adds its
// elements in order, then a butterfly over the warp. A row is read twice, the second time from L1; nothing is saved for the
// backward, whose first pass finds both sums at once.
#include "common/halves.h"
#include "ptx/warp.h"

constexpr int rms_norm_threads = 256;

template <class T>
DEVICE void rms_norm_forward(const T* __restrict__ x, const T* __restrict__ addend, const T* __restrict__ w, T* sum,
                             T* __restrict__ y, int rows, int width, float epsilon) {
    const int lane = threadIdx.x % 32;
    const int row = blockIdx.x * (rms_norm_threads / 32) + threadIdx.x / 32;
    if (row >= rows) return;
    const long long begin = static_cast<long long>(row) * width;

    float squares = 0.f;
    for (int column = lane * vector_width; column < width; column += 32 * vector_width) {
        float h[vector_width];
        load8(h, x + begin + column);
        if (addend) {
            float added[vector_width];
            load8(added, addend + begin + column);
#pragma unroll
            for (int i = 0; i < vector_width; i++) h[i] = rounded<T>(h[i] + added[i]);
            store8(sum + begin + column, h);
        }
#pragma unroll
        for (int i = 0; i < vector_width; i++) squares += h[i] * h[i];
    }
    const float rstd = rsqrtf(warp_sum(squares) / width + epsilon);

    // A lane reads back only what it wrote itself: no barrier is needed between the passes.
    const T* h_row = (addend ? sum : x) + begin;
    for (int column = lane * vector_width; column < width; column += 32 * vector_width) {
        float h[vector_width], weight[vector_width];
        load8(h, h_row + column);
        load8(weight, w + column);
#pragma unroll
        for (int i = 0; i < vector_width; i++) h[i] = rounded<T>(h[i] * rstd) * weight[i];
        store8(y + begin + column, h);
    }
}

template <class T>
DEVICE void rms_norm_backward(const T* __restrict__ x, const T* __restrict__ w, const T* __restrict__ dy,
                              const T* residual_gradient, T* dx, int rows, int width, float epsilon) {
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
            products += weight[i] * gradient[i] * h[i];
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
        for (int i = 0; i < vector_width; i++) total[i] += rstd * (weight[i] * gradient[i] - h[i] * along_h);
        store8(dx + begin + column, total);
    }
}

// Grid: ceil(rows / 8) blocks.
EXPORT_HALF_KERNELS(rms_norm_forward, rms_norm_threads,
                    (const T* x, const T* addend, const T* w, T* sum, T* y, int rows, int width, float epsilon),
                    (x, addend, w, sum, y, rows, width, epsilon))
EXPORT_HALF_KERNELS(rms_norm_backward, rms_norm_threads,
                    (const T* x, const T* w, const T* dy, const T* residual_gradient, T* dx, int rows, int width,
                     float epsilon),
                    (x, w, dy, residual_gradient, dx, rows, width, epsilon))
