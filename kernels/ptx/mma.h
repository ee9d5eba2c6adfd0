// mma.sync m16n8k16 (sm_80): D[16][8] += A[16][16] · B[16][8] by one warp, f16 or bf16 in, f32 accumulators.
// Fragments, with g = lane/4 and t = lane%4:
//   a[0..3]  A[g][2t,2t+1]  A[g+8][2t,2t+1]  A[g][2t+8,2t+9]  A[g+8][2t+8,2t+9]
//   b[0..1]  B[2t,2t+1][g]  B[2t+8,2t+9][g]
//   d[0..3]  D[g][2t]  D[g][2t+1]  D[g+8][2t]  D[g+8][2t+1]
#pragma once
#include <type_traits>

#include "target.h"

#if ON_DEVICE
// Not volatile: a function of its operands, which the compiler may schedule freely.
template <class T>
DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    if constexpr (std::is_same<T, f16>::value)
        asm(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    else
        asm(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#endif

// A grid of MT × NT such products that share their fragments: unrolled on the device, one rendezvous of the warp in the
// emulator (rule 4).
template <class T, int MT, int NT>
DEVICE void mma_tile(float (&d)[MT][NT][4], const uint32_t (&a)[MT][4], const uint32_t (&b)[NT][2] CALL_SITE) {
    static_assert(std::is_same<T, f16>::value || std::is_same<T, bf16>::value, "f16 or bf16");
#if ON_DEVICE
#pragma unroll
    for (int i = 0; i < MT; i++)
#pragma unroll
        for (int j = 0; j < NT; j++) mma_m16n8k16<T>(d[i][j], a[i], b[j]);
#else
    emulator::mma_tile(&d[0][0][0], &a[0][0], &b[0][0], MT, NT, std::is_same<T, bf16>::value, where);
#endif
}
