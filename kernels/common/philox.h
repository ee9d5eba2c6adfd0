// Philox4x32-10 (Salmon et al. 2011) and the dropout masks made from it: the same words, for the same (seed, epoch, sample,
// position, input, feature), as src/backend/dropout.rs.
#pragma once
#include "../ptx/target.h"

struct PhiloxWords {
    uint32_t words[4];
};

DEVICE PhiloxWords philox4x32_10(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t key0, uint32_t key1) {
#pragma unroll
    for (int round = 0; round < 10; round++) {
        const uint32_t high0 = __umulhi(0xD2511F53u, c0), low0 = 0xD2511F53u * c0;
        const uint32_t high1 = __umulhi(0xCD9E8D57u, c2), low1 = 0xCD9E8D57u * c2;
        c0 = high1 ^ c1 ^ key0;
        c1 = low1;
        c2 = high0 ^ c3 ^ key1;
        c3 = low0;
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    return {{c0, c1, c2, c3}};
}

// What a mask depends on besides row and feature. `positions` null: no dropout.
struct DropoutMask {
    const unsigned* positions;  // [T] of each token inside its sample
    const unsigned* samples;    // [T] low 32 bits of each token's sample index
    unsigned seed_low, seed_high;
    const unsigned* epoch;      // in memory, so that a graph that was recorded serves every epoch
    unsigned input;             // the input's index
    unsigned threshold;         // a word at or above it keeps the element
    float keep_scale;           // 1 / (1 − p)

    // The words of features 4·group … 4·group + 3.
    __device__ __forceinline__ PhiloxWords words(int token, int group) const {
        return philox4x32_10(group, positions[token], samples[token], (input & 0xffff) | *epoch << 16, seed_low, seed_high);
    }
    // One feature's word. Spelled out: an array indexed at run time would live in memory.
    __device__ __forceinline__ uint32_t word(int token, int feature) const {
        const PhiloxWords four = words(token, feature / 4);
        const uint32_t low = feature & 1 ? four.words[1] : four.words[0];
        const uint32_t high = feature & 1 ? four.words[3] : four.words[2];
        return feature & 2 ? high : low;
    }
    __device__ __forceinline__ float factor(uint32_t word) const { return word >= threshold ? keep_scale : 0.f; }
};
