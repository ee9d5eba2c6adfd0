// Gated SiLU (Shazeer 2020, "SwiGLU"), forward and backward.
//
//   forward    act = silu(g) · u,  silu(g) = g · σ(g),  σ(g) = 1 / (1 + e^−g)
//   backward   du = dact · silu(g),  dg = dact · u · σ(g) · (1 + g · (1 − σ(g)))      written over g and u
//
// gate_up [rows, 2F]: g in columns 0 … F, u behind it; act, dact [rows, F]. T is f16 or bf16, F a multiple of 8;
// computed in f32, rounded once. A thread takes 8 columns of a row.
#include "common/halves.h"
#include "ptx/math.h"

constexpr int gated_silu_threads = 256;

DEVICE float sigmoid(float x) { return 1.f / (1.f + exp_fast(-x)); }

// The thread's row and first column; false past the end.
DEVICE bool find_place(int rows, int width, long long& row, int& column) {
    const long long vector = static_cast<long long>(blockIdx.x) * gated_silu_threads + threadIdx.x;
    const int vectors_per_row = width / vector_width;
    row = vector / vectors_per_row;
    column = static_cast<int>(vector % vectors_per_row) * vector_width;
    return row < rows;
}

template <class T>
DEVICE void gated_silu_forward(const T* __restrict__ gate_up, T* __restrict__ act, int rows, int width) {
    long long row;
    int column;
    if (!find_place(rows, width, row, column)) return;
    float g[vector_width], u[vector_width];
    load8(g, gate_up + row * 2 * width + column);
    load8(u, gate_up + row * 2 * width + width + column);
#pragma unroll
    for (int i = 0; i < vector_width; i++) u[i] *= g[i] * sigmoid(g[i]);
    store8(act + row * width + column, u);
}

template <class T>
DEVICE void gated_silu_backward(const T* __restrict__ dact, T* __restrict__ gate_up, int rows, int width) {
    long long row;
    int column;
    if (!find_place(rows, width, row, column)) return;
    T* g_address = gate_up + row * 2 * width + column;
    float g[vector_width], u[vector_width], gradient[vector_width];
    load8(g, g_address);
    load8(u, g_address + width);
    load8(gradient, dact + row * width + column);
#pragma unroll
    for (int i = 0; i < vector_width; i++) {
        const float s = sigmoid(g[i]), gate = g[i];
        g[i] = gradient[i] * u[i] * s * (1.f + gate * (1.f - s));
        u[i] = gradient[i] * gate * s;
    }
    store8(g_address, g);
    store8(g_address + width, u);
}

// Grid: ceil(rows · width / 8 / 256) blocks.
EXPORT_HALF_KERNELS(gated_silu_forward, gated_silu_threads, (const T* gate_up, T* act, int rows, int width),
                    (gate_up, act, rows, width))
EXPORT_HALF_KERNELS(gated_silu_backward, gated_silu_threads, (const T* dact, T* gate_up, int rows, int width),
                    (dact, gate_up, rows, width))
