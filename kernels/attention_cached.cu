// Attention of a few new positions over a cache of keys and values: decoding.
//
//   out_i = Σ_j p_ij v_j,   p_i = softmax_j score(q_i · k_j),   j ≤ position + i, and j > position + i − window
//
// q [rows, Q, D] (rotated, row length q_leading), keys and values [capacity, K, D], which already hold the new positions, out
// [rows, Q, D]; T is f16 or bf16, D a multiple of 8, at most 256. All sums and p in f32, tiles of 128 keys in ascending order.
//
// A block owns one query of one head: a thread takes one key of a tile for the products, then two columns of the values for
// a share of the keys.
#include "common/attention_tile.h"
#include "common/block_sum.h"

constexpr int largest_head = 256, keys_per_tile = attention_threads;

template <class T>
DEVICE void attention_cached(const T* __restrict__ q, const T* __restrict__ keys, const T* __restrict__ values,
                             T* __restrict__ out, int position, int query_heads, int key_value_heads, int head_dim,
                             int q_leading, const Score& score, int window) {
    SHARED_ARRAY(float, query, [largest_head]);
    SHARED_ARRAY(float, weights, [keys_per_tile]);
    SHARED_ARRAY(float, partials, [max_warps_per_block]);
    SHARED_ARRAY(float, shares, [2 * attention_threads]);
    const int row = blockIdx.x, head = blockIdx.y, key_head = key_head_of(head, query_heads, key_value_heads);
    const int at = position + row, first = window ? max(0, at - window + 1) : 0, thread = threadIdx.x;
    const long long leading = static_cast<long long>(key_value_heads) * head_dim;
    const T* key_rows = keys + key_head * head_dim;
    const T* value_rows = values + key_head * head_dim;
    for (int i = thread; i < head_dim; i += attention_threads)
        query[i] = to_float(q[static_cast<long long>(row) * q_leading + head * head_dim + i]);
    __syncthreads();

    // Threads share the keys of a tile in `share_count` groups, each with a thread for every two columns.
    const int pairs = head_dim / 2, share_count = attention_threads / pairs;
    const int share = thread / pairs, column = thread % pairs * 2;
    float maximum = -1e30f, total = 0.f, sums[2] = {0.f, 0.f};
    for (int tile = first; tile <= at; tile += keys_per_tile) {
        const int key = tile + thread;
        float z = -INFINITY;
        if (key <= at) {
            float product = 0.f;
            for (int i = 0; i < head_dim; i += vector_width) {
                float k[vector_width];
                load8(k, key_rows + key * leading + i);
#pragma unroll
                for (int e = 0; e < vector_width; e++) product += k[e] * query[i + e];
            }
            z = score.value(product) * log2_of_e;
        }
        const float greatest = fmaxf(maximum, block_maximum(z, partials)), rescale = exp2_fast(maximum - greatest);
        const float weight = exp2_fast(z - greatest);
        weights[thread] = weight;
        total = total * rescale + block_sum(weight, partials);  // its barriers also publish `weights`
        maximum = greatest;
        sums[0] *= rescale;
        sums[1] *= rescale;
        if (share < share_count)
            for (int i = share; i < min(keys_per_tile, at + 1 - tile); i += share_count) {
                float v[2];
                load2(v, value_rows + (tile + i) * leading + column);
                sums[0] += weights[i] * v[0];
                sums[1] += weights[i] * v[1];
            }
        __syncthreads();  // the next tile overwrites `weights`
    }
    shares[2 * thread] = sums[0];
    shares[2 * thread + 1] = sums[1];
    __syncthreads();
    if (thread >= pairs) return;
    float result[2] = {0.f, 0.f};
    for (int i = 0; i < share_count; i++) {
        result[0] += shares[2 * (i * pairs + thread)];
        result[1] += shares[2 * (i * pairs + thread) + 1];
    }
    store2(out + (static_cast<long long>(row) * query_heads + head) * head_dim + column, result[0] / total, result[1] / total);
}

// Grid: rows in x, query heads in y.
EXPORT_HALF_KERNELS(attention_cached, attention_threads,
                    (const T* q, const T* keys, const T* values, T* out, int position, int query_heads, int key_value_heads,
                     int head_dim, int q_leading, float scale, float soft_cap, int window),
                    (q, keys, values, out, position, query_heads, key_value_heads, head_dim, q_leading,
                     Score{scale, {soft_cap}}, window))
