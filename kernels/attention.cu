// Causal attention over packed samples, forward (Dao et al. 2022, "FlashAttention"; Dao 2023).
//
//   z_ij = score(q_i · k_j),  p_ij = exp(z_ij) / Σ_j exp(z_ij),  out_i = Σ_j p_ij v_j,  log_sum_i = log Σ_j exp(z_ij)
//
// over the keys j of i's own sample with j ≤ i, and j > i − window where there is a window. q, k, v [T, heads, D] with row
// lengths of their own (they are slices of fused buffers), out [T, Q, D], log_sum [T, Q] f32; query head h reads key head
// h / (Q / K). T is f16 or bf16; products and sums in f32, p rounded to T before it meets v; the running maximum and sum go
// over tiles of keys in ascending order.
//
// A block owns 64 queries of one head, a warp 16 of them. While a tile of keys and values is used the next is copied.
#include "common/attention_tile.h"
#include "common/running_softmax.h"

template <int D>
constexpr int key_stages = D <= 128 ? 2 : 1;

template <class T, int D>
DEVICE void attention_forward(const T* __restrict__ q, const T* __restrict__ k, const T* __restrict__ v,
                              T* __restrict__ out, float* __restrict__ log_sum, const int* __restrict__ tiles,
                              int query_heads, int key_value_heads, int q_leading, int k_leading, int v_leading,
                              const Score& score, int window) {
    constexpr int keys = inner_rows<D>, stages = key_stages<D>, tile_elements = keys * pitch<D>;
    DYNAMIC_SHARED(shared, 128);
    T* q_tile = reinterpret_cast<T*>(shared);
    T* k_tiles = q_tile + outer_rows * pitch<D>;
    T* v_tiles = k_tiles + stages * tile_elements;

    const SampleTile tile = find_sample_tile(tiles);
    if (tile.rows() == 0) return;  // fills up the number of tiles
    const int head = blockIdx.y, key_head = key_head_of(head, query_heads, key_value_heads);
    const int first_key = window ? max(tile.begin, tile.first - window + 1) : tile.begin;
    const int end_key = tile.first + tile.rows(), blocks = (end_key - first_key + keys - 1) / keys;

    const auto load_keys = [&](int block) {
        const int key = first_key + block * keys, stage = block % stages * tile_elements;
        load_rows<T, D, keys>(k_tiles + stage, k + key * static_cast<long long>(k_leading) + key_head * D, k_leading, end_key - key);
        load_rows<T, D, keys>(v_tiles + stage, v + key * static_cast<long long>(v_leading) + key_head * D, v_leading, end_key - key);
    };
    load_rows<T, D, outer_rows>(q_tile, q + tile.first * static_cast<long long>(q_leading) + head * D, q_leading, tile.rows());
    if (stages == 2) load_keys(0);
    cp_async_commit();

    const int lane = threadIdx.x % 32, warp_first = threadIdx.x / 32 * 16;
    // Of the warp's 16 queries a lane holds rows lane/4 and lane/4 + 8.
    float sums[1][D / 8][4];
    RunningSoftmax softmax;
    clear(sums);
    for (int block = 0; block < blocks; block++) {
        if (stages == 2) {
            if (block + 1 < blocks) load_keys(block + 1);
            cp_async_commit();
            cp_async_wait<1>();
        } else {
            load_keys(block);
            cp_async_commit();
            cp_async_wait<0>();
        }
        __syncthreads();  // this block's keys and values, and the queries, are there for every warp
        const int stage = block % stages * tile_elements;
        float weights[1][keys / 8][4];
        clear(weights);
        multiply_transposed<T, D, keys>(weights, q_tile, warp_first, k_tiles + stage);

        const float2 factors = softmax.step<keys>([&](int j, int i) -> float& { return weights[0][j][i]; },
                                                  [&](int half, int key, float product) {
                                                      const int query = tile.first + warp_first + lane / 4 + half * 8;
                                                      const bool seen = is_visible(query, first_key + block * keys + key, window);
                                                      return seen ? score.value(product) * log2_of_e : -INFINITY;
                                                  },
                                                  1.f);
        softmax.rescale<D>([&](int j, int i) -> float& { return sums[0][j][i]; }, factors);
        multiply<T, D, keys, D>(sums, weights, v_tiles + stage, 0);
        __syncthreads();  // the next load overwrites what other warps may still read
    }
    cp_async_wait<0>();

    softmax.finish();
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = warp_first + lane / 4 + half * 8;
        if (row >= tile.rows()) continue;
        const long long at = static_cast<long long>(tile.first + row) * query_heads + head;
        if (lane % 4 == 0) log_sum[at] = softmax.log_sum(half);
        const float inverse = 1.f / softmax.total[half];
#pragma unroll
        for (int j = 0; j < D / 8; j++)
            store2(out + at * D + j * 8 + lane % 4 * 2, sums[0][j][2 * half] * inverse, sums[0][j][2 * half + 1] * inverse);
    }
}

// Grid: one block a tile in x, the query heads in y. Dynamic shared memory: (64 + 2 · stages · inner rows) · (D + 8) · 2 bytes.
#define EXPORT_ATTENTION_FOR(D, type) \
    extern "C" __global__ void __launch_bounds__(attention_threads) attention_forward_d##D##_##type( \
        const type* q, const type* k, const type* v, type* out, float* log_sum, const int* tiles, int query_heads, \
        int key_value_heads, int q_leading, int k_leading, int v_leading, float scale, float soft_cap, int window) { \
        attention_forward<type, D>(q, k, v, out, log_sum, tiles, query_heads, key_value_heads, q_leading, k_leading, \
                                   v_leading, Score{scale, {soft_cap}}, window); \
    } \
    REGISTER_KERNEL(attention_forward_d##D##_##type);
#define EXPORT_ATTENTION(D) \
    EXPORT_ATTENTION_FOR(D, f16) \
    EXPORT_ATTENTION_FOR(D, bf16)
EXPORT_ATTENTION(16)
EXPORT_ATTENTION(32)
EXPORT_ATTENTION(64)
EXPORT_ATTENTION(80)
EXPORT_ATTENTION(96)
EXPORT_ATTENTION(128)
EXPORT_ATTENTION(256)
