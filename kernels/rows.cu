// Rows by index: the embedding's gather, and the labelled rows' gather and scatter; and columns of rows, into a cache.
//
//   gather         out[i] = table[index[i]], zeros where index[i] is no_row
//   gather_scaled  out[i] = table[index[i]] · scale, rounded to T (an embedding times a factor, Gemma)
//   scatter        out[index[i]] = in[i] unless index[i] is no_row; the other rows keep what they hold (zero them first),
//                  indices must differ
//   copy_columns   out[i][0 … width) = in[i][0 … width), rows of `in` and `out` being longer
//
// in, out [count, width], table [*, width] in 16-bit elements, width a multiple of 8; where there is no
// arithmetic, f16 and bf16 share a kernel. A thread moves 16 bytes. An index is at most 2³¹ − 1; offsets are 64-bit.
#include "common/halves.h"

constexpr int rows_threads = 256;
constexpr unsigned no_row = 0xffffffffu;  // an entry that only fills up a batch

struct RowVector {
    bool inside;
    long long row;
    int vector;
};

DEVICE RowVector find_row_vector(int count, int vectors_per_row) {
    const long long linear = static_cast<long long>(blockIdx.x) * rows_threads + threadIdx.x;
    return {linear < static_cast<long long>(count) * vectors_per_row, linear / vectors_per_row,
            static_cast<int>(linear % vectors_per_row)};
}

// Grid of all: ceil(count · width / 8 / 256) blocks.
extern "C" __global__ void __launch_bounds__(rows_threads)
    gather_rows(const uint4* __restrict__ table, const unsigned* __restrict__ index, uint4* __restrict__ out, int count,
                int width) {
    const int vectors_per_row = width / vector_width;
    const RowVector at = find_row_vector(count, vectors_per_row);
    if (!at.inside) return;
    const unsigned row = index[at.row];
    out[at.row * vectors_per_row + at.vector] =
        row == no_row ? uint4{} : table[static_cast<long long>(row) * vectors_per_row + at.vector];
}
REGISTER_KERNEL(gather_rows);

template <class T>
DEVICE void gather_scaled(const T* __restrict__ table, const unsigned* __restrict__ index, T* __restrict__ out, int count,
                          int width, float scale) {
    const RowVector at = find_row_vector(count, width / vector_width);
    if (!at.inside) return;
    const int column = at.vector * vector_width;
    float values[vector_width];
    load8(values, table + static_cast<long long>(index[at.row]) * width + column);
#pragma unroll
    for (int i = 0; i < vector_width; i++) values[i] *= scale;
    store8(out + at.row * width + column, values);
}
EXPORT_HALF_KERNELS(gather_scaled, rows_threads,
                    (const T* table, const unsigned* index, T* out, int count, int width, float scale),
                    (table, index, out, count, width, scale))

extern "C" __global__ void __launch_bounds__(rows_threads)
    scatter_rows(const uint4* __restrict__ in, const unsigned* __restrict__ index, uint4* __restrict__ out, int count,
                 int width) {
    const int vectors_per_row = width / vector_width;
    const RowVector at = find_row_vector(count, vectors_per_row);
    if (!at.inside) return;
    const unsigned row = index[at.row];
    if (row == no_row) return;
    out[static_cast<long long>(row) * vectors_per_row + at.vector] = in[at.row * vectors_per_row + at.vector];
}
REGISTER_KERNEL(scatter_rows);

extern "C" __global__ void __launch_bounds__(rows_threads)
    copy_columns(const uint4* __restrict__ in, uint4* __restrict__ out, int count, int width, int in_leading,
                 int out_leading) {
    const RowVector at = find_row_vector(count, width / vector_width);
    if (!at.inside) return;
    out[at.row * (out_leading / vector_width) + at.vector] = in[at.row * (in_leading / vector_width) + at.vector];
}
REGISTER_KERNEL(copy_columns);
