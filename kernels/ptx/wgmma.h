// wgmma.mma_async m64nNk16 (sm_90a): D[64][N] += A[64][16] · B[16][N] by the four warps of a warpgroup, B in shared memory, A
// there too or in registers, f16 or bf16 in, f32 accumulators, asynchronous: the accumulators belong to the tensor cores from the first
// instruction until the wait.
//
//   fence ── wgmma … wgmma ── commit ── wait ── the accumulators may be read, the operands overwritten
//
// Thread t of the warpgroup, with w = t/32, g = t%32/4 and q = t%4, holds in d[4j … 4j+3], for each eight columns j:
//   D[16w+g][8j+2q]  D[16w+g][8j+2q+1]  D[16w+g+8][8j+2q]  D[16w+g+8][8j+2q+1]
// and of an A in registers, as fragments of mma.h: A[16w+g][2q,+1]  A[16w+g+8][2q,+1]  A[16w+g][2q+8,+9]  A[16w+g+8][2q+8,+9].
#pragma once
#include <type_traits>

#include "tma.h"

// An operand in boxes (tma.h) for one instruction, 16 of k. K innermost: `start` is the box's address plus 32 bytes for each
// 16 of k gone by; rows of eight follow each other by 1024 bytes. M or N innermost: the box's rows are k, `start` is the
// address of its first row of k, and the next 64 columns stand one box further, `box_bytes` on.
DEVICE uint64_t wgmma_operand(const void* start, int box_bytes = 16) {
#if ON_DEVICE
    const uint32_t address = shared_address(start);
#else
    const uint32_t address = emulator::shared_offset(start);
#endif
    constexpr uint64_t eight_rows = 8 * box_row_bytes, swizzle_128_bytes = 1;
    return (address & 0x3ffff) >> 4 | static_cast<uint64_t>(box_bytes >> 4) << 16 | (eight_rows >> 4) << 32 |
           swizzle_128_bytes << 62;
}

// The operand whose start is `bytes` further on: one addition, where a new operand would take five instructions.
DEVICE uint64_t wgmma_operand_after(uint64_t operand, int bytes) { return operand + (bytes >> 4); }

#if ON_DEVICE
// The operand lists of an instruction: "%0, %1, …" and "+f"(d[0]), "+f"(d[1]), … for N / 2 accumulators.
#define WGMMA_NAMES_10(t) \
    "%" #t "0, %" #t "1, %" #t "2, %" #t "3, %" #t "4, %" #t "5, %" #t "6, %" #t "7, %" #t "8, %" #t "9, "
