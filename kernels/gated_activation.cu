// Gated activations (Shazeer 2020), forward and backward: SiLU ("SwiGLU") and GELU by tanh ("GeGLU", Gemma).
//
//   forward    act = f(g) · u
//   backward   du = dact · f(g),  dg = dact · u · f'(g)                                  written over g and u
//
// gate_up [rows, 2F]: g in columns 0 … F, u behind it; act, dact [rows, F]. T is f16 or bf16, F a multiple of 8;
// computed in f32, rounded once. A thread takes 8 columns of a row.
#include "common/gated.h"

constexpr int gated_threads = 256;

// The thread's row and first column; false past the end.
DEVICE bool find_place(int rows, int width, long long& row, int& column) {
    const long long vector = static_cast<long long>(blockIdx.x) * gated_threads + threadIdx.x;
    const int vectors_per_row = width / vector_width;
    row = vector / vectors_per_row;
    column = static_cast<int>(vector % vectors_per_row) * vector_width;
    return row < rows;
}

template <class T, class F>
DEVICE void gated_forward(const T* __restrict__ gate_up, T* __restrict__ act, int rows, int width) {
    long long row;
    int column;
    if (!find_place(rows, width, row, column)) return;
    float g[vector_width], u[vector_width];
    load8(g, gate_up + row * 2 * width + column);
    load8(u, gate_up + row * 2 * width + width + column);
#pragma unroll
    for (int i = 0; i < vector_width; i++) u[i] *= F::at(g[i]).value;
    store8(act + row * width + column, u);
}

template <class T, class F>
DEVICE void gated_backward(const T* __restrict__ dact, T* __restrict__ gate_up, int rows, int width) {
    long long row;
    int column;
    if (!find_place(rows, width, row, column)) return;
    T* g_address = gate_up + row * 2 * width + column;
    float g[vector_width], u[vector_width], gradient[vector_width];
    load8(g, g_address);
    load8(u, g_address + width);
    load8(gradient, dact + row * width + column);
#pragma unroll
    for (int i = 0; i < vector_width; i++) gated_gradient<F>(g[i], u[i], gradient[i]);
    store8(g_address, g);
    store8(g_address + width, u);
}

// Grid of all: ceil(rows · width / 8 / 256) blocks.
#define EXPORT_GATED(name, F) \
    template <class T> \
    DEVICE void name##_forward(const T* gate_up, T* act, int rows, int width) { \
        gated_forward<T, F>(gate_up, act, rows, width); \
    } \
    template <class T> \
    DEVICE void name##_backward(const T* dact, T* gate_up, int rows, int width) { \
        gated_backward<T, F>(dact, gate_up, rows, width); \
    } \
    EXPORT_HALF_KERNELS(name##_forward, gated_threads, (const T* gate_up, T* act, int rows, int width), \
                        (gate_up, act, rows, width)) \
    EXPORT_HALF_KERNELS(name##_backward, gated_threads, (const T* dact, T* gate_up, int rows, int width), \
                        (dact, gate_up, rows, width))
EXPORT_GATED(gated_silu, Silu)
EXPORT_GATED(gated_gelu, GeluTanh)
