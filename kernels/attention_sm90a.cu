// attention.cu's forward for Hopper, heads of 64 and 128: TMA and wgmma, the weights p kept in registers between both products
// (Shah et al. 2024, "FlashAttention-3", without its intra-warpgroup overlap).
//
// Equation, shapes, types and the order of sums as there; tiles of 128 keys. A block owns 128 queries of one head: one
// warpgroup's first thread loads, two warpgroups compute 64 queries each, so that the softmax of one runs under the products of
// the other. Queries, keys and values come as tensor maps over whole matrices [T, heads · D], boxes of 128 rows; rows of the next
// sample that a box holds are never visible, and rows of queries beyond the sample are not written.
#include "common/attention_tile.h"
#include "common/running_softmax.h"
#include "ptx/barrier.h"
#include "ptx/wgmma.h"

constexpr int hopper_attention_threads = 384, hopper_rows = 128, hopper_warpgroup = 128;

template <int D>
struct HopperAttention {
    static constexpr int boxes = D / box_columns, box_bytes = hopper_rows * box_row_bytes;
    static constexpr int tile_bytes = boxes * box_bytes, stages = 2, consumers = 2;
    struct Shared {
        unsigned char queries[tile_bytes];
        unsigned char keys[stages][tile_bytes], values[stages][tile_bytes];
        Mbarrier queries_full, keys_full[stages], keys_empty[stages], values_full[stages], values_empty[stages];
    };
};

// Loads `D` columns of 128 rows, box after box.
template <int D>
DEVICE void load_hopper_tile(unsigned char* tile, const TensorMap& map, int row, int column, Mbarrier* full) {
    using Layout = HopperAttention<D>;
    mbarrier_arrive_expecting(full, Layout::tile_bytes);
    for (int box = 0; box < Layout::boxes; box++)
        tma_load(tile + box * Layout::box_bytes, map, row, column + box * box_columns, full);
}

