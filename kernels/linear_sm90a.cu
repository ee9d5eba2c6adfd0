// linear.cu for Hopper: the same products over TMA and wgmma (common/hopper_matmul.h), and two that go on before they leave.
//
//   forward          y = residual + bias + x · Wᵀ + s · B̂ᵀ
//   forward_rotated  the same without residual for queries, keys and values; heads of queries and keys rotated as by rope.cu
//   forward_gated    the same for gate | up, without residual, and act = f(gate) · up as by gated_activation.cu; where it is
//                    wanted, s = act · Aᵀ of down as partial sums
//   backward_input   dx = dy · W + mask ∘ (ds · A)
//
// Shapes, types and the order of sums by k (the adapters' first) as there; what is rounded, too: the bits are those of the
// separate kernels, but for the s of down, whose sum is cut at every tile. The adapters' share is one more stretch of k with its own pair of operands into the same accumulators.
// Matrices come as tensor maps: boxes of x, dy, s and ds have 128 rows, those of y, act, dx and residual 64, those of W and B̂
// TILE_N / 2, or 64 in backward_input as A's; s, B̂ and ds end at their R columns.
#include "common/gated.h"
#include "common/hopper_matmul.h"
#include "common/philox.h"
#include "common/rank_range.h"
#include "common/rotated_sums.h"
#include "common/shares_of_s.h"

constexpr int hopper_threads = 384;

struct HopperOperands {
    const TensorMap &a, &b, &adapter_a, &adapter_b;
};

// The loop of a block over its tiles, for all products of this file. `ranks(tile)`: the stretch of ranks of a tile. The
// epilogue says where a tile's columns stand and takes finished sums to memory.
template <class Matmul, class Ranks, class Epilogue>
DEVICE void hopper_linear(const HopperOperands& operands, int rows, int columns, int depth, const Ranks& ranks, Epilogue epilogue) {
    DYNAMIC_SHARED(shared, 1024);
    // Tiles of a cluster: those of its blocks below each other. Of an odd last one the second block computes zeros that the TMA
    // does not write.
    const int is_pair = cluster_block_count() - 1, cluster_rows = Matmul::tile_m << is_pair;
    const int m_tiles = (rows + cluster_rows - 1) / Matmul::tile_m >> is_pair;
    const int n_tiles = (columns + Epilogue::tile_columns - 1) / Epilogue::tile_columns, tiles = m_tiles * n_tiles;
    const int first_tile = blockIdx.x >> is_pair, tile_step = gridDim.x >> is_pair;
    const auto tile_at = [&](int index) {
        const TilePlace place = find_tile(index, m_tiles, n_tiles, cluster_rows, Epilogue::tile_columns);
        const int own_m = place.m + static_cast<int>(cluster_block()) * Matmul::tile_m;
        return HopperTile{own_m, place.n, epilogue.high_half(place.n)};
    };
    Matmul::begin(shared);
    typename Matmul::Ring ring;

    if (threadIdx.x < Matmul::warpgroup) {
        give_registers<24>();
        if (threadIdx.x > 0) return;
        for (int index = first_tile; index < tiles; index += tile_step) {
            const HopperTile tile = tile_at(index);
            const int2 stretch = ranks(tile);
            Matmul::load(shared, ring, operands.adapter_a, operands.adapter_b, tile, stretch.x, stretch.y);
            Matmul::load(shared, ring, operands.a, operands.b, tile, 0, depth);
            epilogue.load(shared, ring, tile);
        }
        Matmul::end();
        return;
    }

    take_registers<240>();
    const HopperConsumer<Matmul> consumer{shared, static_cast<int>(threadIdx.x) / Matmul::warpgroup - 1};
    if (first_tile < tiles) epilogue.begin(consumer, tile_at(first_tile));
    float sums[Matmul::tile_n / 2];
    for (int index = first_tile; index < tiles; index += tile_step) {
        const HopperTile tile = tile_at(index);
        const int2 stretch = ranks(tile);
        bool any = false;
        Matmul::accumulate(sums, shared, ring, consumer.index, stretch.x, stretch.y, any);
        if (Epilogue::scales_adapters && any) {
            Matmul::finish(sums, shared, ring);
            epilogue.scale_adapters(consumer, tile, sums);
        }
        Matmul::accumulate(sums, shared, ring, consumer.index, 0, depth, any);
        Matmul::finish(sums, shared, ring);
        epilogue.finish(consumer, ring, tile, sums);
        const int next = index + tile_step;
        if (next < tiles) epilogue.begin(consumer, tile_at(next));
    }
    if (consumer.is_first()) tma_store_wait_read();
    Matmul::end();
}

