// ldmatrix (sm_75): four 8×8 matrices of 16-bit elements from shared memory into a warp's registers.
#pragma once
#include "cp_async.h"

// Lane 8m + r gives the 16-byte aligned address of row r of matrix m. Lane l receives, in registers[m], the elements
// (l/4, 2(l%4)) and (l/4, 2(l%4) + 1) of matrix m.
DEVICE void ldmatrix_x4(uint32_t (&registers)[4], const void* row CALL_SITE) {
#if ON_DEVICE
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                 : "r"(shared_address(row))
                 : "memory");
#else
    emulator::ldmatrix(registers, row, 4, false, where);
#endif
}

// The same with each matrix transposed: lane l receives the elements (2(l%4), l/4) and (2(l%4) + 1, l/4).
DEVICE void ldmatrix_x4_transposed(uint32_t (&registers)[4], const void* row CALL_SITE) {
#if ON_DEVICE
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                 : "r"(shared_address(row))
                 : "memory");
#else
    emulator::ldmatrix(registers, row, 4, true, where);
#endif
}
