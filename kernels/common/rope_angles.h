// What rotates queries and keys: rope.cu says which columns form a pair.
#pragma once
#include "../ptx/target.h"

// The table of angles, and which of its rows are whose.
struct Angles {
    const float* __restrict__ table;
    const unsigned* __restrict__ positions;
    const unsigned* __restrict__ lengths;
    int first_row, longer_than, long_first_row, half_rotated;
    __device__ __forceinline__ const float* of(long long token) const {
        const bool is_long = lengths && lengths[token] > static_cast<unsigned>(longer_than);
        const long long row = (is_long ? long_first_row : first_row) + static_cast<long long>(positions[token]);
        return table + row * (2 * half_rotated);
    }
};

// Contracted by hand: the same bits wherever it is compiled into.
DEVICE void rotate_pair(float& low, float& high, float cosine, float sine) {
    const float before = low;
    low = fmaf(before, cosine, -(high * sine));
    high = fmaf(high, cosine, before * sine);
}
