// The backward of attention.cu, the same bits on every run: no atomics, every sum in a fixed order.
//
//   delta_i = dout_i · out_i
//   p_ij = exp(z_ij − log_sum_i),  dp_ij = dout_i · v_j,  dz_ij = p_ij (dp_ij − delta_i),  dr_ij = dz_ij · dz/d(q·k)
//   dq_i = Σ_j dr_ij k_j,   dk_j = Σ_i dr_ij q_i,   dv_j = Σ_i p_ij dout_i
//
// Shapes as in attention.cu; dq, dk, dv [T, heads, D] with row lengths of their own, delta [T, Q] f32. Products and sums in
// f32, p and dr rounded to T before their products. dk and dv of a key head sum over all query heads of its group.
//
// Two kernels recompute p, one owning queries (dq), one owning keys (dk, dv): seven products instead of the five of a
// single pass, but that one needs either atomics or a second buffer of dq.
#include "common/attention_tile.h"
#include "ptx/warp.h"

// ---- delta: one warp a row and head. Grid: ceil(T · Q / 4) blocks.
template <class T>
DEVICE void attention_delta(const T* __restrict__ out, const T* __restrict__ dout, float* __restrict__ delta, int rows,
                            int head_dim) {
    const int row = blockIdx.x * (attention_threads / 32) + threadIdx.x / 32;
    if (row >= rows) return;
    float sum = 0.f;
    for (int column = threadIdx.x % 32 * 2; column < head_dim; column += 64) {
        float a[2], b[2];
        load2(a, out + static_cast<long long>(row) * head_dim + column);
        load2(b, dout + static_cast<long long>(row) * head_dim + column);
        sum += a[0] * b[0] + a[1] * b[1];
    }
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) delta[row] = sum;
}
EXPORT_HALF_KERNELS(attention_delta, attention_threads,
                    (const T* out, const T* dout, float* delta, int rows, int head_dim), (out, dout, delta, rows, head_dim))

// What both kernels read.
template <class T>
struct AttentionInputs {
    const T *q, *k, *v, *dout;
    const float *log_sum, *delta;
    const int* tiles;
    int query_heads, key_value_heads, q_leading, k_leading, v_leading;
    Score score;
    int window;

    __device__ __forceinline__ const T* q_rows(int token, int head, int d) const {
        return q + token * static_cast<long long>(q_leading) + head * d;
    }
    __device__ __forceinline__ const T* k_rows(int token, int head, int d) const {
        return k + token * static_cast<long long>(k_leading) + head * d;
    }
    __device__ __forceinline__ const T* v_rows(int token, int head, int d) const {
        return v + token * static_cast<long long>(v_leading) + head * d;
    }
    __device__ __forceinline__ const T* dout_rows(int token, int head, int d) const {
        return dout + (token * static_cast<long long>(query_heads) + head) * d;
    }
};

// One element: from q·k and dp to p and dr.
struct Weight {
    float p, dr;
};
DEVICE Weight weight_of(float product, float dp, float log_sum, float delta, const Score& score, bool visible) {
    if (!visible) return {0.f, 0.f};
    const float z = score.value(product), p = exp2_fast((z - log_sum) * log2_of_e);
    return {p, p * (dp - delta) * score.slope(z)};
}

