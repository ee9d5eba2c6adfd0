// Which of a group's ranks a stretch of its output columns needs.
#pragma once
#include "halves.h"

// The columns of B̂ that the projections overlapping output columns [begin, end) use, from a multiple of eight on. slots:
// lora.cu.
DEVICE int2 rank_range(const int* slots, int adapters, int begin, int end) {
    int first = 0x7fffffff, last = 0;
    for (int adapter = 0; adapter < adapters; adapter++) {
        const int* slot = slots + adapter * 4;
        if (slot[0] < end && begin < slot[1]) {
            first = min(first, slot[2]);
            last = max(last, slot[3]);
        }
    }
    return make_int2(first / vector_width * vector_width, last);
}
