// Threads are fibers of one OS thread. A seeded schedule picks the next: a random lane of the current warp until the
// whole warp waits, then another warp; now and then a warp is preempted although it could go on. Half of the seeds pick
// warps by random priority instead, which starves some and lets others run far ahead.
#include <sys/mman.h>

#include <algorithm>
#include <map>

#include "block.h"
#include "checker.h"

namespace emulator {

Indices* current = nullptr;
Block block;

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
    uint64_t x = block.random_state;
    x ^= x << 13;
    x ^= x >> 7;
    x ^= x << 17;
    return block.random_state = x;
}

// A random set bit of a non-zero mask.
static int random_bit(unsigned mask) {
    const unsigned turn = random_number() & 31;
    const unsigned turned = mask >> turn | (turn ? mask << (32 - turn) : 0);
    return (__builtin_ctz(turned) + turn) & 31;
}

void abandon_block() {
    void* nobody;
    emulator_switch_stack(&nobody, block.main_stack_pointer);
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
            const Barrier& barrier = block.barriers[thread.barrier_id];
            snprintf(text, sizeof text, "at barrier %d (%d of %d arrived)", thread.barrier_id, barrier.arrived,
                     barrier.expected);
            break;
        }
        case State::at_mbarrier:
            return "waiting for parity " + std::to_string(thread.mbarrier_parity) + " of " +
                   describe_memory_barrier(thread.mbarrier_offset) + " at " + describe_location(thread.where);
        case State::exited: return "exited";
        case State::runnable: return "runnable";
    }
    return std::string(text) + " at " + describe_location(thread.where);
}

[[noreturn]] static void report_deadlock() {
    std::map<std::string, int> waits;
    for (const Thread& thread : block.threads) waits[describe_wait(thread)]++;
    std::string message = std::string("deadlock in ") + block.launch->kernel->name + ": no thread can run";
    for (const auto& [wait, count] : waits) message += "\n    " + std::to_string(count) + " threads " + wait;
    add_message(message);
    abandon_block();
}

static int pick_warp() {
    if (!block.random) return __builtin_ctz(block.runnable_warps);
    const bool follow_priority = block.by_priority && (random_number() & 31);
    if (!follow_priority) {
        const int warp = random_bit(block.runnable_warps);
        if (block.by_priority) block.warps[warp].priority = random_number() & 1023;
        return warp;
    }
    int best = -1;
    for (unsigned mask = block.runnable_warps; mask; mask &= mask - 1) {
        const int warp = __builtin_ctz(mask);
        if (best < 0 || block.warps[warp].priority > block.warps[best].priority) best = warp;
    }
    return best;
}

// Loads in flight land at random, or, in half of the schedules, only when no thread can go on without them.
static void land_loads() {
    constexpr int odds = 16;
    if (block.random && !block.copies_land_late && any_load_in_flight() && random_number() % odds == 0) land_a_load();
    while (!block.runnable_warps && land_a_load()) {}
}

static Thread* pick_thread() {
    land_loads();
    const bool preempt = block.random && !block.by_priority && (random_number() & 63) == 0;
    if (!block.warps[block.current_warp].runnable || preempt) {
        if (!block.runnable_warps) report_deadlock();
        block.current_warp = pick_warp();
    }
    const unsigned lanes = block.warps[block.current_warp].runnable;
    const int lane = block.random ? random_bit(lanes) : __builtin_ctz(lanes);
    return &block.threads[block.current_warp * 32 + lane];
}

static void switch_away(Thread* thread) {
    Thread* next = pick_thread();
    if (next == thread) return;
    block.switches++;
    current = next;
    emulator_switch_stack(&thread->stack_pointer, next->stack_pointer);
}

void make_runnable(Thread* thread) {
    thread->state = State::runnable;
    block.warps[thread->warp].runnable |= 1u << thread->lane;
    block.runnable_warps |= 1u << thread->warp;
}

static void leave_runnable(Thread* thread, State state) {
    thread->state = state;
    Warp& warp = block.warps[thread->warp];
    warp.runnable &= ~(1u << thread->lane);
    if (!warp.runnable) block.runnable_warps &= ~(1u << thread->warp);
}

void wait_in(Thread* thread, State state) {
    leave_runnable(thread, state);
    switch_away(thread);
}

void maybe_yield(int odds) {
    if (!block.random || random_number() % odds) return;
    Thread* thread = self();
    const unsigned others = block.runnable_warps & ~(1u << thread->warp);
    if (!others) return;
    block.current_warp = random_bit(others);
    switch_away(thread);
}

// ---- barriers

