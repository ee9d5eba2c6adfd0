// attention.cu's forward for Hopper, heads of 64 and 128: TMA and wgmma, the weights p kept in registers between both products,
// the softmax of a tile under the products of the tile before (Shah et al. 2024, "FlashAttention-3").
//
// Equation, shapes, types and the order of sums as there; tiles of 128 keys. A block owns 128 queries of one head: one
// warpgroup's first thread loads, two warpgroups compute 64 queries each, so that the softmax of one runs under the products of
// the other. Queries, keys and values come as tensor maps over whole matrices [T, heads · D], boxes of 64 rows; rows of the next
// sample that a box holds are never visible, and rows of queries beyond the sample are not written.
//
// Where it is wanted a block also takes its head's share of s = out · Aᵀ of the adapter that reads out: the 64×D of out that a
// warpgroup holds, rounded as they leave, by the head's columns of A. Counted for a token, reading out again takes 2·Q·D bytes,
// the shares, written and read, 8·Q·R̄.
#include "common/hopper_attention.h"
#include "common/running_softmax.h"
#include "common/shares_of_s.h"

template <int D>
struct HopperAttention {
    static constexpr int keys = 128, stages = 2;
    struct Shared {
        unsigned char queries[hopper_tile_bytes<D, hopper_rows>];
        unsigned char keys[stages][hopper_tile_bytes<D, HopperAttention::keys>];
        unsigned char values[stages][hopper_tile_bytes<D, HopperAttention::keys>];
        unsigned char output_a[hopper_tile_bytes<D, share_ranks>];
        Mbarrier queries_full, keys_full[stages], keys_empty[stages], values_full[stages], values_empty[stages], output_a_full;
    };
};

