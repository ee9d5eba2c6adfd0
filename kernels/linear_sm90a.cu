// linear.cu for Hopper: the same products over TMA and wgmma (common/hopper_matmul.h).
//
//   forward          y = residual + bias + x · Wᵀ + s · B̂ᵀ
//   backward_input   dx = dy · W + mask ∘ (ds · A)
//
// Shapes, types and the order of sums by k (the adapters' first) as there. The adapters' share is one more stretch of k with
// its own pair of operands into the same accumulators. Matrices come as tensor maps: A's boxes have 128 rows, B's TILE_N (forward)
// or 64 (backward_input), those of y, dx and residual 64; s, B̂ and ds end at their R columns.
#include "common/hopper_matmul.h"
#include "common/philox.h"
#include "common/rank_range.h"

constexpr int hopper_threads = 384;

// What both directions share. ranks(n): the stretch of ranks of the tile at column n; scale(m, n, …): applied to the adapters'
// share.
template <class T, bool B_IS_MN, int TILE_N, class Ranks, class Scale>
DEVICE void hopper_linear(const TensorMap& a, const TensorMap& b, const TensorMap& adapter_a, const TensorMap& adapter_b,
                          const TensorMap& residual, const TensorMap& out, const T* bias, bool has_residual, int rows, int columns,
                          int depth, const Ranks& ranks, bool has_scale, const Scale& scale) {
    using Matmul = HopperMatmul<T, B_IS_MN, TILE_N>;
    DYNAMIC_SHARED(shared, 1024);
    const int m_tiles = (rows + Matmul::tile_m - 1) / Matmul::tile_m, n_tiles = (columns + TILE_N - 1) / TILE_N;
    const int tiles = m_tiles * n_tiles;
    Matmul::begin(shared);
    typename Matmul::Ring ring;

    if (threadIdx.x < Matmul::warpgroup) {
        give_registers<24>();
        if (threadIdx.x > 0) return;
        for (int index = blockIdx.x; index < tiles; index += gridDim.x) {
            const TilePlace tile = find_tile(index, m_tiles, n_tiles, Matmul::tile_m, TILE_N);
            const int2 stretch = ranks(tile.n);
            Matmul::load(shared, ring, adapter_a, adapter_b, tile.m, tile.n, stretch.x, stretch.y);
            Matmul::load(shared, ring, a, b, tile.m, tile.n, 0, depth);
        }
        return;
    }

    take_registers<240>();
    const int consumer = threadIdx.x / Matmul::warpgroup - 1, barrier_id = 1 + consumer;
    const bool is_first = threadIdx.x % Matmul::warpgroup == 0;
    const int first_row = consumer * Matmul::rows_of_consumer;
    Mbarrier* residual_landed = &Matmul::barriers(shared).residual[consumer];
    // The consumer's rows of box `box` on their way out; before, its rows of the residual.
    const auto out_box = [&](int box) {
        return Matmul::out(shared) + box * Matmul::out_box_bytes + first_row * box_row_bytes;
    };
    const auto load_residual = [&](int index) {
        if (!has_residual || index >= tiles) return;
        const TilePlace tile = find_tile(index, m_tiles, n_tiles, Matmul::tile_m, TILE_N);
        mbarrier_arrive_expecting(residual_landed, Matmul::out_bytes / Matmul::consumers);
        for (int box = 0; box < Matmul::boxes_of_tile; box++)
            tma_load(out_box(box), residual, tile.m + first_row, tile.n + box * box_columns, residual_landed);
    };
    if (is_first) load_residual(blockIdx.x);
    unsigned residual_parity = 0;

    float sums[TILE_N / 2];
    for (int index = blockIdx.x; index < tiles; index += gridDim.x) {
        const TilePlace tile = find_tile(index, m_tiles, n_tiles, Matmul::tile_m, TILE_N);
        const int2 stretch = ranks(tile.n);
        bool any = false;
        Matmul::accumulate(sums, shared, ring, consumer, stretch.x, stretch.y, any);
        // The mask belongs to the adapters' share alone, which is all that the accumulators hold so far.
        if (has_scale && any) {
            Matmul::finish(sums, shared, ring);
            Matmul::for_each_pair(sums, consumer, [&](int row, int column, float& first, float& second) {
                if (tile.m + row < rows) scale(tile.m + row, tile.n + column, first, second);
            });
        }
        Matmul::accumulate(sums, shared, ring, consumer, 0, depth, any);
        Matmul::finish(sums, shared, ring);

        if (has_residual) {
            mbarrier_wait(residual_landed, residual_parity);
            residual_parity ^= 1;
        } else {
            if (is_first) tma_store_wait_read();  // of the previous tile
            named_barrier_sync(barrier_id, Matmul::warpgroup);
        }
        Matmul::for_each_pair(sums, consumer, [&](int row, int column, float& first, float& second) {
            T* place = Matmul::out_pair(shared, row, column);
            float added[2];
            if (bias && tile.n + column < columns) {
                load2(added, bias + tile.n + column);
                first += added[0];
                second += added[1];
            }
            if (has_residual) {
                load2(added, place);
                first += added[0];
                second += added[1];
            }
            store2(place, first, second);
        });
        fence_async_proxy();
        named_barrier_sync(barrier_id, Matmul::warpgroup);
        if (is_first) {
            for (int box = 0; box < Matmul::boxes_of_tile; box++)
                tma_store(out, out_box(box), tile.m + first_row, tile.n + box * box_columns);
            tma_store_commit();
            if (has_residual) {
                tma_store_wait_read();
                load_residual(index + gridDim.x);
            }
        }
    }
    if (is_first) tma_store_wait_read();
}