// ---- dq: a block owns 64 queries of one head. Grid: tiles in x, query heads in y.
template <class T, int D>
DEVICE void attention_backward_queries(const AttentionInputs<T>& in, T* __restrict__ dq, int dq_leading) {
    constexpr int keys = inner_rows<D>;
    DYNAMIC_SHARED(shared, 128);
    T* q_tile = reinterpret_cast<T*>(shared);
    T* dout_tile = q_tile + outer_rows * pitch<D>;
    T* k_tile = dout_tile + outer_rows * pitch<D>;
    T* v_tile = k_tile + keys * pitch<D>;
    const SampleTile tile = find_sample_tile(in.tiles);
    if (tile.rows() == 0) return;  // fills up the number of tiles
    const int head = blockIdx.y, key_head = key_head_of(head, in.query_heads, in.key_value_heads);
    const int first_key = in.window ? max(tile.begin, tile.first - in.window + 1) : tile.begin;
    const int end_key = tile.first + tile.rows();
    load_rows<T, D, outer_rows>(q_tile, in.q_rows(tile.first, head, D), in.q_leading, tile.rows());
    load_rows<T, D, outer_rows>(dout_tile, in.dout_rows(tile.first, head, D), in.query_heads * D, tile.rows());

    const int lane = threadIdx.x % 32, warp_first = threadIdx.x / 32 * 16;
    float log_sums[2], deltas[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = warp_first + lane / 4 + half * 8;
        const long long at = static_cast<long long>(tile.first + row) * in.query_heads + head;
        log_sums[half] = row < tile.rows() ? in.log_sum[at] : 0.f;
        deltas[half] = row < tile.rows() ? in.delta[at] : 0.f;
    }
    float sums[1][D / 8][4];
    clear(sums);
    for (int key = first_key; key < end_key; key += keys) {
        load_rows<T, D, keys>(k_tile, in.k_rows(key, key_head, D), in.k_leading, end_key - key);
        load_rows<T, D, keys>(v_tile, in.v_rows(key, key_head, D), in.v_leading, end_key - key);
        cp_async_commit();
        cp_async_wait<0>();
        __syncthreads();
        float weights[1][keys / 8][4], dp[1][keys / 8][4];
        clear(weights);
        clear(dp);
        multiply_transposed<T, D, keys>(weights, q_tile, warp_first, k_tile);
        multiply_transposed<T, D, keys>(dp, dout_tile, warp_first, v_tile);
#pragma unroll
        for (int j = 0; j < keys / 8; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const int row = warp_first + lane / 4 + e / 2 * 8, at_key = key + j * 8 + lane % 4 * 2 + e % 2;
                const bool visible = row < tile.rows() && is_visible(tile.first + row, at_key, in.window);
                weights[0][j][e] =
                    weight_of(weights[0][j][e], dp[0][j][e], log_sums[e / 2], deltas[e / 2], in.score, visible).dr;
            }
        multiply<T, D, keys, D>(sums, weights, k_tile, 0);
        __syncthreads();  // the next load overwrites what other warps may still read
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = warp_first + lane / 4 + half * 8;
        if (row >= tile.rows()) continue;
        T* out = dq + (tile.first + row) * static_cast<long long>(dq_leading) + head * D + lane % 4 * 2;
#pragma unroll
        for (int j = 0; j < D / 8; j++) store2(out + j * 8, sums[0][j][2 * half], sums[0][j][2 * half + 1]);
    }
}

