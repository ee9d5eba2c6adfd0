// Device memory: every allocation ends at a guard page, starts as 0xFF (NaN in f16, bf16 and f32) and its addresses are
// never used again, so that reading too far, reading what nobody wrote and reading what was freed all show.
// Shared memory: one arena a block of the cluster, static variables from the bottom, dynamic ones ending at a guard page.
#include <sys/mman.h>

#include <algorithm>

#include "block.h"
#include "checker.h"

namespace emulator {

uintptr_t global_range = 0;
unsigned char* shared_arena = nullptr;

constexpr size_t page_bytes = 4096, address_alignment = 16;
static std::vector<Allocation> allocations;  // ascending addresses
static uintptr_t next_mapping;

static size_t round_up(size_t value, size_t unit) { return (value + unit - 1) / unit * unit; }

void reserve_memory() {
    if (shared_arena) return;
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    global_range = reinterpret_cast<uintptr_t>(mmap(nullptr, global_range_bytes, PROT_NONE, flags, -1, 0));
    next_mapping = global_range + page_bytes;
    shared_arena = static_cast<unsigned char*>(
        mmap(nullptr, max_cluster_blocks * shared_arena_bytes, PROT_READ | PROT_WRITE, flags, -1, 0));
    for (int block = 0; block < max_cluster_blocks; block++) {
        unsigned char* arena = shared_arena + block * shared_arena_bytes;
        mprotect(arena, static_shared_begin, PROT_NONE);
        mprotect(arena + shared_end, shared_arena_bytes - shared_end, PROT_NONE);
    }
    if constexpr (checked) checker::reserve_shadow();
}

const Allocation* find_allocation(uintptr_t address) {
    const auto after = std::upper_bound(allocations.begin(), allocations.end(), address,
                                        [](uintptr_t a, const Allocation& b) { return a < b.mapping; });
    return after == allocations.begin() ? nullptr : &after[-1];
}

void* allocate(size_t bytes) {
    const size_t padded = round_up(std::max<size_t>(bytes, 1), address_alignment);
    const size_t mapping_bytes = round_up(padded, page_bytes);
    if (next_mapping + mapping_bytes + page_bytes > global_range + global_range_bytes) return nullptr;
    const uintptr_t mapping = next_mapping;
    if (mprotect(reinterpret_cast<void*>(mapping), mapping_bytes, PROT_READ | PROT_WRITE)) return nullptr;
    memset(reinterpret_cast<void*>(mapping), 0xFF, mapping_bytes);
    next_mapping += mapping_bytes + page_bytes;
    allocations.push_back({mapping + mapping_bytes - padded, bytes, mapping, mapping_bytes, false});
    return reinterpret_cast<void*>(allocations.back().address);
}

bool release(void* address) {
    const Allocation* found = find_allocation(reinterpret_cast<uintptr_t>(address));
    if (!found || found->address != reinterpret_cast<uintptr_t>(address) || found->freed) return false;
    Allocation& allocation = allocations[found - allocations.data()];
    allocation.freed = true;
    void* mapping = reinterpret_cast<void*>(allocation.mapping);
    mprotect(mapping, allocation.mapping_bytes, PROT_NONE);
    madvise(mapping, allocation.mapping_bytes, MADV_DONTNEED);
    if constexpr (checked) checker::forget(allocation.mapping, allocation.mapping_bytes);
    return true;
}

bool is_inside_allocation(const void* pointer, size_t bytes) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
    const Allocation* found = find_allocation(address);
    return found && !found->freed && address >= found->address && address + bytes <= found->address + found->bytes;
}

// ---- shared memory

static uint32_t dynamic_begin(uint32_t alignment) {
    return static_cast<uint32_t>((shared_end - cluster.launch->dynamic_shared_bytes) & ~size_t{alignment - 1});
}

void begin_shared_memory(int index) {
    Block& block = cluster.blocks[index];
    block.shared_variables.clear();
    block.static_shared_top = static_shared_begin;
    block.dynamic_shared_offset = 0;
    constexpr uint32_t largest_alignment = 1024;
    if (cluster.launch->dynamic_shared_bytes)
        memset(shared_arena + index * shared_arena_bytes + dynamic_begin(largest_alignment), 0xFF,
               shared_end - dynamic_begin(largest_alignment));
}

uint32_t shared_offset(const void* pointer) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
    if (!is_shared(address)) fail("address %p is not in shared memory", pointer);
    return static_cast<uint32_t>(address - reinterpret_cast<uintptr_t>(shared_arena));
}

uint32_t own_shared_offset(const void* address, Location where) {
    const uint32_t offset = shared_offset(address);
    if (shared_owner(offset) != current->block)
        fail("shared memory of another block of the cluster at %s", describe_location(where).c_str());
    return offset;
}

uint32_t shared_offset_in(unsigned block, uint32_t offset, Location where) {
    if (block >= unsigned(cluster.block_count))
        fail("block %u of a cluster of %d at %s", block, cluster.block_count, describe_location(where).c_str());
    return static_cast<uint32_t>(block * shared_arena_bytes + shared_place(offset));
}

unsigned char* dynamic_shared(size_t alignment) {
    if (!cluster.launch->dynamic_shared_bytes) fail("the kernel uses dynamic shared memory and was launched with none");
    own_block().dynamic_shared_offset = dynamic_begin(static_cast<uint32_t>(alignment));
    return own_shared() + own_block().dynamic_shared_offset;
}

void* static_shared(const void* key, size_t bytes, size_t alignment) {
    Block& block = own_block();
    for (const SharedVariable& variable : block.shared_variables)
        if (variable.key == key) return own_shared() + variable.offset;
    const uint32_t offset = round_up(block.static_shared_top, alignment);
    constexpr uint32_t gap = 16;  // so that one past the end is no other variable
    block.static_shared_top = offset + bytes + gap;
    if (block.static_shared_top - static_shared_begin + cluster.launch->dynamic_shared_bytes > max_shared_bytes)
        fail("static and dynamic shared memory exceed %u bytes", max_shared_bytes);
    block.shared_variables.push_back({key, offset, static_cast<uint32_t>(bytes)});
    memset(own_shared() + offset, 0xFF, bytes);
    return own_shared() + offset;
}

// ---- atomics: one OS thread runs the cluster, so a plain read-modify-write is atomic; the yield mixes their order.

template <class T, class Combine>
static T atomic(T* address, Location where, Combine combine) {
    if constexpr (checked) checker::atomic_access(address, sizeof(T), where);
    const T before = *address;
    *address = combine(before);
    maybe_yield(8);
    return before;
}

float atomic_add(float* address, float value, Location where) {
    return atomic(address, where, [=](float before) { return before + value; });
}
unsigned atomic_add(unsigned* address, unsigned value, Location where) {
    return atomic(address, where, [=](unsigned before) { return before + value; });
}
unsigned atomic_max(unsigned* address, unsigned value, Location where) {
    return atomic(address, where, [=](unsigned before) { return std::max(before, value); });
}
unsigned atomic_or(unsigned* address, unsigned value, Location where) {
    return atomic(address, where, [=](unsigned before) { return before | value; });
}

}  // namespace emulator
