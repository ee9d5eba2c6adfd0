// The running cluster: its blocks, their threads, warps and barriers, and what the runtime's files ask of each other. A launch
// without clusters runs as clusters of one block.
#pragma once
#include <string>
#include <vector>

#include "runtime.h"

#ifndef EMULATOR_CHECKED
#define EMULATOR_CHECKED 0
#endif

namespace emulator {

// True in the checker build: shadow memory and vector clocks (checker.cpp) watch every access of the kernel.
constexpr bool checked = EMULATOR_CHECKED;

enum class State : uint8_t { absent, runnable, in_collective, at_barrier, at_cluster_barrier, at_mbarrier, exited };

// cp.async of one thread: copies in order of issue, cut into groups by commit.
struct AsyncCopies {
    struct Copy {
        unsigned char* shared;
        const void* global;
        int bytes;
        Location where;
    };
    std::vector<Copy> copies;
    std::vector<size_t> group_ends;  // copies issued when each group was committed
    size_t groups_landed = 0, copies_landed = 0;
    void clear() {
        copies.clear();
        group_ends.clear();
        groups_landed = copies_landed = 0;
    }
};

struct Thread : Indices {
    void* stack_pointer;
    State state;
    Location where;
    // Arguments of the collective or barrier in which the thread waits.
    Collective kind;
    unsigned mask;
    void* arguments;
    int barrier_id;
    uint32_t mbarrier_offset;
    unsigned mbarrier_parity;
    bool is_at_cluster_barrier;      // has arrived there and not waited yet
    uint64_t cluster_barrier_phase;  // in which it arrived
    AsyncCopies async_copies;
    // Checker: the thread's vector clock, one entry a thread and one for each block's TMA; and what the copies that it starts
    // come after, beside that.
    uint32_t* clock;
    std::vector<uint32_t> turns;
};

struct Warp {
    unsigned runnable, present, exited, arrived;  // lane masks; `arrived` waits in a collective
    int priority;
};

struct Barrier {
    int expected, arrived;
    std::vector<Thread*> waiting;
    std::vector<uint32_t> clock;
};

// barrier.cluster: of all threads of the cluster that have not exited.
struct ClusterBarrier {
    int arrived;
    uint64_t phase;
    std::vector<Thread*> waiting;
    std::vector<uint32_t> arriving_clock, completed_clock;
};

// mbarrier.cpp: a barrier in shared memory.
struct MemoryBarrier {
    uint32_t offset;
    int expected, pending;  // arrivals of a phase, and those that are missing
    int64_t bytes;          // still to be copied in this phase; copies may land before they are expected
    uint64_t phase;
    int initialised_by;
    uint32_t initialised_at;  // checker: that thread's clock
    bool visible_to_copies;
    std::vector<Thread*> waiting;
    // What the block's own threads and copies did before they arrived, and what the other blocks' threads did.
    struct Clocks {
        std::vector<uint32_t> own, other;
    };
    Clocks arriving, completed;
};

struct Launch {
    const Kernel* kernel;
    void** arguments;
    dim3 grid, block;
    unsigned cluster_blocks;  // neighbours in x
    uint32_t dynamic_shared_bytes;
    uint32_t id;
    uint64_t seed;  // 0: threads run in order; else every choice is random
};

constexpr int max_threads = 1024, max_cluster_blocks = 8, barrier_count = 16;
constexpr int max_warps = 64;  // of a cluster

struct SharedVariable {
    const void* key;
    uint32_t offset, bytes;
};

// One block of the cluster.
struct Block {
    uint32_t linear_index;  // in the grid
    int alive;              // threads that have not exited
    int priority;
    Barrier barriers[barrier_count];
    // memory.cpp; offsets from the block's shared memory on.
    std::vector<SharedVariable> shared_variables;  // static ones seen in this block
    uint32_t static_shared_top;
    uint32_t dynamic_shared_offset;  // 0 until the kernel asked for it
};

struct Cluster {
    const Launch* launch;
    int block_count, threads_of_block;
    int warps_of_block;  // places for warps: whole warpgroups
    Block blocks[max_cluster_blocks];
    ClusterBarrier barrier;
    // Block after block; places behind a block's last thread are absent.
    std::vector<Thread> threads;
    Warp warps[max_warps];
    uint64_t runnable_warps;
    int current_warp;
    int alive;
    // Schedule.
    uint64_t random_state;
    bool random, by_priority, copies_land_late;
    uint64_t switches;  // since the process began; the watchdog's sign of progress
    bool running;
    void* main_stack_pointer;
    Thread* warp_begin(int warp) { return &threads[warp * 32]; }
    int block_of(int thread) const { return thread / (warps_of_block * 32); }
};
extern Cluster cluster;
inline Thread* self() { return static_cast<Thread*>(current); }
inline Block& own_block() { return cluster.blocks[current->block]; }

uint64_t random_number();
// Gives other warps a turn once in `odds` calls on average.
void maybe_yield(int odds);

// For the files that make threads wait: the scheduler's own steps.
void make_runnable(Thread* thread);
void wait_in(Thread* thread, State state);

// Of one block of the launch: see Cluster::warps_of_block.
int warps_of_block(const Launch& launch);
// Runs the blocks of a cluster of `launch`, from `first_block` on, until every thread exited or an error ended them.
void run_cluster(const Launch& launch, uint64_t first_block);
[[noreturn]] void abandon_cluster();

// ---- errors.cpp
// A finding after which the cluster can go on; the launch still fails.
void report(const char* format, ...) __attribute__((format(printf, 1, 2), cold));
void add_message(const std::string& message);
std::string describe_location(Location where);
std::string describe_block(int block);  // of the cluster
std::string describe_thread(int thread);  // of the cluster
void clear_messages();
const char* messages();
bool any_message();
void install_signal_handlers();
void start_watchdog();
void stop_watchdog();
bool is_stack(uintptr_t address);  // scheduler.cpp

// ---- memory.cpp: one reserved range of addresses for all device memory, one arena for each block's shared memory.
struct Allocation {
    uintptr_t address;
    size_t bytes;
    uintptr_t mapping;
    size_t mapping_bytes;
    bool freed;
};
constexpr size_t global_range_bytes = size_t{1} << 36;
constexpr size_t shared_arena_bytes = 256 << 10, shared_end = 252 << 10, static_shared_begin = 4096;
constexpr uint32_t max_shared_bytes = 227 << 10;
extern uintptr_t global_range;
extern unsigned char* shared_arena;  // the first block's
inline bool is_global(uintptr_t address) { return address - global_range < global_range_bytes; }
inline bool is_shared(uintptr_t address) {
    return address - reinterpret_cast<uintptr_t>(shared_arena) < max_cluster_blocks * shared_arena_bytes;
}
void reserve_memory();
const Allocation* find_allocation(uintptr_t address);  // the last one that starts at or below `address`
void* allocate(size_t bytes);
bool release(void* address);
bool is_inside_allocation(const void* address, size_t bytes);
void begin_shared_memory(int block);
// Of an offset from shared_arena on: whose shared memory that is, and where in it.
inline int shared_owner(size_t offset) { return static_cast<int>(offset / shared_arena_bytes); }
inline size_t shared_place(size_t offset) { return offset % shared_arena_bytes; }
inline unsigned char* own_shared() { return shared_arena + current->block * shared_arena_bytes; }
// Of an address in the running thread's own block; fails elsewhere.
uint32_t own_shared_offset(const void* address, Location where);
// The same place in another block of the cluster.
uint32_t shared_offset_in(unsigned block, uint32_t offset, Location where);

// ---- async_copy.cpp
void check_copies_at_exit(const Thread& thread);

// ---- mbarrier.cpp
extern std::vector<MemoryBarrier> memory_barriers;  // of this cluster
MemoryBarrier& find_memory_barrier(uint32_t offset, Location where);
void mbarrier_bytes_landed(uint32_t offset, unsigned bytes);
std::string describe_memory_barrier(uint32_t offset);

// ---- tma.cpp
bool encode_boxes(uint64_t* map, uint64_t address, uint64_t rows, uint64_t columns, uint64_t row_bytes, uint32_t box_rows);
void begin_asynchronous_work();
bool any_load_in_flight();
bool land_a_load();
void check_transfers_at_exit(const Thread& thread);
void check_transfers_at_end(int block);

// ---- wgmma.cpp
void begin_wgmma();
void check_wgmma_at_end(int block);

}  // namespace emulator