// What an epilogue does nowhere but at a tile's end.
template <class Matmul>
struct EpilogueBase {
    using T = typename Matmul::T;
    using Sums = float[Matmul::tile_n / 2];
    static constexpr bool scales_adapters = false;
    // By the producer, behind a tile's own loads.
    __device__ __forceinline__ void load(unsigned char*, typename Matmul::Ring&, const HopperTile&) const {}
    // By a consumer, before a tile.
    __device__ __forceinline__ void begin(const HopperConsumer<Matmul>&, const HopperTile&) {}
    __device__ __forceinline__ void scale_adapters(const HopperConsumer<Matmul>&, const HopperTile&, Sums&) const {}
};

// A product whose columns stand side by side leaves as it is.
template <class Matmul>
struct PlainEpilogue : EpilogueBase<Matmul> {
    using typename EpilogueBase<Matmul>::Sums;
    static constexpr int tile_columns = Matmul::tile_n;
    const TensorMap& out;
    int rows, columns;

    __device__ __forceinline__ int high_half(int n) const { return n + Matmul::tile_n / 2; }

    // Rounds the sums into the tile that leaves.
    static __device__ __forceinline__ void stage(const HopperConsumer<Matmul>& consumer, Sums& sums) {
        Matmul::for_each_pair(sums, consumer.index, [&](int row, int column, float& first, float& second) {
            store2(Matmul::out_pair(consumer.shared, row, column), first, second);
        });
    }
    __device__ __forceinline__ void send(const HopperConsumer<Matmul>& consumer, const HopperTile& tile) const {
        fence_async_proxy();
        consumer.meet();
        if (!consumer.is_first()) return;
        consumer.send(out, 0, Matmul::boxes_of_tile, tile.m, tile.low);
        tma_store_commit();
    }
    __device__ __forceinline__ void finish(const HopperConsumer<Matmul>& consumer, typename Matmul::Ring& ring, const HopperTile& tile,
                                           Sums& sums) {
        consumer.wait_until_free();
        stage(consumer, sums);
        send(consumer, tile);
    }
};

template <class Matmul>
DEVICE void add_bias(const typename Matmul::T* bias, int columns, const HopperConsumer<Matmul>& consumer, const HopperTile& tile,
                     float (&sums)[Matmul::tile_n / 2]) {
    if (!bias) return;
    Matmul::for_each_pair(sums, consumer.index, [&](int, int column, float& first, float& second) {
        constexpr int half = Matmul::tile_n / 2;
        const int begin = column < half ? tile.low : tile.high - half;
        if (begin + column >= columns) return;
        float added[2];
        load2(added, bias + begin + column);
        first += added[0];
        second += added[1];
    });
}

// The residual's tile comes to where the sum leaves, as soon as the tile before has left.
template <class Matmul>
struct ResidualEpilogue : PlainEpilogue<Matmul> {
    using Base = PlainEpilogue<Matmul>;
    const TensorMap& residual;
    const typename Matmul::T* bias;
    bool has_residual;
    unsigned parity = 0;

    __device__ __forceinline__ void begin(const HopperConsumer<Matmul>& consumer, const HopperTile& tile) {
        if (!has_residual || !consumer.is_first()) return;
        Mbarrier* landed = &Matmul::barriers(consumer.shared).residual[consumer.index];
        tma_store_wait_read();
        mbarrier_arrive_expecting(landed, Matmul::out_bytes / Matmul::consumers);
        for (int box = 0; box < Matmul::boxes_of_tile; box++)
            tma_load(consumer.out_box(box), residual, tile.m + consumer.first_row(), tile.low + box * box_columns, landed);
    }
    __device__ __forceinline__ void finish(const HopperConsumer<Matmul>& consumer, typename Matmul::Ring& ring, const HopperTile& tile,
                                           typename Base::Sums& sums) {
        add_bias(bias, this->columns, consumer, tile, sums);
        if (!has_residual) return Base::finish(consumer, ring, tile, sums);
        mbarrier_wait(&Matmul::barriers(consumer.shared).residual[consumer.index], parity);
        parity ^= 1;
        Matmul::for_each_pair(sums, consumer.index, [&](int row, int column, float& first, float& second) {
            auto* place = Matmul::out_pair(consumer.shared, row, column);
            float added[2];
            load2(added, place);
            store2(place, first + added[0], second + added[1]);
        });
        this->send(consumer, tile);
    }
};

