// The TMA: a load's destination is poisoned when it is issued and lands at a random later time, zeros outside the matrix, a
// multicast's in each block at a time of its own; a store reads its source as late as its thread's wait allows. Whoever reads
// too early, or writes too early, shows.
#include <algorithm>

#include "block.h"
#include "checker.h"

namespace emulator {

// What interface.cpp writes into a kernel's TensorMap.
struct Boxes {
    uint64_t magic, address, rows, columns, row_bytes;
    uint32_t box_rows;
};
constexpr uint64_t boxes_magic = 0x626f786573;  // "boxes"
constexpr int box_columns = 64, chunk_bytes = 16, row_bytes_in_box = 128, box_alignment = 1024;

struct Transfer {
    bool is_store, is_committed;
    Boxes boxes;
    uint32_t shared;  // offset through the shared memory of all blocks of the cluster
    int row, column;
    uint32_t barrier;  // of a load
    int thread;
    uint32_t read_mark;  // of a store: see checker::async_read_begins
    Location where;
};
static std::vector<Transfer> transfers;

bool encode_boxes(uint64_t* map, uint64_t address, uint64_t rows, uint64_t columns, uint64_t row_bytes, uint32_t box_rows) {
    const Boxes boxes{boxes_magic, address, rows, columns, row_bytes, box_rows};
    const bool encodable = rows && columns && address % 16 == 0 && row_bytes % 16 == 0 && columns * 2 <= row_bytes &&
                           row_bytes < uint64_t{1} << 40 && rows < uint64_t{1} << 32 && box_rows && box_rows <= 256;
    if (!encodable) return false;
    memcpy(map, &boxes, sizeof boxes);
    return is_inside_allocation(reinterpret_cast<void*>(address), (rows - 1) * row_bytes + columns * 2);
}

static Transfer issue(bool is_store, const void* shared, const uint64_t* map, int row, int column, Location where) {
    Transfer transfer{};
    transfer.is_store = is_store;
    memcpy(&transfer.boxes, map, sizeof transfer.boxes);
    if (transfer.boxes.magic != boxes_magic) fail("TMA with something that is no tensor map at %s", describe_location(where).c_str());
    transfer.shared = own_shared_offset(shared, where);
    if (transfer.shared % box_alignment)
        fail("TMA box that is not at a multiple of %d bytes at %s", box_alignment, describe_location(where).c_str());
    transfer.row = row;
    transfer.column = column;
    transfer.thread = self()->linear;
    transfer.where = where;
    return transfer;
}

static uint32_t box_bytes(const Transfer& transfer) { return transfer.boxes.box_rows * row_bytes_in_box; }

// One block's part of a load.
static void load_into(unsigned block, Transfer transfer, uint32_t barrier_offset) {
    const Location where = transfer.where;
    transfer.shared = shared_offset_in(block, transfer.shared, where);
    transfer.barrier = shared_offset_in(block, barrier_offset, where);
    if (!find_memory_barrier(transfer.barrier, where).visible_to_copies)
        report("TMA load on an mbarrier that was initialised without fence_mbarrier_init at %s",
               describe_location(where).c_str());
    unsigned char* destination = shared_arena + transfer.shared;
    if constexpr (checked) checker::async_write_issued(destination, box_bytes(transfer), where);
    memset(destination, 0xFF, box_bytes(transfer));
    transfers.push_back(transfer);
}

void tma_load(void* shared, const uint64_t* map, int row, int column, uint64_t* barrier, Location where) {
    load_into(cluster_block(), issue(false, shared, map, row, column, where), own_shared_offset(barrier, where));
    maybe_yield(8);
}

void tma_load_multicast(void* shared, const uint64_t* map, int row, int column, uint64_t* barrier, unsigned block_mask,
                        Location where) {
    if (block_mask == 0 || block_mask >> cluster.block_count)
        fail("a multicast to blocks %#x of a cluster of %d at %s", block_mask, cluster.block_count,
             describe_location(where).c_str());
    const Transfer transfer = issue(false, shared, map, row, column, where);
    for (unsigned rest = block_mask; rest; rest &= rest - 1)
        load_into(__builtin_ctz(rest), transfer, own_shared_offset(barrier, where));
    maybe_yield(8);
}

void tma_store(const uint64_t* map, const void* shared, int row, int column, Location where) {
    Transfer transfer = issue(true, shared, map, row, column, where);
    if constexpr (checked) transfer.read_mark = checker::async_read_begins(shared, box_bytes(transfer), where);
    transfers.push_back(transfer);
    maybe_yield(8);
}

void tma_store_commit() {
    for (Transfer& transfer : transfers)
        if (transfer.is_store && transfer.thread == self()->linear) transfer.is_committed = true;
}

// The columns of a box's row that lie inside the matrix.
struct Inside {
    int begin, end;
};
static Inside columns_inside(const Transfer& transfer, int box_row) {
    const int64_t row = int64_t{transfer.row} + box_row, columns = static_cast<int64_t>(transfer.boxes.columns);
    if (row < 0 || row >= static_cast<int64_t>(transfer.boxes.rows)) return {0, 0};
    const auto clamped = [](int64_t column) { return static_cast<int>(std::clamp<int64_t>(column, 0, box_columns)); };
    return {clamped(-int64_t{transfer.column}), clamped(columns - transfer.column)};
}

static void land(const Transfer& transfer) {
    for (int r = 0; r < static_cast<int>(transfer.boxes.box_rows); r++) {
        unsigned char row[row_bytes_in_box] = {};
        const uint32_t start = transfer.shared + r * row_bytes_in_box;
        const Inside inside = columns_inside(transfer, r);
        const int first = inside.begin * 2, bytes = inside.end > inside.begin ? (inside.end - inside.begin) * 2 : 0;
        unsigned char* global = reinterpret_cast<unsigned char*>(transfer.boxes.address) +
                                (int64_t{transfer.row} + r) * transfer.boxes.row_bytes + int64_t{transfer.column} * 2 + first;
        const auto swizzled = [&](int c) { return shared_arena + start + ((c ^ (start >> 7 & 7)) * chunk_bytes); };
        constexpr int chunks = row_bytes_in_box / chunk_bytes;
        if (transfer.is_store) {
            for (int c = 0; c < chunks; c++) memcpy(row + c * chunk_bytes, swizzled(c), chunk_bytes);
            if (bytes) memcpy(global, row + first, bytes);
            if constexpr (checked)
                if (bytes) checker::copy_writes_global(transfer.thread, global, bytes, transfer.where);
        } else {
            if constexpr (checked)
                if (bytes) checker::copy_reads_global(transfer.thread, global, bytes, transfer.where);
            if (bytes) memcpy(row + first, global, bytes);
            for (int c = 0; c < chunks; c++) memcpy(swizzled(c), row + c * chunk_bytes, chunk_bytes);
        }
    }
    if (transfer.is_store) return;
    if constexpr (checked) checker::async_write_landed(shared_arena + transfer.shared, box_bytes(transfer), transfer.where);
    mbarrier_bytes_landed(transfer.barrier, box_bytes(transfer));
}

static void land_at(size_t index) {
    const Transfer transfer = transfers[index];
    transfers.erase(transfers.begin() + static_cast<std::ptrdiff_t>(index));
    land(transfer);
}

bool any_load_in_flight() {
    for (const Transfer& transfer : transfers)
        if (!transfer.is_store) return true;
    return false;
}

// A load that nothing else can overtake any more, a random one where the schedule is random. Stores wait for their thread.
bool land_a_load() {
    std::vector<size_t> loads;
    for (size_t i = 0; i < transfers.size(); i++)
        if (!transfers[i].is_store) loads.push_back(i);
    if (loads.empty()) return false;
    land_at(loads[cluster.random ? random_number() % loads.size() : 0]);
    return true;
}

void tma_store_wait_read() {
    Thread* thread = self();
    for (size_t i = 0; i < transfers.size();) {
        if (transfers[i].is_store && transfers[i].is_committed && transfers[i].thread == thread->linear) {
            if constexpr (checked) checker::async_read_ended(thread, transfers[i].read_mark);
            land_at(i);
        } else {
            i++;
        }
    }
    maybe_yield(4);
}

void fence_async_proxy() {
    if constexpr (checked) checker::fence_async_proxy(self());
}

void check_transfers_at_exit(const Thread& thread) {
    for (const Transfer& transfer : transfers)
        if (transfer.is_store && transfer.thread == thread.linear)
            report("a TMA store from %s may still read shared memory when its thread exits",
                   describe_location(transfer.where).c_str());
}

void begin_asynchronous_work() {
    transfers.clear();
    memory_barriers.clear();
}

void check_transfers_at_end(int block) {
    for (const Transfer& transfer : transfers)
        if (!transfer.is_store && shared_owner(transfer.shared) == block)
            report("a TMA load from %s was still in flight when the block ended", describe_location(transfer.where).c_str());
}

}  // namespace emulator
