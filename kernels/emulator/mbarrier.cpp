// mbarrier: barriers in shared memory that count arrivals and the bytes of asynchronous copies (PTX ISA, "mbarrier"). Their
// eight bytes stay opaque; the counts live here.
#include "block.h"
#include "checker.h"

namespace emulator {

std::vector<MemoryBarrier> memory_barriers;

MemoryBarrier& find_memory_barrier(const void* address, Location where) {
    const uint32_t offset = shared_offset(address);
    for (MemoryBarrier& barrier : memory_barriers)
        if (barrier.offset == offset) return barrier;
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

// Who may not know of the initialisation yet must not touch the barrier.
static void check_is_known(const MemoryBarrier& barrier, const Thread& thread, Location where) {
    if constexpr (checked)
        if (barrier.initialised_by != thread.linear && thread.clock[barrier.initialised_by] < barrier.initialised_at)
            report("mbarrier used at %s without a barrier since thread %d initialised it", describe_location(where).c_str(),
                   barrier.initialised_by);
}

static void complete_phase_if_done(MemoryBarrier& barrier) {
    if (barrier.pending || barrier.bytes) return;
    const unsigned completed = barrier.phase++ & 1;
    barrier.pending = barrier.expected;
    barrier.completed_clock = std::move(barrier.arriving_clock);
    barrier.arriving_clock.clear();
    std::vector<Thread*> still_waiting;
    for (Thread* waiter : barrier.waiting) {
        if (waiter->mbarrier_parity != completed) {
            still_waiting.push_back(waiter);
            continue;
        }
        make_runnable(waiter);
        if constexpr (checked) checker::acquire(waiter, barrier.completed_clock);
    }
    barrier.waiting = std::move(still_waiting);
}

void mbarrier_arrive(uint64_t* address, unsigned bytes, Location where) {
    MemoryBarrier& barrier = find_memory_barrier(address, where);
    Thread* thread = self();
    check_is_known(barrier, *thread, where);
    if (barrier.pending == 0)
        fail("mbarrier: more than the %d arrivals of a phase at %s", barrier.expected, describe_location(where).c_str());
    if constexpr (checked) checker::release(thread, barrier.arriving_clock);
    barrier.bytes += bytes;
    barrier.pending--;
    complete_phase_if_done(barrier);
    maybe_yield(8);
}

void mbarrier_bytes_landed(uint32_t offset, unsigned bytes) {
    for (MemoryBarrier& barrier : memory_barriers) {
        if (barrier.offset != offset) continue;
        barrier.bytes -= bytes;
        if constexpr (checked) checker::release_copies(barrier.arriving_clock);
        complete_phase_if_done(barrier);
    }
}

void mbarrier_wait(uint64_t* address, unsigned parity, Location where) {
    if (parity > 1) fail("mbarrier parity %u at %s", parity, describe_location(where).c_str());
    MemoryBarrier& barrier = find_memory_barrier(address, where);
    Thread* thread = self();
    check_is_known(barrier, *thread, where);
    if ((barrier.phase & 1) != parity) {
        if constexpr (checked) checker::acquire(thread, barrier.completed_clock);
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
                 offset, static_cast<unsigned long long>(barrier.phase), barrier.pending, barrier.expected,
                 static_cast<long long>(barrier.bytes));
        return text;
    }
    return "an mbarrier";
}

}  // namespace emulator