// The dropout mask belongs to the adapters' share alone, which is all that the accumulators hold at first.
template <class Matmul>
struct MaskedEpilogue : PlainEpilogue<Matmul> {
    using Base = PlainEpilogue<Matmul>;
    static constexpr bool scales_adapters = true;
    const DropoutMask& mask;

    __device__ __forceinline__ void scale_adapters(const HopperConsumer<Matmul>& consumer, const HopperTile& tile,
                                                   typename Base::Sums& sums) const {
        if (!mask.positions) return;
        Matmul::for_each_pair(sums, consumer.index, [&](int row, int column, float& first, float& second) {
            const int token = tile.m + row, feature = tile.low + column;
            if (token >= this->rows) return;
            const PhiloxWords four = mask.words(token, feature / 4);  // an even feature and the next share their four
            first *= mask.factor(feature & 2 ? four.words[2] : four.words[0]);
            second *= mask.factor(feature & 2 ? four.words[3] : four.words[1]);
        });
    }
};

// Rotates the heads of D columns that begin before `rotated_columns`.
template <class Matmul, int D>
DEVICE void rotate_heads(const Angles& angles, int rows, int rotated_columns, const HopperConsumer<Matmul>& consumer,
                         const HopperTile& tile, float (&sums)[Matmul::tile_n / 2]) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = tile.m + Matmul::own_row(consumer.index) + half * 8;
        if (row >= rows) continue;
        for_each_angle<D>(angles.of(row), [&](int j, float2 cosines, float2 sines) {
#pragma unroll
            for (int head = 0; head < Matmul::tile_n / D; head++)
                if (tile.low + head * D < rotated_columns)
                    rotate_two_pairs<typename Matmul::T, D>(sums + (head * (D / 8) + j) * 4 + half * 2, cosines, sines);
        });
    }
}

template <class Matmul>
struct RotatedEpilogue : PlainEpilogue<Matmul> {
    using Base = PlainEpilogue<Matmul>;
    const typename Matmul::T* bias;
    Angles angles;
    int rotated_columns;

    __device__ __forceinline__ void finish(const HopperConsumer<Matmul>& consumer, typename Matmul::Ring& ring, const HopperTile& tile,
                                           typename Base::Sums& sums) {
        add_bias(bias, this->columns, consumer, tile, sums);
        if (angles.half_rotated == 32)
            rotate_heads<Matmul, 64>(angles, this->rows, rotated_columns, consumer, tile, sums);
        else if constexpr (Matmul::tile_n % 128 == 0)
            rotate_heads<Matmul, 128>(angles, this->rows, rotated_columns, consumer, tile, sums);
        Base::finish(consumer, ring, tile, sums);
    }
};

// A tile's low half is of the gate, its high half the same columns of up. Both leave first; from where they stand act is
// computed, eight columns of a row at a time, and it leaves from the gate's place. There its share of s for the adapter of down is
// taken, if it is wanted: stretches of tile_columns.
template <class Matmul>
struct GatedEpilogue : EpilogueBase<Matmul> {
    using typename EpilogueBase<Matmul>::T, typename EpilogueBase<Matmul>::Sums;
    static constexpr int half = Matmul::tile_n / 2, tile_columns = half, boxes = Matmul::boxes_of_tile / 2;
    const TensorMap &gate, &up, &act, &down_a;
    const T* bias;
    SharesOfS down_shares;
    int rows, width;
    bool is_gelu;

    __device__ __forceinline__ int high_half(int n) const { return width + n; }
    __device__ __forceinline__ void load(unsigned char* shared, typename Matmul::Ring& ring, const HopperTile& tile) const {
        if (down_shares.are_wanted()) Matmul::load_beside(shared, ring, down_a, tile.low, boxes);
    }

    __device__ __forceinline__ void finish(const HopperConsumer<Matmul>& consumer, typename Matmul::Ring& ring, const HopperTile& tile,
                                           Sums& sums) {
        add_bias<Matmul>(bias, 2 * width, consumer, tile, sums);
        consumer.wait_until_free();
        PlainEpilogue<Matmul>::stage(consumer, sums);
        fence_async_proxy();
        consumer.meet();
        if (consumer.is_first()) {
            consumer.send(gate, 0, boxes, tile.m, tile.low);
            consumer.send(up, boxes, boxes, tile.m, tile.low);
            tma_store_commit();
        }
        if (is_gelu) activate<GeluTanh>(consumer);
        else activate<Silu>(consumer);
        fence_async_proxy();
        consumer.meet();
        if (consumer.is_first()) {
            consumer.send(act, 0, boxes, tile.m, tile.low);
            tma_store_commit();
        }
        if (down_shares.are_wanted()) multiply_by_down(consumer, ring, tile);
    }