#define WGMMA_VALUES_10(t) \
    "+f"(d[t##0]), "+f"(d[t##1]), "+f"(d[t##2]), "+f"(d[t##3]), "+f"(d[t##4]), "+f"(d[t##5]), "+f"(d[t##6]), \
        "+f"(d[t##7]), "+f"(d[t##8]), "+f"(d[t##9])
#define WGMMA_NAMES_64 \
    WGMMA_NAMES_10() WGMMA_NAMES_10(1) WGMMA_NAMES_10(2) "%30, %31"
#define WGMMA_VALUES_64 WGMMA_VALUES_10(), WGMMA_VALUES_10(1), WGMMA_VALUES_10(2), "+f"(d[30]), "+f"(d[31])
#define WGMMA_NAMES_60 \
    WGMMA_NAMES_10() WGMMA_NAMES_10(1) WGMMA_NAMES_10(2) WGMMA_NAMES_10(3) WGMMA_NAMES_10(4) WGMMA_NAMES_10(5)
#define WGMMA_VALUES_60 \
    WGMMA_VALUES_10(), WGMMA_VALUES_10(1), WGMMA_VALUES_10(2), WGMMA_VALUES_10(3), WGMMA_VALUES_10(4), WGMMA_VALUES_10(5)
#define WGMMA_NAMES_128 WGMMA_NAMES_60 "%60, %61, %62, %63"
#define WGMMA_VALUES_128 WGMMA_VALUES_60, "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
#define WGMMA_NAMES_192 \
    WGMMA_NAMES_60 WGMMA_NAMES_10(6) WGMMA_NAMES_10(7) WGMMA_NAMES_10(8) "%90, %91, %92, %93, %94, %95"
#define WGMMA_VALUES_192 \
    WGMMA_VALUES_60, WGMMA_VALUES_10(6), WGMMA_VALUES_10(7), WGMMA_VALUES_10(8), "+f"(d[90]), "+f"(d[91]), "+f"(d[92]), \
        "+f"(d[93]), "+f"(d[94]), "+f"(d[95])
#define WGMMA_NAMES_256 \
    WGMMA_NAMES_60 WGMMA_NAMES_10(6) WGMMA_NAMES_10(7) WGMMA_NAMES_10(8) WGMMA_NAMES_10(9) WGMMA_NAMES_10(10) \
        WGMMA_NAMES_10(11) "%120, %121, %122, %123, %124, %125, %126, %127"
#define WGMMA_VALUES_256 \
    WGMMA_VALUES_60, WGMMA_VALUES_10(6), WGMMA_VALUES_10(7), WGMMA_VALUES_10(8), WGMMA_VALUES_10(9), WGMMA_VALUES_10(10), \
        WGMMA_VALUES_10(11), "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123]), "+f"(d[124]), "+f"(d[125]), \
        "+f"(d[126]), "+f"(d[127])

// The last four arguments are the numbers of the operands behind the accumulators.
#define WGMMA_INSTRUCTION(N, TYPE, A, B, ACCUMULATE, B_MN) \
    asm volatile( \
        "{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, %" #ACCUMULATE ", 0;\n" \
        "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" WGMMA_NAMES_##N "}, %" #A ", %" #B \
        ", accumulate, 1, 1, 0, %" #B_MN ";\n}" \
        : WGMMA_VALUES_##N \
        : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(static_cast<int>(B_IS_MN)))
#define WGMMA_BOTH_TYPES(N, A, B, ACCUMULATE, B_MN) \
    if constexpr (std::is_same<T, f16>::value) WGMMA_INSTRUCTION(N, "f16", A, B, ACCUMULATE, B_MN); \
    else WGMMA_INSTRUCTION(N, "bf16", A, B, ACCUMULATE, B_MN)
// The same with A in four registers.
#define WGMMA_REGISTER_INSTRUCTION(N, TYPE, A0, A1, A2, A3, B, ACCUMULATE, B_MN) \
    asm volatile( \
        "{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, %" #ACCUMULATE ", 0;\n" \
        "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" WGMMA_NAMES_##N "}, {%" #A0 ", %" #A1 ", %" #A2 \
        ", %" #A3 "}, %" #B ", accumulate, 1, 1, %" #B_MN ";\n}" \
        : WGMMA_VALUES_##N \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)), \
          "n"(static_cast<int>(B_IS_MN)))
#define WGMMA_REGISTER_BOTH_TYPES(N, A0, A1, A2, A3, B, ACCUMULATE, B_MN) \
    if constexpr (std::is_same<T, f16>::value) \
        WGMMA_REGISTER_INSTRUCTION(N, "f16", A0, A1, A2, A3, B, ACCUMULATE, B_MN); \
    else WGMMA_REGISTER_INSTRUCTION(N, "bf16", A0, A1, A2, A3, B, ACCUMULATE, B_MN)
#endif

// d = A · B, or d += A · B. A has k innermost; B has n innermost if B_IS_MN, else k. Operands: wgmma_operand.
template <class T, int N, bool B_IS_MN>
DEVICE void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate CALL_SITE) {
    static_assert(std::is_same<T, f16>::value || std::is_same<T, bf16>::value, "f16 or bf16");
    static_assert(N == 64 || N == 128 || N == 192 || N == 256, "the widths written out above");
#if ON_DEVICE
    if constexpr (N == 64) {
        WGMMA_BOTH_TYPES(64, 32, 33, 34, 35);
    } else if constexpr (N == 128) {
        WGMMA_BOTH_TYPES(128, 64, 65, 66, 67);
    } else if constexpr (N == 192) {
        WGMMA_BOTH_TYPES(192, 96, 97, 98, 99);
    } else {
        WGMMA_BOTH_TYPES(256, 128, 129, 130, 131);
    }
#else
    emulator::wgmma(d, N, nullptr, a, b, B_IS_MN, accumulate, std::is_same<T, bf16>::value, where);
#endif
}

// The same with A's fragment in registers, which stay as they are until the wait.
template <class T, int N, bool B_IS_MN>
DEVICE void wgmma_registers(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate CALL_SITE) {
    static_assert(std::is_same<T, f16>::value || std::is_same<T, bf16>::value, "f16 or bf16");
    static_assert(N == 64 || N == 128, "the widths written out below");
#if ON_DEVICE
    if constexpr (N == 64) {
        WGMMA_REGISTER_BOTH_TYPES(64, 32, 33, 34, 35, 36, 37, 38);
    } else {
        WGMMA_REGISTER_BOTH_TYPES(128, 64, 65, 66, 67, 68, 69, 70);
    }
#else
    emulator::wgmma(d, N, a, 0, b, B_IS_MN, accumulate, std::is_same<T, bf16>::value, where);
#endif
}

// Before the first wgmma of a row of them, and whenever the accumulators were touched in between.
template <int COUNT>
DEVICE void wgmma_fence(float (&d)[COUNT] CALL_SITE) {
#if ON_DEVICE
    // The compiler must not move accesses of the accumulators across: it does not know that the instructions are asynchronous.
#pragma unroll
    for (int i = 0; i < COUNT; i++) asm volatile("" : "+f"(d[i])::"memory");
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#else
    emulator::wgmma_fence(where);
#endif
}

// The same before products with these fragments of A, which are computed by then.
template <int COUNT, int STEPS>
DEVICE void wgmma_fence(float (&d)[COUNT], uint32_t (&a)[STEPS][4] CALL_SITE) {
#if ON_DEVICE
#pragma unroll
    for (int i = 0; i < STEPS * 4; i++) asm volatile("" : "+r"(a[i / 4][i % 4])::"memory");
    wgmma_fence(d);
#else
    wgmma_fence(d, where);
#endif
}

// Closes a group.
DEVICE void wgmma_commit(CALL_SITE_ONLY) {
#if ON_DEVICE
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#else
    emulator::wgmma_commit(where);
#endif
}

// Waits until at most `groups_in_flight` groups are pending; then `d` may be touched if all groups that add to it are done.
template <int groups_in_flight, int COUNT>
DEVICE void wgmma_wait(float (&d)[COUNT] CALL_SITE) {
#if ON_DEVICE
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(groups_in_flight) : "memory");
#pragma unroll
    for (int i = 0; i < COUNT; i++) asm volatile("" : "+f"(d[i])::"memory");
#else
    emulator::wgmma_wait(groups_in_flight, where);
#endif
}

// Moves registers between warpgroups: the block's threads start with an equal share; every thread of a warpgroup calls.
template <int COUNT>
DEVICE void take_registers() {
#if ON_DEVICE
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
#endif
}
template <int COUNT>
DEVICE void give_registers() {
#if ON_DEVICE
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
#endif
}