template <class T, int TILE_N>
DEVICE void linear_forward_sm90a(const TensorMap& x, const TensorMap& w, const TensorMap& s, const TensorMap& b_hat,
                                 const TensorMap& residual, const TensorMap& y, const T* bias, const int* slots, int has_residual,
                                 int tokens, int in_features, int out_features, int adapters) {
    hopper_linear<T, false, TILE_N>(
        x, w, s, b_hat, residual, y, bias, has_residual, tokens, out_features, in_features,
        [&](int n) { return rank_range(slots, adapters, n, n + TILE_N); }, false, [](int, int, float&, float&) {});
}

template <class T, int TILE_N>
DEVICE void linear_backward_input_sm90a(const TensorMap& dy, const TensorMap& w, const TensorMap& ds, const TensorMap& a,
                                        const TensorMap& dx, int tokens, int in_features, int out_features, int rank,
                                        const DropoutMask& mask) {
    hopper_linear<T, true, TILE_N>(
        dy, w, ds, a, dx, dx, static_cast<const T*>(nullptr), false, tokens, in_features, out_features,
        [&](int) { return make_int2(0, rank); }, mask.positions != nullptr,
        [&](int token, int feature, float& first, float& second) {
            const PhiloxWords four = mask.words(token, feature / 4);  // an even feature and the next share their four
            first *= mask.factor(feature & 2 ? four.words[2] : four.words[0]);
            second *= mask.factor(feature & 2 ? four.words[3] : four.words[1]);
        });
}

// Grid of both: as many blocks as multiprocessors, at most ceil(T / 128) · ceil(width / TILE_N) tiles, width being O forward
// and I backward. 227 KiB of dynamic shared memory. residual may be y. Absent adapters (adapters = 0, R = 0)
// or residual: any map.
#define EXPORT_LINEAR(TILE_N, type) \
    EXPORT_KERNEL_AS(linear_forward_sm90a_n##TILE_N##_##type, type, (hopper_threads, 1), \
                     (const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w, \
                      const __grid_constant__ TensorMap s, const __grid_constant__ TensorMap b_hat, \
                      const __grid_constant__ TensorMap residual, const __grid_constant__ TensorMap y, const T* bias, \
                      const int* slots, int has_residual, int tokens, int in_features, int out_features, int adapters), \
                     (linear_forward_sm90a<T, TILE_N>(x, w, s, b_hat, residual, y, bias, slots, has_residual, tokens, \
                                                      in_features, out_features, adapters))) \
    EXPORT_KERNEL_AS(linear_backward_input_sm90a_n##TILE_N##_##type, type, (hopper_threads, 1), \
                     (const __grid_constant__ TensorMap dy, const __grid_constant__ TensorMap w, \
                      const __grid_constant__ TensorMap ds, const __grid_constant__ TensorMap a, \
                      const __grid_constant__ TensorMap dx, int tokens, int in_features, int out_features, int rank, \
                      const unsigned* positions, const unsigned* samples, unsigned seed_low, unsigned seed_high, \
                      const unsigned* epoch, unsigned input, unsigned threshold, float keep_scale), \
                     (linear_backward_input_sm90a<T, TILE_N>( \
                         dy, w, ds, a, dx, tokens, in_features, out_features, rank, \
                         DropoutMask{positions, samples, seed_low, seed_high, epoch, input, threshold, keep_scale})))

EXPORT_LINEAR(128, f16)
EXPORT_LINEAR(192, f16)
EXPORT_LINEAR(256, f16)
EXPORT_LINEAR(128, bf16)
EXPORT_LINEAR(192, bf16)
EXPORT_LINEAR(256, bf16)