    // This tile's share of s = act · Aᵀ of down, A [r, F] with r at most 64: act stands where it leaves as wgmma wants it.
    __device__ __forceinline__ void multiply_by_down(const HopperConsumer<Matmul>& consumer, typename Matmul::Ring& ring,
                                                     const HopperTile& tile) const {
        float shares[share_ranks / 2];
        const uint64_t a = wgmma_operand(Matmul::take_beside(consumer.shared, ring)), own_act = wgmma_operand(consumer.out_box(0));
        wgmma_fence(shares);
#pragma unroll
        for (int box = 0; box < boxes; box++)
#pragma unroll
            for (int step = 0; step < box_columns / 16; step++)
                wgmma<T, share_ranks, false>(shares, wgmma_operand_after(own_act, box * Matmul::out_box_bytes + step * 32),
                                             wgmma_operand_after(a, box * share_ranks * box_row_bytes + step * 32),
                                             box + step > 0);
        wgmma_commit();
        wgmma_wait<0>(shares);
        Matmul::release_beside(consumer.shared, ring);
        down_shares.store(shares, tile.low / tile_columns, tile.m + Matmul::own_row(consumer.index), rows);
    }

    template <class F>
    static __device__ __forceinline__ void activate(const HopperConsumer<Matmul>& consumer) {
        constexpr int chunks = half / vector_width, rounds = Matmul::rows_of_consumer * chunks / Matmul::warpgroup;
        const auto place = [&](int round, int column) {
            const int linear = round * Matmul::warpgroup + threadIdx.x % Matmul::warpgroup;
            return Matmul::out_pair(consumer.shared, consumer.first_row() + linear / chunks, column + linear % chunks * vector_width);
        };
        Vector8<T> activated[rounds];
#pragma unroll
        for (int round = 0; round < rounds; round++) {
            float g[vector_width], u[vector_width];
            load8(g, place(round, 0));
            load8(u, place(round, half));
#pragma unroll
            for (int i = 0; i < vector_width; i++) activated[round].values[i] = from_float<T>(F::at(g[i]).value * u[i]);
        }
        consumer.wait_until_free();
#pragma unroll
        for (int round = 0; round < rounds; round++) *reinterpret_cast<uint4*>(place(round, 0)) = activated[round].bits;
    }
};

template <class T, int TILE_N>
DEVICE void linear_forward_sm90a(const HopperOperands& operands, const TensorMap& residual, const TensorMap& y, const T* bias,
                                 const int* slots, int has_residual, int tokens, int in_features, int out_features, int adapters) {
    using Matmul = HopperMatmul<T, false, TILE_N>;
    hopper_linear<Matmul>(
        operands, tokens, out_features, in_features,
        [&](const HopperTile& tile) { return rank_range(slots, adapters, tile.low, tile.low + TILE_N); },
        ResidualEpilogue<Matmul>{{{}, y, tokens, out_features}, residual, bias, has_residual != 0});
}

template <class T, int TILE_N>
DEVICE void linear_forward_rotated_sm90a(const HopperOperands& operands, const TensorMap& y, const T* bias, const int* slots,
                                         const Angles& angles, int rotated_columns, int tokens, int in_features,
                                         int out_features, int adapters) {
    using Matmul = HopperMatmul<T, false, TILE_N>;
    hopper_linear<Matmul>(
        operands, tokens, out_features, in_features,
        [&](const HopperTile& tile) { return rank_range(slots, adapters, tile.low, tile.low + TILE_N); },
        RotatedEpilogue<Matmul>{{{}, y, tokens, out_features}, bias, angles, rotated_columns});
}

template <class T, int TILE_N>
DEVICE void linear_forward_gated_sm90a(const HopperOperands& operands, const TensorMap& gate, const TensorMap& up,
                                       const TensorMap& act, const TensorMap& down_a, const T* bias, const int* slots,
                                       float* s_partials, int tokens, int in_features, int width, int adapters,
                                       int down_leading, int is_gelu) {
    using Matmul = HopperMatmul<T, false, TILE_N>;
    hopper_linear<Matmul>(
        operands, tokens, width, in_features,
        [&](const HopperTile& tile) {
            const int2 low = rank_range(slots, adapters, tile.low, min(tile.low + TILE_N / 2, width));
            const int2 high = rank_range(slots, adapters, tile.high, tile.high + TILE_N / 2);
            return make_int2(min(low.x, high.x), max(low.y, high.y));
        },
        GatedEpilogue<Matmul>{{}, gate, up, act, down_a, bias, {s_partials, tokens, down_leading}, tokens, width, is_gelu != 0});
}

