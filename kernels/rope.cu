// Rotary positions (Su et al. 2021) on the queries and keys of a fused projection, after an optional RMSNorm of each head
// (Qwen3), forward and backward; one warp a head of a token.
//
//   forward    h = round(x · rstd) · w                        or x where there is no norm
//              out[i] = h[i]·cos − h[i+D/2]·sin,  out[i+D/2] = h[i+D/2]·cos + h[i]·sin,      i < D/2
//   backward   the rotation back, then the norm's backward (rms_norm.cu); written over dqkv's queries and keys
//
// qkv, dqkv [T, (Q + 2K)·D]: queries, keys, values side by side; rotated [T, (Q + K)·D]; T is f16 or bf16. w [D] for
// queries and keys, or null. angles [positions, 2, D/2] f32: cosines, then sines. positions [T]: of each token inside its
// sample. D is a multiple of 4, at most 256. Computed in f32, sums over the warp.
#include "common/halves.h"
#include "ptx/warp.h"

constexpr int rope_threads = 128, max_head_dim = 256;
// A lane holds pairs (i, i + D/2) for i = 2·lane, 2·lane + 1, then 64 further.
constexpr int rounds_per_head = max_head_dim / 2 / 64;

struct Head {
    float low[rounds_per_head][2], high[rounds_per_head][2];
};

template <class T>
DEVICE void load_head(Head& head, const T* address, int half_dim) {
#pragma unroll
    for (int round = 0; round < rounds_per_head; round++) {
        const int i = 2 * (threadIdx.x % 32) + round * 64;
        head.low[round][0] = head.low[round][1] = head.high[round][0] = head.high[round][1] = 0.f;
        if (i >= half_dim) continue;
        load2(head.low[round], address + i);
        load2(head.high[round], address + half_dim + i);
    }
}

template <class T>
DEVICE void store_head(T* address, const Head& head, int half_dim) {
#pragma unroll
    for (int round = 0; round < rounds_per_head; round++) {
        const int i = 2 * (threadIdx.x % 32) + round * 64;
        if (i >= half_dim) continue;
        store2(address + i, head.low[round][0], head.low[round][1]);
        store2(address + half_dim + i, head.high[round][0], head.high[round][1]);
    }
}

// direction +1 rotates, −1 rotates back.
DEVICE void rotate(Head& head, const float* cosines, int half_dim, float direction) {
#pragma unroll
    for (int round = 0; round < rounds_per_head; round++) {
        const int i = 2 * (threadIdx.x % 32) + round * 64;
        if (i >= half_dim) continue;
#pragma unroll
        for (int e = 0; e < 2; e++) {
            const float cosine = cosines[i + e], sine = direction * cosines[half_dim + i + e];
            const float low = head.low[round][e], high = head.high[round][e];
            head.low[round][e] = low * cosine - high * sine;
            head.high[round][e] = high * cosine + low * sine;
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
                         const float* __restrict__ angles, const unsigned* __restrict__ positions,
                         T* __restrict__ rotated, int tokens, int query_heads, int key_value_heads, int head_dim,
                         float epsilon) {
    const int heads = query_heads + key_value_heads, half_dim = head_dim / 2;
    const HeadPlace at = find_head(tokens, heads);
    if (!at.inside) return;
    Head x;
    load_head(x, qkv + (at.token * (heads + key_value_heads) + at.head) * head_dim, half_dim);
    const T* weight = at.head < query_heads ? query_norm : key_norm;
    if (weight) {
        const float rstd = rsqrtf(dot(x, x) / head_dim + epsilon);
        Head w;
        load_head(w, weight, half_dim);
#pragma unroll
        for (int round = 0; round < rounds_per_head; round++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                x.low[round][e] = rounded<T>(rounded<T>(x.low[round][e] * rstd) * w.low[round][e]);
                x.high[round][e] = rounded<T>(rounded<T>(x.high[round][e] * rstd) * w.high[round][e]);
            }
    }
    rotate(x, angles + static_cast<long long>(positions[at.token]) * head_dim, half_dim, 1.f);
    store_head(rotated + (at.token * heads + at.head) * head_dim, x, half_dim);
}

template <class T>
DEVICE void rope_backward(const T* __restrict__ qkv, const T* __restrict__ query_norm, const T* __restrict__ key_norm,
                          const float* __restrict__ angles, const unsigned* __restrict__ positions,
                          T* __restrict__ dqkv, int tokens, int query_heads, int key_value_heads, int head_dim,
                          float epsilon) {
    const int heads = query_heads + key_value_heads, half_dim = head_dim / 2;
    const HeadPlace at = find_head(tokens, heads);
    if (!at.inside) return;
    const long long begin = (at.token * (heads + key_value_heads) + at.head) * head_dim;
    Head gradient;
    load_head(gradient, dqkv + begin, half_dim);
    rotate(gradient, angles + static_cast<long long>(positions[at.token]) * head_dim, half_dim, -1.f);
    const T* weight = at.head < query_heads ? query_norm : key_norm;
    if (weight) {
        Head x, w;
        load_head(x, qkv + begin, half_dim);
        load_head(w, weight, half_dim);
        const float rstd = rsqrtf(dot(x, x) / head_dim + epsilon);
#pragma unroll
        for (int round = 0; round < rounds_per_head; round++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                gradient.low[round][e] *= w.low[round][e];
                gradient.high[round][e] *= w.high[round][e];
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
    store_head(dqkv + begin, gradient, half_dim);
}

// Grid of both: ceil(tokens · (Q + K) / 4) blocks.
EXPORT_HALF_KERNELS(rope_forward, rope_threads,
                    (const T* qkv, const T* query_norm, const T* key_norm, const float* angles,
                     const unsigned* positions, T* rotated, int tokens, int query_heads, int key_value_heads,
                     int head_dim, float epsilon),
                    (qkv, query_norm, key_norm, angles, positions, rotated, tokens, query_heads, key_value_heads,
                     head_dim, epsilon))
EXPORT_HALF_KERNELS(rope_backward, rope_threads,
                    (const T* qkv, const T* query_norm, const T* key_norm, const float* angles,
                     const unsigned* positions, T* dqkv, int tokens, int query_heads, int key_value_heads, int head_dim,
                     float epsilon),
                    (qkv, query_norm, key_norm, angles, positions, dqkv, tokens, query_heads, key_value_heads, head_dim,
                     epsilon))
