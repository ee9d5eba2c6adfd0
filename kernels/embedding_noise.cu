// Noise on the embeddings while training (NEFTune, Jain et al. 2023):  x[t][h] += α / √(L[t] · H) · u,  u uniform in (-1, 1)
//
// x [count, width] in half, in place; L[t] the length of token t's sample. u is made of the Philox word of (seed, epoch, sample,
// position, feature) under the input index 0xffff, which no linear has: the same numbers as src/backend/noise.rs. Computed in
// f32 and rounded once. A thread takes 8 features, which are two calls of the generator.
#include "common/halves.h"
#include "common/philox.h"

constexpr int noise_threads = 256;
constexpr unsigned noise_input = 0xffffu;

// The middle of one of 2²⁴ equal steps between -1 and 1: exact.
DEVICE float uniform(uint32_t word) { return (static_cast<float>(static_cast<int>(word) >> 8) + 0.5f) / 8388608.f; }

template <class T>
DEVICE void embedding_noise(T* __restrict__ x, const unsigned* __restrict__ positions,
                            const unsigned* __restrict__ samples, const unsigned* __restrict__ lengths,
                            unsigned seed_low, unsigned seed_high, const unsigned* __restrict__ epoch, float alpha,
                            int count, int width) {
    const int vectors_per_row = width / vector_width;
    const long long linear = static_cast<long long>(blockIdx.x) * noise_threads + threadIdx.x;
    if (linear >= static_cast<long long>(count) * vectors_per_row) return;
    const long long row = linear / vectors_per_row;
    const unsigned vector = static_cast<unsigned>(linear % vectors_per_row);
    const float bound = alpha / sqrtf(static_cast<float>(lengths[row]) * static_cast<float>(width));
    float values[vector_width];
    load8(values, x + linear * vector_width);
#pragma unroll
    for (int call = 0; call < 2; call++) {
        const PhiloxWords four = philox4x32_10(2 * vector + call, positions[row], samples[row], noise_input | *epoch << 16,
                                               seed_low, seed_high);
#pragma unroll
        for (int word = 0; word < 4; word++) values[4 * call + word] += bound * uniform(four.words[word]);
    }
    store8(x + linear * vector_width, values);
}
// Grid: ceil(count · width / 8 / 256) blocks.
EXPORT_HALF_KERNELS(embedding_noise, noise_threads,
                    (T* x, const unsigned* positions, const unsigned* samples, const unsigned* lengths,
                     unsigned seed_low, unsigned seed_high, const unsigned* epoch, float alpha, int count, int width),
                    (x, positions, samples, lengths, seed_low, seed_high, epoch, alpha, count, width))
