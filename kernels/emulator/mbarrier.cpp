// mbarrier: barriers in shared memory that count arrivals and the bytes of asynchronous copies (PTX ISA, "mbarrier"). Their
// eight bytes stay opaque; the counts live here. Offsets go through the shared memory of all blocks of the cluster.
#include "block.h"
#include "checker.h"

namespace emulator {

std::vector<MemoryBarrier> memory_barriers;

// Who may not know of the initialisation yet must not touch the barrier.
static void check_is_known(const MemoryBarrier& barrier, const Thread& thread, Location where) {
    if constexpr (checked)
        if (barrier.initialised_by != thread.linear && thread.clock[barrier.initialised_by] < barrier.initialised_at)
            report("mbarrier used at %s without a barrier since %s initialised it", describe_location(where).c_str(),
                   describe_thread(barrier.initialised_by).c_str());
}

MemoryBarrier& find_memory_barrier(uint32_t offset, Location where) {
    const int owner = shared_owner(offset);
    if (cluster.blocks[owner].alive == 0)
        fail("mbarrier of %s, which has ended, used at %s", describe_block(owner).c_str(), describe_location(where).c_str());
    for (MemoryBarrier& barrier : memory_barriers) {
        if (barrier.offset != offset) continue;
        check_is_known(barrier, *self(), where);
        return barrier;
    }
    fail("mbarrier used before mbarrier.init at %s", describe_location(where).c_str());
}

void mbarrier_init(uint64_t* address, unsigned arrivals, Location where) {
    const uint32_t offset = shared_offset(address);
    constexpr unsigned most_arrivals = (1 << 20) - 1;
    if (offset % 8) fail("mbarrier that is not 8-byte aligned at %s", describe_location(where).c_str());
    if (arrivals == 0 || arrivals > most_arrivals)
        fail("mbarrier of %u arrivals at %s", arrivals, describe_location(where).c_str());
    for (const MemoryBarrier& barrier : memory_barriers)
        if (barrier.offset == offset) fail("mbarrier initialised twice at %s", describe_location(where).c_str());
    const Thread* thread = self();
    MemoryBarrier barrier{};
    barrier.offset = offset;
    barrier.expected = barrier.pending = static_cast<int>(arrivals);
    barrier.initialised_by = thread->linear;
    if constexpr (checked) {
        checker::plain_write(address, 8, where);
        barrier.initialised_at = thread->clock[thread->linear];
    }
    memory_barriers.push_back(std::move(barrier));
}

void fence_mbarrier_init() {
    for (MemoryBarrier& barrier : memory_barriers)
        if (barrier.initialised_by == self()->linear) barrier.visible_to_copies = true;
}

// What a completed phase orders before the thread that waited for it.
static void acquire_phase(const MemoryBarrier& barrier, Thread* thread) {
    if constexpr (checked) {
        checker::acquire(thread, barrier.completed.own);
        checker::acquire_turn(thread, barrier.completed.other);
    }
}

static void complete_phase_if_done(MemoryBarrier& barrier) {
    if (barrier.pending || barrier.bytes) return;
    const unsigned completed = barrier.phase++ & 1;
    barrier.pending = barrier.expected;
    barrier.completed = std::move(barrier.arriving);
    barrier.arriving = {};
    std::vector<Thread*> still_waiting;
    for (Thread* waiter : barrier.waiting) {
        if (waiter->mbarrier_parity != completed) {
            still_waiting.push_back(waiter);
            continue;
        }
        make_runnable(waiter);
        acquire_phase(barrier, waiter);
    }
    barrier.waiting = std::move(still_waiting);
}

static void arrive(uint32_t offset, unsigned bytes, Location where) {
    MemoryBarrier& barrier = find_memory_barrier(offset, where);
    Thread* thread = self();
    const bool is_own = shared_owner(offset) == thread->block;
    if (barrier.pending == 0)
        fail("mbarrier: more than the %d arrivals of a phase at %s", barrier.expected, describe_location(where).c_str());
    if constexpr (checked) {
        if (!is_own) checker::touches_other_block(*thread, shared_owner(offset), where);
        checker::release(thread, is_own ? barrier.arriving.own : barrier.arriving.other);
    }
    barrier.bytes += bytes;
    barrier.pending--;
    complete_phase_if_done(barrier);
    maybe_yield(8);
}

void mbarrier_arrive(uint64_t* address, unsigned bytes, Location where) {
    arrive(own_shared_offset(address, where), bytes, where);
}

void mbarrier_arrive_at(unsigned block, uint64_t* address, Location where) {
    arrive(shared_offset_in(block, own_shared_offset(address, where), where), 0, where);
}

void mbarrier_bytes_landed(uint32_t offset, unsigned bytes) {
    for (MemoryBarrier& barrier : memory_barriers) {
        if (barrier.offset != offset) continue;
        barrier.bytes -= bytes;
        if constexpr (checked) checker::release_copies(shared_owner(offset), barrier.arriving.own);
        complete_phase_if_done(barrier);
    }
}

void mbarrier_wait(uint64_t* address, unsigned parity, Location where) {
    if (parity > 1) fail("mbarrier parity %u at %s", parity, describe_location(where).c_str());
    MemoryBarrier& barrier = find_memory_barrier(own_shared_offset(address, where), where);
    Thread* thread = self();
    if ((barrier.phase & 1) != parity) {
        acquire_phase(barrier, thread);
        return maybe_yield(4);
    }
    thread->where = where;
    thread->mbarrier_offset = barrier.offset;
    thread->mbarrier_parity = parity;
    barrier.waiting.push_back(thread);
    wait_in(thread, State::at_mbarrier);
}

std::string describe_memory_barrier(uint32_t offset) {
    for (const MemoryBarrier& barrier : memory_barriers) {
        if (barrier.offset != offset) continue;
        char text[160];
        snprintf(text, sizeof text, "the mbarrier at shared byte %u (phase %llu: %d of %d arrivals and %lld bytes missing)",
                 static_cast<unsigned>(shared_place(offset)), static_cast<unsigned long long>(barrier.phase),
                 barrier.pending, barrier.expected, static_cast<long long>(barrier.bytes));
        return text;
    }
    return "an mbarrier";
}

}  // namespace emulator