template <class T, int D>
DEVICE void attention_forward_sm90a(const TensorMap& q, const TensorMap& k, const TensorMap& v, T* __restrict__ out,
                                    float* __restrict__ log_sum, const int* __restrict__ tiles, int query_heads,
                                    int key_value_heads, const Score& score, int window, const TensorMap& output_a,
                                    const SharesOfS& shares) {
    using Layout = HopperAttention<D>;
    constexpr int keys = Layout::keys;
    DYNAMIC_SHARED(bytes, 1024);
    auto& shared = *reinterpret_cast<typename Layout::Shared*>(bytes);
    const SampleTile tile = find_sample_tile(tiles);
    const int rows = hopper_tile_rows(tile);
    if (rows == 0) return;  // fills up the number of tiles
    const int head = blockIdx.y, key_head = key_head_of(head, query_heads, key_value_heads);
    const int first_key = window ? max(tile.begin, tile.first - window + 1) : tile.begin;
    const int end_row = tile.first + rows, blocks = (end_row - first_key + keys - 1) / keys;

    if (threadIdx.x == 0) {
        mbarrier_init(&shared.queries_full, 1);
        mbarrier_init(&shared.output_a_full, 1);
        for (int i = 0; i < Layout::stages; i++) {
            mbarrier_init(&shared.keys_full[i], 1);
            mbarrier_init(&shared.values_full[i], 1);
            mbarrier_init(&shared.keys_empty[i], hopper_consumers * hopper_warpgroup / 32);
            mbarrier_init(&shared.values_empty[i], hopper_consumers * hopper_warpgroup / 32);
        }
        fence_mbarrier_init();
    }
    __syncthreads();

    if (threadIdx.x < hopper_warpgroup) {
        give_registers<24>();
        if (threadIdx.x > 0) return;
        mbarrier_arrive_expecting(&shared.queries_full, sizeof shared.queries);
        load_hopper_tile<D, hopper_rows>(shared.queries, q, tile.first, head * D, &shared.queries_full);
        for (int block = 0; block < blocks; block++) {
            const int stage = block % Layout::stages, row = first_key + block * keys;
            const unsigned parity = (block / Layout::stages & 1) ^ 1;
            mbarrier_wait(&shared.keys_empty[stage], parity);
            mbarrier_arrive_expecting(&shared.keys_full[stage], sizeof shared.keys[stage]);
            load_hopper_tile<D, keys>(shared.keys[stage], k, row, key_head * D, &shared.keys_full[stage]);
            mbarrier_wait(&shared.values_empty[stage], parity);
            mbarrier_arrive_expecting(&shared.values_full[stage], sizeof shared.values[stage]);
            load_hopper_tile<D, keys>(shared.values[stage], v, row, key_head * D, &shared.values_full[stage]);
        }
        if (shares.are_wanted()) {
            mbarrier_arrive_expecting(&shared.output_a_full, sizeof shared.output_a);
            load_hopper_tile<D, share_ranks>(shared.output_a, output_a, 0, head * D, &shared.output_a_full);
        }
        return;
    }

    take_registers<240>();
    const int lane = threadIdx.x % 32, consumer = consumer_index();
    const int first_own = tile.first + consumer * consumer_rows, own_row = first_own + accumulator_row();
    const unsigned char* own_queries = shared.queries + consumer * consumer_rows * box_row_bytes;
    const auto release = [&](Mbarrier* empty) {
        if (lane == 0) mbarrier_arrive(empty);
    };

    float sums[D / 2], weights[keys / 2];
    uint32_t rounded[keys / 16][4];
    RunningSoftmax softmax;
    const float factor = exponent_factor(score);
    const auto start_products = [&](int block) {
        const int stage = block % Layout::stages;
        mbarrier_wait(&shared.keys_full[stage], block / Layout::stages & 1);
        start_scores<T, D, keys>(weights, own_queries, shared.keys[stage]);
    };
    const auto take_softmax = [&](int block) {
        const int key = first_key + block * keys;
        score_tile(weights, score, !is_wholly_visible(first_own, consumer_rows, key, keys, window),
                   [&](int row, int column) { return is_visible(own_row + row, key + column, window); });
        return softmax.step<keys>([&](int j, int i) -> float& { return weights[j * 4 + i]; },
                                  [&](int, int, float z) { return z; }, factor);
    };
    const auto start_sums = [&](int block) {
        const int stage = block % Layout::stages;
        mbarrier_wait(&shared.values_full[stage], block / Layout::stages & 1);
        start_weighted_sum<T, D, keys>(sums, rounded, shared.values[stage]);
    };

#pragma unroll
    for (int i = 0; i < D / 2; i++) sums[i] = 0.f;
    mbarrier_wait(&shared.queries_full, 0);
    start_products(0);
    wgmma_wait<0>(weights);
    release(&shared.keys_empty[0]);
    take_softmax(0);
    round_weights<T, keys>(rounded, weights);
    // The softmax of a tile is taken while the values of the tile before are summed.
    for (int block = 1; block < blocks; block++) {
        start_products(block);
        start_sums(block - 1);
        wgmma_wait<1>(weights);
        release(&shared.keys_empty[block % Layout::stages]);
        const float2 factors = take_softmax(block);
        wgmma_wait<0>(sums);
        release(&shared.values_empty[(block - 1) % Layout::stages]);
        softmax.rescale<D>([&](int j, int i) -> float& { return sums[j * 4 + i]; }, factors);
        round_weights<T, keys>(rounded, weights);
    }
    start_sums(blocks - 1);
    wgmma_wait<0>(sums);

    softmax.finish();
    const float inverse[2] = {1.f / softmax.total[0], 1.f / softmax.total[1]};
#pragma unroll
    for (int i = 0; i < D / 2; i++) sums[i] *= inverse[i / 2 % 2];
    uint32_t leaving[D / 16][4];
    round_weights<T, D>(leaving, sums);
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = own_row + half * 8;
        if (row >= end_row) continue;
        const long long at = static_cast<long long>(row) * query_heads + head;
        if (lane % 4 == 0) log_sum[at] = softmax.log_sum(half);
#pragma unroll
        for (int j = 0; j < D / 8; j++)
            *reinterpret_cast<uint32_t*>(out + at * D + j * 8 + lane % 4 * 2) = leaving[j / 2][j % 2 * 2 + half];
    }
    if (shares.are_wanted()) {
        float products[share_ranks / 2];
        mbarrier_wait(&shared.output_a_full, 0);
        start_shares<T, D, share_ranks>(products, leaving, shared.output_a);
        wgmma_wait<0>(products);
        shares.store(products, head, own_row, end_row);
    }
}

// Grid: one block a tile of 128 rows in x, the query heads in y. Dynamic shared memory: (5 · 128 + 64) · D · 2 bytes and 1 KiB.
// Shares of s: one stretch a head; output_a is any map where s_partials is null.
#define EXPORT_HOPPER_ATTENTION(D, type) \
    EXPORT_KERNEL_AS(attention_forward_sm90a_d##D##_##type, type, (hopper_attention_threads, 1), \
                     (const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k, \
                      const __grid_constant__ TensorMap v, T* out, float* log_sum, const int* tiles, int query_heads, \
                      int key_value_heads, float scale, float soft_cap, int window, \
                      const __grid_constant__ TensorMap output_a, float* s_partials, int tokens, int s_leading), \
                     (attention_forward_sm90a<T, D>(q, k, v, out, log_sum, tiles, query_heads, key_value_heads, \
                                                    Score{scale, {soft_cap}}, window, output_a, \
                                                    SharesOfS{s_partials, tokens, s_leading})))
EXPORT_HOPPER_ATTENTION(64, f16)
EXPORT_HOPPER_ATTENTION(128, f16)
EXPORT_HOPPER_ATTENTION(64, bf16)
EXPORT_HOPPER_ATTENTION(128, bf16)
