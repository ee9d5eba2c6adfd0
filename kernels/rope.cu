// Rotary positions (Su et al. 2021) on the queries and keys of a fused projection, after an optional RMSNorm of each head
// (Qwen3, Gemma 3), forward and backward; one warp a head of a token.
//
//   forward    h = x · rstd · (offset + w)                    or x where there is no norm
//              out[i] = h[i]·cos − h[i+R/2]·sin,  out[i+R/2] = h[i+R/2]·cos + h[i]·sin,      i < R/2
//              out[i] = h[i],                                                                i ≥ R
//   backward   the rotation back, then the norm's backward (rms_norm.cu); written over dqkv's queries and keys
//
// qkv, dqkv [T, (Q + 2K)·D]: queries, keys, values side by side; rotated [T, (Q + K)·D]; T is f16 or bf16. w [D] for
// queries and keys, or null. angles [rows, 2, R/2] f32: cosines, then sines. positions [T]: of each token inside its sample;
// its row of angles is first_row + position, or long_first_row + position in samples of more than longer_than tokens, if the
// samples' lengths [T] are given. D and R are multiples of 4, D at most 256. Computed in f32, sums over the warp.
#include "common/norm_weight.h"
#include "common/rope_angles.h"
#include "ptx/warp.h"

constexpr int rope_threads = 128, max_head_dim = 256;
// A lane holds pairs for i = 2·lane, 2·lane + 1, then 64 further: (i, i + R/2) for i < R/2, and of the columns that stay
// (i + R/2, i + D/2).
constexpr int rounds_per_head = max_head_dim / 2 / 64;

struct Head {
    float low[rounds_per_head][2], high[rounds_per_head][2];
};

DEVICE int low_column(int i, int half_rotated) { return i < half_rotated ? i : i + half_rotated; }
DEVICE int high_column(int i, int half_rotated, int half_dim) { return i + (i < half_rotated ? half_rotated : half_dim); }

template <class T>
DEVICE void load_head(Head& head, const T* address, int half_rotated, int half_dim) {
#pragma unroll
    for (int round = 0; round < rounds_per_head; round++) {
        const int i = 2 * (threadIdx.x % 32) + round * 64;
        head.low[round][0] = head.low[round][1] = head.high[round][0] = head.high[round][1] = 0.f;
        if (i >= half_dim) continue;
        load2(head.low[round], address + low_column(i, half_rotated));
        load2(head.high[round], address + high_column(i, half_rotated, half_dim));
    }
}

template <class T>
DEVICE void store_head(T* address, const Head& head, int half_rotated, int half_dim) {
#pragma unroll
    for (int round = 0; round < rounds_per_head; round++) {
        const int i = 2 * (threadIdx.x % 32) + round * 64;
        if (i >= half_dim) continue;
        store2(address + low_column(i, half_rotated), head.low[round][0], head.low[round][1]);
        store2(address + high_column(i, half_rotated, half_dim), head.high[round][0], head.high[round][1]);
    }
}

// direction +1 rotates, −1 rotates back.
DEVICE void rotate(Head& head, const float* cosines, int half_rotated, float direction) {
#pragma unroll
    for (int round = 0; round < rounds_per_head; round++) {
        const int i = 2 * (threadIdx.x % 32) + round * 64;
        if (i >= half_rotated) continue;
#pragma unroll
        for (int e = 0; e < 2; e++) {
            const float cosine = cosines[i + e], sine = direction * cosines[half_rotated + i + e];
            rotate_pair(head.low[round][e], head.high[round][e], cosine, sine);
        }
    }
}

DEVICE float dot(const Head& a, const Head& b) {
    float sum = 0.f;
#pragma unroll
    for (int round = 0; round < rounds_per_head; round++)
#pragma unroll
        for (int e = 0; e < 2; e++)
            sum += a.low[round][e] * b.low[round][e] + a.high[round][e] * b.high[round][e];
    return warp_sum(sum);
}

// Where the warp's head lies; head counts queries, then keys.
struct HeadPlace {
    bool inside;
    long long token;
    int head;
};
DEVICE HeadPlace find_head(int tokens, int heads) {
    const long long linear = static_cast<long long>(blockIdx.x) * (rope_threads / 32) + threadIdx.x / 32;
    return {linear < static_cast<long long>(tokens) * heads, linear / heads, static_cast<int>(linear % heads)};
}