template <class T, int TILE_N>
DEVICE void linear_backward_input_sm90a(const HopperOperands& operands, const TensorMap& dx, int tokens, int in_features,
                                        int out_features, int rank, const DropoutMask& mask) {
    using Matmul = HopperMatmul<T, true, TILE_N>;
    hopper_linear<Matmul>(operands, tokens, in_features, out_features, [&](const HopperTile&) { return make_int2(0, rank); },
                          MaskedEpilogue<Matmul>{{{}, dx, tokens, in_features}, mask});
}

// Grid of all: as many blocks as multiprocessors, at most ceil(T / 128) · ceil(width / TILE_N) tiles, width being O forward
// and I backward; in clusters of two at most ceil(T / 256) · ceil(width / TILE_N) pairs. 227 KiB of dynamic shared memory.
// residual may be y. Absent adapters (adapters = 0, R = 0) or residual: any map. Rotated: heads of 64 or, where TILE_N is a
// multiple of it, 128, rotated whole.
#define MAP const __grid_constant__ TensorMap
#define EXPORT_FORWARD(TILE_N, type) \
    EXPORT_KERNEL_AS(linear_forward_sm90a_n##TILE_N##_##type, type, (hopper_threads, 1), \
                     (MAP x, MAP w, MAP s, MAP b_hat, MAP residual, MAP y, const T* bias, const int* slots, int has_residual, \
                      int tokens, int in_features, int out_features, int adapters), \
                     (linear_forward_sm90a<T, TILE_N>({x, w, s, b_hat}, residual, y, bias, slots, has_residual, tokens, \
                                                      in_features, out_features, adapters))) \
    EXPORT_KERNEL_AS(linear_forward_rotated_sm90a_n##TILE_N##_##type, type, (hopper_threads, 1), \
                     (MAP x, MAP w, MAP s, MAP b_hat, MAP y, const T* bias, const int* slots, const float* table, \
                      const unsigned* positions, const unsigned* lengths, int first_row, int longer_than, int long_first_row, \
                      int head_dim, int rotated_columns, int tokens, int in_features, int out_features, int adapters), \
                     (linear_forward_rotated_sm90a<T, TILE_N>( \
                         {x, w, s, b_hat}, y, bias, slots, \
                         Angles{table, positions, lengths, first_row, longer_than, long_first_row, head_dim / 2}, \
                         rotated_columns, tokens, in_features, out_features, adapters)))
#define EXPORT_GATED_FORWARD(TILE_N, type) \
    EXPORT_KERNEL_AS(linear_forward_gated_sm90a_n##TILE_N##_##type, type, (hopper_threads, 1), \
                     (MAP x, MAP w, MAP s, MAP b_hat, MAP gate, MAP up, MAP act, MAP down_a, const T* bias, const int* slots, \
                      float* s_partials, int tokens, int in_features, int width, int adapters, int down_leading, int is_gelu), \
                     (linear_forward_gated_sm90a<T, TILE_N>({x, w, s, b_hat}, gate, up, act, down_a, bias, slots, s_partials, \
                                                            tokens, in_features, width, adapters, down_leading, is_gelu)))
#define EXPORT_BACKWARD_INPUT(TILE_N, type) \
    EXPORT_KERNEL_AS(linear_backward_input_sm90a_n##TILE_N##_##type, type, (hopper_threads, 1), \
                     (MAP dy, MAP w, MAP ds, MAP a, MAP dx, int tokens, int in_features, int out_features, int rank, \
                      const unsigned* positions, const unsigned* samples, unsigned seed_low, unsigned seed_high, \
                      const unsigned* epoch, unsigned input, unsigned threshold, float keep_scale), \
                     (linear_backward_input_sm90a<T, TILE_N>( \
                         {dy, w, ds, a}, dx, tokens, in_features, out_features, rank, \
                         DropoutMask{positions, samples, seed_low, seed_high, epoch, input, threshold, keep_scale})))
#define EXPORT_FOR(type) \
    EXPORT_FORWARD(128, type) \
    EXPORT_FORWARD(192, type) \
    EXPORT_FORWARD(256, type) \
    EXPORT_GATED_FORWARD(128, type) \
    EXPORT_GATED_FORWARD(256, type) \
    EXPORT_BACKWARD_INPUT(128, type) \
    EXPORT_BACKWARD_INPUT(192, type) \
    EXPORT_BACKWARD_INPUT(256, type)
EXPORT_FOR(f16)
EXPORT_FOR(bf16)
