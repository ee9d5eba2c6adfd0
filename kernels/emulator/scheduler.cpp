// Threads are fibers of one OS thread, those of a cluster's blocks together. A seeded schedule picks the next: a random lane
// of the current warp until the whole warp waits, then another warp of any block; now and then a warp is preempted although it
// could go on. Half of the seeds pick warps by random priority instead, which starves some and lets others, or all of one block,
// run far ahead.
#include <sys/mman.h>

#include <algorithm>
#include <map>

#include "block.h"
#include "checker.h"

namespace emulator {

Indices* current = nullptr;
Cluster cluster;

// Saves the callee-saved registers of the System V ABI on this stack, leaves its pointer in *save, and goes on where
// `to` was left. Everything else is dead across a call, so a switch costs a few nanoseconds.
extern "C" __attribute__((visibility("hidden"))) void emulator_switch_stack(void** save, void* to);
asm(R"(
.text
.hidden emulator_switch_stack
.globl emulator_switch_stack
.type emulator_switch_stack, @function
emulator_switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size emulator_switch_stack, . - emulator_switch_stack
)");

uint64_t random_number() {  // xorshift64
    uint64_t x = cluster.random_state;
    x ^= x << 13;
    x ^= x >> 7;
    x ^= x << 17;
    return cluster.random_state = x;
}

// A random set bit of a non-zero mask.
static int random_bit(unsigned mask) {
    const unsigned turn = random_number() & 31;
    const unsigned turned = mask >> turn | (turn ? mask << (32 - turn) : 0);
    return (__builtin_ctz(turned) + turn) & 31;
}

static int random_warp(uint64_t mask) {
    for (int skipped = random_number() % __builtin_popcountll(mask); skipped; skipped--) mask &= mask - 1;
    return __builtin_ctzll(mask);
}

void abandon_cluster() {
    void* nobody;
    emulator_switch_stack(&nobody, cluster.main_stack_pointer);
    __builtin_unreachable();
}

static std::string describe_wait(const Thread& thread) {
    static const char* const kinds[] = {"none", "__syncwarp", "shuffle", "vote", "warp_reduce", "ldmatrix", "mma",
                                        "wgmma", "wgmma_fence", "wgmma_commit", "wgmma_wait"};
    char text[160];
    switch (thread.state) {
        case State::in_collective:
            snprintf(text, sizeof text, "in %s with mask %08x", kinds[static_cast<int>(thread.kind)], thread.mask);
            break;
        case State::at_barrier: {
            const Barrier& barrier = cluster.blocks[thread.block].barriers[thread.barrier_id];
            snprintf(text, sizeof text, "at barrier %d (%d of %d arrived)", thread.barrier_id, barrier.arrived,
                     barrier.expected);
            break;
        }
        case State::at_cluster_barrier:
            snprintf(text, sizeof text, "at the cluster's barrier (%d of %d arrived)", cluster.barrier.arrived, cluster.alive);
            break;
        case State::at_mbarrier:
            return "waiting for parity " + std::to_string(thread.mbarrier_parity) + " of " +
                   describe_memory_barrier(thread.mbarrier_offset) + " at " + describe_location(thread.where);
        case State::exited: return "exited";
        case State::runnable: return "runnable";
        case State::absent: return "absent";
    }
    return std::string(text) + " at " + describe_location(thread.where);
}

[[noreturn]] static void report_deadlock() {
    std::map<std::pair<int, std::string>, int> waits;
    for (const Thread& thread : cluster.threads)
        if (thread.state != State::absent) waits[{thread.block, describe_wait(thread)}]++;
    std::string message = std::string("deadlock in ") + cluster.launch->kernel->name + ", " + describe_block(0) +
                          (cluster.block_count > 1 ? " and its cluster" : "") + ": no thread can run";
    for (const auto& [wait, count] : waits) {
        message += "\n    " + std::to_string(count) + " threads ";
        if (cluster.block_count > 1) message += "of " + describe_block(wait.first) + " ";
        message += wait.second;
    }
    add_message(message);
    abandon_cluster();
}

constexpr int largest_priority = 1023;

static int priority_of(int warp) {
    return cluster.warps[warp].priority + cluster.blocks[warp / cluster.warps_of_block].priority;
}

static int pick_warp() {
    if (!cluster.random) return __builtin_ctzll(cluster.runnable_warps);
    const bool follow_priority = cluster.by_priority && (random_number() & 31);
    if (!follow_priority) {
        const int warp = random_warp(cluster.runnable_warps);
        if (cluster.by_priority) cluster.warps[warp].priority = random_number() & largest_priority;
        return warp;
    }
    int best = -1;
    for (uint64_t mask = cluster.runnable_warps; mask; mask &= mask - 1) {
        const int warp = __builtin_ctzll(mask);
        if (best < 0 || priority_of(warp) > priority_of(best)) best = warp;
    }
    return best;
}

// Loads in flight land at random, or, in half of the schedules, only when no thread can go on without them.
static void land_loads() {
    constexpr int odds = 16;
    if (cluster.random && !cluster.copies_land_late && any_load_in_flight() && random_number() % odds == 0) land_a_load();
    while (!cluster.runnable_warps && land_a_load()) {}
}

static Thread* pick_thread() {
    land_loads();
    const bool preempt = cluster.random && !cluster.by_priority && (random_number() & 63) == 0;
    if (!cluster.warps[cluster.current_warp].runnable || preempt) {
        if (!cluster.runnable_warps) report_deadlock();
        cluster.current_warp = pick_warp();
    }
    const unsigned lanes = cluster.warps[cluster.current_warp].runnable;
    const int lane = cluster.random ? random_bit(lanes) : __builtin_ctz(lanes);
    return cluster.warp_begin(cluster.current_warp) + lane;
}

static void switch_away(Thread* thread) {
    Thread* next = pick_thread();
    if (next == thread) return;
    cluster.switches++;
    current = next;
    emulator_switch_stack(&thread->stack_pointer, next->stack_pointer);
}

void make_runnable(Thread* thread) {
    thread->state = State::runnable;
    cluster.warps[thread->warp].runnable |= 1u << thread->lane;
    cluster.runnable_warps |= uint64_t{1} << thread->warp;
}

static void leave_runnable(Thread* thread, State state) {
    thread->state = state;
    Warp& warp = cluster.warps[thread->warp];
    warp.runnable &= ~(1u << thread->lane);
    if (!warp.runnable) cluster.runnable_warps &= ~(uint64_t{1} << thread->warp);
}

void wait_in(Thread* thread, State state) {
    leave_runnable(thread, state);
    switch_away(thread);
}

void maybe_yield(int odds) {
    if (!cluster.random || random_number() % odds) return;
    Thread* thread = self();
    const uint64_t others = cluster.runnable_warps & ~(uint64_t{1} << thread->warp);
    if (!others) return;
    cluster.current_warp = random_warp(others);
    switch_away(thread);
}

// ---- barriers

// Counts the calling thread in; true when it was the last and the others have been woken.
static bool arrive(int id, int thread_count, bool waits, Location where) {
    Thread* thread = self();
    if (id < 0 || id >= barrier_count) fail("barrier id %d at %s", id, describe_location(where).c_str());
    if (thread_count % 32)
        fail("barrier of %d threads, not a multiple of 32, at %s", thread_count, describe_location(where).c_str());
    const int expected = thread_count ? thread_count : cluster.threads_of_block;
    Barrier& barrier = own_block().barriers[id];
    if (barrier.arrived && barrier.expected != expected)
        fail("barrier %d used with %d and %d threads at %s", id, barrier.expected, expected,
             describe_location(where).c_str());
    barrier.expected = expected;
    barrier.arrived++;
    thread->where = where;
    thread->barrier_id = id;
    if constexpr (checked) checker::release(thread, barrier.clock);
    if (barrier.arrived < expected) return false;
    for (Thread* other : barrier.waiting) {
        make_runnable(other);
        if constexpr (checked) checker::acquire(other, barrier.clock);
    }
    if constexpr (checked)
        if (waits) checker::acquire(thread, barrier.clock);
    barrier.waiting.clear();
    barrier.clock.clear();
    barrier.arrived = 0;
    return true;
}

void barrier_sync(int id, int thread_count, Location where) {
    if (arrive(id, thread_count, true, where)) return maybe_yield(2);
    own_block().barriers[id].waiting.push_back(self());
    wait_in(self(), State::at_barrier);
}

void barrier_arrive(int id, int thread_count, Location where) {
    arrive(id, thread_count, false, where);
}

// ---- the cluster's barrier

static void complete_cluster_barrier_if_done() {
    ClusterBarrier& barrier = cluster.barrier;
    if (barrier.arrived == 0 || barrier.arrived < cluster.alive) return;
    barrier.phase++;
    barrier.arrived = 0;
    barrier.completed_clock = std::move(barrier.arriving_clock);
    barrier.arriving_clock.clear();
    for (Thread* waiter : barrier.waiting) {
        make_runnable(waiter);
        if constexpr (checked) checker::acquire(waiter, barrier.completed_clock);
    }
    barrier.waiting.clear();
}

void cluster_barrier_arrive(Location where) {
    Thread* thread = self();
    if (thread->is_at_cluster_barrier)
        fail("a second arrival at the cluster's barrier without a wait between at %s", describe_location(where).c_str());
    thread->is_at_cluster_barrier = true;
    thread->cluster_barrier_phase = cluster.barrier.phase;
    cluster.barrier.arrived++;
    if constexpr (checked) checker::release(thread, cluster.barrier.arriving_clock);
    complete_cluster_barrier_if_done();
    maybe_yield(4);
}

void cluster_barrier_wait(Location where) {
    Thread* thread = self();
    if (!thread->is_at_cluster_barrier)
        fail("a wait at the cluster's barrier without an arrival at %s", describe_location(where).c_str());
    thread->is_at_cluster_barrier = false;
    if (thread->cluster_barrier_phase != cluster.barrier.phase) {
        if constexpr (checked) checker::acquire(thread, cluster.barrier.completed_clock);
        return maybe_yield(4);
    }
    thread->where = where;
    cluster.barrier.waiting.push_back(thread);
    wait_in(thread, State::at_cluster_barrier);
}

// The barrier is of those that have not exited.
static void leave_cluster_barrier(const Thread& thread) {
    if (thread.is_at_cluster_barrier && thread.cluster_barrier_phase == cluster.barrier.phase) cluster.barrier.arrived--;
    cluster.alive--;
    complete_cluster_barrier_if_done();
}

unsigned cluster_block() { return static_cast<unsigned>(current->block); }
unsigned cluster_block_count() { return static_cast<unsigned>(cluster.block_count); }

// ---- warp collectives

void collective(Collective kind, unsigned mask, void* arguments, Operation operation, Location where) {
    Thread* thread = self();
    Warp& warp = cluster.warps[thread->warp];
    Thread* lanes = cluster.warp_begin(thread->warp);
    thread->kind = kind;
    thread->mask = mask;
    thread->arguments = arguments;
    thread->where = where;
    if (!(mask >> thread->lane & 1))
        fail("a warp collective's mask %08x excludes the calling lane at %s", mask, describe_location(where).c_str());
    const bool whole_warp = kind >= Collective::reduce;  // what the hardware calls .aligned
    if (whole_warp && warp.present != ~0u)
        fail("a whole-warp instruction in a warp of %d threads at %s", __builtin_popcount(warp.present),
             describe_location(where).c_str());
    const unsigned wanted = mask & warp.present;
    if (wanted & warp.exited)
        fail("a warp collective's mask %08x names lanes that have exited (%08x) at %s", mask, wanted & warp.exited,
             describe_location(where).c_str());
    warp.arrived |= 1u << thread->lane;
    const unsigned here = warp.arrived & wanted;
    if (const unsigned others = here & ~(1u << thread->lane)) {
        const Thread& other = lanes[__builtin_ctz(others)];
        const bool same_line = other.where.line == where.line;
        if (other.kind != kind || other.mask != mask || (whole_warp && !same_line)) {
            thread->state = State::in_collective;
            fail("divergent warp collective: lane %d is %s, lane %d is %s", thread->lane,
                 describe_wait(*thread).c_str(), other.lane, describe_wait(other).c_str());
        }
    }
    if (here != wanted) return wait_in(thread, State::in_collective);

    void* lane_arguments[32];
    for (int lane = 0; lane < 32; lane++) lane_arguments[lane] = wanted >> lane & 1 ? lanes[lane].arguments : nullptr;
    if (operation) operation(lane_arguments, wanted);
    warp.arrived &= ~wanted;
    for (unsigned rest = wanted; rest; rest &= rest - 1) make_runnable(&lanes[__builtin_ctz(rest)]);
    // Only __syncwarp orders memory; a shuffle does not.
    if constexpr (checked)
        if (kind == Collective::syncwarp) checker::synchronise(lanes, wanted);
    maybe_yield(64);
}

// ---- a cluster's life

constexpr size_t stack_bytes = 128 << 10, guarded_bytes = 1 << 20;
static char* stacks = nullptr;
static int stack_count = 0;

// The first page of each stack is a guard: an overflow faults instead of writing over the next one. Below them all is more of
// it, for large variables of the first thread.
static void make_stacks(int count) {
    if (count <= stack_count) return;
    if (stacks) munmap(stacks - guarded_bytes, guarded_bytes + stack_count * stack_bytes);
    char* mapping = static_cast<char*>(mmap(nullptr, guarded_bytes + count * stack_bytes, PROT_READ | PROT_WRITE,
                                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    mprotect(mapping, guarded_bytes, PROT_NONE);
    stacks = mapping + guarded_bytes;
    for (int i = 0; i < count; i++) mprotect(stacks + i * stack_bytes, 4096, PROT_NONE);
    stack_count = count;
}

bool is_stack(uintptr_t address) {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(stacks) - guarded_bytes;
    return stacks && address - begin < guarded_bytes + stack_count * stack_bytes;
}

static void thread_main() {
    cluster.launch->kernel->call(cluster.launch->arguments);
    Thread* thread = self();
    check_copies_at_exit(*thread);
    check_transfers_at_exit(*thread);
    leave_runnable(thread, State::exited);
    cluster.warps[thread->warp].exited |= 1u << thread->lane;
    leave_cluster_barrier(*thread);
    if (--own_block().alive == 0) {
        check_transfers_at_end(thread->block);
        check_wgmma_at_end(thread->block);
        if constexpr (checked) checker::end_block(thread->block);
    }
    void* nobody;
    if (cluster.alive == 0) emulator_switch_stack(&nobody, cluster.main_stack_pointer);
    Thread* next = pick_thread();
    current = next;
    emulator_switch_stack(&nobody, next->stack_pointer);
}

// A stack on which emulator_switch_stack "returns" into thread_main. Tops are staggered: 128 KiB apart they would all
// share one cache set.
static void* prepare_stack(int thread) {
    char* top = stacks + (thread + 1) * stack_bytes - (thread * 7 % 61) * 64;
    void** stack = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(top) & ~uintptr_t{63});
    *--stack = nullptr;  // where a caller's return address would stand
    *--stack = reinterpret_cast<void*>(thread_main);
    for (int saved_register = 0; saved_register < 6; saved_register++) *--stack = nullptr;
    return stack;
}

static void prepare_warps() {
    cluster.runnable_warps = 0;
    for (int i = 0; i < cluster.block_count * cluster.warps_of_block; i++) {
        const int lanes = std::clamp(cluster.threads_of_block - i % cluster.warps_of_block * 32, 0, 32);
        const unsigned present = lanes == 32 ? ~0u : (1u << lanes) - 1;
        cluster.warps[i] = {0, present, 0, 0, static_cast<int>(random_number() & largest_priority)};
    }
    cluster.current_warp = 0;
}

// Its threads and barriers, as a launch leaves them.
static void prepare_block(int index, uint64_t linear_index) {
    const Launch& launch = *cluster.launch;
    Block& block = cluster.blocks[index];
    block.linear_index = static_cast<uint32_t>(linear_index);
    block.alive = cluster.threads_of_block;
    block.priority = cluster.block_count > 1 && (random_number() & 1) ? largest_priority + 1 : 0;
    for (Barrier& barrier : block.barriers) {
        barrier.arrived = 0;
        barrier.waiting.clear();
        barrier.clock.clear();
    }
    begin_shared_memory(index);
    const unsigned bx = launch.block.x, by = launch.block.y, gx = launch.grid.x, gy = launch.grid.y;
    const uint3 block_index{unsigned(linear_index % gx), unsigned(linear_index / gx % gy),
                            unsigned(linear_index / (uint64_t{gx} * gy))};
    for (unsigned i = 0; i < unsigned(cluster.threads_of_block); i++) {
        const int place = index * cluster.warps_of_block * 32 + static_cast<int>(i);
        Thread& thread = cluster.threads[place];
        static_cast<Indices&>(thread) = {{i % bx, i / bx % by, i / (bx * by)}, block_index, launch.block, launch.grid, index,
                                         static_cast<int>(i % 32), place / 32, place};
        thread.where = {"", 0};
        thread.is_at_cluster_barrier = false;
        thread.async_copies.clear();
        thread.turns.clear();
        if constexpr (checked) thread.clock = checker::thread_clock(place);
        thread.stack_pointer = prepare_stack(place);
        make_runnable(&thread);
    }
}

int warps_of_block(const Launch& launch) {
    const int threads = static_cast<int>(launch.block.x * launch.block.y * launch.block.z);
    return (threads + 127) / 128 * 4;
}

void run_cluster(const Launch& launch, uint64_t first_block) {
    cluster.launch = &launch;
    cluster.block_count = static_cast<int>(launch.cluster_blocks);
    cluster.threads_of_block = static_cast<int>(launch.block.x * launch.block.y * launch.block.z);
    cluster.warps_of_block = warps_of_block(launch);
    cluster.alive = cluster.block_count * cluster.threads_of_block;
    cluster.threads.resize(size_t(cluster.block_count) * cluster.warps_of_block * 32);
    make_stacks(static_cast<int>(cluster.threads.size()));
    cluster.random_state = (launch.seed * 0x9E3779B97F4A7C15ull ^ first_block * 0xD1B54A32D192ED03ull ^
                            uint64_t{launch.id} << 40) | 1;
    for (int warm_up = 0; warm_up < 4; warm_up++) random_number();
    cluster.random = launch.seed != 0;
    cluster.by_priority = cluster.random && (random_number() & 1);
    cluster.copies_land_late = !cluster.random || (random_number() & 1);
    cluster.barrier = {};
    for (Thread& thread : cluster.threads) thread.state = State::absent;
    begin_asynchronous_work();
    begin_wgmma();
    prepare_warps();
    if constexpr (checked) checker::begin_cluster();
    for (int block = 0; block < cluster.block_count; block++) prepare_block(block, first_block + block);
    if (cluster.random) cluster.current_warp = random_warp(cluster.runnable_warps);
    cluster.running = true;
    Thread* first = pick_thread();
    current = first;
    emulator_switch_stack(&cluster.main_stack_pointer, first->stack_pointer);
    cluster.running = false;
    current = nullptr;
}

}  // namespace emulator
