// The race checker: every plain access of a kernel arrives here through __tsan_read*/__tsan_write*, every primitive's
// through checker.h. Each two bytes of memory have a shadow cell that remembers the last write and some reads as
// (thread, clock) pairs; an access is ordered after another thread's if its own vector clock has reached that thread's.
// Two kernels' threads that touch neighbouring bytes of one cell would look like a race: our types are 2 bytes or more.
#include "checker.h"

#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>

namespace emulator::checker {

constexpr size_t cell_bytes = 2;

enum Flags : uint8_t { initialised = 1, in_flight = 2, by_atomic = 4, by_thread = 8 };

// ---- clocks

static Clock clocks;  // a row for each thread: one entry a thread, and one for each block's TMA
static int thread_places() { return static_cast<int>(cluster.threads.size()); }
static int clock_entries() { return thread_places() + cluster.block_count; }
static int tma(int block) { return thread_places() + block; }
static uint32_t tma_time[max_cluster_blocks], last_landing[max_cluster_blocks];
static std::vector<Clock> proxy_fences;  // of each thread: its clock at each fence_async_proxy

// The last arrival of each thread at the mbarriers of each block.
struct Arrival {
    uint32_t clock;
    Location where;
};
static std::vector<Arrival> arrivals[max_cluster_blocks];

uint32_t* thread_clock(int thread) { return &clocks[size_t(thread) * clock_entries()]; }

static void merge(uint32_t* into, const uint32_t* from) {
    for (int i = 0; i < clock_entries(); i++) into[i] = std::max(into[i], from[i]);
}

void release(Thread* thread, Clock& into) {
    into.resize(clock_entries(), 0);
    merge(into.data(), thread->clock);
    thread->clock[thread->linear]++;  // what the thread does from here on is not covered
}

void acquire(Thread* thread, const Clock& from) {
    if (!from.empty()) merge(thread->clock, from.data());
}

void acquire_turn(Thread* thread, const Clock& from) {
    if (from.empty()) return;
    thread->turns.resize(clock_entries(), 0);
    merge(thread->turns.data(), from.data());
}

void release_copies(int block, Clock& into) {
    into.resize(clock_entries(), 0);
    into[tma(block)] = tma_time[block];
}

void fence_async_proxy(Thread* thread) { proxy_fences[thread->linear].push_back(thread->clock[thread->linear]++); }

void synchronise(Thread* lanes, unsigned mask) {
    Clock together;
    for (unsigned rest = mask; rest; rest &= rest - 1) release(&lanes[__builtin_ctz(rest)], together);
    for (unsigned rest = mask; rest; rest &= rest - 1) acquire(&lanes[__builtin_ctz(rest)], together);
}

// ---- places in the code, packed in 32 bits: an offset into this library, or a primitive's call site

using Place = uint32_t;
constexpr Place is_call_site = 0x80000000u;
static std::vector<Location> call_sites;

static Place place_of(Location where) {
    static size_t last = 0;  // accesses of one line come in rows
    const auto matches = [&](const Location& site) { return site.line == where.line && site.file == where.file; };
    if (last < call_sites.size() && matches(call_sites[last])) return is_call_site | Place(last);
    last = std::find_if(call_sites.begin(), call_sites.end(), matches) - call_sites.begin();
    if (last == call_sites.size()) call_sites.push_back(where);
    return is_call_site | Place(last);
}

static uintptr_t library_base() {
    static const uintptr_t base = [] {
        Dl_info library;
        return dladdr(reinterpret_cast<void*>(&library_base), &library) ? uintptr_t(library.dli_fbase) : 0;
    }();
    return base;
}
static Place place_of(void* return_address) { return Place(uintptr_t(return_address) - 1 - library_base()); }

static std::string describe(Place place) {
    if (place & is_call_site) return describe_location(call_sites[place & ~is_call_site]);
    return describe_code(library_base() + place);
}

// ---- device memory

struct GlobalCell {
    // A cluster is named by its first block.
    uint32_t write_launch, write_cluster, write_clock;
    uint32_t read_launch, read_cluster, read_clock;
    uint16_t writer, reader;
    uint8_t flags;
};
static GlobalCell* global_cells = nullptr;
static uint32_t this_cluster() { return cluster.blocks[0].linear_index; }
static unsigned block_in_grid(uint32_t of_cluster, int thread) { return of_cluster + cluster.block_of(thread); }
static unsigned thread_in_block(int thread) { return thread % (cluster.warps_of_block * 32); }
static GlobalCell* global_cell(uintptr_t address) { return &global_cells[(address - global_range) / cell_bytes]; }

void reserve_shadow() {
    const size_t bytes = global_range_bytes / cell_bytes * sizeof(GlobalCell);
    global_cells = static_cast<GlobalCell*>(
        mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
}

void forget(uintptr_t mapping, size_t bytes) {
    // The mapping is whole pages, and so are its cells.
    madvise(global_cell(mapping), bytes / cell_bytes * sizeof(GlobalCell), MADV_DONTNEED);
}

void initialised_by_host(const void* address, size_t bytes) {
    if (!bytes) return;
    const uintptr_t first = uintptr_t(address);
    for (GlobalCell* cell = global_cell(first); cell <= global_cell(first + bytes - 1); cell++)
        *cell = {0, 0, 0, 0, 0, 0, 0, 0, initialised};
}

static void check_global_bounds(uintptr_t address, size_t bytes, const char* action, Place place) {
    const Allocation* near = find_allocation(address);
    const bool inside = near && !near->freed && address >= near->address &&
                        address + bytes <= near->address + near->bytes;
    if (!inside)
        fail("global %s of %zu bytes out of bounds: byte %lld of an allocation of %zu bytes%s at %s", action, bytes,
             near ? static_cast<long long>(address - near->address) : -1LL, near ? near->bytes : 0,
             near && near->freed ? ", already freed" : "", describe(place).c_str());
    const bool vector = bytes <= 16 && (bytes & (bytes - 1)) == 0;
    if (vector && address % bytes) report("misaligned global %s of %zu bytes at %s", action, bytes, describe(place).c_str());
}

static void global_read(const Thread& thread, uintptr_t address, size_t bytes, Place place) {
    check_global_bounds(address, bytes, "read", place);
    const uint32_t launch = cluster.launch->id;
    for (GlobalCell *cell = global_cell(address), *last = global_cell(address + bytes - 1); cell <= last; cell++) {
        if (!(cell->flags & initialised)) {
            report("read of uninitialised global memory at %s", describe(place).c_str());
            cell->flags |= initialised;  // report once
        }
        if (cell->write_launch == launch && !(cell->flags & by_atomic)) {
            const bool other_cluster = cell->write_cluster != this_cluster();
            if (other_cluster || cell->write_clock > thread.clock[cell->writer]) {
                report("global race: read at %s of what block %u thread %u writes in the same launch", describe(place).c_str(),
                       block_in_grid(cell->write_cluster, cell->writer), thread_in_block(cell->writer));
                cell->write_launch = 0;
            }
        }
        // One reader is remembered: keep the old one unless it is known to be over.
        const bool replaceable = cell->read_launch != launch ||
                                 (cell->read_cluster == this_cluster() &&
                                  (cell->reader == thread.linear || cell->read_clock <= thread.clock[cell->reader]));
        if (replaceable) {
            cell->read_launch = launch;
            cell->read_cluster = this_cluster();
            cell->reader = static_cast<uint16_t>(thread.linear);
            cell->read_clock = thread.clock[thread.linear];
        }
    }
}

static void global_write(const Thread& thread, uintptr_t address, size_t bytes, Place place, bool atomic) {
    check_global_bounds(address, bytes, atomic ? "atomic" : "write", place);
    const uint32_t launch = cluster.launch->id;
    for (GlobalCell *cell = global_cell(address), *last = global_cell(address + bytes - 1); cell <= last; cell++) {
        if (atomic && !(cell->flags & initialised))
            report("atomic on uninitialised global memory at %s", describe(place).c_str());
        const bool both_atomic = atomic && (cell->flags & by_atomic);
        const auto unordered = [&](uint32_t other_cluster, uint16_t other, uint32_t clock) {
            return other_cluster != this_cluster() || (other != thread.linear && clock > thread.clock[other]);
        };
        if (cell->write_launch == launch && !both_atomic &&
            unordered(cell->write_cluster, cell->writer, cell->write_clock))
            report("global race: %s overwrites what block %u thread %u wrote in the same launch", describe(place).c_str(),
                   block_in_grid(cell->write_cluster, cell->writer), thread_in_block(cell->writer));
        if (cell->read_launch == launch && !atomic && unordered(cell->read_cluster, cell->reader, cell->read_clock)) {
            report("global race: %s overwrites what block %u thread %u may still be reading", describe(place).c_str(),
                   block_in_grid(cell->read_cluster, cell->reader), thread_in_block(cell->reader));
            cell->read_launch = 0;
        }
        cell->write_launch = launch;
        cell->write_cluster = this_cluster();
        cell->writer = static_cast<uint16_t>(thread.linear);
        cell->write_clock = thread.clock[thread.linear];
        cell->flags = initialised | (atomic ? by_atomic : 0);
    }
}

// ---- shared memory

constexpr int remembered_readers = 4;
struct SharedCell {
    uint32_t cluster_stamp;  // cells of earlier clusters count as blank
    uint32_t write_clock;
    Place write_place;
    uint16_t writer;
    uint8_t flags, reader_count;
    uint16_t readers[remembered_readers];
    uint32_t read_clocks[remembered_readers];
};
static std::vector<SharedCell> shared_cells;
static uint32_t cluster_stamp = 0;

void begin_cluster() {
    clocks.assign(size_t(thread_places()) * clock_entries(), 0);
    proxy_fences.assign(thread_places(), {});
    for (int block = 0; block < cluster.block_count; block++) {
        tma_time[block] = last_landing[block] = 0;
        arrivals[block].assign(thread_places(), {});
    }
    for (int i = 0; i < thread_places(); i++) thread_clock(i)[i] = 1;
    shared_cells.resize(std::max(shared_cells.size(), cluster.block_count * shared_arena_bytes / cell_bytes));
    cluster_stamp++;
}

void end_block(int block) {
    Clock seen(clock_entries(), 0);
    for (const Thread& thread : cluster.threads)
        if (thread.block == block && thread.state == State::exited) {
            merge(seen.data(), thread.clock);
            if (!thread.turns.empty()) merge(seen.data(), thread.turns.data());
        }
    for (int thread = 0; thread < thread_places(); thread++)
        if (arrivals[block][thread].clock > seen[thread])
            return report("%s ends, and may do so before %s arrives at its mbarrier at %s", describe_block(block).c_str(),
                          describe_thread(thread).c_str(), describe_location(arrivals[block][thread].where).c_str());
    if (last_landing[block] > seen[tma(block)])
        report("%s ends, and may do so before a TMA load has landed in it", describe_block(block).c_str());
}

static SharedCell& shared_cell(size_t offset) {
    SharedCell& cell = shared_cells[offset / cell_bytes];
    if (cell.cluster_stamp != cluster_stamp) {
        cell = SharedCell{};
        cell.cluster_stamp = cluster_stamp;
    }
    return cell;
}

static void check_shared_bounds(size_t in_arenas, size_t bytes, const char* action, Place place) {
    const Block& block = cluster.blocks[shared_owner(in_arenas)];
    const size_t offset = shared_place(in_arenas);
    const auto holds = [&](size_t begin, size_t length) { return offset >= begin && offset + bytes <= begin + length; };
    bool inside = block.dynamic_shared_offset && holds(block.dynamic_shared_offset, cluster.launch->dynamic_shared_bytes);
    for (const SharedVariable& variable : block.shared_variables) inside |= holds(variable.offset, variable.bytes);
    if (!inside)
        fail("shared %s of %zu bytes out of bounds: byte %lld of the dynamic %u at %s", action, bytes,
             static_cast<long long>(offset) - static_cast<long long>(block.dynamic_shared_offset),
             cluster.launch->dynamic_shared_bytes, describe(place).c_str());
    const bool vector = bytes <= 16 && (bytes & (bytes - 1)) == 0;
    if (vector && offset % bytes) report("misaligned shared %s of %zu bytes at %s", action, bytes, describe(place).c_str());
}

static void remember_reader(SharedCell& cell, const Thread& thread, int reader, uint32_t clock) {
    int slot = -1;
    for (int i = 0; i < cell.reader_count; i++) {
        if (cell.readers[i] == reader) { slot = i; break; }
        if (cell.read_clocks[i] <= thread.clock[cell.readers[i]]) slot = i;  // that read is over
    }
    if (slot < 0) slot = cell.reader_count < remembered_readers ? cell.reader_count++ : random_number() % remembered_readers;
    cell.readers[slot] = static_cast<uint16_t>(reader);
    cell.read_clocks[slot] = clock;
}

// Who reads or writes: the thread itself, or the TMA or the tensor cores on its behalf.
enum class Proxy { thread, tensor_cores, tma };

static std::string describe_writer(const SharedCell& cell) {
    return cell.writer >= thread_places() ? "the TMA" : describe_thread(cell.writer);
}

// What a thread wrote reaches the asynchronous proxy if the thread fenced after it, and that before what orders the reader.
static bool is_fenced(const SharedCell& cell, const Thread& reader) {
    const Clock& fences = proxy_fences[cell.writer];
    const auto fence = std::lower_bound(fences.begin(), fences.end(), cell.write_clock);
    return fence != fences.end() && (cell.writer == reader.linear || *fence < reader.clock[cell.writer]);
}

static void shared_read(const Thread& thread, size_t offset, size_t bytes, Place place, Proxy proxy = Proxy::thread) {
    check_shared_bounds(offset, bytes, "read", place);
    for (size_t at = offset & ~(cell_bytes - 1); at < offset + bytes; at += cell_bytes) {
        SharedCell& cell = shared_cell(at);
        if (cell.flags & in_flight) {
            report("shared memory read at %s while an asynchronous copy to it is in flight (issued at %s)",
                   describe(place).c_str(), describe(cell.write_place).c_str());
            cell.flags &= ~in_flight;
        } else if (!(cell.flags & initialised)) {
            report("read of uninitialised shared memory at %s", describe(place).c_str());
            cell.flags |= initialised;
        } else {
            if (cell.writer != thread.linear && cell.write_clock > thread.clock[cell.writer]) {
                report("shared race: read at %s of %s's write at %s without a barrier between", describe(place).c_str(),
                       describe_writer(cell).c_str(), describe(cell.write_place).c_str());
                cell.write_clock = 0;
            } else if (proxy != Proxy::thread && (cell.flags & by_thread) && !is_fenced(cell, thread)) {
                report("asynchronous read at %s of %s's write at %s without fence_async_proxy between",
                       describe(place).c_str(), describe_writer(cell).c_str(), describe(cell.write_place).c_str());
                cell.flags &= ~by_thread;
            }
            if (proxy == Proxy::tma) remember_reader(cell, thread, tma(thread.block), tma_time[thread.block]);
            else remember_reader(cell, thread, thread.linear, thread.clock[thread.linear]);
        }
    }
}

static void check_shared_write(const SharedCell& cell, const Thread& thread, Place place, Proxy proxy) {
    const auto is_over = [&](int other, uint32_t clock) {
        return other == thread.linear || clock <= thread.clock[other] ||
               (proxy == Proxy::tma && !thread.turns.empty() && clock <= thread.turns[other]);
    };
    if (cell.flags & in_flight)
        return report("shared memory written at %s while an asynchronous copy to it is in flight", describe(place).c_str());
    if ((cell.flags & initialised) && !is_over(cell.writer, cell.write_clock))
        return report("shared race: %s overwrites %s's write at %s without a barrier between", describe(place).c_str(),
                      describe_writer(cell).c_str(), describe(cell.write_place).c_str());
    for (int i = 0; i < cell.reader_count; i++)
        if (!is_over(cell.readers[i], cell.read_clocks[i]))
            return report("shared race: %s overwrites what %s may still be reading", describe(place).c_str(),
                          cell.readers[i] >= thread_places() ? "the TMA" : describe_thread(cell.readers[i]).c_str());
}

static void shared_write(size_t offset, size_t bytes, Place place, uint8_t flags, Proxy proxy = Proxy::thread) {
    check_shared_bounds(offset, bytes, "write", place);
    const Thread& thread = *self();
    for (size_t at = offset & ~(cell_bytes - 1); at < offset + bytes; at += cell_bytes) {
        SharedCell& cell = shared_cell(at);
        check_shared_write(cell, thread, place, proxy);
        cell.reader_count = 0;
        cell.flags = initialised | flags;
        cell.writer = static_cast<uint16_t>(thread.linear);
        cell.write_clock = thread.clock[thread.linear];
        cell.write_place = place;
    }
}

// ---- the primitives' accesses

void shared_read(const Thread& reader, const void* address, size_t bytes, Location where) {
    shared_read(reader, shared_offset(address), bytes, place_of(where));
}

void async_copy_issued(const void* shared, const void* global, int bytes, Location where) {
    const Place place = place_of(where);
    if (bytes) global_read(*self(), uintptr_t(global), bytes, place);
    shared_write(shared_offset(shared), 16, place, in_flight);
}

// The data is visible to its own thread from here, to others after the next barrier.
void async_copy_landed(const void* shared, size_t bytes, Location where) {
    const Thread& thread = *self();
    const size_t offset = shared_offset(shared);
    for (size_t at = offset; at < offset + bytes; at += cell_bytes) {
        SharedCell& cell = shared_cell(at);
        cell.flags = initialised;
        cell.reader_count = 0;
        cell.writer = static_cast<uint16_t>(thread.linear);
        cell.write_clock = thread.clock[thread.linear];
        cell.write_place = place_of(where);
    }
}

void touches_other_block(const Thread& thread, int block, Location where) {
    arrivals[block][thread.linear] = {thread.clock[thread.linear], where};
}

void atomic_access(const void* address, size_t bytes, Location where) {
    const uintptr_t first = uintptr_t(address);
    if (is_global(first)) global_write(*self(), first, bytes, place_of(where), true);
    else check_shared_bounds(shared_offset(address), bytes, "atomic", place_of(where));
}

void plain_write(const void* shared, size_t bytes, Location where) {
    shared_write(shared_offset(shared), bytes, place_of(where), by_thread);
}

// ---- the asynchronous proxy

void async_write_issued(const void* shared, size_t bytes, Location where) {
    shared_write(shared_offset(shared), bytes, place_of(where), in_flight, Proxy::tma);
}

void async_write_landed(const void* shared, size_t bytes, Location where) {
    const size_t offset = shared_offset(shared);
    const Place place = place_of(where);
    const int block = shared_owner(offset);
    last_landing[block] = ++tma_time[block];
    for (size_t at = offset; at < offset + bytes; at += cell_bytes) {
        SharedCell& cell = shared_cell(at);
        cell.flags = initialised;
        cell.reader_count = 0;
        cell.writer = static_cast<uint16_t>(tma(block));
        cell.write_clock = tma_time[block];
        cell.write_place = place;
    }
}

void async_read(const Thread& reader, const void* shared, size_t bytes, Location where) {
    shared_read(reader, shared_offset(shared), bytes, place_of(where), Proxy::tensor_cores);
}

uint32_t async_read_begins(const void* shared, size_t bytes, Location where) {
    const uint32_t mark = ++tma_time[self()->block];
    shared_read(*self(), shared_offset(shared), bytes, place_of(where), Proxy::tma);
    return mark;
}

void async_read_ended(Thread* thread, uint32_t mark) {
    uint32_t& seen = thread->clock[tma(thread->block)];
    seen = std::max(seen, mark);
}

void copy_reads_global(int thread, const void* global, size_t bytes, Location where) {
    global_read(cluster.threads[thread], uintptr_t(global), bytes, place_of(where));
}

void copy_writes_global(int thread, const void* global, size_t bytes, Location where) {
    global_write(cluster.threads[thread], uintptr_t(global), bytes, place_of(where), false);
}

// ---- what g++ calls at each access

static void plain_access(void* address, size_t bytes, bool write, void* return_address) {
    if (!cluster.running || !bytes) return;
    const uintptr_t first = uintptr_t(address);
    if (is_global(first)) {
        if (write) global_write(*self(), first, bytes, place_of(return_address), false);
        else global_read(*self(), first, bytes, place_of(return_address));
    } else if (is_shared(first)) {
        const size_t offset = first - uintptr_t(shared_arena);
        if (shared_owner(offset) != current->block)
            fail("access to shared memory of another block of the cluster at %s", describe(place_of(return_address)).c_str());
        if (write) shared_write(offset, bytes, place_of(return_address), by_thread);
        else shared_read(*self(), offset, bytes, place_of(return_address));
    }
}

}  // namespace emulator::checker

using emulator::checker::plain_access;
#define ACCESS_HOOKS(bytes) \
    extern "C" void __tsan_read##bytes(void* p) { plain_access(p, bytes, false, __builtin_return_address(0)); } \
    extern "C" void __tsan_write##bytes(void* p) { plain_access(p, bytes, true, __builtin_return_address(0)); } \
    extern "C" void __tsan_unaligned_read##bytes(void* p) { plain_access(p, bytes, false, __builtin_return_address(0)); } \
    extern "C" void __tsan_unaligned_write##bytes(void* p) { plain_access(p, bytes, true, __builtin_return_address(0)); }
ACCESS_HOOKS(1)
ACCESS_HOOKS(2)
ACCESS_HOOKS(4)
ACCESS_HOOKS(8)
ACCESS_HOOKS(16)
extern "C" void __tsan_read_range(void* p, size_t n) { plain_access(p, n, false, __builtin_return_address(0)); }
extern "C" void __tsan_write_range(void* p, size_t n) { plain_access(p, n, true, __builtin_return_address(0)); }
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
