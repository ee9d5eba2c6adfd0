// Linear layers with LoRA (Hu et al. 2021), the frozen product and the adapters' share in one kernel; projections that read
// the same input run as one, their weights' rows one below the other.
//
//   forward          y = residual + bias + x · Wᵀ + s · B̂ᵀ
//   backward_input   dx = dy · W + mask ∘ (ds · A)
//
// x [T, I], W [O, I], y [T, O], dy [T, O], dx [T, I], residual [T, O], bias [O]; s, ds [T, R] (lora.cu) with leading dimension R̄,
// R rounded up to a multiple of 8; B̂ [O, R] (leading R̄): α/r · B of each projection in its own rows and columns, zero
// elsewhere; A [R, I]. All in T (f16 or bf16), I and O multiples of 8; sums in f32 in the accumulators of mma, in the order
// of k, the adapters' k first; rounded once. residual, bias, and the adapters (R = 0) may be absent.
//
// The adapters' share rides in the same accumulators as one more stretch of k. Of B̂ a tile reads only the columns of the
// projections in which it lies; the others are zero.
#include "common/matmul_tile.h"
#include "common/philox.h"
#include "common/rank_range.h"

constexpr int linear_tile = 128;
template <class T, Major B_MAJOR>
using LinearTile = MatmulTile<T, Major::k, B_MAJOR, linear_tile, linear_tile, 2, 4>;
constexpr int linear_threads = 256;

// Adds what is given and writes eight neighbouring elements of a row, fewer at the right edge.
template <class T>
DEVICE void add_and_store(T* out, const T* bias, const T* residual, long long row, int column, int width,
                          float (&values)[chunk]) {
    const long long at = row * width + column;
    float added[chunk];  // widths are multiples of 8: an eight is inside or outside as a whole
    if (bias) {
        load8(added, bias + column);
#pragma unroll
        for (int i = 0; i < chunk; i++) values[i] += added[i];
    }
    if (residual) {
        load8(added, residual + at);
#pragma unroll
        for (int i = 0; i < chunk; i++) values[i] += added[i];
    }
    store8(out + at, values);
}

template <class T>
DEVICE void linear_forward(const T* __restrict__ x, const T* __restrict__ w, const T* __restrict__ bias,
                           const T* residual, const T* __restrict__ s, const T* __restrict__ b_hat,
                           const int* __restrict__ slots, T* y, int tokens, int in_features, int out_features, int adapters,
                           int rank_leading) {
    using Tile = LinearTile<T, Major::k>;
    DYNAMIC_SHARED(shared, 128);
    const int m_tiles = (tokens + linear_tile - 1) / linear_tile, n_tiles = (out_features + linear_tile - 1) / linear_tile;
    const TilePlace tile = find_tile(blockIdx.x, m_tiles, n_tiles, linear_tile, linear_tile);
    typename Tile::Accumulators sums;
    Tile::clear(sums);
    const int2 ranks = rank_range(slots, adapters, tile.n, tile.n + linear_tile);
    if (ranks.x < ranks.y)
        Tile::accumulate(sums, shared, Operand<T>{s, tokens, rank_leading}, Operand<T>{b_hat, out_features, rank_leading},
                         tile.m, tile.n, ranks.x, ranks.y);
    Tile::accumulate(sums, shared, Operand<T>{x, tokens, in_features}, Operand<T>{w, out_features, in_features}, tile.m,
                     tile.n, 0, in_features);
    Tile::store(sums, shared, [&](int row, int column, float (&values)[chunk]) {
        if (tile.m + row < tokens && tile.n + column < out_features)
            add_and_store(y, bias, residual, tile.m + row, tile.n + column, out_features, values);
    });
}

template <class T>
DEVICE void linear_backward_input(const T* __restrict__ dy, const T* __restrict__ w, const T* __restrict__ ds,
                                  const T* __restrict__ a, T* __restrict__ dx, int tokens, int in_features,
                                  int out_features, int rank, int rank_leading, const DropoutMask& mask) {
    using Tile = LinearTile<T, Major::mn>;
    DYNAMIC_SHARED(shared, 128);
    const int m_tiles = (tokens + linear_tile - 1) / linear_tile, n_tiles = (in_features + linear_tile - 1) / linear_tile;
    const TilePlace tile = find_tile(blockIdx.x, m_tiles, n_tiles, linear_tile, linear_tile);
    typename Tile::Accumulators sums;
    Tile::clear(sums);
    if (rank > 0) {
        Tile::accumulate(sums, shared, Operand<T>{ds, tokens, rank_leading}, Operand<T>{a, in_features, in_features},
                         tile.m, tile.n, 0, rank);
        // The mask belongs to the adapters' share alone, which is all that the accumulators hold so far.
        if (mask.positions)
            Tile::for_each(sums, [&](int row, int column, float& value) {
                const int token = tile.m + row, feature = tile.n + column;
                if (token < tokens) value *= mask.factor(mask.word(token, feature));
            });
    }
    Tile::accumulate(sums, shared, Operand<T>{dy, tokens, out_features}, Operand<T>{w, in_features, in_features}, tile.m,
                     tile.n, 0, out_features);
    Tile::store(sums, shared, [&](int row, int column, float (&values)[chunk]) {
        if (tile.m + row < tokens && tile.n + column < in_features)
            add_and_store<T>(dx, nullptr, nullptr, tile.m + row, tile.n + column, in_features, values);
    });
}

// Grid of both: ceil(T / 128) · ceil(width / 128) blocks, width being O forward and I backward; 64 KiB of dynamic shared
// memory. residual may be y.
EXPORT_HALF_KERNELS(linear_forward, linear_threads,
                    (const T* x, const T* w, const T* bias, const T* residual, const T* s, const T* b_hat,
                     const int* slots, T* y, int tokens, int in_features, int out_features, int adapters,
                     int rank_leading),
                    (x, w, bias, residual, s, b_hat, slots, y, tokens, in_features, out_features, adapters, rank_leading))
EXPORT_HALF_KERNELS(linear_backward_input, linear_threads,
                    (const T* dy, const T* w, const T* ds, const T* a, T* dx, int tokens, int in_features,
                     int out_features, int rank, int rank_leading, const unsigned* positions, const unsigned* samples,
                     unsigned seed_low, unsigned seed_high, const unsigned* epoch, unsigned input,
                     unsigned threshold, float keep_scale),
                    (dy, w, ds, a, dx, tokens, in_features, out_features, rank, rank_leading,
                     DropoutMask{positions, samples, seed_low, seed_high, epoch, input, threshold, keep_scale}))
