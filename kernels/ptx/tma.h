// The tensor memory accelerator (sm_90): boxes of a matrix between global and shared memory, started by one thread, without
// registers. What lies outside the matrix is read as zero and not written.
//
// A box in shared memory has rows of 128 bytes (64 halves) and starts at a multiple of 1024 bytes; within each eight rows the
// 16-byte chunk c of row r stands at chunk c ^ (r % 8), as wgmma wants it.
#pragma once
#include "mbarrier.h"

// A matrix and the box's height, encoded by the host: see `Argument::Boxes`. A kernel takes it as
// `const __grid_constant__ TensorMap`.
struct alignas(64) TensorMap {
    uint64_t opaque[16];
};

constexpr int box_columns = 64, box_row_bytes = 128;

// Address of 16-byte chunk `c` of row `r` in a box.
DEVICE int box_offset(int r, int c) { return r * box_row_bytes + ((c ^ (r & 7)) << 4); }

// Starts to copy the box whose first element is (row, column) to shared memory; its bytes count on `barrier` as they land,
// zeros outside the matrix included.
DEVICE void tma_load(void* shared, const TensorMap& map, int row, int column, Mbarrier* barrier CALL_SITE) {
#if ON_DEVICE
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
            shared_address(shared)),
        "l"(&map), "r"(shared_address(barrier)), "r"(column), "r"(row)
        : "memory");
#else
    emulator::tma_load(shared, map.opaque, row, column, barrier, where);
#endif
}

// The same to several blocks of the cluster at once: the box lands at the offset of `shared` in the shared memory of each block
// whose bit is set, and its bytes count on the barrier at the offset of `barrier` there.
DEVICE void tma_load_multicast(void* shared, const TensorMap& map, int row, int column, Mbarrier* barrier,
                               unsigned block_mask CALL_SITE) {
#if ON_DEVICE
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1, {%3, %4}], [%2], %5;" ::"r"(shared_address(shared)),
        "l"(&map), "r"(shared_address(barrier)), "r"(column), "r"(row), "h"(static_cast<uint16_t>(block_mask))
        : "memory");
#else
    emulator::tma_load_multicast(shared, map.opaque, row, column, barrier, block_mask, where);
#endif
}

// Starts to copy a box from shared memory. Every thread that wrote it has fenced (fence_async_proxy) and met the calling one
// at a barrier since.
DEVICE void tma_store(const TensorMap& map, const void* shared, int row, int column CALL_SITE) {
#if ON_DEVICE
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(&map),
                 "r"(shared_address(shared)), "r"(column), "r"(row)
                 : "memory");
#else
    emulator::tma_store(map.opaque, shared, row, column, where);
#endif
}

// Closes the group of this thread's stores.
DEVICE void tma_store_commit() {
#if ON_DEVICE
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
#else
    emulator::tma_store_commit();
#endif
}

// Waits until this thread's stores have read their shared memory. A thread that stored must do so before it ends.
DEVICE void tma_store_wait_read() {
#if ON_DEVICE
    asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
#else
    emulator::tma_store_wait_read();
#endif
}

// Makes this thread's plain writes of shared memory visible to the TMA and to wgmma, after the next barrier.
DEVICE void fence_async_proxy() {
#if ON_DEVICE
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#else
    emulator::fence_async_proxy();
#endif
}