template <class T, int D>
DEVICE void attention_forward_sm90a(const TensorMap& q, const TensorMap& k, const TensorMap& v, T* __restrict__ out,
                                    float* __restrict__ log_sum, const int* __restrict__ tiles, int query_heads,
                                    int key_value_heads, const Score& score, int window) {
    using Layout = HopperAttention<D>;
    DYNAMIC_SHARED(bytes, 1024);
    auto& shared = *reinterpret_cast<typename Layout::Shared*>(bytes);
    const SampleTile tile = find_sample_tile(tiles);
    // Tiles are of 64 rows: of each two of a sample the first stands for both.
    if (tile.rows() == 0 || (tile.first - tile.begin) / outer_rows % 2) return;
    const int head = blockIdx.y, key_head = key_head_of(head, query_heads, key_value_heads);
    const int first_key = window ? max(tile.begin, tile.first - window + 1) : tile.begin;
    const int end_row = min(tile.end, tile.first + hopper_rows);
    const int blocks = (end_row - first_key + hopper_rows - 1) / hopper_rows;

    if (threadIdx.x == 0) {
        mbarrier_init(&shared.queries_full, 1);
        for (int i = 0; i < Layout::stages; i++) {
            mbarrier_init(&shared.keys_full[i], 1);
            mbarrier_init(&shared.values_full[i], 1);
            mbarrier_init(&shared.keys_empty[i], Layout::consumers * hopper_warpgroup / 32);
            mbarrier_init(&shared.values_empty[i], Layout::consumers * hopper_warpgroup / 32);
        }
        fence_mbarrier_init();
    }
    __syncthreads();

    if (threadIdx.x < hopper_warpgroup) {
        give_registers<24>();
        if (threadIdx.x > 0) return;
        load_hopper_tile<D>(shared.queries, q, tile.first, head * D, &shared.queries_full);
        for (int block = 0; block < blocks; block++) {
            const int stage = block % Layout::stages, row = first_key + block * hopper_rows;
            const unsigned parity = (block / Layout::stages & 1) ^ 1;
            mbarrier_wait(&shared.keys_empty[stage], parity);
            load_hopper_tile<D>(shared.keys[stage], k, row, key_head * D, &shared.keys_full[stage]);
            mbarrier_wait(&shared.values_empty[stage], parity);
            load_hopper_tile<D>(shared.values[stage], v, row, key_head * D, &shared.values_full[stage]);
        }
        return;
    }

    take_registers<240>();
    const int lane = threadIdx.x % 32, consumer = threadIdx.x / hopper_warpgroup - 1;
    // Of the warp's 16 queries a lane holds rows lane/4 and lane/4 + 8.
    const int own_row = consumer * 64 + threadIdx.x % hopper_warpgroup / 32 * 16 + lane / 4;
    const unsigned char* own_queries = shared.queries + consumer * 64 * box_row_bytes;
    const auto release = [&](Mbarrier* empty) {
        if (lane == 0) mbarrier_arrive(empty);
    };

    float sums[D / 2], weights[hopper_rows / 2];
    RunningSoftmax softmax;
#pragma unroll
    for (int i = 0; i < D / 2; i++) sums[i] = 0.f;
    mbarrier_wait(&shared.queries_full, 0);
    for (int block = 0; block < blocks; block++) {
        const int stage = block % Layout::stages;
        const unsigned parity = block / Layout::stages & 1;
        mbarrier_wait(&shared.keys_full[stage], parity);
        wgmma_fence(weights);
#pragma unroll
        for (int step = 0; step < D / 16; step++) {
            const int at = step / 4 * Layout::box_bytes + step % 4 * 32;
            wgmma<T, hopper_rows, false>(weights, wgmma_operand(own_queries + at), wgmma_operand(shared.keys[stage] + at), step > 0);
        }
        wgmma_commit();
        wgmma_wait<0>(weights);
        release(&shared.keys_empty[stage]);

        softmax.step<hopper_rows, D>([&](int j, int i) -> float& { return weights[j * 4 + i]; },
                                              [&](int j, int i) -> float& { return sums[j * 4 + i]; },
                                              [&](int half, int key, float product) {
                                                  const int query = tile.first + own_row + half * 8;
                                                  const bool seen = is_visible(query, first_key + block * hopper_rows + key, window);
                                                  return seen ? score.value(product) * log2_of_e : -INFINITY;
                                              });

        // The accumulators' layout is that of A's fragments.
        uint32_t rounded[hopper_rows / 16][4];
#pragma unroll
        for (int step = 0; step < hopper_rows / 16; step++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                rounded[step][i] = pack2<T>(weights[(2 * step + i / 2) * 4 + i % 2 * 2], weights[(2 * step + i / 2) * 4 + i % 2 * 2 + 1]);
        mbarrier_wait(&shared.values_full[stage], parity);
        wgmma_fence(sums);
#pragma unroll
        for (int step = 0; step < hopper_rows / 16; step++)
            wgmma_registers<T, D, true>(sums, rounded[step],
                                        wgmma_operand(shared.values[stage] + step * 16 * box_row_bytes, Layout::box_bytes), true);
        wgmma_commit();
        wgmma_wait<0>(sums);
        release(&shared.values_empty[stage]);
    }

    softmax.finish();
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = tile.first + own_row + half * 8;
        if (row >= end_row) continue;
        const long long at = static_cast<long long>(row) * query_heads + head;
        if (lane % 4 == 0) log_sum[at] = softmax.log_sum(half);
        const float inverse = 1.f / softmax.total[half];
#pragma unroll
        for (int j = 0; j < D / 8; j++)
            store2(out + at * D + j * 8 + lane % 4 * 2, sums[j * 4 + 2 * half] * inverse, sums[j * 4 + 2 * half + 1] * inverse);
    }
}

// Grid: one block a tile (of 64 rows) in x, the query heads in y. Dynamic shared memory: 5 · 128 · D · 2 bytes and 1 KiB.
#define EXPORT_HOPPER_ATTENTION(D, type) \
    EXPORT_KERNEL_AS(attention_forward_sm90a_d##D##_##type, type, (hopper_attention_threads, 1), \
                     (const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k, \
                      const __grid_constant__ TensorMap v, T* out, float* log_sum, const int* tiles, int query_heads, \
                      int key_value_heads, float scale, float soft_cap, int window), \
                     (attention_forward_sm90a<T, D>(q, k, v, out, log_sum, tiles, query_heads, key_value_heads, \
                                                    Score{scale, {soft_cap}}, window)))
EXPORT_HOPPER_ATTENTION(64, f16)
EXPORT_HOPPER_ATTENTION(128, f16)
EXPORT_HOPPER_ATTENTION(64, bf16)
EXPORT_HOPPER_ATTENTION(128, bf16)