template <class T>
DEVICE void rope_forward(const T* __restrict__ qkv, const T* __restrict__ query_norm, const T* __restrict__ key_norm,
                         const Angles& angles, T* __restrict__ rotated, int tokens, int query_heads, int key_value_heads,
                         int head_dim, float offset, float epsilon) {
    const int heads = query_heads + key_value_heads, half_dim = head_dim / 2, half_rotated = angles.half_rotated;
    const HeadPlace at = find_head(tokens, heads);
    if (!at.inside) return;
    Head x;
    load_head(x, qkv + (at.token * (heads + key_value_heads) + at.head) * head_dim, half_rotated, half_dim);
    const T* weight = at.head < query_heads ? query_norm : key_norm;
    if (weight) {
        const float rstd = rsqrtf(dot(x, x) / head_dim + epsilon);
        Head w;
        load_head(w, weight, half_rotated, half_dim);
#pragma unroll
        for (int round = 0; round < rounds_per_head; round++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                x.low[round][e] = rounded<T>(weighted<T>(x.low[round][e] * rstd, w.low[round][e], offset));
                x.high[round][e] = rounded<T>(weighted<T>(x.high[round][e] * rstd, w.high[round][e], offset));
            }
    }
    rotate(x, angles.of(at.token), half_rotated, 1.f);
    store_head(rotated + (at.token * heads + at.head) * head_dim, x, half_rotated, half_dim);
}

template <class T>
DEVICE void rope_backward(const T* __restrict__ qkv, const T* __restrict__ query_norm, const T* __restrict__ key_norm,
                          const Angles& angles, T* __restrict__ dqkv, int tokens, int query_heads, int key_value_heads,
                          int head_dim, float offset, float epsilon) {
    const int heads = query_heads + key_value_heads, half_dim = head_dim / 2, half_rotated = angles.half_rotated;
    const HeadPlace at = find_head(tokens, heads);
    if (!at.inside) return;
    const long long begin = (at.token * (heads + key_value_heads) + at.head) * head_dim;
    Head gradient;
    load_head(gradient, dqkv + begin, half_rotated, half_dim);
    rotate(gradient, angles.of(at.token), half_rotated, -1.f);
    const T* weight = at.head < query_heads ? query_norm : key_norm;
    if (weight) {
        Head x, w;
        load_head(x, qkv + begin, half_rotated, half_dim);
        load_head(w, weight, half_rotated, half_dim);
        const float rstd = rsqrtf(dot(x, x) / head_dim + epsilon);
#pragma unroll
        for (int round = 0; round < rounds_per_head; round++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                gradient.low[round][e] *= offset + w.low[round][e];
                gradient.high[round][e] *= offset + w.high[round][e];
            }
        const float along_x = rstd * rstd * (dot(gradient, x) / head_dim);
#pragma unroll
        for (int round = 0; round < rounds_per_head; round++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                gradient.low[round][e] = rstd * (gradient.low[round][e] - x.low[round][e] * along_x);
                gradient.high[round][e] = rstd * (gradient.high[round][e] - x.high[round][e] * along_x);
            }
    }
    store_head(dqkv + begin, gradient, half_rotated, half_dim);
}

// Grid of both: ceil(tokens · (Q + K) / 4) blocks.
#define EXPORT_ROPE(name, out) \
    EXPORT_HALF_KERNELS(name, rope_threads, \
                        (const T* qkv, const T* query_norm, const T* key_norm, const float* table, \
                         const unsigned* positions, const unsigned* lengths, T* out, int tokens, int query_heads, \
                         int key_value_heads, int head_dim, int rotated_width, int first_row, int longer_than, \
                         int long_first_row, float offset, float epsilon), \
                        (qkv, query_norm, key_norm, \
                         Angles{table, positions, lengths, first_row, longer_than, long_first_row, rotated_width / 2}, \
                         out, tokens, query_heads, key_value_heads, head_dim, offset, epsilon))
EXPORT_ROPE(rope_forward, rotated)
EXPORT_ROPE(rope_backward, dqkv)
