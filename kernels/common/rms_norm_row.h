// What a warp does to a row of RMSNorm, wherever the row stands: the formula is in ../rms_norm.cu.
#pragma once
#include "../ptx/warp.h"
#include "norm_weight.h"

constexpr int elements_per_round = 32 * vector_width;

// Calls visit(round, column) for each eight elements of a row that belong to the lane. ROUNDS 0: as many as there are.
template <int ROUNDS, class Visit>
DEVICE void for_each_vector(int width, const Visit& visit) {
    const int first = threadIdx.x % 32 * vector_width;
    if constexpr (ROUNDS > 0) {
#pragma unroll
        for (int round = 0; round < ROUNDS; round++)
            if (first + round * elements_per_round < width) visit(round, first + round * elements_per_round);
    } else {
        for (int column = first; column < width; column += elements_per_round) visit(0, column);
    }
}

// 1 / sqrt(mean(x²) + epsilon), for every lane. row.get(values, round, column) reads eight elements.
template <int ROUNDS, class Row>
DEVICE float reciprocal_rms(const Row& row, int width, float epsilon) {
    float squares = 0.f;
    for_each_vector<ROUNDS>(width, [&](int round, int column) {
        float h[vector_width];
        row.get(h, round, column);
#pragma unroll
        for (int i = 0; i < vector_width; i++) squares += h[i] * h[i];
    });
    return rsqrtf(warp_sum(squares) / width + epsilon);
}

// total += h · rstd · (offset + w), where w is at `weight`.
template <class T>
DEVICE void add_normed(float (&total)[vector_width], const float (&h)[vector_width], float rstd, const T* weight, float offset) {
    float w[vector_width];
    load8(w, weight);
#pragma unroll
    for (int i = 0; i < vector_width; i++) total[i] += weighted<T>(h[i] * rstd, w[i], offset);
}