// ---- dk and dv: a block owns 64 keys of one key head and up to 128 columns of their gradients. Everything is transposed,
// so that pᵀ and drᵀ come out of their products as the left operands of the next. Grid: tiles in x, key heads in y,
// ceil(D / 128) in z.
template <class T, int D>
DEVICE void attention_backward_keys(const AttentionInputs<T>& in, T* __restrict__ dk, T* __restrict__ dv, int dk_leading,
                                    int dv_leading) {
    constexpr int queries = inner_rows<D>, columns = D < 128 ? D : 128;
    DYNAMIC_SHARED(shared, 128);
    T* k_tile = reinterpret_cast<T*>(shared);
    T* v_tile = k_tile + outer_rows * pitch<D>;
    T* q_tile = v_tile + outer_rows * pitch<D>;
    T* dout_tile = q_tile + queries * pitch<D>;
    const SampleTile tile = find_sample_tile(in.tiles).mirrored(outer_rows);
    if (tile.rows() == 0) return;  // fills up the number of tiles
    const int key_head = blockIdx.y, first_column = blockIdx.z * columns;
    const int heads_per_group = in.query_heads / in.key_value_heads;
    // The last query that sees the last key.
    const int end_query = in.window ? min(tile.end, tile.first + tile.rows() - 1 + in.window) : tile.end;
    load_rows<T, D, outer_rows>(k_tile, in.k_rows(tile.first, key_head, D), in.k_leading, tile.rows());
    load_rows<T, D, outer_rows>(v_tile, in.v_rows(tile.first, key_head, D), in.v_leading, tile.rows());

    const int lane = threadIdx.x % 32, warp_first = threadIdx.x / 32 * 16;
    float dk_sums[1][columns / 8][4], dv_sums[1][columns / 8][4];
    clear(dk_sums);
    clear(dv_sums);
    for (int head = key_head * heads_per_group; head < (key_head + 1) * heads_per_group; head++)
        for (int query = tile.first; query < end_query; query += queries) {
            load_rows<T, D, queries>(q_tile, in.q_rows(query, head, D), in.q_leading, end_query - query);
            load_rows<T, D, queries>(dout_tile, in.dout_rows(query, head, D), in.query_heads * D, end_query - query);
            cp_async_commit();
            cp_async_wait<0>();
            __syncthreads();
            float p[1][queries / 8][4], dr[1][queries / 8][4];
            clear(p);
            clear(dr);
            multiply_transposed<T, D, queries>(p, k_tile, warp_first, q_tile);
            multiply_transposed<T, D, queries>(dr, v_tile, warp_first, dout_tile);
#pragma unroll
            for (int j = 0; j < queries / 8; j++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const int key = tile.first + warp_first + lane / 4 + e / 2 * 8;
                    const int at_query = query + j * 8 + lane % 4 * 2 + e % 2;
                    const bool inside = at_query < end_query;
                    const long long at = static_cast<long long>(inside ? at_query : query) * in.query_heads + head;
                    const Weight weight =
                        weight_of(p[0][j][e], dr[0][j][e], in.log_sum[at], in.delta[at], in.score,
                                  inside && is_visible(at_query, key, in.window));
                    p[0][j][e] = weight.p;
                    dr[0][j][e] = weight.dr;
                }
            multiply<T, D, queries, columns>(dv_sums, p, dout_tile, first_column);
            multiply<T, D, queries, columns>(dk_sums, dr, q_tile, first_column);
            __syncthreads();  // the next load overwrites what other warps may still read
        }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = warp_first + lane / 4 + half * 8;
        if (row >= tile.rows()) continue;
        const int column = key_head * D + first_column + lane % 4 * 2;
        T* dk_out = dk + (tile.first + row) * static_cast<long long>(dk_leading) + column;
        T* dv_out = dv + (tile.first + row) * static_cast<long long>(dv_leading) + column;
#pragma unroll
        for (int j = 0; j < columns / 8; j++) {
            store2(dk_out + j * 8, dk_sums[0][j][2 * half], dk_sums[0][j][2 * half + 1]);
            store2(dv_out + j * 8, dv_sums[0][j][2 * half], dv_sums[0][j][2 * half + 1]);
        }
    }
}

// Dynamic shared memory of both: 2 · (64 + inner rows) · (D + 8) · 2 bytes.
#define ATTENTION_PARAMETERS(type) \
    const type *q, const type *k, const type *v, const type *dout, const float *log_sum, const float *delta, \
        const int *tiles, int query_heads, int key_value_heads, int q_leading, int k_leading, int v_leading, \
        float scale, float soft_cap, int window
#define ATTENTION_INPUTS(type) \
    AttentionInputs<type> { \
        q, k, v, dout, log_sum, delta, tiles, query_heads, key_value_heads, q_leading, k_leading, v_leading, \
            Score{scale, {soft_cap}}, window \
    }
#define EXPORT_BACKWARD_FOR(D, type) \
    extern "C" __global__ void __launch_bounds__(attention_threads) attention_backward_queries_d##D##_##type( \
        ATTENTION_PARAMETERS(type), type* dq, int dq_leading) { \
        attention_backward_queries<type, D>(ATTENTION_INPUTS(type), dq, dq_leading); \
    } \
    REGISTER_KERNEL(attention_backward_queries_d##D##_##type); \
    extern "C" __global__ void __launch_bounds__(attention_threads) attention_backward_keys_d##D##_##type( \
        ATTENTION_PARAMETERS(type), type* dk, type* dv, int dk_leading, int dv_leading) { \
        attention_backward_keys<type, D>(ATTENTION_INPUTS(type), dk, dv, dk_leading, dv_leading); \
    } \
    REGISTER_KERNEL(attention_backward_keys_d##D##_##type);
#define EXPORT_BACKWARD(D) \
    EXPORT_BACKWARD_FOR(D, f16) \
    EXPORT_BACKWARD_FOR(D, bf16)
EXPORT_BACKWARD(16)
EXPORT_BACKWARD(32)
EXPORT_BACKWARD(64)
EXPORT_BACKWARD(80)
EXPORT_BACKWARD(96)
EXPORT_BACKWARD(128)
EXPORT_BACKWARD(256)