// Counts the calling thread in; true when it was the last and the others have been woken.
static bool arrive(int id, int thread_count, bool waits, Location where) {
    Thread* thread = self();
    if (id < 0 || id >= barrier_count) fail("barrier id %d at %s", id, describe_location(where).c_str());
    if (thread_count % 32)
        fail("barrier of %d threads, not a multiple of 32, at %s", thread_count, describe_location(where).c_str());
    const int expected = thread_count ? thread_count : block.thread_count;
    Barrier& barrier = block.barriers[id];
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
    block.barriers[id].waiting.push_back(self());
    wait_in(self(), State::at_barrier);
}

void barrier_arrive(int id, int thread_count, Location where) {
    arrive(id, thread_count, false, where);
}

// ---- warp collectives

void collective(Collective kind, unsigned mask, void* arguments, Operation operation, Location where) {
    Thread* thread = self();
    Warp& warp = block.warps[thread->warp];
    Thread* lanes = &block.threads[thread->warp * 32];
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

// ---- a block's life

constexpr size_t stack_bytes = 128 << 10;
static char* stacks = nullptr;
static int stack_count = 0;

// The first page of each stack is a guard: an overflow faults instead of writing over the next one.
static void make_stacks(int count) {
    if (count <= stack_count) return;
    if (stacks) munmap(stacks, stack_count * stack_bytes);
    stacks = static_cast<char*>(mmap(nullptr, count * stack_bytes, PROT_READ | PROT_WRITE,
                                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    for (int i = 0; i < count; i++) mprotect(stacks + i * stack_bytes, 4096, PROT_NONE);
    stack_count = count;
}

bool is_stack(uintptr_t address) {
    return stacks && address - reinterpret_cast<uintptr_t>(stacks) < stack_count * stack_bytes;
}

static void thread_main() {
    block.launch->kernel->call(block.launch->arguments);
    Thread* thread = self();
    check_copies_at_exit(*thread);
    check_transfers_at_exit(*thread);
    leave_runnable(thread, State::exited);
    block.warps[thread->warp].exited |= 1u << thread->lane;
    void* nobody;
    if (--block.alive == 0) {
        check_transfers_at_end();
        check_wgmma_at_end();
        emulator_switch_stack(&nobody, block.main_stack_pointer);
    }
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
    const int warp_count = (block.thread_count + 31) / 32;
    for (int i = 0; i < warp_count; i++) {
        const int lanes = std::min(32, block.thread_count - i * 32);
        const unsigned present = lanes == 32 ? ~0u : (1u << lanes) - 1;
        block.warps[i] = {0, present, 0, 0, static_cast<int>(random_number() & 1023)};
    }
    block.runnable_warps = 0;
    block.current_warp = block.random ? random_number() % warp_count : 0;
}

void run_block(const Launch& launch, uint64_t linear_index) {
    block.launch = &launch;
    block.linear_index = static_cast<uint32_t>(linear_index);
    block.thread_count = block.alive = static_cast<int>(launch.block.x * launch.block.y * launch.block.z);
    block.threads.resize(block.thread_count);
    make_stacks(block.thread_count);
    block.random_state = (launch.seed * 0x9E3779B97F4A7C15ull ^ linear_index * 0xD1B54A32D192ED03ull ^
                          uint64_t{launch.id} << 40) | 1;
    for (int warm_up = 0; warm_up < 4; warm_up++) random_number();
    block.random = launch.seed != 0;
    block.by_priority = block.random && (random_number() & 1);
    block.copies_land_late = !block.random || (random_number() & 1);
    begin_asynchronous_work();
    begin_wgmma();
    prepare_warps();
    for (Barrier& barrier : block.barriers) {
        barrier.arrived = 0;
        barrier.waiting.clear();
        barrier.clock.clear();
    }
    begin_shared_memory(launch.dynamic_shared_bytes);
    if constexpr (checked) checker::begin_block();
    const unsigned bx = launch.block.x, by = launch.block.y, gx = launch.grid.x, gy = launch.grid.y;
    const uint3 block_index{unsigned(linear_index % gx), unsigned(linear_index / gx % gy),
                            unsigned(linear_index / (uint64_t{gx} * gy))};
    for (int i = 0; i < block.thread_count; i++) {
        Thread& thread = block.threads[i];
        static_cast<Indices&>(thread) = {{i % bx, i / bx % by, i / (bx * by)}, block_index, launch.block, launch.grid,
                                         i % 32, i / 32, i};
        thread.where = {"", 0};
        thread.async_copies.clear();
        if constexpr (checked) thread.clock = checker::thread_clock(i);
        thread.stack_pointer = prepare_stack(i);
        make_runnable(&thread);
    }
    block.running = true;
    Thread* first = pick_thread();
    current = first;
    emulator_switch_stack(&block.main_stack_pointer, first->stack_pointer);
    block.running = false;
    current = nullptr;
}

}  // namespace emulator
