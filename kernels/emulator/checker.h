// The checker build's view of memory. Kernels are compiled by g++ with -fsanitize=thread, which calls __tsan_read/write
// at every access; checker.cpp defines those calls itself (the sanitizer's runtime is not linked).
#pragma once
#include <string>
#include <vector>

#include "block.h"

namespace emulator::checker {

using Clock = std::vector<uint32_t>;

// ---- happens-before: thread i's clock counts its own releases at [i] and what it has seen of the others elsewhere.
uint32_t* thread_clock(int thread);
void release(Thread* thread, Clock& into);
void acquire(Thread* thread, const Clock& from);
// For the copies that the thread starts alone.
void acquire_turn(Thread* thread, const Clock& from);
void synchronise(Thread* lanes, unsigned mask);

// ---- life
void reserve_shadow();
void begin_cluster();
// Its last thread has exited: what another block, or a copy, does to it must be known to be over.
void end_block(int block);
void forget(uintptr_t mapping, size_t bytes);
void initialised_by_host(const void* address, size_t bytes);

// ---- accesses by primitives (plain loads and stores come in through __tsan_*)
void shared_read(const Thread& reader, const void* address, size_t bytes, Location where);
void async_copy_issued(const void* shared, const void* global, int bytes, Location where);
void async_copy_landed(const void* shared, size_t bytes, Location where);
// An arrival at an mbarrier of another block.
void touches_other_block(const Thread& thread, int block, Location where);
void atomic_access(const void* address, size_t bytes, Location where);
void plain_write(const void* shared, size_t bytes, Location where);

// ---- the asynchronous proxy: TMA and wgmma. What the TMA does to a block's shared memory has a clock entry behind the threads'.
void fence_async_proxy(Thread* thread);
void release_copies(int block, Clock& into);
void async_write_issued(const void* shared, size_t bytes, Location where);
void async_write_landed(const void* shared, size_t bytes, Location where);
// A read by wgmma, on behalf of `reader`.
void async_read(const Thread& reader, const void* shared, size_t bytes, Location where);
// A read by a TMA store, from its issue by the running thread until the thread has waited for the mark that is returned.
uint32_t async_read_begins(const void* shared, size_t bytes, Location where);
void async_read_ended(Thread* thread, uint32_t mark);
void copy_reads_global(int thread, const void* global, size_t bytes, Location where);
void copy_writes_global(int thread, const void* global, size_t bytes, Location where);

// "file:line" of an address in the kernels' code, by addr2line: slow, for messages only. In both builds.
std::string describe_code(uintptr_t program_counter);

}  // namespace emulator::checker
